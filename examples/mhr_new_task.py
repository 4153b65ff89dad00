"""Skills that tasks share, then a new task that starts from their average. Offline, on a small Llama."""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import thawline
from thawline import MHRConfig
from thawline.tuners.mhr import parameter_groups

STEPS = {"by one": 1, "by two": 2, "by three": 3, "by five": 5}  # a task counts so, modulo 32


def build_base() -> LlamaForCausalLM:
    """Stands for your pretrained model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.1, **sizes))


def rows_of(step: int, n: int) -> torch.Tensor:
    """Rows that count up by `step` from a random number: (n, 12)."""
    return (torch.randint(32, (n, 1)) + step * torch.arange(12)) % 32


def train(model: torch.nn.Module, tasks: dict[str, int], n_steps: int) -> float:
    """Eight rows of every task in a batch; the last loss."""
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, routing_lr=0.1))
    ids = [name for name in tasks for _ in range(8)]
    model.train()
    for _ in range(n_steps):
        rows = torch.cat([rows_of(step, 8) for step in tasks.values()])
        thawline.set_task_ids(model, ids)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


config = MHRConfig(task_names=list(STEPS), r=4, n_skills=4, n_heads=4, target_modules="all-linear")
model = get_peft_model(build_base(), config)
print(f"four tasks: loss {train(model, STEPS, 60):.2f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(f"{folder}/skills")
    model = PeftModel.from_pretrained(build_base(), f"{folder}/skills")
    thawline.start_adaptation(model, mode="full", tasks=["by four"])  # or "z": its routing alone, or "mu"
    model.print_trainable_parameters()
    print(f"a new task: loss {train(model, {'by four': 4}, 60):.2f}")
    thawline.to_lora(model, f"{folder}/lora", task="by four")
    lora = PeftModel.from_pretrained(build_base(), f"{folder}/lora").eval()
    rows = rows_of(4, 8)
    torch.testing.assert_close(lora(rows).logits, model.eval()(rows).logits, atol=1e-3, rtol=1e-3)

"""PaCA where LoRA stood: one line of a PEFT script changes. Offline, on a small random Llama."""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import thawline.tuners  # registers PaCA with PEFT; whoever loads the adapter needs this line too
from thawline import PacaConfig


def build_base() -> LlamaForCausalLM:
    """Stands for your pretrained model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
    # A wide start, so that the frozen random head can tell its 32 words apart.
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.1, **sizes))


def counting_rows(n: int) -> torch.Tensor:
    """Rows that count up from a random number, modulo 32: (n, 16)."""
    return (torch.randint(32, (n, 1)) + torch.arange(16)) % 32


# LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") before; twice the r costs the same parameters.
model = get_peft_model(build_base(), PacaConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(60):
    rows = counting_rows(32)
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 or step == 59:
        print(f"step {step:3}  loss {loss.item():.3f}")

model.eval()
held_out = counting_rows(64)
with torch.no_grad():
    logits = model(input_ids=held_out).logits
    with model.disable_adapter():  # the frozen base, bit for bit: the columns are taken out of its weights
        before = model(input_ids=held_out, labels=held_out).loss
    after = model(input_ids=held_out, labels=held_out).loss
print(f"held out: {before:.3f} frozen, {after:.3f} with PaCA")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(f"{folder}/paca")
    again = PeftModel.from_pretrained(build_base(), f"{folder}/paca").eval()
    assert torch.equal(again(held_out).logits, logits)  # the same bits

    thawline.to_lora(model, f"{folder}/lora")  # for servers and tools that only know LoRA
    as_lora = PeftModel.from_pretrained(build_base(), f"{folder}/lora").eval()
    torch.testing.assert_close(as_lora(held_out).logits, logits, atol=1e-4, rtol=1e-4)

merged = model.merge_and_unload()  # a plain LlamaForCausalLM
assert torch.equal(merged(held_out).logits, logits)
print("saved, loaded, exported as LoRA and merged: the same answers")

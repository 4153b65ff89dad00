"""PaCA in TRL's SFTTrainer: `peft_config=PacaConfig(...)`, nothing else. Offline, on a small random Llama."""

import tempfile

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from thawline import PacaConfig  # registers PaCA with PEFT; to load, `import thawline.tuners`


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["</s>", *letters])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")
    turn = "{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}"
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}{prompt}"
    return tokenizer


def build_base(n_tokens: int) -> LlamaForCausalLM:
    """Stands for your pretrained model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=n_tokens, eos_token_id=0, pad_token_id=0, **sizes))


def chat(animal: str) -> dict[str, list[dict[str, str]]]:
    """A conversation as TRL reads it: its loss is on the completion."""
    prompt, completion = f"a {animal}", f"two {animal}s"
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


tokenizer, gpu = build_tokenizer(), torch.cuda.is_available()
schedule = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 4}
with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        model=build_base(len(tokenizer)),
        args=SFTConfig(folder, use_cpu=not gpu, bf16=gpu, report_to="none", **schedule),
        train_dataset=Dataset.from_list([chat(name) for name in ("cat", "dog", "owl", "hen") * 16]),
        processing_class=tokenizer,
        peft_config=PacaConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(f"{folder}/adapter")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert float(losses[-1]) < float(losses[0])
    PeftModel.from_pretrained(build_base(len(tokenizer)), f"{folder}/adapter")
    print(f"loss {losses[0]} → {losses[-1]}, saved and loaded again")

"""PaCA in TRL's GRPOTrainer: rollouts at the speed of the merged model, without merging. Offline, CPU or GPU.

The trained columns are inside the weights, so that generation runs the plain layers, and the reference pass
(`disable_adapter`) sees the original weights bit for bit. An inference engine in another process gets the
columns alone, by `pack_columns` and `apply_columns`.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import thawline
from thawline import PacaConfig

WORDS = ["<pad>", "</s>", "<unk>", *"abcdefgh"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def build_base() -> LlamaForCausalLM:
    """Stands for your pretrained model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), eos_token_id=1, pad_token_id=0, **sizes))


def share_of_a(completions: list[str], **_: object) -> list[float]:
    """Reward: the share of the letter a."""
    return [text.split().count("a") / max(len(text.split()), 1) for text in completions]


gpu = torch.cuda.is_available()
schedule = {"max_steps": 10, "per_device_train_batch_size": 8, "num_generations": 8, "learning_rate": 2e-2}
with tempfile.TemporaryDirectory() as folder:
    trainer = GRPOTrainer(
        model=build_base(),
        reward_funcs=share_of_a,
        args=GRPOConfig(
            folder, max_completion_length=8, beta=0.01, use_cpu=not gpu, bf16=gpu, report_to="none",
            logging_steps=1, save_strategy="no", **schedule,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["b c", "d e"] * 32}),
        processing_class=build_tokenizer(),
        peft_config=PacaConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"reward {rewards[0]:.2f} → {rewards[-1]:.2f}")
    engine = build_base().to(trainer.model.device)
    thawline.apply_columns(engine, thawline.pack_columns(trainer.model))

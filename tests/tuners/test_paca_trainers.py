"""PaCA in the engines people use, untouched: transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from tests.support.models import VOCAB, tiny_llama
from tests.support.paca import same, tokens, weights, wrap
from thawline import PacaConfig
from thawline.tuners.paca import PacaLayer

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB - 3))]


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int):
        ids = tokens(i % 2)[0]
        return {"input_ids": ids, "labels": ids}


def arguments(folder, **changes) -> TrainingArguments:
    fields = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 0.02,
        "save_steps": 3, "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 5, "disable_tqdm":
        True,
    }  # fmt: skip
    return TrainingArguments(**(fields | changes))


def run(folder, resume: bool = False, **changes):
    base = tiny_llama()
    before = weights(base)
    model = wrap(base)
    trainer = Trainer(model=model, args=arguments(folder, **changes), train_dataset=Tokens())
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model, before


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_learns_with_its_default_fused_optimiser_and_saves_only_the_adapter(tmp_path):
    trainer, model, before = run(tmp_path, max_steps=12, save_steps=12)
    assert trainer.args.optim == "adamw_torch_fused"
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])
    folder = tmp_path / "checkpoint-12"
    assert (folder / "adapter_model.safetensors").stat().st_size < 60_000
    assert "import thawline.tuners" in (folder / "README.md").read_text()
    fresh = PeftModel.from_pretrained(tiny_llama(), folder)
    with torch.no_grad():
        assert torch.equal(fresh(tokens()).logits, model.eval()(tokens()).logits)
    assert same(weights(model.unload()), before)


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}],
    ids=["plain", "accumulating, checkpointed"],
)
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path, changes):
    through, model, _ = run(tmp_path / "through", **changes)
    run(tmp_path / "cut", save_steps=3, **changes)
    for leftover in (tmp_path / "cut").glob("checkpoint-6/**/*"):
        if leftover.is_file():
            leftover.unlink()
    (tmp_path / "cut" / "checkpoint-6").rmdir()
    resumed, again, _ = run(tmp_path / "cut", resume=True, **changes)
    assert losses(resumed)[-3:] == losses(through)[-3:]
    assert same(weights(model), weights(again))
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, again(tokens()).logits)


def test_trainer_evaluates_amid_training_on_the_columns_of_the_step(tmp_path):
    base = tiny_llama()
    model = wrap(base)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="no"),
        train_dataset=Tokens(),
        eval_dataset=Tokens(),
    )
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 3
    assert trainer.evaluate()["eval_loss"] == logged[-1]
    assert trainer.evaluate()["eval_loss"] == logged[-1]


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_trl_sft_trainer_takes_the_config_as_peft_config(tmp_path):
    pytest.importorskip("datasets")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [" ".join(f"w{(i * k) % 20}" for k in range(1, 6)) for i in range(8)]
    settings = {
        "output_dir": str(tmp_path), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.02,
        "report_to": [], "use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no",
        "max_length": 8, "disable_tqdm": True,
    }  # fmt: skip
    base = tiny_llama()
    before = weights(base)
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=PacaConfig(r=4, target_modules="all-linear"),
    )
    assert trainer.args.gradient_checkpointing  # TRL's default
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert any(isinstance(m, PacaLayer) for m in trainer.model.modules())
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = tiny_llama()
    fresh.load_state_dict(before)
    fresh = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(fresh(tokens()).logits, trainer.model.eval()(tokens()).logits)


def test_trl_with_added_chat_tokens_trains_them_besides(tmp_path):
    # SFTTrainer sets these two fields when it has added tokens; a config without them breaks there.
    config = PacaConfig(r=4, target_modules=["q_proj"])
    config.trainable_token_indices = {"embed_tokens": [27, 28]}
    config.modules_to_save = ["lm_head"]
    from peft import get_peft_model

    base = tiny_llama()
    before = copy.deepcopy(base.model.embed_tokens.weight)
    model = get_peft_model(base, config)
    ids = torch.tensor([[3, 27, 28, 4]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(fresh(ids).logits, model.eval()(ids).logits)
    moved = (fresh.base_model.model.model.embed_tokens(torch.arange(VOCAB)) != before).any(1)
    assert moved.nonzero().flatten().tolist() == [27, 28]

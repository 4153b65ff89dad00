"""Rollouts without merging: merging drifts nothing, and TRL's online trainers run on PaCA as they are."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from tests.support.models import tiny_llama
from tests.support.paca import Net, same, tokens, train, trainable, weights, wrap
from tests.tuners.test_paca_trainers import tokenizer
from thawline import PacaConfig
from thawline.measure import count_ops

N_MERGES = 1000


def test_a_thousand_merges_leave_a_bf16_base_as_it_was_and_loras_do_not():
    base = Net().bfloat16()
    before = weights(base)
    model = wrap(base)
    train(model)
    for _ in range(N_MERGES):
        model.merge_adapter()
        model.unmerge_adapter()
    assert same(weights(model.unload()), before)
    lora = get_peft_model(base, LoraConfig(target_modules=["first", "second"], init_lora_weights=False))
    for _ in range(20):
        lora.merge_adapter()
        lora.unmerge_adapter()
    assert not same(weights(lora.unload()), before)


SETTINGS = {
    "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.02, "report_to": [], "use_cpu": True,
    "bf16": False, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "beta": 0.1,
}  # fmt: skip
CONFIG = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def prompts():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(8)]})


def reward(completions, **_):
    return [float(len(text)) for text in completions]


def check_trained(trainer, before) -> None:
    """Losses are finite, columns have moved, and the base is what it was."""
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses
    assert torch.isfinite(torch.tensor(losses)).all()
    assert any(p.abs().max() > 0 for p in trainable(trainer.model))
    assert same(weights(trainer.model.unload()), before)


def test_grpo_generates_at_merged_speed_and_learns(tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    base = tiny_llama()
    before = weights(base)
    trainer = GRPOTrainer(
        model=base,
        reward_funcs=reward,
        args=GRPOConfig(str(tmp_path), num_generations=4, max_completion_length=4, **SETTINGS),
        train_dataset=prompts(),
        processing_class=tokenizer(),
        peft_config=PacaConfig(**CONFIG),
    )
    trainer.train()
    check_trained(trainer, before)


def test_online_dpo_runs(tmp_path):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    base, with_chat = tiny_llama(), tokenizer()
    with_chat.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    before = weights(base)
    trainer = OnlineDPOTrainer(
        model=base,
        reward_funcs=reward,
        args=OnlineDPOConfig(str(tmp_path), max_new_tokens=4, **SETTINGS),
        train_dataset=prompts(),
        processing_class=with_chat,
        peft_config=PacaConfig(**CONFIG),
    )
    trainer.train()
    check_trained(trainer, before)


def test_dpos_reference_pass_is_the_base_bit_for_bit(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    base = tiny_llama()
    before = weights(base)
    with torch.no_grad():
        expected = base.eval()(tokens()).logits
    rows = {"prompt": ["w1 w2"] * 8, "chosen": [" w3 w4"] * 8, "rejected": [" w5 w6"] * 8}
    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=PacaConfig(**CONFIG),
    )
    trainer.train()
    assert trainer.ref_model is None, "the reference is the model without its adapter"
    with torch.no_grad(), trainer.model.disable_adapter():
        assert torch.equal(trainer.model.eval()(tokens()).logits, expected)
    check_trained(trainer, before)


def test_generation_calls_no_more_operations_than_the_merged_model():
    model = wrap(tiny_llama(), init_weights=False).eval()
    with torch.no_grad():
        model(tokens())  # writes
        n_adapted, _ = count_ops(lambda: model(tokens()))
        merged = model.merge_and_unload()
        assert n_adapted == count_ops(lambda: merged(tokens()))[0]

"""The recipes that ship do what their headers say, as far as a small model and a processor can show."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.support.text import byte_tokenizer
from thawline.recipe import load_recipe
from thawline.run import evaluate, predict, run

RECIPES = Path(__file__).parents[1] / "recipes"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("file", sorted((RECIPES / "paca").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_can_be_read(file: Path) -> None:
    assert load_recipe(file).run_name


def test_the_chat_recipe_runs_on_a_small_llama_with_chats_as_trl_reads_them(
    tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base, file = tmp_path / "chat-llama", tmp_path / "chats.jsonl"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(base)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(base)
    chats = [
        [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": "1 " * n}]
        for n in range(1, 60)
    ]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))

    recipe = load_recipe(RECIPES / "paca" / "llama_chat.yaml")
    config = dataclasses.replace(
        recipe,
        base=dataclasses.replace(recipe.base, model=str(base)),
        data=dataclasses.replace(recipe.data, path=str(file)),
        training=dataclasses.replace(recipe.training, lr=1e-2),
        folder=str(tmp_path / "runs"),
    )
    result = run(config)
    assert result.status == "finished"
    assert result.steps == 2 * 4  # 58 chats, 2 × 8 a step, two epochs; one chat is held out
    folder = result.folder
    assert "<|user|>count to" in (folder / "sample.txt").read_text().split("⟦")[0]
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["precision"] == "bf16"
    assert plan["schedule"] == "cosine"
    losses = [
        json.loads(line).get("eval_loss") for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0]
    assert evaluate(folder).metrics == pytest.approx(result.metrics, rel=0.05)  # without autocast
    assert isinstance(predict(folder, ["count to 3"])[0], str)

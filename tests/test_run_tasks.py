"""Runs of several tasks: routed in training, evaluation and prediction; then adapted to new ones."""

from __future__ import annotations

import dataclasses
import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.text import LETTERS, save_tiny_bert, write_tasks
from thawline.analysis.recorder import ALIGNMENT, read_trajectory
from thawline.cli import main
from thawline.errors import CheckpointError, ConfigError, DataError, RoutingError
from thawline.recipe import RunConfig, load_recipe
from thawline.run import RunResult, evaluate, measure_alignment, predict, run
from thawline.training.objective import build_objective
from thawline.training.text.match import MatchObjective
from thawline.training.text.objective import TextObjective
from thawline.tuners.mhr.adapt import find_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module", params=["text", "match"])
def recipe(request, folder: Path, tiny_llama: Path, tiny_bert: Path, tmp_path_factory):
    """A recipe of a few steps, for a language model or an encoder."""
    base = tiny_bert if request.param == "match" else tiny_llama
    runs = tmp_path_factory.mktemp("runs")

    def build(
        name: str, tasks: list[str], tuner: object = None, data: object = None, **training
    ) -> RunConfig:
        return RunConfig.from_mapping(
            {
                "objective": request.param,
                "name": name,
                "folder": str(runs),
                "base": str(base),
                "data": {"path": str(folder), "tasks": tasks, "sampling": "equal", **(data or {})},
                "tuner": tuner or {"method": "mhr", "r": 2, "n_skills": 3, "dropout": 0.1},
                "training": {
                    "max_steps": 8, "batch_size": 5, "lr": 1e-2, "save_every": 4, "eval_every": 4,
                    "log_every": 2, **training,
                },
            }
        )  # fmt: skip

    return build


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "adapter_model.safetensors")


def logged(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def pretrained(recipe) -> RunResult:
    return run(recipe("pretrained", ["first", "last"], weight_decay=0.01))


def test_a_run_on_tasks_keeps_their_table_and_reads_back_equal(recipe, pretrained) -> None:
    result = pretrained
    assert set(result.parts) == {"first", "last"}
    mean = sum(part["choice_accuracy"] for part in result.parts.values()) / 2
    assert result.metrics["macro_choice_accuracy"] == pytest.approx(mean)
    told = json.loads((result.folder / "objective.json").read_text())
    assert told["tasks"] == {"first": list(LETTERS), "last": list(LETTERS)}
    for saved in (result.folder / "model", result.folder / "checkpoint-8"):
        assert json.loads((saved / "adapter_config.json").read_text())["task_names"] == ["first", "last"]
    found = evaluate(result.folder)
    assert (found.metrics, found.parts) == (result.metrics, result.parts)
    plan = json.loads((result.folder / "plan.json").read_text())
    skills, routing = plan["parameter_groups"]
    assert (skills["lr"], skills["weight_decay"]) == (1e-2, 0.01)
    assert (routing["lr"], routing["weight_decay"]) == (0.1, 0)
    # MHR trains all that it adds, and only that.
    assert plan["base_parameters"] == plan["parameters"] - plan["trainable_parameters"]
    assert set(predict(result.folder, ["ab", "ba"], task="last")) <= set(LETTERS)


def test_each_task_is_routed_by_its_own_row(recipe, pretrained) -> None:
    folder = pretrained.folder
    config = recipe("pretrained", ["first", "last"])
    together = evaluate(folder)
    for task in ("first", "last"):
        alone = evaluate(folder, config=recipe("pretrained", [task]))
        part = {name: value for name, value in together.parts[task].items() if name != "rows"}
        assert alone.metrics == pytest.approx(part)
    objective = build_objective(config)
    model = objective.build_model()
    shared, name = find_adapter(model)
    assert shared.configs[name].task_names == ["first", "last"]
    rows = [objective.train_rows[0], objective.train_rows[-1]]
    assert objective.collate(rows)["task_ids"] == [0, 1]


@pytest.mark.parametrize("adapt", ["full", "z", "mu"])
def test_adapting_moves_what_it_should_from_the_average_of_the_skills(recipe, pretrained, adapt: str) -> None:
    before = pretrained
    tuner = {"method": "mhr", "start_from": str(before.folder), "adapt": adapt}
    shots = {"shots": 6, "sampling": "each"}
    result = run(recipe(f"adapted-{adapt}", ["least"], tuner, shots))
    assert set(result.start["parts"]) == set(result.parts) == {"least"}
    assert result.start["name"] == "zero-shot"
    old, new = weights(before.folder), weights(result.folder)
    skills = [name for name in old if "mhr_A" in name or "mhr_B" in name]
    assert len(skills) == len([name for name in new if name in skills]) > 0
    if adapt == "z":
        assert all(torch.equal(old[name], new[name]) for name in skills)
    if adapt == "mu":
        assert {new[name].shape[0] for name in skills} == {1}
        assert not any("router" in name for name in new)
    assert json.loads((result.folder / "model" / "adapter_config.json").read_text())["mode"] == adapt
    found = evaluate(result.folder)
    assert (found.metrics, found.parts) == (result.metrics, result.parts)
    assert len(predict(result.folder, ["ab"])) == 1
    # The average of the skills, by way of mu without a step, is where every mode starts.
    average = recipe("average", ["least"], {**tuner, "adapt": "mu"})
    zero_shot = evaluate(before.folder, config=average)
    assert result.start["metrics"]["loss"] == pytest.approx(zero_shot.metrics["loss"], rel=2e-3)


def test_an_unseen_task_is_evaluated_zero_shot_from_the_command_line(pretrained, capsys) -> None:
    words = ["eval", str(pretrained.folder), "--data.tasks", "[least, first]"]
    assert main([*words, "--json"]) == 1
    assert "No routing for task 'least'" in (told := capsys.readouterr()).err
    assert "`--tuner.adapt mu`" in told.err
    assert main([*words, "--tuner.adapt", "mu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["parts"]) == {"least", "first"}
    # The same by Python, where the trained adapter is named.
    config = load_recipe(pretrained.folder / "config.yaml")
    tuner = dataclasses.replace(config.tuner, start_from=str(pretrained.folder), adapt="mu")
    data = dataclasses.replace(config.data, tasks=["least", "first"])
    average = evaluate(pretrained.folder, config=dataclasses.replace(config, tuner=tuner, data=data))
    assert found["metrics"] == pytest.approx(average.metrics)


def test_the_table_of_an_adaptation_has_zero_shot_rows(
    recipe, pretrained, capsys, caplog, monkeypatch
) -> None:
    config = recipe("pretrained", ["first", "last"])
    # The command line keeps the package's log from pytest's own handler.
    monkeypatch.setattr(logging.getLogger("thawline.tuners"), "handlers", [caplog.handler])
    words = ["train", "--config", str(pretrained.folder / "config.yaml"), "--data.tasks", "[least, first]"]
    words += ["--name", "rows", "--tuner.start_from", str(pretrained.folder), "--tuner.adapt", "z"]
    assert main(words) == 0
    told = capsys.readouterr().out.splitlines()
    lines = [line.split("  ")[0] or line.strip().split("  ")[0] for line in told]
    assert lines[:9] == [
        "task", "first", "zero-shot", "least", "zero-shot", "mean over tasks", "zero-shot", "all rows",
        "zero-shot",
    ]  # fmt: skip
    start = json.loads((config.run_folder.parent / "rows" / "start.json").read_text())
    column = told[0].split().index("choice_accuracy")
    assert float(told[6].split()[-1]) == round(start["metrics"]["macro_choice_accuracy"], 4)
    assert float(told[4].split()[column - 1]) == round(start["parts"]["least"]["choice_accuracy"], 4)
    page = (config.run_folder.parent / "rows" / "report.html").read_text()
    assert page.count(">  zero-shot<") == 4
    # One of the two is no new task.
    assert "Already trained: first. " in caplog.text


def test_a_killed_run_goes_on_to_the_same_bits(recipe, pretrained, monkeypatch) -> None:
    tuner = {"method": "mhr", "start_from": str(pretrained.folder), "adapt": "full"}
    again = partial(recipe, tasks=["least", "last"], tuner=tuner, data={"batches": "task"})
    straight = run(again("straight"))
    with monkeypatch.context() as patch:
        for kind in (TextObjective, MatchObjective):
            collate, made = kind.collate, [0]

            def dying(self, rows, collate=collate, made=made):
                made[0] += all(any(row is known for known in self.train_rows) for row in rows)
                if made[0] == 7:
                    raise RuntimeError("the machine went away")
                return collate(self, rows)

            patch.setattr(kind, "collate", dying)
        with pytest.raises(RuntimeError, match="went away"):
            run(again("killed"))
    resumed = run(again("killed"), resume=True)
    assert resumed.metrics == straight.metrics
    assert resumed.start == straight.start
    assert logged(resumed.folder) == logged(straight.folder)
    for key, value in weights(straight.folder).items():
        assert torch.equal(weights(resumed.folder)[key], value), key


def test_annealing_ends_at_the_average_whatever_the_task(recipe) -> None:
    tuner = {"method": "mhr", "r": 2, "n_skills": 3, "anneal": 0.5}
    result = run(recipe("annealed", ["first", "last"], tuner))
    saved = json.loads((result.folder / "model" / "adapter_config.json").read_text())
    assert saved["uniform_mix"] == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["lora", "frozen"])
def test_tasks_without_routing_are_still_judged_task_by_task(recipe, method: str) -> None:
    result = run(recipe(method, ["first", "least"], method))
    assert set(result.parts) == {"first", "least"}


@pytest.mark.parametrize("metric", ["choice_accuracy", "macro_choice_accuracy", "macro_loss"])
def test_the_best_checkpoint_is_chosen_by_any_metric_of_the_table(recipe, metric: str) -> None:
    result = run(recipe(f"best-{metric}", ["first", "least"], "lora", best_metric=metric))
    lines = [line[f"eval_{metric}"] for line in logged(result.folder) if f"eval_{metric}" in line]
    best = (min if "loss" in metric else max)(lines)
    assert result.metrics[metric] == pytest.approx(best)
    with pytest.raises(ConfigError, match="`training.best_metric: macro_loss` is not evaluated"):
        run(recipe("alone", ["first"], "lora", best_metric="macro_loss"))


def test_private_gives_every_task_a_skill_of_its_own(recipe) -> None:
    result = run(recipe("private", ["first", "last"], {"method": "mhr", "r": 2, "router": "private"}))
    saved = json.loads((result.folder / "model" / "adapter_config.json").read_text())
    assert (saved["n_skills"], saved["n_tasks"]) == (2, 2)


def test_what_would_be_a_guess_is_refused(recipe, pretrained, folder: Path) -> None:
    before = pretrained
    with pytest.raises(
        RoutingError, match="No routing for task 'least': the model was trained on tasks 'first'"
    ):
        evaluate(before.folder, config=recipe("x", ["least"]))
    with pytest.raises(RoutingError, match="Which task are the texts of. Available: first, last"):
        predict(before.folder, ["ab"])
    with pytest.raises(RoutingError, match="knows no task 'lst'.*Did you mean 'last'"):
        predict(before.folder, ["ab"], task="lst")
    with pytest.raises(ConfigError, match="No task 'fist' in `data.tasks`.*Did you mean 'first'"):
        run(recipe("x", ["fist"]))
    with pytest.raises(
        ConfigError, match="No task of type 'choise' in `data.task_types`.*Did you mean 'choice'"
    ):
        run(recipe("x", ["*"], data={"task_types": ["choise"]}))
    with pytest.raises(DataError, match="task 'first' has 12 examples to draw 13 shots"):
        run(recipe("x", ["first"], data={"shots": 13}))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        run(recipe("x", ["first"], {"method": "mhr", "start_from": str(folder), "adapt": "z"}))


def test_alignment_is_recorded_without_a_trace_and_measured_alike_at_checkpoints(recipe, pretrained) -> None:
    recorded = run(recipe("aligned", ["first", "last"], align_every=4, weight_decay=0.01))
    for name, tensor in weights(recorded.folder).items():
        assert torch.equal(tensor, weights(pretrained.folder)[name])
    rows = read_trajectory(recorded.folder / ALIGNMENT)
    assert [row["step"] for row in rows] == [4, 8]
    assert rows[0]["n_tasks"] == 2
    assert rows[0]["skill"] != rows[0]["effective"]
    measured = measure_alignment(pretrained.folder)
    assert measured == read_trajectory(pretrained.folder / ALIGNMENT)
    for one, other in zip(rows, measured, strict=True):
        assert one["step"] == other["step"]
        for space in ("skill", "effective"):
            assert one[space] == pytest.approx(other[space], rel=1e-4, abs=1e-5)
    with pytest.raises(ConfigError, match="already exists"):
        measure_alignment(pretrained.folder)


def test_what_cannot_be_aligned_is_told_before_the_first_step(recipe, pretrained, tmp_path) -> None:
    alone = recipe("alone-in-batch", ["first"], align_every=2)
    with pytest.raises(ConfigError, match="between tasks; got batches of 1"):
        run(alone)
    adapter = {"method": "mhr", "start_from": str(pretrained.folder), "adapt": "z"}
    frozen = recipe("unshared", ["swap", "least"], adapter, align_every=2)
    if frozen.objective.kind == "text":
        with pytest.raises(ConfigError, match="No parameter that tasks share is trainable"):
            run(frozen)
    assert not alone.run_folder.exists()
    assert not frozen.run_folder.exists()
    with pytest.raises(CheckpointError, match="holds no run"):
        measure_alignment(tmp_path)

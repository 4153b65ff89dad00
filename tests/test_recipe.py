"""Recipes are strict, and true to the libraries they mirror."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import peft
import pytest
import transformers

from thawline.errors import ConfigError
from thawline.recipe import (
    OBJECTIVES,
    TUNERS,
    Adapter,
    Frozen,
    Lora,
    Mhr,
    Paca,
    RunConfig,
    TextBase,
    TextData,
    Training,
    load_recipe,
    section_types,
)
from thawline.recipe.adapters import MhrFields, PacaFields
from thawline.recipe.training import TRAINING_ARGUMENTS

MINIMAL = {"base": "models/llama", "data": "rows.jsonl"}


def test_a_section_may_be_its_leading_field_alone() -> None:
    config = RunConfig.from_mapping({**MINIMAL, "tuner": "dora", "objective": "text"})
    assert config.base == TextBase(model="models/llama")
    assert config.data == TextData(path="rows.jsonl")
    assert config.tuner == Lora(method="dora")
    assert config.run_folder == Path("runs/llama-dora-rows")


def test_what_is_written_out_reads_back_equal(tmp_path: Path) -> None:
    import yaml

    config = RunConfig.from_mapping(
        {**MINIMAL, "tuner": {"method": "ia3", "args": {"target_modules": ["k"]}}, "training": {"lr": 1e-5}}
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_mapping()))
    assert load_recipe(file) == config


def test_1e_minus_4_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("base: m\ndata: d\ntraining: {lr: 1e-4, warmup: 5e-2, epochs: 2}\n")
    assert load_recipe(file).training == Training(lr=1e-4, warmup=0.05, epochs=2)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"tuner": {"rank": 4}}, r"Unknown key 'tuner.rank' in the recipe. Did you mean 'tuner.r'\?"),
        ({"lr": 1e-4}, r"Unknown key 'lr' in the recipe. Did you mean 'training.lr'\?"),
        ({"training": {"learning_rate": 1}}, "Here it is called 'training.lr'"),
        ({"tuner": "loraa"}, r"Unknown tuner 'loraa'.*Did you mean 'lora'\?"),
        ({"objective": "txt"}, r"Unknown objective 'txt'.*Did you mean 'text'\?"),
        ({"tuner": {"method": "frozen", "r": 8}}, "Unknown key 'tuner.r'"),
        ({"tuner": {"method": "poly", "n_heads": 2}}, "`tuner: poly` has one head, got n_heads=2"),
        ({"tuner": {"method": "mhr", "adapt": "z"}}, "`tuner.adapt: z` needs a trained adapter"),
        (
            {"tuner": {"method": "mhr", "adapt": "y"}},
            "'tuner.adapt' takes 'none', 'full', 'z', 'mu', got 'y'",
        ),
        ({"data": {"path": "d", "batches": "task"}}, "`data.batches` needs tasks to be drawn"),
        ({"data": {"path": "d", "task_cap": 9}}, "`data.task_cap` needs tasks to be drawn"),
        ({"data": {"path": "d", "sampling_temperature": 0}}, "must be positive, got 0"),
        ({"objective": {"kind": "match", "scale": 0}}, "`objective.scale` must be positive, got 0"),
        ({"objective": {"kind": "match", "choice_template": "x"}}, "must hold {choice}, got 'x'"),
        ({"tuner": {"r": 0}}, "tuner.r=0: expected a whole number of at least 1"),
        ({"data": None}, "`data` in the recipe must hold keys and values, got None"),
        ({"data": {}}, "`data.path` is missing"),
        ({"training": {"epochs": 0}}, "`training.epochs` must be positive, got 0"),
        ({"training": {"eval_every": 0}}, "`training.eval_every` must be a number of at least 1, got 0"),
        ({"name": "a/b"}, "`name` must be a plain folder name, got 'a/b'"),
    ],
)
def test_a_mistake_is_named_with_what_would_work(mapping: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping({**MINIMAL, **mapping})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_may_be_in_any_encoding_of_unicode(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: größe\nbase: models/llama\ndata: rows.jsonl\n", encoding=encoding)
    assert load_recipe(file).name == "größe"
    file.write_bytes("name: größe".encode("cp1252"))
    with pytest.raises(ConfigError, match="recipe.yaml' is not YAML: .*invalid"):
        load_recipe(file)


def test_files_that_are_no_recipe_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read recipe .*No such file"):
        load_recipe(tmp_path / "none.yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text("a: [1")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_recipe(file)
    file.write_text("- a")
    with pytest.raises(ConfigError, match="must hold keys and values, got list"):
        load_recipe(file)


def test_a_section_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="`data` must be a TextData in this recipe, got a dict"):
        RunConfig(base=TextBase(model="m"), data={"path": "d"}, tuner=Frozen())  # type: ignore[arg-type]


def test_every_choice_names_itself() -> None:
    for method, kind in TUNERS.items():
        assert kind(method=method).method == method
        assert kind.usual_lr >= 0
    for name, sections in OBJECTIVES.items():
        assert sections["objective"](kind=name).kind == name
        assert set(section_types(name, "paca")) == {"objective", "base", "data", "tuner", "training"}


def test_adapters_carry_pefts_names() -> None:
    ours = {field.name for field in dataclasses.fields(Adapter)} - {"start_from"}
    assert ours <= {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_paca_and_its_config_have_the_same_fields() -> None:
    from thawline import PacaConfig

    inherited = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    theirs = {field.name for field in dataclasses.fields(PacaConfig)} - inherited
    ours = {field.name for field in dataclasses.fields(Paca)}
    # Columns that start away from the pretrained values are for tests only; `base_columns` is filled in.
    assert theirs - {"init_weights", "base_columns"} == ours - {"method", "start_from"}


def test_mhr_and_its_config_have_the_same_fields() -> None:
    from thawline import MHRConfig

    inherited = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    theirs = {field.name for field in dataclasses.fields(MHRConfig)} - inherited
    ours = {field.name for field in dataclasses.fields(Mhr)}
    # Tasks come from the data, `mode` and `uniform_mix` from training; biases are not trained.
    left_out = {"n_tasks", "task_names", "mode", "uniform_mix", "bias", "init_weights"}
    how_to_train = {
        "method", "start_from", "adapt", "new_rows", "routing_lr", "routing_weight_decay", "anneal",
    }  # fmt: skip
    assert theirs - left_out == ours - how_to_train


def test_choices_are_those_of_the_tables_that_hold_them() -> None:
    from thawline.tuners.mhr.routing import ROUTERS
    from thawline.tuners.paca.selection import SELECTIONS

    assert get_args(get_type_hints(PacaFields)["selection"]) == tuple(SELECTIONS)
    assert get_args(get_type_hints(MhrFields)["router"]) == tuple(ROUTERS)


@pytest.mark.parametrize("settings", [Paca(), Mhr(), Lora()], ids=lambda settings: settings.method)
def test_settings_of_a_tuner_do_not_change(settings: Adapter) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="'r'"):
        settings.r = 3
    assert dataclasses.replace(settings, r=3).r == 3
    assert copy.deepcopy(settings) == settings


def test_training_fields_are_the_trainers_by_shorter_names() -> None:
    ours = {field.name for field in dataclasses.fields(Training)}
    theirs = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    if "activation_checkpointing" not in theirs:  # transformers' older name for it
        theirs = theirs - {"gradient_checkpointing"} | {"activation_checkpointing"}
    assert set(TRAINING_ARGUMENTS) <= theirs
    own = {"precision", "eval_at_start", "align_every", "patience", "on_broken_loss", "args"}
    assert set(TRAINING_ARGUMENTS.values()) == ours - own


def test_recipes_import_no_framework() -> None:
    code = (
        "import sys, thawline.recipe, thawline.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'jsonargparse'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

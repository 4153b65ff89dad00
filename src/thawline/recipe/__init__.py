"""Recipes: dataclasses without frameworks, so that the command line answers at once.

A recipe is base × tuner × objective, its data, and how it is trained:

    objective: text                             what to learn: decides the fields of base, data and objective
    base: {model: ../models/llama}              the pretrained model
    tuner: {method: lora, r: 8}                 the trained part: `method` decides the other fields
    data: {path: train.jsonl}
    training: {epochs: 3, lr: 2.0e-4}

`TUNERS` and `OBJECTIVES` hold the choices; adding one is a dataclass and a line there, and the command line,
its help and `thawline list` pick it up. A section may be given as its leading field alone (`tuner: lora`).
Where fields mirror another library's, tests/test_recipe.py holds them to it.
"""

from __future__ import annotations

__all__ = [
    "CHOICES",
    "LEADING_FIELD",
    "OBJECTIVES",
    "PEFT_METHODS",
    "TUNERS",
    "Adapter",
    "DetectionBase",
    "DetectionData",
    "DetectionSettings",
    "DetectionTraining",
    "Frozen",
    "Full",
    "Lora",
    "MatchSettings",
    "Mhr",
    "Paca",
    "PeftMethod",
    "RunConfig",
    "TextBase",
    "TextData",
    "TextSettings",
    "Training",
    "TunerSettings",
    "build_config",
    "dotted_values",
    "list_choices",
    "load_recipe",
    "read_recipe",
    "section_types",
]

from thawline.recipe.choices import CHOICES, list_choices
from thawline.recipe.detection import DetectionBase, DetectionData, DetectionSettings, DetectionTraining
from thawline.recipe.files import load_recipe, read_recipe
from thawline.recipe.run import (
    LEADING_FIELD,
    OBJECTIVES,
    RunConfig,
    build_config,
    dotted_values,
    section_types,
)
from thawline.recipe.text import MatchSettings, TextBase, TextData, TextSettings
from thawline.recipe.training import Training
from thawline.recipe.tuners import (
    PEFT_METHODS,
    TUNERS,
    Adapter,
    Frozen,
    Full,
    Lora,
    Mhr,
    Paca,
    PeftMethod,
    TunerSettings,
)

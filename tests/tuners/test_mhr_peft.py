"""MHR among PEFT's own tuners: a type of its own, which PEFT hands task ids to as it does to Poly."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.peft_model import get_model_status
from peft.tuners.poly import PolyModel
from peft.utils import PeftType

from tests.support.mhr import config, logits, routed, tokens
from tests.support.models import tiny_llama
from thawline import MHRConfig, set_task_ids
from thawline.tuners.mhr import MHRModel
from thawline.tuners.mhr.config import MHR

POLY = {"r": 3, "n_tasks": 3, "n_skills": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False}


def test_pefts_one_question_about_poly_is_answered_yes_and_no_other() -> None:
    asked = config().peft_type
    assert asked == PeftType.POLY  # as PEFT's forwards ask it
    assert asked != PeftType.POLY  # as add_adapter asks whether two adapters are of one kind
    assert all(asked != other for other in PeftType)
    assert [other for other in PeftType if asked == other] == [PeftType.POLY]
    assert asked == "MHR"
    assert len({asked, PeftType.POLY, "MHR"}) == 2


def test_peft_asks_about_poly_only_where_it_hands_task_ids_on() -> None:
    """PEFT's own comparisons with POLY are counted: a new one has to be looked at."""
    asking = []
    for path in sorted(Path(peft.__file__).parent.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text if "PeftType.POLY" in text else "")
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.If) and "PeftType.POLY" in ast.unparse(node.test):
                    assert ast.unparse(node.test) == "peft_config.peft_type == PeftType.POLY"
                    assert re.fullmatch(r"\w*kwargs\['task_ids'\] = task_ids", ast.unparse(node.body))
                    asking.append((path.name, function.name))
    places = {"forward": 6, "prepare_inputs_for_generation": 2}
    assert Counter(asking) == {("peft_model.py", name): n for name, n in places.items()}


def test_pefts_tables_hold_both() -> None:
    for table, ours, theirs in (
        (PEFT_TYPE_TO_CONFIG_MAPPING, MHRConfig, PolyConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, MHRModel, PolyModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, "mhr_", "poly_"),
    ):
        assert table[MHR] is table["MHR"]
        assert (table[MHR], table[PeftType.POLY]) == (ours, theirs)


def test_pefts_own_poly_works_beside_it_in_one_process(tmp_path: Path) -> None:
    x, ids = tokens(), torch.tensor([2, 0, 1])
    torch.manual_seed(3)
    poly = get_peft_model(tiny_llama(), PolyConfig(**POLY, task_type="CAUSAL_LM")).eval()
    ours = routed(task_type="CAUSAL_LM")
    set_task_ids(ours, ids)
    expected = logits(poly, x, task_ids=ids), logits(ours, x)
    for model, name, kind in ((poly, "poly", PolyModel), (ours, "mhr", MHRModel)):
        model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / name)
        assert type(loaded.base_model) is kind
        if kind is MHRModel:
            set_task_ids(loaded, ids)
            assert torch.equal(logits(loaded, x), expected[1])
        else:
            assert torch.equal(logits(loaded, x, task_ids=ids), expected[0])
    assert type(peft.PeftConfig.from_pretrained(tmp_path / "mhr")) is MHRConfig
    assert type(peft.PeftConfig.from_pretrained(tmp_path / "poly")) is PolyConfig
    saved = (tmp_path / "mhr" / "adapter_config.json").read_text()
    assert json.loads(saved)["peft_type"] == "MHR"


@pytest.mark.parametrize("other", [PolyConfig(**POLY), LoraConfig(target_modules=["q_proj"])])
def test_one_model_takes_adapters_of_one_kind(other: peft.PeftConfig) -> None:
    for first, second in ((config(), other), (other, config())):
        with pytest.raises(ValueError, match="peft_type='MHR'|'MHR'|MHR"):
            get_peft_model(tiny_llama(), first).add_adapter("other", second)
    with pytest.raises(ValueError, match="MHR"):
        get_peft_model(tiny_llama(), config(), mixed=True)


def test_the_status_report_names_the_type() -> None:
    status = get_model_status(routed())
    assert status.peft_types == {"default": "MHR"}
    assert status.num_adapter_layers == 14

"""MHR among PEFT's own tuners: a type of its own, which PEFT hands task ids to as it does to Poly."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from mhr_models import config, logits, routed, tiny_llama, tokens
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.peft_model import get_model_status
from peft.tuners.poly import PolyModel
from peft.utils import PeftType

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

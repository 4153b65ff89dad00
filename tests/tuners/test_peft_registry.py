"""Registration beside PEFT's own tuners, also where PEFT has a PACA of its own."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.peft_model import get_model_status
from peft.utils import PeftType

import thawline
from tests.support.paca import Net, wrap
from thawline.tuners._peft import TunerType, register_tuner
from thawline.tuners.paca import PacaConfig, PacaModel
from thawline.tuners.paca.config import PACA


@pytest.fixture
def _peft_with_a_paca_of_its_own(monkeypatch):
    """PEFT 0.22: PeftType.PACA with prefix paca_. A stand-in, as an installed one may be older."""
    if "PACA" in PeftType.__members__:
        yield
        return
    member = str.__new__(PeftType, "PACA")
    member._name_, member._value_ = "PACA", "PACA"
    monkeypatch.setitem(PeftType._member_map_, "PACA", member)
    monkeypatch.setitem(PeftType._value2member_map_, "PACA", member)
    monkeypatch.setattr(PeftType, "_member_names_", [*PeftType._member_names_, "PACA"])
    stand_in = type("PacaModel", (PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA],), {"prefix": "paca_"})
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, member, LoraConfig)
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, member, stand_in)
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, member, "paca_")
    yield


@pytest.mark.usefixtures("_peft_with_a_paca_of_its_own")
def test_pefts_own_paca_and_ours_live_side_by_side(tmp_path):
    assert PeftType("PACA") in list(PeftType)
    register_tuner(PACA, PacaConfig, PacaModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType("PACA")] is not PacaModel
    assert PEFT_TYPE_TO_TUNER_MAPPING["THAWLINE_PACA"] is PacaModel
    x = torch.randn(2, 12)
    torch.manual_seed(0)
    model = wrap(Net(), init_weights=False)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert type(again.base_model) is PacaModel
    assert torch.equal(again(x), model(x))


def test_prefix_is_the_type_in_lower_case_as_transformers_derives_it():
    assert PacaModel.prefix == f"{PACA.value.lower()}_"
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PACA] == PacaModel.prefix
    for name in (*PacaModel.tuner_layer_cls.adapter_layer_names, "thawline_paca_indices"):
        assert name.startswith(PacaModel.prefix)


def test_registering_twice_changes_nothing_and_a_taken_name_is_refused():
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    register_tuner(PACA, PacaConfig, PacaModel)
    assert before == PEFT_TYPE_TO_TUNER_MAPPING
    other = type("Other", (PacaModel,), {})
    with pytest.raises(ValueError, match="already knows 'THAWLINE_PACA' as PacaModel"):
        register_tuner(PACA, PacaConfig, other)
    with pytest.raises(ValueError, match="prefix is 'thawline_paca_', expected 'lora_'"):
        register_tuner(TunerType("LORA"), PacaConfig, PacaModel)


def test_pefts_status_report_knows_the_type():
    status = get_model_status(wrap(Net()))
    assert status.peft_types == {"default": "THAWLINE_PACA"}
    assert status.num_adapter_layers == 2
    assert status.devices == {"default": ["cpu"]}


def test_lora_is_what_it_was():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"]))
    assert model.peft_config["default"].peft_type is PeftType.LORA


def test_every_tuner_name_of_the_face_comes_from_the_room_that_registers():
    for name in ("PacaConfig", "select_columns", "to_lora"):
        assert thawline._HOMES[name] == "thawline.tuners"

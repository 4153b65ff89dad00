"""Tuners that PEFT does not have. Importing this package registers them with PEFT."""

from thawline.tuners._peft import is_registered, register_tuner
from thawline.tuners.mhr.adapt import add_tasks, start_adaptation
from thawline.tuners.mhr.config import MHR, MHRConfig
from thawline.tuners.mhr.convert import from_poly
from thawline.tuners.mhr.model import MHRModel
from thawline.tuners.mhr.routing_file import load_routing, save_routing
from thawline.tuners.mhr.task_ids import route_by_batch, set_task_ids
from thawline.tuners.paca.calibrate import select_columns
from thawline.tuners.paca.config import PACA, PacaConfig
from thawline.tuners.paca.hotswap import hotswap
from thawline.tuners.paca.model import PacaModel
from thawline.tuners.paca.peft_paca import (
    PEFT_PACA,
    PeftPacaConfig,
    PeftPacaModel,
    from_peft_paca,
    to_peft_paca,
    use_for_peft_paca,
)
from thawline.tuners.paca.sync import apply_columns, pack_columns
from thawline.tuners.to_lora import to_lora

__all__ = [
    "MHRConfig",
    "PacaConfig",
    "add_tasks",
    "apply_columns",
    "from_peft_paca",
    "from_poly",
    "hotswap",
    "load_routing",
    "pack_columns",
    "route_by_batch",
    "save_routing",
    "select_columns",
    "set_task_ids",
    "start_adaptation",
    "to_lora",
    "to_peft_paca",
    "use_for_peft_paca",
]

register_tuner(PACA, PacaConfig, PacaModel)
register_tuner(MHR, MHRConfig, MHRModel)
if not is_registered(PEFT_PACA):
    register_tuner(PEFT_PACA, PeftPacaConfig, PeftPacaModel)

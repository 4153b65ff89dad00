"""Tuners that PEFT does not have. Importing this registers them with PEFT: the one import with an effect."""

from thawline.tuners._peft import register_tuner
from thawline.tuners.paca.calibrate import select_columns
from thawline.tuners.paca.config import PACA, PacaConfig
from thawline.tuners.paca.model import PacaModel
from thawline.tuners.to_lora import to_lora

__all__ = ["PacaConfig", "select_columns", "to_lora"]

register_tuner(PACA, PacaConfig, PacaModel)

"""Tuners that PEFT does not have. Importing this registers them with PEFT: the one import with an effect."""

from thawline.tuners._peft import register_tuner
from thawline.tuners.paca.config import PACA, PacaConfig
from thawline.tuners.paca.model import PacaModel

__all__ = ["PacaConfig"]

register_tuner(PACA, PacaConfig, PacaModel)

"""PaCA: train a few columns inside frozen weights, at the speed of the frozen model."""

from thawline.tuners.paca.config import PacaConfig
from thawline.tuners.paca.layer import PacaConv2d, PacaLayer, PacaLinear
from thawline.tuners.paca.model import PacaModel

__all__ = ["PacaConfig", "PacaConv2d", "PacaLayer", "PacaLinear", "PacaModel"]

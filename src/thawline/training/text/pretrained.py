"""Load a pretrained model and its tokenizer, with one-line errors for what a user can fix."""

from __future__ import annotations

__all__ = ["build_without_weights", "load_pretrained", "load_processor", "quantization_config"]

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from thawline.errors import ConfigError, requires_extra
from thawline.files import DAMAGED
from thawline.recipe import TextBase


def load_processor(base: TextBase, n_tokens: int | None = None) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, with a padding token among the first `n_tokens`, which the base knows.

    Raises: ConfigError: if there is none.
    """
    tokenizer = load_pretrained(AutoTokenizer, base)
    padding = tokenizer.pad_token_id
    if padding is None or (n_tokens is not None and padding >= n_tokens):
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"The tokenizer of '{base.model}' has neither a padding nor an end token.")
        # Never seen by the loss or by attention, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_without_weights(loader: Any, base: TextBase, dtype: torch.dtype, **extra: Any) -> Any:
    """Build a model of one of transformers' Auto classes on the meta device, from its config alone.

    Args:
        extra: values over the config's. Raises: ConfigError: in one line.
    """
    extra.pop("ignore_mismatched_sizes", None)
    config = load_pretrained(AutoConfig, base, **extra)
    # Flash attention may be missing here, and keeps what torch's fused attention keeps.
    attention = None if "flash" in (base.attn_implementation or "") else base.attn_implementation
    with torch.device("meta"):
        return loader.from_config(
            config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=base.trust_remote_code,
        )


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return transformers' config of `base.quantization`, products in `dtype`.

    Raises: MissingExtraError: without bitsandbytes.
    """
    with requires_extra(f"`base.quantization: {quantization}`", "bitsandbytes", "quant"):
        import bitsandbytes  # noqa: F401
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_pretrained(loader: Any, base: TextBase, **extra: Any) -> Any:
    """Call `from_pretrained` of one of transformers' Auto classes. Raises: ConfigError: in one line."""
    folder = Path(base.model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"'{base.model}' is an adapter: give its base as `base.model`, and it as `tuner.start_from`."
        )
    try:
        return loader.from_pretrained(
            base.model, revision=base.revision, trust_remote_code=base.trust_remote_code, **extra
        )
    # A JSON file that holds something else than settings raises TypeError or AttributeError.
    except (*DAMAGED, OSError, ValueError, RuntimeError, ImportError, TypeError, AttributeError) as error:
        if not folder.is_dir() and (
            folder.is_absolute() or base.model.startswith(".") or len(folder.parts) > 2
        ):
            raise ConfigError(f"Cannot load '{base.model}': no such folder{_seen_from(folder)}.") from error
        reason = str(error).strip().splitlines()[0]
        if loader is AutoTokenizer and folder.is_dir() and not any(folder.glob("*token*")):
            reason = "it holds no tokenizer. Save the base's there, by `tokenizer.save_pretrained`."
        where = "" if folder.is_dir() else f"no such folder{_seen_from(folder)}, and as a Hub id: "
        raise ConfigError(f"Cannot load '{base.model}': {where}{reason}") from error


def _seen_from(folder: Path) -> str:
    """Return what a relative path is relative to."""
    return "" if folder.is_absolute() else f" in '{Path.cwd()}'"

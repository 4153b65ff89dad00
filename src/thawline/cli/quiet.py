"""Hide the messages of other libraries that a user can do nothing about, before the libraries are imported.

Only what is listed here is hidden: a warning that asks for an action stays.
"""

from __future__ import annotations

__all__ = ["quiet_libraries"]

import logging
import os
import re
import warnings
from collections.abc import Callable

HEADS = {"score", "classifier", "classification_head", "pre_classifier", "pooler"}
"""Modules that a base lacks until it is a classifier, which is then trained."""


def _is_expected(report: str) -> bool:
    """Return whether transformers' report on loading names only what is new, or unused, on purpose."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", report)
    rows = re.findall(r"(?m)^(\S.*?)\s*\|\s*([A-Z]+)\b", plain)
    return " LOAD REPORT from" in plain and all(
        status == "UNEXPECTED" or (status == "MISSING" and not HEADS.isdisjoint(key.split(".")))
        for key, status in rows
    )


NOTICES: dict[str, Callable[[str], bool]] = {
    # Printed at import on CPUs with AVX-512 bf16; the kernel it misses is optional, its fallback exact.
    "bitsandbytes.backends.cpu.ops": lambda text: text.startswith("Failed to load CPU gemm_4bit_forward"),
    "transformers.modeling_utils": _is_expected,
    # onnxruntime's quantiser, on every call: the graphs it gets are folded already.
    "root": lambda text: text.startswith("Please consider") and "pre-processing before quantization" in text,
}
"""Logger → which of its messages are hidden."""
WARNINGS = (
    "Position ids are not supported for parameter efficient tuning",
    "The following (rank|alpha)_pattern keys did not match",
    "`past_key_values` is deprecated",
)
"""Beginnings of Python warnings that are hidden, as patterns: PEFT's on learned prompts, and on entries that
it wrote itself for fused experts (what a user wrote is checked in `tuners/targets.py`); transformers' on how
PEFT calls it."""


def quiet_libraries() -> None:
    """Hide the notices above, deprecations between libraries, and progress bars of less than a second."""
    # tqdm reads it when it is imported: transformers shows bars for loading and saving even a tiny model.
    os.environ.setdefault("TQDM_DELAY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenCV prints about images that it cannot decode; the errors name them.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    # OpenCV's and its FFmpeg's own words on a stream or file that cannot be opened, of which we say more.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    for name, is_notice in NOTICES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Hide) for known in logger.filters):
            logger.addFilter(_Hide(is_notice))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b")
    for beginning in WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)


class _Hide(logging.Filter):
    """Drops records whose message is a notice."""

    def __init__(self, is_notice: Callable[[str], bool]) -> None:
        super().__init__()
        self.is_notice = is_notice

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for a record that is hidden."""
        return not self.is_notice(record.getMessage())

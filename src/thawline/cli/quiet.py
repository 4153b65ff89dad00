"""Hide the messages of other libraries that a user can do nothing about, before the libraries are imported.

Only what is listed here is hidden: a warning that asks for an action stays.
"""

from __future__ import annotations

__all__ = ["quiet_libraries"]

import logging
import os
import warnings

NOTICES = {
    # Printed at import on CPUs with AVX-512 bf16; the kernel it misses is optional, its fallback exact.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""Logger → beginning of the message that is hidden."""


def quiet_libraries() -> None:
    """Hide the notices above, deprecations between libraries, and progress bars of less than a second."""
    # tqdm reads it when it is imported: transformers shows bars for loading and saving even a tiny model.
    os.environ.setdefault("TQDM_DELAY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenCV prints about images that it cannot decode; the errors name them.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    # OpenCV's and its FFmpeg's own words on a stream or file that cannot be opened, of which we say more.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    for name, beginning in NOTICES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Hide) for known in logger.filters):
            logger.addFilter(_Hide(beginning))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b")


class _Hide(logging.Filter):
    """Drops records that begin with a text."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for a record that is hidden."""
        return not record.getMessage().startswith(self.beginning)

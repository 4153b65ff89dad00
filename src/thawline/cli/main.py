"""The entry point: find the command, run it, and turn errors into one line and an exit status."""

from __future__ import annotations

__all__ = ["INTERRUPTED", "main"]

import os
import sys
from collections.abc import Sequence

import thawline
from thawline.cli.command import VERBS, first_line
from thawline.cli.printing import show
from thawline.cli.verbs import INTERRUPTED, OVER_BUDGET
from thawline.errors import BudgetError, ConfigError, DataError, ThawlineError, did_you_mean
from thawline.files import is_write_failure
from thawline.tables import labelled


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        return show(_help())
    if words[0] == "--version":
        return show(thawline.__version__)
    try:
        if words[0] not in VERBS:
            raise ConfigError(f"Unknown command '{words[0]}'. {did_you_mean(words[0], VERBS)}")
        return VERBS[words[0]](words[1:])
    except ThawlineError as error:
        # A dataset's errors are listed, one per line; every other mistake is one line.
        message = str(error) if isinstance(error, DataError) else " ".join(str(error).split())
        sys.stderr.write(f"thawline: {message}\n")
        return 2 if isinstance(error, ConfigError) else OVER_BUDGET if isinstance(error, BudgetError) else 1
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "peft", "huggingface_hub"):
            raise
        sys.stderr.write(
            f"thawline: This needs {error.name}: `pip install thawline`. Without it, detectors run as "
            "exported files (.onnx, .xml).\n"
        )
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("thawline: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has closed the pipe; without this the interpreter complains as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.strerror}: '{error.filename}'"
        elif is_write_failure(error):
            reason = f"A file could not be written: {' '.join(str(error).split())}. Make room, and try again."
        else:
            raise
        sys.stderr.write(f"thawline: {reason}\n")
        return 1


def _help() -> str:
    verbs = labelled(((name, first_line(command)) for name, command in VERBS.items()), "  ")
    return (
        "usage: thawline COMMAND …\n\nAdapt pretrained, frozen models: base × tuner × objective.\n\n"
        f"{verbs}\n\n`thawline COMMAND --help` lists its options, `thawline list` the choices of a recipe."
    )

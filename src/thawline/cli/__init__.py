"""The command line: `verbs.py` does, `options.py` reads what is asked, `printing.py` answers."""

from __future__ import annotations

__all__ = ["VERBS", "main"]

from thawline.cli.verbs import VERBS, main

"""The command line.

`main.py` finds the command; `verbs.py` holds the commands, `command.py` how one is made; `options.py` parses,
`recipe_help.py` explains the fields of a recipe, `printing.py` prints results.
"""

from __future__ import annotations

__all__ = ["VERBS", "main"]

from thawline.cli.command import VERBS
from thawline.cli.main import main

"""Commands as functions of parsed options."""

from __future__ import annotations

__all__ = ["VERBS", "first_line", "verb"]

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from thawline.cli.options import Argument, Parser, split_recipe_options
from thawline.cli.quiet import quiet_libraries
from thawline.jobs import is_main_process

VERBS: dict[str, Callable[[list[str]], int]] = {}
"""Command → function of the rest of the command line; the first line of its docstring is its help."""


def verb(
    name: str,
    *arguments: Argument,
    groups: dict[str, Sequence[Argument]] | None = None,
    takes_recipe: bool = False,
) -> Callable[[Callable[[Namespace], int]], Callable[[Namespace], int]]:
    """Add a function of parsed options to VERBS.

    Args:
        arguments, groups: its options; groups by title.
        takes_recipe: every other option is a field of a recipe, and becomes `options.fields`; the names of
            the command's own options become `options.known`.
    """

    def register(function: Callable[[Namespace], int]) -> Callable[[Namespace], int]:
        def command(argv: list[str]) -> int:
            parser = Parser(name, first_line(function), {"": arguments, **(groups or {})}, takes_recipe)
            fields: dict[str, Any] = {}
            if takes_recipe:
                argv, fields = split_recipe_options(argv, parser.option_names)
            options = parser.parse_intermixed_args(argv)
            options.fields, options.known = fields, parser.option_names
            _set_up_logging()
            quiet_libraries()
            return function(options)

        command.__doc__ = function.__doc__
        VERBS[name] = command
        return function

    return register


def first_line(command: Callable[..., int]) -> str:
    """Return the first line of a command's docstring, its help."""
    return (command.__doc__ or "").partition("\n")[0]


def _set_up_logging() -> None:
    """Show thawline's log on stderr."""
    package = logging.getLogger("thawline")
    if not package.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO if is_main_process() else logging.WARNING)
        # Some libraries give the root logger a handler: every line would come twice.
        package.propagate = False

"""Options of the commands: argparse for a command's own, recipe fields for all others of train and eval."""

from __future__ import annotations

__all__ = ["Argument", "Parser", "argument", "split_recipe_options"]

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from thawline.cli.recipe_help import recipe_help
from thawline.errors import ConfigError, did_you_mean
from thawline.recipe.values import read_yaml

Argument = tuple[tuple[str, ...], dict[str, Any]]


def argument(*names: str, **keywords: Any) -> Argument:
    """Return the arguments of `add_argument`, to list a command's options as data."""
    return names, keywords


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises a mistake as a ConfigError of one line, with the nearest option.

    Args:
        verb: the command.
        arguments: its options, by the title of their group; "" for the usual groups.
        takes_recipe: whether `--help` shows the fields of a recipe too.
    """

    def __init__(
        self,
        verb: str,
        description: str,
        arguments: dict[str, Sequence[Argument]],
        takes_recipe: bool = False,
    ) -> None:
        super().__init__(
            prog=f"thawline {verb}",
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
        )
        self.takes_recipe = takes_recipe
        for title, group in arguments.items():
            target = self.add_argument_group(title) if title else self
            for names, keywords in group:
                target.add_argument(*names, **keywords)
        if takes_recipe:
            indent = " " * len(f"usage: {self.prog} ")
            self.usage = f"{self.format_usage()[7:].rstrip()}\n{indent}[--SECTION.FIELD VALUE …]"

    @property
    def option_names(self) -> list[str]:
        """Long names, without dashes."""
        return [name[2:] for name in self._option_string_actions if name.startswith("--")]

    def format_help(self) -> str:
        """Return the help text."""
        return super().format_help() + (recipe_help() if self.takes_recipe else "")

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of exiting."""
        if unknown := re.match(r"unrecognized arguments: --([^ =]+)", message):
            message = f"Unknown option '--{unknown[1]}'. {did_you_mean(unknown[1], self.option_names)}"
        raise ConfigError(message)


def split_recipe_options(argv: Sequence[str], own: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split a command line into the command's own options and values of recipe fields, by dotted key.

    Args:
        own: names of the command's options.
    Raises: ConfigError: for a field without a value.
    """
    rest: list[str] = []
    fields: dict[str, Any] = {}
    tokens = iter(argv)
    for token in tokens:
        key, has_value, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or key in own:
            rest.append(token)
            continue
        if not has_value:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise ConfigError(f"'--{key}' needs a value: --{key} VALUE.")
        # Below a field, in a dict such as `tuner.args`, no type says how to read text.
        fields[key] = read_yaml(value) if key.count(".") > 1 else value
    return rest, fields

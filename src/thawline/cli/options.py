"""The options of train and eval: the recipe's dataclasses through jsonargparse, over recipe files.

jsonargparse takes 0.2 s to import, hence only where a parser is made. What it cannot read comes back as one
line: what an option takes and got, or the nearest one that is known.
"""

from __future__ import annotations

__all__ = ["empty_parser", "options_first", "parse", "parse_recipe", "read_recipes"]

import argparse
import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thawline import recipe
from thawline.errors import ConfigError, did_you_mean
from thawline.recipe import LEADING_FIELD, RunConfig

if TYPE_CHECKING:
    import jsonargparse

logger = logging.getLogger(__name__)


def empty_parser(
    verb: str, description: str, json_help: str = "Print JSON instead of a table."
) -> jsonargparse.ArgumentParser:
    """A parser of `--json` alone, which raises instead of exiting."""
    import jsonargparse

    # Attribute docstrings of the recipe's dataclasses are the options' help.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"thawline {verb}", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help=json_help)
    return parser


def read_recipes(argv: Sequence[str]) -> dict[str, Any]:
    """The values of all --config files, later ones over earlier ones."""
    values: dict[str, Any] = {}
    for i, token in enumerate(argv):
        name, is_joined, path = token.partition("=")
        if name == "--config" and (is_joined or i + 1 < len(argv)):
            path = path if is_joined else argv[i + 1]
            for key, value in recipe.check_mapping(recipe.read_mapping(path), path).items():
                values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values


def parse_recipe(
    parser: jsonargparse.ArgumentParser, argv: Sequence[str], values: Mapping[str, Any]
) -> tuple[RunConfig, jsonargparse.Namespace]:
    """A recipe's values under what the command line says; and the parser's own options."""
    argv = _write_out_sections(argv)
    values = recipe.expand_sections(values)
    objective = _option(argv, "--objective.kind") or values["objective"].get("kind", "text")
    method = _option(argv, "--tuner.method") or values["tuner"].get("method", recipe.usual_method(objective))
    types = recipe.section_types(objective, method)
    # The recipe's values alone first: what the parser demands beside them would be missing there.
    of_recipe = empty_parser("", "")
    for target in (of_recipe, parser):
        _add_sections(target, types)
    parser.add_argument(
        "--print_config", action="store_true", help="Print the recipe as it would run, and exit."
    )
    for section, wanted in types.items():
        # `--tuner frozen` over a LoRA recipe is a comparison, not a mistake: what frozen lacks is left out.
        known = {field.name for field in dataclasses.fields(wanted)}
        if dropped := sorted(set(values[section]) - known):
            logger.info("Left out, since '%s' has no such field: %s.", method, ", ".join(dropped))
        values[section] = {name: value for name, value in values[section].items() if name in known}
    values |= {
        section: {**values[section], leading: choice}
        for section, leading, choice in (("objective", "kind", objective), ("tuner", "method", method))
    }
    try:
        start = of_recipe.parse_object(values)
    except argparse.ArgumentError as error:
        raise ConfigError(_explain(error, types)) from error
    # jsonargparse keeps the name --print_config to itself.
    options = parse(parser, [token for token in argv if token != "--print_config"], start, types)
    options.print_config = "--print_config" in argv
    built = parser.instantiate(options)
    return RunConfig(
        **{field.name: getattr(built, field.name) for field in dataclasses.fields(RunConfig)}
    ), options


def _add_sections(parser: jsonargparse.ArgumentParser, types: Mapping[str, type]) -> None:
    """The options of a recipe with these sections."""
    parser.add_class_arguments(RunConfig, skip=set(types))
    for section, wanted in types.items():
        parser.add_class_arguments(wanted, section)
    for action in parser._actions:
        if action.dest in LEADING_FIELD:
            action.help, action.metavar = f"Short for --{action.dest}.{LEADING_FIELD[action.dest]}.", "VALUE"
        elif action.dest in types:
            action.help = argparse.SUPPRESS


def parse(
    parser: jsonargparse.ArgumentParser,
    argv: Sequence[str],
    start: jsonargparse.Namespace | None = None,
    types: Mapping[str, type] | None = None,
) -> jsonargparse.Namespace:
    """Parse over the values of `start`. Raises: ConfigError: in one line."""
    try:
        return parser.parse_args(list(argv), namespace=start)
    except argparse.ArgumentError as error:
        # Without -h, the forms for lists ("data.path+") and jsonargparse's own for shells.
        known = [
            name.removeprefix("--")
            for action in parser._actions
            for name in action.option_strings
            if re.fullmatch(r"--\w[\w.]*", name) and name != "--print_shtab"
        ]
        raise ConfigError(_explain(error, types or {}, known)) from error


def _explain(error: argparse.ArgumentError, types: Mapping[str, type], known: Sequence[str] = ()) -> str:
    """jsonargparse's message in one line: what the option takes and got, or the nearest known option."""
    message = str(error)
    if unknown := re.search(r"unrecognized arguments: --([\w.+-]+)", message):
        name = unknown[1]
        if types:
            return f"Unknown option '--{name}'. {recipe.nearest_key(name, types, known)}"
        return f"Unknown option '--{name}'. {did_you_mean(name, known)}"
    key = re.search(r'Parser key "(.+?)":', message)
    got = re.search(r"(?:Got value|Given value): (.*)", message)
    wanted = [
        re.sub(r"<class '(\w+)'>|typing\.Literal\[(.*)\]", r"\1\2", name)
        for name in re.findall(r"Expected an? (.*?)(?:\. Got value.*)?$", message, re.MULTILINE)
    ]
    if key and got and wanted:
        return f"'{key[1]}' takes {' or '.join(wanted)}, got {got[1]!r}."
    return message


def _write_out_sections(argv: Sequence[str]) -> list[str]:
    """`--tuner lora` as `--tuner.method lora`, and so on for every section with a leading field."""
    written = []
    for token in argv:
        name, is_joined, value = token.partition("=")
        section = name.removeprefix("--")
        if name.startswith("--") and section in LEADING_FIELD:
            name = f"--{section}.{LEADING_FIELD[section]}"
        written.append(f"{name}{is_joined}{value}")
    return written


def options_first(argv: Sequence[str]) -> list[str]:
    """Options, then what stands alone: argparse loses texts that come after an option."""
    options: list[str] = []
    alone: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if token == "--":
            alone += [token, *tokens]
        elif token.startswith("--"):
            options.append(token)
            if "=" not in token and token not in ("--json", "--help"):
                options += [value for value in [next(tokens, None)] if value is not None]
        else:
            (options if token == "-h" else alone).append(token)
    return options + alone


def _option(argv: Sequence[str], option: str) -> str | None:
    """The last value given for an option, before there is a parser to ask."""
    found = None
    for i, token in enumerate(argv):
        name, is_joined, value = token.partition("=")
        if name == option and (is_joined or i + 1 < len(argv)):
            found = value if is_joined else argv[i + 1]
    return found

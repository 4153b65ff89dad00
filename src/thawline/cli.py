"""The command line: a table of verbs, one function each.

`thawline --help` and `thawline list` import no framework, so that they answer at once. The options of train
and eval are the recipe's dataclasses, through jsonargparse; an unknown one is answered with the nearest. A
user's mistake ends in one line on stderr and exit status 2 (what was asked for) or 1 (what was found).
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

__all__ = ["VERBS", "main"]

import argparse
import dataclasses
import importlib
import json
import logging
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import thawline
from thawline import recipe
from thawline.errors import ConfigError, DataError, MissingExtraError, ThawlineError, did_you_mean
from thawline.recipe import LEADING_FIELD, RunConfig

if TYPE_CHECKING:
    import jsonargparse

logger = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def train(argv: list[str]) -> int:
    """Train a tuner, or a whole model, as a recipe says."""
    parser = _parser("train", train)
    parser.add_argument(
        "--config", action="append", default=[], help="Recipe (YAML). Given twice, the later one wins."
    )
    parser.add_argument("--resume", action="store_true", help="Go on from the run's newest checkpoint.")
    parser.add_argument(
        "--dry_run", action="store_true", help="Build everything, write plan.json, take no step."
    )
    config, options = _parse_recipe(parser, argv, _read_recipes(argv))
    if options.print_config:
        return _say(_to_yaml(config))
    _prepare()
    from thawline.run import run

    result = run(config, resume=options.resume, dry_run=options.dry_run)
    if result.status == "interrupted":
        logger.warning(
            "Stopped at step %d. Go on with: thawline train --config %s/config.yaml --resume",
            result.steps,
            result.folder,
        )
        return INTERRUPTED
    if result.status == "finished":
        _report(result.folder)
    if options.json:
        return _say(_to_json(dataclasses.asdict(result)))
    if result.status == "planned":
        return _say((result.folder / "plan.json").read_text(encoding="utf-8"))
    _say_evaluation(result.metrics, result.parts, result.start)
    return _say(f"{result.folder}: {result.steps} steps in {result.seconds:.1f} s")


def report(argv: list[str]) -> int:
    """Write report.html into a run's folder: curves, tables, pictures, recipe, environment."""
    parser = argparse.ArgumentParser(
        prog="thawline report", description=_first_line(report), allow_abbrev=False
    )
    parser.add_argument("run", help="Folder of a run, finished or not.")
    options = parser.parse_args(argv)
    _prepare()
    from thawline.report.run_report import build_report

    return _say(str(build_report(options.run)))


def evaluate(argv: list[str]) -> int:
    """Evaluate a run, an adapter or a model on held-out rows."""
    parser = _parser("eval", evaluate)
    parser.add_argument("model", help="Folder of a run, adapter or model, or a model's Hub id.")
    parser.add_argument("--out", help="Write what was predicted here, one JSON row a line.")
    target = next((token for token in argv if not token.startswith("-")), None)
    mapping: dict[str, Any] = {}
    if target is not None:
        _prepare()
        from thawline.run import saved_config

        mapping = saved_config(target).to_mapping()
        if any(token.split("=")[0] in ("--data", "--data.path") for token in argv):
            mapping["data"]["eval_path"] = None
    config, options = _parse_recipe(parser, argv, mapping)
    if options.print_config:
        return _say(_to_yaml(config))
    if options.out and not Path(options.out).absolute().parent.is_dir():
        raise ConfigError(f"--out: no such folder: '{Path(options.out).parent}'.")
    from thawline.run import evaluate as evaluate_model
    from thawline.run import save_evaluation

    found = evaluate_model(options.model, config=config)
    if options.out:
        Path(options.out).write_text(
            "".join(f"{_to_json(row, None)}\n" for row in found.rows), encoding="utf-8"
        )
    if found.detections is not None and (Path(options.model) / "config.yaml").is_file():
        folder = Path(options.model) / f"eval-{Path(str(config.data.path)).stem}"
        save_evaluation(folder, found)
        _report(folder)
    if options.json:
        return _say(_to_json({"metrics": found.metrics, "parts": found.parts}))
    return _say_evaluation(found.metrics, found.parts)


def predict(argv: list[str]) -> int:
    """Answer texts, or with --source detect objects in pictures and films."""
    if any(token.partition("=")[0] == "--source" for token in argv):
        return _detect(argv)
    parser = _parser("predict", predict)
    parser.add_argument("model", help="Folder of a run, adapter or model, or a model's Hub id.")
    parser.add_argument(
        "texts", nargs="*", help="What to answer. None: the lines of --file or of standard input."
    )
    parser.add_argument("--file", help="Answer the lines of this file.")
    parser.add_argument("--choices", help="Pick the likeliest of these, parted by commas.")
    parser.add_argument("--task", help="Which of the tasks trained on the texts are of.")
    parser.add_argument("--max_new_tokens", type=int, help="Longest answer.")
    parser.add_argument(
        "--temperature", type=float, help="Draw instead of taking the likeliest token; 0: do not."
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Texts at a time.")
    options = _parse(parser, _options_first(argv))
    for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("temperature", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"'{name}' must be at least {least}, got {value}.")
    texts = list(options.texts)
    if options.file is not None:
        texts += _lines(options.file)
    elif not texts:
        texts = [line.rstrip("\n") for line in sys.stdin]
    _prepare()
    from thawline.run import predict as answer

    sampling: dict[str, Any] = {}
    if options.max_new_tokens is not None:
        sampling["max_new_tokens"] = options.max_new_tokens
    if options.temperature:
        sampling |= {"do_sample": True, "temperature": options.temperature}
    choices = [choice.strip() for choice in (options.choices or "").split(",") if choice.strip()]
    answers = answer(
        options.model, texts, choices=choices, task=options.task, batch_size=options.batch_size, **sampling
    )
    if options.json:
        answers = [_to_json({"input": t, "output": a}, None) for t, a in zip(texts, answers, strict=True)]
    return _say("\n".join(answers))


def _detect(argv: list[str]) -> int:
    """Detect objects in pictures and films."""
    parser = _parser(
        "predict", _detect, json_help="Write COCO results: predictions.json in --out, or stdout."
    )
    parser.add_argument(
        "--model", required=True, help="Weights: file or folder; or a size, for its published."
    )
    parser.add_argument(
        "--source", required=True, help="Picture, folder, pattern, film, or a camera's number."
    )
    parser.add_argument("--out", help="Folder, or file, for pictures or a film with boxes.")
    parser.add_argument("--variant", help="Size of the detector, where the weights do not tell.")
    parser.add_argument("--weights", choices=["pretrained", "random"], default="pretrained")
    parser.add_argument("--threshold", type=float, default=0.4, help="Lowest score shown.")
    parser.add_argument("--classes", help="Classes to keep, parted by commas.")
    parser.add_argument("--max_detections", type=int, help="The best so many of a picture.")
    parser.add_argument("--tile", type=int, help="Cut large pictures into squares of this side, pixels.")
    parser.add_argument("--batch_size", type=int, default=8, help="Pictures at a time.")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …. None: a GPU if there is one.")
    options = _parse(parser, argv)
    _prepare()
    from thawline.inference import Detector
    from thawline.inference.files import describe, predict_files, write_results

    detector = Detector.from_pretrained(
        options.model,
        options.variant,
        weights=options.weights,
        device=options.device,
        threshold=options.threshold,
    )
    source = int(options.source) if options.source.isdecimal() else options.source
    out = Path(options.out) if options.out else None
    summary = predict_files(
        detector,
        source,
        out,
        None if options.json else lambda prediction: _say(describe(prediction)),
        classes=[name.strip() for name in options.classes.split(",")] if options.classes else None,
        max_detections=options.max_detections,
        tile=options.tile,
        batch_size=options.batch_size,
    )
    if options.json and out is not None:
        write_results((out.parent if out.suffix else out) / "predictions.json", summary.results)
    elif options.json:
        _say(_to_json(summary.results))
    logger.info(
        "%d images, %d detections, %.1f images/s",
        summary.images,
        summary.detections,
        summary.images_per_second,
    )
    for name, reason in summary.unreadable.items():
        sys.stderr.write(f"thawline: not read: {name}: {' '.join(reason.split())}\n")
    return 1 if summary.unreadable else 0


def convert(argv: list[str]) -> int:
    """Write a detector's weights in another layout, read them back and compare what both detect."""
    parser = _parser("convert", convert)
    parser.add_argument("source", help="Weights: file or folder, of any layout.")
    parser.add_argument("out", help="Folder to write; for `authors` a file, name.pth. Must not exist.")
    parser.add_argument(
        "--to", required=True, choices=["thawline", "authors", "authors_hub", "transformers"], help="Layout."
    )
    parser.add_argument("--variant", help="Size of the detector, where the weights do not tell.")
    options = _parse(parser, argv)
    _prepare()
    from thawline.models.deimv2.save import convert_checkpoint

    difference = convert_checkpoint(options.source, options.out, options.to, options.variant)
    if options.json:
        return _say(_to_json({"out": options.out, "to": options.to, "largest_logit_difference": difference}))
    return _say(f"{options.out}: {options.to}; read back, logits differ by at most {difference:.1e}")


def list_choices(argv: list[str]) -> int:
    """What there is to choose from: tuners, objectives, formats, metrics, …"""
    from thawline.choices import CHOICES

    parser = argparse.ArgumentParser(prog="thawline list", description=list_choices.__doc__)
    parser.add_argument("topics", nargs="*", help=f"Among {', '.join(CHOICES)}. None: all.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args(argv)
    for topic in options.topics:
        if topic not in CHOICES:
            raise ConfigError(f"Nothing called '{topic}' to list. {did_you_mean(topic, CHOICES)}")
    tables = {topic: CHOICES[topic]() for topic in options.topics or CHOICES}
    if options.json:
        return _say(_to_json(tables))
    for topic, table in tables.items():
        _say("\n".join([topic, *_choice_lines(table)]))
    return 0


def data(argv: list[str]) -> int:
    """Look a detection data set through before it is trained on: `thawline data check PATH`."""
    parser = argparse.ArgumentParser(prog="thawline data", description=_first_line(data), allow_abbrev=False)
    parser.add_argument("action", choices=["check"], help="What to do with it.")
    parser.add_argument("path", help="Folder of images and annotations, a COCO JSON, or a data.yaml.")
    parser.add_argument("--format", help="coco, yolo or voc. None: found by looking.")
    parser.add_argument("--images", help="Folder that image names start from. None: looked for.")
    parser.add_argument("--out", help="Folder for check.json and pictures of samples. None: runs/check-NAME.")
    parser.add_argument(
        "--fix", metavar="NEW_FOLDER", help="Write a mended copy here; the original is only read."
    )
    parser.add_argument("--size", type=int, default=640, help="Side of the augmented pictures, pixels.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    options = parser.parse_args(argv)
    _prepare()
    from thawline.data.check import check_detection, save_augmented, save_samples
    from thawline.data.mending import write_mended

    check = check_detection(options.path, options.format, options.images)
    out = Path(options.out or f"runs/check-{Path(options.path).resolve().name}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "check.json").write_text(_to_json(check.to_dict()), encoding="utf-8")
    pictures = [*save_samples(check.data, out), save_augmented(check.data, out, options.size)]
    _say(_to_json(check.to_dict()) if options.json else "\n".join(check.lines()))
    logger.info("Look at: %s", ", ".join(str(path) for path in pictures if path))
    if options.fix is not None:
        copy = write_mended(check, options.fix)
        logger.info("Mended copy: '%s', %d images.", options.fix, sum(map(len, copy.splits.values())))
        return 0
    return 0 if check.is_trainable else 1


def align(argv: list[str]) -> int:
    """Show what routing learned and whether tasks pull alike: JSON and pictures of a run or adapter."""
    parser = argparse.ArgumentParser(
        prog="thawline align", description=_first_line(align), allow_abbrev=False
    )
    parser.add_argument("source", help="Folder of a run, of an adapter (MHR, Poly), or of save_routing.")
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="RUN", help="Runs whose alignment to draw beside it."
    )
    parser.add_argument(
        "--measure", action="store_true", help="Measure alignment at the run's checkpoints, on its rows."
    )
    parser.add_argument("--out", help="Folder for align.json and pictures. None: align/ in `source`.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a summary.")
    options = parser.parse_args(argv)
    _prepare()
    from thawline.analysis.align import align as align_folder
    from thawline.analysis.align import summary
    from thawline.report.run_report import ALIGN

    if options.measure:
        from thawline.run import measure_alignment

        measure_alignment(options.source)
    out = Path(options.out or Path(options.source) / ALIGN)
    found = align_folder(options.source, out, beside=options.beside)
    _say(_to_json(found) if options.json else "\n".join(summary(found)))
    logger.info("Look at: %s", ", ".join(str(path) for path in sorted(out.glob("*.png"))))
    return 0


def bench(argv: list[str]) -> int:
    """Measure: `thawline bench tuners`, each benchmark with options of its own."""
    parser = argparse.ArgumentParser(prog="thawline bench", description=_first_line(bench), add_help=False)
    parser.add_argument("name", nargs="?", help=f"Among {', '.join(BENCHES)}.")
    options, rest = parser.parse_known_args(argv)
    if options.name is None:
        return _say("\n".join([parser.format_help(), *_choice_lines(BENCHES)]))
    if options.name not in BENCHES:
        raise ConfigError(
            f"Nothing called '{options.name}' to measure. {did_you_mean(options.name, BENCHES)}"
        )
    measure: Callable[[list[str]], int] = importlib.import_module(
        f"thawline.bench.{options.name.replace('-', '_')}"
    ).main
    return measure(rest)


BENCHES = {
    "tuners": "step time, bytes kept and operations of full fine-tuning, LoRA, PaCA and the frozen floor",
    "vision": "accuracy of a ViT and a conv net adapted to another domain",
    "skills": "LoRA, Poly and MHR on made-up tasks whose skills are known, and how tasks' gradients align",
    "loader": "images a second and core through the detection augmentation",
    "detector": "latency and throughput of the detector's sizes, beside transformers' port",
    "train-step": "a detector's training step beside transformers' port, and how often it waits for the GPU",
}
"""Module of thawline.bench → what it measures."""


def demo(argv: list[str]) -> int:
    """The main jobs, offline, in minutes."""
    from thawline.demo import PARTS, run_demo

    parts = "\n".join(_choice_lines(PARTS))
    parser = argparse.ArgumentParser(
        prog="thawline demo", description=f"{_first_line(demo)} Parts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("parts", nargs="*", help="Those to run. None: all.")
    parser.add_argument("--folder", default="runs/demo", help="Folder for base, tasks and runs.")
    options = parser.parse_args(argv)
    _prepare()
    return _say(run_demo(Path(options.folder), options.parts))


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "data": data,
    "report": report,
    "convert": convert,
    "list": list_choices,
    "align": align,
    "bench": bench,
    "demo": demo,
}
"""Verb → what it does with the rest of the command line; its docstring is its help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        return _say(_help())
    if words[0] == "--version":
        return _say(thawline.__version__)
    try:
        if words[0] not in VERBS:
            raise ConfigError(f"Unknown command '{words[0]}'. {did_you_mean(words[0], VERBS)}")
        return VERBS[words[0]](words[1:])
    except ThawlineError as error:
        # A data set's faults are named all together, a line each; every other mistake is one line.
        told = str(error) if isinstance(error, DataError) else " ".join(str(error).split())
        sys.stderr.write(f"thawline: {told}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("thawline: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough; without this the interpreter complains on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"thawline: {error.strerror}: '{error.filename}'\n")
        return 1


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {_first_line(verb)}" for name, verb in VERBS.items())
    return (
        "usage: thawline COMMAND …\n\nAdapt pretrained, frozen models: base × tuner × objective.\n\n"
        f"{verbs}\n\n`thawline COMMAND --help` lists its options, `thawline list` what there is to choose."
    )


def _choice_lines(table: Mapping[str, str]) -> list[str]:
    """One line a choice; choices that share their text (PEFT's many methods) stand together above it."""
    names_of: dict[str, list[str]] = {}
    for name, text in table.items():
        names_of.setdefault(text, []).append(name)
    width = max(len(names[0]) for names in names_of.values())
    lines = []
    for text, names in names_of.items():
        if len(names) > 2:
            block = textwrap.fill(", ".join(names), 100, initial_indent="  ", subsequent_indent="  ")
            lines += [*block.splitlines(), f"  {'':{width}}  {text}"]
        else:
            lines += [f"  {name:{width}}  {text}" for name in names]
    return lines


def _parser(
    verb: str, function: Callable[[list[str]], int], json_help: str = "Print JSON instead of a table."
) -> jsonargparse.ArgumentParser:
    """An empty parser that raises instead of exiting. It takes 0.2 s to import, hence here."""
    import jsonargparse

    # Attribute docstrings of the recipe's dataclasses are the options' help.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"thawline {verb}", description=_first_line(function), exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help=json_help)
    return parser


def _read_recipes(argv: Sequence[str]) -> dict[str, Any]:
    """The values of all --config files, later ones over earlier ones."""
    values: dict[str, Any] = {}
    for i, token in enumerate(argv):
        name, is_joined, path = token.partition("=")
        if name == "--config" and (is_joined or i + 1 < len(argv)):
            path = path if is_joined else argv[i + 1]
            for key, value in recipe.check_mapping(recipe.read_mapping(path), path).items():
                values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values


def _parse_recipe(
    parser: jsonargparse.ArgumentParser, argv: Sequence[str], values: Mapping[str, Any]
) -> tuple[RunConfig, jsonargparse.Namespace]:
    """A recipe's values under what the command line says; and the parser's own options."""
    argv = _write_out_sections(argv)
    values = recipe.expand_sections(values)
    objective = _option(argv, "--objective.kind") or values["objective"].get("kind", "text")
    method = _option(argv, "--tuner.method") or values["tuner"].get("method", recipe.usual_method(objective))
    types = recipe.section_types(objective, method)
    # The recipe's values alone first: what the parser demands beside them would be missing there.
    of_recipe = _parser("", train)
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
    options = _parse(parser, [token for token in argv if token != "--print_config"], start, types)
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


def _parse(
    parser: jsonargparse.ArgumentParser,
    argv: Sequence[str],
    start: jsonargparse.Namespace | None = None,
    types: Mapping[str, type] | None = None,
) -> jsonargparse.Namespace:
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


def _options_first(argv: Sequence[str]) -> list[str]:
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


def _prepare() -> None:
    """What a command does before it imports frameworks: show our log on stderr, and hush their notices."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("thawline")
    if not package.handlers:
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        # Some libraries give the root logger a handler of theirs: every line would come twice.
        package.propagate = False
    # Notices between libraries, which a user can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b")


def _report(folder: Path) -> None:
    """Write a finished run's report. A run is not lost for want of the libraries that draw it."""
    from thawline.report.run_report import build_report

    try:
        logger.info("Report: %s", build_report(folder))
    except MissingExtraError as error:
        logger.info("No report. %s", error)


def _say(text: str) -> int:
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()
    return 0


def _say_evaluation(
    metrics: Mapping[str, float],
    parts: Mapping[str, Mapping[str, float]],
    start: Mapping[str, Any] | None = None,
) -> int:
    """A table of one line a part, with the mean over parts and over everything below it.

    Args:
        start: `metrics` and `parts` before the first step; the last columns.
    """
    if not metrics:
        return _say("No held-out rows: nothing was evaluated.")
    part_name, whole = ("class", "classes") if "AP" in metrics else ("task", "tasks")
    # A class of objects may lack a metric that others have: small ones, say.
    names = [name for name in metrics if not parts or any(name in part for part in parts.values())]
    before: Mapping[str, Mapping[str, float]] = (start or {}).get("parts", {})
    columns = [(name, parts, metrics) for name in names]
    columns += [(name, before, start["metrics"]) for name in names if start]
    rows = [
        [name, str(part.get("rows", "")), *(_cell(found.get(name, {}), key) for key, found, _ in columns)]
        for name, part in parts.items()
    ]
    if len(parts) > 1:
        found = [[part[key] for part in of.values() if key in part] for key, of, _ in columns]
        means = [_round(sum(values) / len(values)) if values else "" for values in found]
        rows.append([f"mean over {whole}", "", *means])
        total = sum(int(part.get("rows", 0)) for part in parts.values())
        rows.append(["all rows", str(total), *(_cell(over_all, key) for key, _, over_all in columns)])
    header = [part_name, "rows", *names, *(f"{name} at start" for name in names if start)]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [header, *rows]
    ]
    return _say("\n".join(lines))


def _cell(values: Mapping[str, float], key: str) -> str:
    return _round(values[key]) if key in values else ""


def _round(value: float) -> str:
    return f"{value:.4f}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"Cannot read '{path}': {error.strerror}.") from error


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").splitlines()[0]


def _to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.to_mapping(), sort_keys=False, allow_unicode=True)


def _to_json(value: Any, indent: int | None = 2) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str)

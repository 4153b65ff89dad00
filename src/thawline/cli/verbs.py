"""The verbs, one function each, and the table that holds them.

`thawline --help` and `thawline list` import no framework, so that they answer at once. A user's
mistake ends in one line on stderr and exit status 2 (what was asked for) or 1 (what was found). Results go to
stdout, everything else to stderr.
"""

from __future__ import annotations

__all__ = ["VERBS", "main"]

import argparse
import dataclasses
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import thawline
from thawline.cli.options import empty_parser, options_first, parse, parse_recipe, read_recipes
from thawline.cli.printing import choice_lines, first_line, say, say_evaluation, to_json, to_yaml
from thawline.errors import ConfigError, DataError, MissingExtraError, ThawlineError, did_you_mean

logger = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def train(argv: list[str]) -> int:
    """Train a tuner, or a whole model, as a recipe says."""
    parser = empty_parser("train", first_line(train))
    parser.add_argument(
        "--config", action="append", default=[], help="Recipe (YAML). Given twice, the later one wins."
    )
    parser.add_argument("--resume", action="store_true", help="Go on from the run's newest checkpoint.")
    parser.add_argument(
        "--dry_run", action="store_true", help="Build everything, write plan.json, take no step."
    )
    config, options = parse_recipe(parser, argv, read_recipes(argv))
    if options.print_config:
        return say(to_yaml(config))
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
    if not _speaks():
        return 0
    if result.status == "finished":
        _report(result.folder)
    if options.json:
        return say(to_json(dataclasses.asdict(result)))
    if result.status == "planned":
        return say((result.folder / "plan.json").read_text(encoding="utf-8"))
    say_evaluation(result.metrics, result.parts, result.start)
    return say(f"{result.folder}: {result.steps} steps in {result.seconds:.1f} s")


def report(argv: list[str]) -> int:
    """Write report.html into a run's folder: curves, tables, pictures, recipe, environment."""
    parser = argparse.ArgumentParser(
        prog="thawline report", description=first_line(report), allow_abbrev=False
    )
    parser.add_argument("run", help="Folder of a run, finished or not.")
    options = parser.parse_args(argv)
    _prepare()
    from thawline.report.run_report import build_report

    return say(str(build_report(options.run)))


def evaluate(argv: list[str]) -> int:
    """Evaluate a run, an adapter or a model on held-out rows."""
    parser = empty_parser("eval", first_line(evaluate))
    parser.add_argument("model", help="Folder of a run, adapter or model, or a model's Hub id.")
    parser.add_argument("--out", help="Write what was predicted to this new file, one JSON row a line.")
    target = next((token for token in argv if not token.startswith("-")), None)
    mapping: dict[str, Any] = {}
    if target is not None:
        _prepare()
        from thawline.run import saved_config

        mapping = saved_config(target).to_mapping()
        names_data = any(token.split("=")[0] in ("--data", "--data.path") for token in argv)
        if names_data and "eval_path" in mapping["data"]:
            mapping["data"]["eval_path"] = None
        if "adapt" in mapping["tuner"]:  # what is evaluated is trained, and can be adapted: zero-shot
            mapping["tuner"]["start_from"] = target
    config, options = parse_recipe(parser, argv, mapping)
    if options.print_config:
        return say(to_yaml(config))
    if options.out and not Path(options.out).absolute().parent.is_dir():
        raise ConfigError(f"--out: no such folder: '{Path(options.out).parent}'.")
    if options.out and Path(options.out).exists():
        raise ConfigError(f"--out: '{options.out}' is there already. Give another name, or move it away.")
    from thawline.run import evaluate as evaluate_model
    from thawline.run import save_evaluation

    found = evaluate_model(options.model, config=config)
    if options.out:
        Path(options.out).write_text(
            "".join(f"{to_json(row, None)}\n" for row in found.rows), encoding="utf-8"
        )
    if found.detections is not None and (Path(options.model) / "config.yaml").is_file():
        folder = Path(options.model) / f"eval-{Path(str(config.data.path)).stem}"
        save_evaluation(folder, found)
        _report(folder)
    if options.json:
        return say(to_json({"metrics": found.metrics, "parts": found.parts}))
    return say_evaluation(found.metrics, found.parts)


def predict(argv: list[str]) -> int:
    """Answer texts, or with --source detect objects in pictures and films."""
    if any(token.partition("=")[0] == "--source" for token in argv):
        return _detect(argv)
    parser = empty_parser("predict", first_line(predict))
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
    options = parse(parser, options_first(argv))
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
        answers = [to_json({"input": t, "output": a}, None) for t, a in zip(texts, answers, strict=True)]
    return say("\n".join(answers))


def _detect(argv: list[str]) -> int:
    """Detect objects in pictures and films."""
    parser = empty_parser(
        "predict", first_line(_detect), json_help="Write COCO results: predictions.json in --out, or stdout."
    )
    parser.add_argument(
        "weights_at",
        nargs="?",
        metavar="model",
        help="Weights: run, file or folder; or a size, for its published.",
    )
    parser.add_argument("--model", help="The same, by name.")
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
    options = parse(parser, options_first(argv))
    model = options.model or options.weights_at
    if model is None:
        raise ConfigError(
            "What should detect? Give a run's folder, weights, or a size: thawline predict MODEL …"
        )
    _prepare()
    from thawline.inference import Detector
    from thawline.inference.files import describe, predict_files, write_results

    detector = Detector.from_pretrained(
        model,
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
        None if options.json else lambda prediction: say(describe(prediction)),
        classes=[name.strip() for name in options.classes.split(",")] if options.classes else None,
        max_detections=options.max_detections,
        tile=options.tile,
        batch_size=options.batch_size,
    )
    if options.json and out is not None:
        write_results((out.parent if out.suffix else out) / "predictions.json", summary.results)
    elif options.json:
        say(to_json(summary.results))
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
    parser = empty_parser("convert", first_line(convert))
    parser.add_argument("source", help="Weights: file or folder, of any layout.")
    parser.add_argument("out", help="Folder to write; for `authors` a file, name.pth. Must not exist.")
    parser.add_argument(
        "--to", required=True, choices=["thawline", "authors", "authors_hub", "transformers"], help="Layout."
    )
    parser.add_argument("--variant", help="Size of the detector, where the weights do not tell.")
    options = parse(parser, argv)
    _prepare()
    from thawline.models.deimv2.checkpoints.write import convert_checkpoint

    difference = convert_checkpoint(options.source, options.out, options.to, options.variant)
    if options.json:
        return say(to_json({"out": options.out, "to": options.to, "largest_logit_difference": difference}))
    return say(f"{options.out}: {options.to}; read back, logits differ by at most {difference:.1e}")


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
        return say(to_json(tables))
    for topic, table in tables.items():
        say("\n".join([topic, *choice_lines(table)]))
    return 0


def data(argv: list[str]) -> int:
    """Look a detection data set through before it is trained on: `thawline data check PATH`."""
    parser = argparse.ArgumentParser(prog="thawline data", description=first_line(data), allow_abbrev=False)
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
    from thawline.data.detection.check import check_detection, save_augmented, save_samples
    from thawline.data.detection.mending import write_mended

    check = check_detection(options.path, options.format, options.images)
    out = Path(options.out or f"runs/check-{Path(options.path).resolve().name}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "check.json").write_text(to_json(check.to_dict()), encoding="utf-8")
    pictures = [*save_samples(check.data, out), save_augmented(check.data, out, options.size)]
    say(to_json(check.to_dict()) if options.json else "\n".join(check.lines()))
    logger.info("Look at: %s", ", ".join(str(path) for path in pictures if path))
    if options.fix is not None:
        copy = write_mended(check, options.fix)
        logger.info("Mended copy: '%s', %d images.", options.fix, sum(map(len, copy.splits.values())))
        return 0
    return 0 if check.is_trainable else 1


def align(argv: list[str]) -> int:
    """Show what routing learned and whether tasks pull alike: JSON and pictures of a run or adapter."""
    parser = argparse.ArgumentParser(prog="thawline align", description=first_line(align), allow_abbrev=False)
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
    say(to_json(found) if options.json else "\n".join(summary(found)))
    logger.info("Look at: %s", ", ".join(str(path) for path in sorted(out.glob("*.png"))))
    return 0


def bench(argv: list[str]) -> int:
    """Measure: `thawline bench tuners`, each benchmark with options of its own."""
    parser = argparse.ArgumentParser(prog="thawline bench", description=first_line(bench), add_help=False)
    parser.add_argument("name", nargs="?", help=f"Among {', '.join(BENCHES)}.")
    options, rest = parser.parse_known_args(argv)
    if options.name is None:
        return say("\n".join([parser.format_help(), *choice_lines(BENCHES)]))
    if options.name not in BENCHES:
        raise ConfigError(
            f"Nothing called '{options.name}' to measure. {did_you_mean(options.name, BENCHES)}"
        )
    measure: Callable[[list[str]], int] = importlib.import_module(
        f"thawline.bench.{options.name.replace('-', '_')}"
    ).main
    return measure(rest)


BENCHES = {
    "tuners": "step time, bytes kept, operations of full fine-tuning, LoRA, PaCA, Poly, MHR, a frozen floor",
    "vision": "accuracy of a ViT and a conv net adapted to another domain",
    "skills": "LoRA, Poly and MHR on made-up tasks whose skills are known, and how tasks' gradients align",
    "loader": "images a second and core through the detection augmentation",
    "detector": "latency and throughput of the detector's sizes, beside transformers' port",
    "train-step": "a detector's training step beside transformers' port, and how often it waits for the GPU",
    "backbone": "a detector's training step with its backbone trained, adapted by LoRA or PaCA, or frozen",
}
"""Module of thawline.bench → what it measures."""


def demo(argv: list[str]) -> int:
    """The main jobs, offline, in minutes."""
    from thawline.demo import PARTS, run_demo

    parts = "\n".join(choice_lines(PARTS))
    parser = argparse.ArgumentParser(
        prog="thawline demo", description=f"{first_line(demo)} Parts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("parts", nargs="*", help="Those to run. None: all.")
    parser.add_argument("--folder", default="runs/demo", help="Folder for base, tasks and runs.")
    options = parser.parse_args(argv)
    _prepare()
    return say(run_demo(Path(options.folder), options.parts))


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
        return say(_help())
    if words[0] == "--version":
        return say(thawline.__version__)
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
    verbs = "\n".join(f"  {name:{width}}  {first_line(verb)}" for name, verb in VERBS.items())
    return (
        "usage: thawline COMMAND …\n\nAdapt pretrained, frozen models: base × tuner × objective.\n\n"
        f"{verbs}\n\n`thawline COMMAND --help` lists its options, `thawline list` what there is to choose."
    )


def _prepare() -> None:
    """What a command does before it imports frameworks: show our log on stderr, and hush their notices."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("thawline")
    if not package.handlers:
        package.addHandler(handler)
        package.setLevel(logging.INFO if _speaks() else logging.WARNING)
        # Some libraries give the root logger a handler of theirs: every line would come twice.
        package.propagate = False
    # Notices between libraries, which a user can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b")


def _speaks() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _report(folder: Path) -> None:
    """Write a finished run's report. A run is not lost for want of the libraries that draw it."""
    from thawline.report.run_report import build_report

    try:
        logger.info("Report: %s", build_report(folder))
    except MissingExtraError as error:
        logger.info("No report. %s", error)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"Cannot read '{path}': {error.strerror}.") from error

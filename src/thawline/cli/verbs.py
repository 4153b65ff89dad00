"""The commands: each parses its options, calls the function of the same name, and prints what comes back.

`thawline --help` and `thawline list` import no framework, so that they answer at once. A user's mistake ends
in one line on stderr and exit status 2 (a wrong request) or 1 (a fault found in files). Results go to stdout,
everything else to stderr.
"""

from __future__ import annotations

__all__ = ["BENCHES", "INTERRUPTED", "OVER_BUDGET"]

import csv
import importlib
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from thawline import jobs
from thawline.cli.command import VERBS, verb
from thawline.cli.options import Argument, argument
from thawline.cli.printing import (
    choice_lines,
    domain_scores,
    domain_table,
    evaluation_table,
    recipe_yaml,
    show,
    show_json,
    show_yaml,
)
from thawline.demo import PARTS, run_demo
from thawline.domains import is_shared
from thawline.errors import ConfigError, did_you_mean
from thawline.files import read_json, to_json, write_text
from thawline.recipe import CHOICES, build_config, list_choices, read_recipe
from thawline.recipe.values import convert
from thawline.tables import labelled

logger = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
OVER_BUDGET = 3
"""Exit status of an export that differs too much from its model."""

JSON = argument("--json", action="store_true", help="Print JSON instead of a table.")
PRINT_CONFIG = argument("--print_config", action="store_true", help="Print the resulting recipe, and exit.")

CONFIG = argument(
    "--config", action="append", default=[], metavar="RECIPE", help="Recipe (YAML); the last of several wins."
)


@verb(
    "train",
    CONFIG,
    argument("--resume", action="store_true", help="Continue from the run's newest checkpoint."),
    argument("--dry_run", action="store_true", help="Build everything and print the plan, but take no step."),
    JSON,
    PRINT_CONFIG,
    takes_recipe=True,
)
def _train(options: Namespace) -> int:
    """Train a tuner, or a whole model, as a recipe says."""
    config = build_config([*map(read_recipe, options.config), ("", options.fields)], options.known)
    if options.print_config:
        return show_yaml(config)
    result = jobs.train(config, resume=options.resume, dry_run=options.dry_run)
    if result.status == "interrupted":
        logger.warning(
            "Stopped at step %d. Continue with: thawline train --config %s/config.yaml --resume",
            result.steps,
            result.folder,
        )
        return INTERRUPTED
    if not jobs.is_main_process():
        return 0
    if result.status == "planned":
        plan = read_json(result.folder / "plan.json")
        return show_json(plan) if options.json else show(labelled(plan["overview"].items()))
    if options.json:
        return show_json(asdict(result))
    show(evaluation_table(result.metrics, result.parts, result.start))
    if result.ending:
        show(result.ending)
    stopped = f", stopped early: {result.stopped}" if result.stopped else ""
    return show(f"{result.folder}: {result.steps} steps in {result.seconds:.1f} s{stopped}")


@verb(
    "plan",
    CONFIG,
    argument("--compare", action="store_true", help="One row per method."),
    argument("--fit", metavar="MEMORY", help="Largest batch and longest sequence per method in, e.g., 24GB."),
    argument(
        "--within",
        metavar="TIME",
        help="With --fit: choose a recipe that takes at most, e.g., 2h, and print it.",
    ),
    argument("--out", help="With --within: new file for the recipe."),
    argument("--device", help="cpu, cuda, or a GPU by name (h100, 4090, …). None: where it would train."),
    argument("--devices", type=int, default=1, help="Devices, each with the recipe's batch. Default: 1."),
    argument("--sharding", default="ddp", help="ddp, zero1, zero2, zero3 or fsdp2. Default: ddp."),
    JSON,
    takes_recipe=True,
)
def _plan(options: Namespace) -> int:
    """Say what a run needs before it is loaded: parameters, bytes by part, time."""
    config = build_config([*map(read_recipe, options.config), ("", options.fields)], options.known)
    if options.within is not None and options.fit is None:
        raise ConfigError("`--within` needs the memory too: --fit 24GB --within 2h.")
    if options.out is not None and (options.within is None or Path(options.out).exists()):
        wrong = "is for --within" if options.within is None else f"'{options.out}' already exists"
        raise ConfigError(f"`--out`: {wrong}.")
    if options.devices < 1:
        raise ConfigError(f"`--devices` must be at least 1, got {options.devices}.")
    from thawline.planning import search
    from thawline.planning.tables import comparison_table, fit_table, plan_lines

    where = {name: getattr(options, name) for name in ("device", "devices", "sharding")}
    if options.within is not None:
        seconds = search.read_seconds(options.within)
        chosen, found = search.plan_within(config, options.fit, seconds, **where)
        if options.out is not None:
            write_text(Path(options.out), recipe_yaml(chosen))
        logger.info("%s", "\n".join(plan_lines(found)))
        return show_json(found.to_dict()) if options.json else show_yaml(chosen)
    if options.fit is not None:
        sizes = search.fit(config, options.fit, **where)
        return show_json(sizes) if options.json else show(fit_table(sizes))
    if options.compare:
        plans = search.compare(config, **where)
        rows = {name: one.to_dict() for name, one in plans.items()}
        return show_json(rows) if options.json else show(comparison_table(plans))
    one = jobs.plan(config, **where)
    return show_json(one.to_dict()) if options.json else show("\n".join(plan_lines(one)))


@verb(
    "eval",
    argument("model", help="Folder of a run, adapter or model, or a model's Hub id."),
    argument("--out", help="New file for the predictions, one JSON object per line."),
    JSON,
    PRINT_CONFIG,
    takes_recipe=True,
)
def _evaluate(options: Namespace) -> int:
    """Evaluate a run, an adapter or a model on held-out rows or images."""
    if is_shared(options.model):
        return _evaluate_domains(options)
    config = jobs.evaluation_recipe(options.model, "", options.fields, options.known)
    if options.print_config:
        return show_yaml(config)
    found = jobs.evaluate(options.model, config=config, out=options.out)
    if options.json:
        return show_json({"metrics": found.metrics, "parts": found.parts})
    return show(evaluation_table(found.metrics, found.parts))


def _evaluate_domains(options: Namespace) -> int:
    if options.out is not None or options.print_config:
        raise ConfigError("`--out` and `--print_config` are for a run: evaluate the domain's own run.")
    name = options.fields.pop("domain", None)
    found = jobs.evaluate_domains(options.model, name, **options.fields)
    if options.json:
        rows = {name: one if isinstance(one, str) else one.metrics for name, one in found.items()}
        return show_json(rows)
    show(domain_scores(found))
    return 1 if any(isinstance(one, str) for one in found.values()) else 0


def _names(text: str) -> list[str]:
    """Split comma-separated names; one in quotation marks may hold a comma."""
    return [name.strip() for name in next(csv.reader([text], skipinitialspace=True)) if name.strip()]


TEXT_OPTIONS = [
    argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="Texts to answer. None: the lines of --file or of standard input.",
    ),
    argument("--file", help="Answer the lines of this file."),
    argument(
        "--choices", type=_names, help='Pick the most likely of these: a,b, or "a, with comma",b in quotes.'
    ),
    argument("--task", help="Task of the texts, among those trained on."),
    argument("--max_new_tokens", type=int, help="Maximum length of an answer."),
    argument("--temperature", type=float, help="Sample instead of taking the most likely token; 0: do not."),
]
DETECTION_OPTIONS = [
    argument(
        "--source",
        action="append",
        default=[],
        help="Images, folders, patterns; a video, a camera's number, or the address of a stream.",
    ),
    argument("--out", help="Folder, or file, for images or a video with boxes; never the source."),
    argument("--variant", help="Size of the detector, where the weights do not say."),
    argument("--weights", choices=["pretrained", "random"], help="Default: pretrained."),
    argument("--threshold", type=float, help="Lowest score shown. Default: 0.4, or that of a domain."),
    argument("--domain", help="Of a shared folder: a domain, or all. Default: its only one."),
    argument(
        "--classes",
        action="append",
        default=[],
        metavar="CLASS",
        help="Classes to keep: names or numbers, comma-separated or one a --classes.",
    ),
    argument("--max_detections", type=int, help="Maximum detections per image (highest scores kept)."),
    argument("--tile", type=int, help="Cut large images into squares of this side, pixels."),
    argument("--device", help="cpu, cuda, cuda:1, …. None: a GPU if there is one."),
]


@verb(
    "predict",
    argument("at", nargs="?", metavar="MODEL", help="Run folder, model or Hub id; weights file or size."),
    argument("--model", help="The same, by name."),
    argument("--batch_size", type=int, default=8, help="Texts or images per forward pass. Default: 8."),
    argument("--json", action="store_true", help="Print JSON; COCO results, to predictions.json in --out."),
    groups={"text": TEXT_OPTIONS, "detection (with --source)": DETECTION_OPTIONS},
)
def _predict(options: Namespace) -> int:
    """Answer texts, or with --source detect objects in images and videos."""
    detects = bool(options.source)
    if options.model is None:
        options.model = options.at
    elif options.at is not None:
        options.texts.insert(0, options.at)
    if options.model is None:
        usage = "--source …; MODEL is a run folder, a weights file or a size." if detects else "TEXT …"
        raise ConfigError(f"No model given. Usage: thawline predict MODEL {usage}")
    if detects:  # a pattern that the shell has expanded
        options.source, options.texts = options.source + options.texts, []
    mine, others = (DETECTION_OPTIONS, TEXT_OPTIONS) if detects else (TEXT_OPTIONS, DETECTION_OPTIONS)
    if foreign := _given(options, others):
        kind = "texts, not for --source" if detects else "detection, which needs --source"
        raise ConfigError(f"'{next(iter(foreign))}' is for {kind}.")
    given = {"batch_size": options.batch_size, **_given(options, mine)}
    return _detect(options, given) if detects else _answer(options, given)


def _answer(options: Namespace, given: dict[str, Any]) -> int:
    from thawline.data.text.files import decode_text, read_text

    texts = given.pop("texts", [])
    if file := given.pop("file", None):
        texts += _lines(read_text(Path(file)))
    elif not texts:
        texts = _lines(decode_text(sys.stdin.buffer.read(), "stdin"))
    answers: Any = jobs.predict(options.model, texts, **given)
    if options.json:
        rows = ({"input": text, "output": answer} for text, answer in zip(texts, answers, strict=True))
        answers = [to_json(row) for row in rows]
    return show("\n".join(answers))


def _lines(text: str) -> list[str]:
    """Return the lines of a text; no other separator ends one than a line break."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def _detect(options: Namespace, given: dict[str, Any]) -> int:
    from thawline.inference.files import describe

    source = given.pop("source")
    given["on_prediction"] = None if options.json else lambda prediction: show(describe(prediction))
    given["save_results"] = options.json and options.out is not None
    summary = jobs.detect(options.model, source[0] if len(source) == 1 else source, **given)
    if options.json and options.out is None:
        show_json(summary.results)
    speed = f"{summary.images_per_second:.1f} images/s"
    logger.info("%d images, %d detections, %s", summary.images, summary.detections, speed)
    for name, reason in summary.unreadable.items():
        sys.stderr.write(f"thawline: not read: {name}: {' '.join(reason.split())}\n")
    return 1 if summary.unreadable else 0


def _given(options: Namespace, arguments: Sequence[Argument]) -> dict[str, Any]:
    """Return those of the options that the command line gives."""
    values = {
        name: getattr(options, name) for name in (names[0].removeprefix("--") for names, _ in arguments)
    }
    return {name: value for name, value in values.items() if value not in (None, [])}


DOMAIN_ACTIONS = {"list": "FOLDER", "add": "FOLDER RUN", "remove": "FOLDER NAME", "rename": "FOLDER NAME NEW"}
"""Action of `thawline domains` → its arguments."""


@verb(
    "domains",
    argument("words", nargs="+", metavar="WORD", help="FOLDER, or an action with what it takes; see above."),
    argument("--name", help="Of add: name in the shared folder. Default: the one it was trained under."),
    argument("--base", help="Of add, for a new folder: weights of the base. Default: as the run names them."),
    JSON,
)
def _domains(options: Namespace) -> int:
    """Domains of a shared detector: FOLDER, add FOLDER RUN, remove FOLDER NAME, rename FOLDER NAME NEW."""
    words = options.words if options.words[0] in DOMAIN_ACTIONS else ["list", *options.words]
    action, *rest = words
    if len(rest) != len(DOMAIN_ACTIONS[action].split()):
        usage = f"{action} {DOMAIN_ACTIONS[action]}".removeprefix("list ")
        raise ConfigError(f"Usage: thawline domains {usage}")
    given: dict[str, str | None] = {"name": options.name, "base": options.base}
    if action != "add" and (foreign := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"`--{foreign[0]}` is for `thawline domains add`.")
    folder = rest[0]
    if action == "add":
        added = jobs.add_domain(folder, rest[1], options.name, options.base)
        return show(f"{folder}: {', '.join(map(repr, added))} added")
    if action == "remove":
        jobs.remove_domain(folder, rest[1])
        return show(f"{folder}: '{rest[1]}' removed")
    if action == "rename":
        jobs.rename_domain(folder, rest[1], rest[2])
        return show(f"{folder}: '{rest[1]}' is '{rest[2]}' now")
    found = jobs.list_domains(folder)
    if options.json:
        return show_json({name: one if isinstance(one, str) else asdict(one) for name, one in found.items()})
    show(domain_table(found))
    return 1 if any(isinstance(one, str) for one in found.values()) else 0


@verb("report", argument("run", help="Folder of a run, finished or not."))
def _report(options: Namespace) -> int:
    """Write report.html into a run's folder: curves, tables, images, recipe, environment."""
    from thawline.report.run_report import build_report

    return show(str(build_report(options.run)))


@verb(
    "convert",
    argument("source", help="Weights: file or folder, of any layout."),
    argument("out", help="New folder to write; for `authors` a file, name.pth."),
    argument(
        "--to", required=True, choices=["thawline", "authors", "authors_hub", "transformers"], help="Layout."
    ),
    argument("--variant", help="Size of the detector, where the weights do not say."),
    JSON,
)
def _convert(options: Namespace) -> int:
    """Write a detector's weights in another layout, read them back, and compare what both detect."""
    difference = jobs.convert(options.source, options.out, options.to, options.variant)
    if options.json:
        return show_json({"out": options.out, "to": options.to, "largest_logit_difference": difference})
    return show(f"{options.out}: {options.to}; read back, logits differ by at most {difference:.1e}")


EXPORT_OPTIONS = [
    argument(
        "--format", help="onnx, openvino, tensorrt, pt2, executorch, web; of text merged, lora, gguf-ready."
    ),
    argument("--out", help="File to write, or a folder. Default: exports/ in a run's folder, or here."),
    argument("--batch", type=int, help="Fixed number of images in a call. Default: any."),
    argument("--opset", type=int, help="Opset of the ONNX graph: 17, 18 or 19. Default: 17."),
    argument("--sampling", help="grid_sample, or gather for runtimes without GridSample."),
    argument("--half", action="store_true", help="Weights and arithmetic in float16."),
    argument("--int8", action="store_true", help="8-bit integers, calibrated on training images."),
    argument("--ap_budget", type=float, help="Largest loss of AP in int8, of 100 points. Default: 0.5."),
    argument("--single_input", action="store_true", help="One input, images; boxes are in 0-1."),
    argument(
        "--budget",
        type=float,
        help="Largest box error in pixels. Default: 0.5; 4 with --half; any with --int8.",
    ),
    argument("--data", help="Labelled images to compare on. Default: a run's held-out images, or generated."),
    argument("--domain", help="Of a shared folder: the domain to export. Default: its only one."),
    argument("--task", help="Of a text run that serves several: one of them, or all."),
    argument("--variant", help="Size of the detector, where the weights do not say."),
    argument("--weights", choices=["pretrained", "random"], help="Default: pretrained."),
]


@verb(
    "export",
    argument("model", help="Run folder, weights file, Hub id, or a size for its published weights."),
    *EXPORT_OPTIONS,
    JSON,
)
def _export(options: Namespace) -> int:
    """Write a detector for another runtime, with a certificate; or a text run's model for serving."""
    report: Any = jobs.export(options.model, **_given(options, EXPORT_OPTIONS))
    if isinstance(report, list):
        return show_json(report) if options.json else show("\n".join(map(str, report)))
    return show_json(report.to_dict()) if options.json else show("\n".join(report.lines()))


SERVICE_OPTIONS = [
    argument("--host", help="Address to listen at. Default: 127.0.0.1, this machine alone."),
    argument("--port", type=int, help="Default: 8000; 0: any free one."),
    argument("--token", help="Bearer token that requests must send. Default: $THAWLINE_TOKEN, or none."),
    argument("--threshold", type=float, help="Lowest score of a detection. Default: 0.4."),
    argument("--workers", type=int, help="Processes per model. Default: 1."),
    argument("--batch_size", type=int, help="Largest number of images in a forward pass. Default: 1."),
    argument("--batch_wait", type=float, help="Seconds that a request waits for others. Default: 0.005."),
    argument("--max_bytes", type=int, help="Largest body. Default: 20 000 000."),
    argument("--max_pixels", type=int, help="Largest image, by its header. Default: 50 000 000."),
    argument("--max_requests", type=int, help="Requests at once; others get 503. Default: 32."),
    argument("--timeout", type=float, help="Seconds for a body, and for its answer. Default: 30."),
    argument("--variant", help="Size of the detector, where the weights do not say."),
    argument("--weights", choices=["pretrained", "random"], help="Default: pretrained."),
    argument("--device", help="cpu, cuda, cuda:1, …. None: a GPU if there is one."),
]


@verb(
    "serve",
    argument(
        "models", nargs="+", metavar="MODEL", help="Run, weights, size or exported file; several: NAME=MODEL."
    ),
    *SERVICE_OPTIONS,
)
def _serve(options: Namespace) -> int:
    """Serve detectors by HTTP: POST /predict with an image, until Ctrl-C."""
    jobs.serve(options.models, **_given(options, SERVICE_OPTIONS))
    return 0


@verb(
    "list",
    argument("topics", nargs="*", help=f"Any of {', '.join(CHOICES)}. None: all."),
    JSON,
)
def _list(options: Namespace) -> int:
    """List the choices of a recipe: tuners, objectives, formats, metrics, …"""
    tables = list_choices(*options.topics)
    if options.json:
        return show_json(tables)
    return show("\n".join(line for topic, table in tables.items() for line in (topic, *choice_lines(table))))


@verb(
    "data",
    argument("action", choices=["check"], help="The only action: check."),
    argument("path", help="Folder of images and annotations, a COCO JSON, or a data.yaml."),
    argument("--format", help="coco, yolo or voc. None: detected."),
    argument("--images", help="Folder that image names are relative to. None: searched for."),
    argument("--out", help="Folder for check.json and sample images. None: runs/check-NAME."),
    argument("--fix", metavar="NEW_FOLDER", help="Write a repaired copy here; the original is only read."),
    argument(
        "--size", default=640, help="Side or [height, width] of augmented samples, pixels. Default: 640."
    ),
    JSON,
)
def _data(options: Namespace) -> int:
    """Check a detection dataset for errors before training: `thawline data check PATH`."""
    given = {name: getattr(options, name) for name in ("format", "images", "out", "fix")}
    check = jobs.check_data(options.path, **given, size=convert("size", options.size, int | list[int]))
    show_json(check.to_dict()) if options.json else show("\n".join(check.lines()))
    return 0 if check.is_trainable or options.fix is not None else 1


@verb(
    "align",
    argument("source", help="Folder of a run, of an adapter (MHR, Poly), or of save_routing."),
    argument("--beside", nargs="+", default=[], metavar="RUN", help="Other runs to plot the alignment of."),
    argument(
        "--measure", action="store_true", help="Measure alignment at the run's checkpoints, on its rows."
    ),
    argument("--out", help="Folder for align.json and plots. None: align/ in SOURCE."),
    JSON,
)
def _align(options: Namespace) -> int:
    """Write what routing learned and how far tasks' gradients agree: JSON and plots of a run or adapter."""
    from thawline.analysis.align import summary

    found = jobs.align(options.source, beside=options.beside, measure=options.measure, out=options.out)
    return show_json(found) if options.json else show("\n".join(summary(found)))


BENCHES = {
    "sequence": "longest sequence and throughput of LoRA, DoRA, PaCA, QLoRA, QPaCA within a memory budget",
    "tuners": "step time, bytes kept, operations of full fine-tuning, LoRA, PaCA, Poly, MHR, a frozen floor",
    "loader": "images a second and core through the detection augmentation",
    "detector": "latency and throughput of the detector's sizes, beside transformers' port",
    "domains": "several domains on one detector: memory, switching, batches of several domains",
    "train-step": "a detector's training step beside transformers' port, and how often it waits for the GPU",
}
"""Module of thawline.bench → what it measures."""
STUDIES = ("backbone", "skills", "vision")
"""Former benches, now scripts of the repository."""


def _bench(argv: list[str]) -> int:
    """Measure costs on this machine: `thawline bench NAME`, each with its own options."""
    name = argv[0] if argv and not argv[0].startswith("-") else None
    if name is None:
        return show("\n".join(["usage: thawline bench NAME …\n", *choice_lines(BENCHES)]))
    if name in STUDIES:
        raise ConfigError(
            f"'{name}' is a study of the repository, not a bench: `python benchmarks/{name}.py`."
        )
    if name not in BENCHES:
        raise ConfigError(f"Unknown benchmark '{name}'. {did_you_mean(name, BENCHES)}")
    run: Callable[[list[str]], int] = importlib.import_module(f"thawline.bench.{name.replace('-', '_')}").main
    return run(argv[1:])


VERBS["bench"] = _bench


@verb(
    "demo",
    argument("parts", nargs="*", help=f"Any of {', '.join(PARTS)}. None: all."),
    argument("--folder", default="runs/demo", help="Folder for models, tasks and runs. Default: runs/demo."),
)
def _demo(options: Namespace) -> int:
    """Run the main jobs offline, in minutes."""
    return show(run_demo(Path(options.folder), options.parts))

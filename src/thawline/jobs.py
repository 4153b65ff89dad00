"""The jobs of the command line as functions: `thawline train` is `thawline.train`, and so on.

Frameworks are imported inside the functions, so that a command loads only what its job needs.
"""

from __future__ import annotations

__all__ = [
    "add_domain",
    "align",
    "check_data",
    "convert",
    "detect",
    "evaluate",
    "evaluate_domains",
    "evaluation_recipe",
    "export",
    "is_main_process",
    "list_domains",
    "plan",
    "predict",
    "remove_domain",
    "rename_domain",
    "serve",
    "train",
]

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thawline.domains import check_base_options, is_shared
from thawline.errors import CheckpointError, ConfigError, DataError, MissingExtraError, requires_extra
from thawline.files import write_json, write_jsonl
from thawline.recipe import RunConfig, build_config, dotted_values, load_recipe
from thawline.recipe.checks import at_least, height_width

if TYPE_CHECKING:
    from thawline.data.detection.check import DataCheck
    from thawline.data.detection.records import ImageRecord
    from thawline.domains.domain import Domain
    from thawline.exporters.export import ExportReport
    from thawline.inference.detector import Prediction
    from thawline.inference.files import Summary
    from thawline.models.deimv2 import DEIMv2
    from thawline.planning.plan import Plan
    from thawline.run import RunResult
    from thawline.training.evaluation import Evaluation

logger = logging.getLogger(__name__)


def train(
    recipe: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    **overrides: Any,
) -> RunResult:
    """Train a tuner, or a whole model, as a recipe says, and write the run's report.

    Args:
        recipe: a YAML file, nested values, or a config.
        resume: continue from the run's newest checkpoint.
        dry_run: build everything and write plan.json, but take no step.
        overrides: values over the recipe's, by section (`tuner={"r": 8}`) or dotted key
            (`**{"tuner.r": 8}`).
    Raises: CheckpointError: if the run's folder is in use, or there is nothing to resume. ConfigError,
        DataError: for what cannot work, before anything is written.
    """
    from thawline.run import run

    result = run(load_recipe(recipe, **overrides), resume=resume, dry_run=dry_run, plan_memory=True)
    if result.status == "finished":
        _report(result.folder)
    return result


def plan(
    recipe: RunConfig | Mapping[str, Any] | str | Path,
    *,
    device: str | None = None,
    devices: int = 1,
    sharding: str = "ddp",
    **overrides: Any,
) -> Plan:
    """Return the parameters, bytes and time that a run will need, from the base's config alone.

    No weight is read; rows only to count them.

    Args:
        recipe, overrides: as in `train`.
        device: cpu, cuda, or a GPU by name (h100, 4090, …), estimated where it is not there. None: the one
            that `train` would use.
        devices: number of devices, each with the recipe's batch.
        sharding: how they share the run: ddp, zero1, zero2, zero3 or fsdp2.
    Raises: ConfigError: if the recipe cannot work, or the model's step depends on values.
    """
    from thawline.planning.plan import Planner

    config = load_recipe(recipe, **overrides)
    return Planner(config, device=device, devices=devices, sharding=sharding).plan()


def evaluate(
    model: str | Path, *, config: RunConfig | None = None, out: str | Path | None = None, **overrides: Any
) -> Evaluation:
    """Evaluate a run, an adapter or a model on held-out rows or images.

    Args:
        model: folder of a run, adapter or model, or a model's Hub id.
        config: how to evaluate. None: as the run was trained, with `overrides`.
        out: new file for the predictions, one JSON object per line.
        overrides: values over those of the run's recipe, as in `train`: `data="other.jsonl"`.
    Raises: ConfigError: if there is nothing to evaluate on, or `out` exists.
    """
    config = config or evaluation_recipe(model, "the overrides", overrides)
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise ConfigError(f"`out`: no such folder: '{Path(out).parent}'.")
    if out is not None and Path(out).exists():
        raise ConfigError(f"`out`: '{out}' already exists. Choose another name, or move the file away.")
    from thawline.run import evaluate, save_evaluation

    found = evaluate(model, config=config)
    if out is not None:
        write_jsonl(out, found.rows)
    if found.detections is not None and (Path(model) / "config.yaml").is_file():
        folder = Path(model) / f"eval-{Path(str(config.data.path)).stem}"
        save_evaluation(folder, found)
        _report(folder)
    return found


def evaluation_recipe(
    model: str | Path, source: str, overrides: Mapping[str, Any], options: Sequence[str] = ()
) -> RunConfig:
    """Return the recipe that evaluates a model: the one it was trained with, under `overrides`.

    Args:
        source, options: of the overrides, as in `build_config`.
    Raises: ConfigError: an override that evaluating does not read.
    """
    from thawline.run import saved_config

    saved, given = dotted_values(saved_config(model).to_mapping()), dotted_values(overrides)
    trained: tuple[str, ...] = ()
    if saved["objective.kind"] == "detection":
        trained = ("base.variant", "base.weights", "base.overrides", "tuner.")
    elif (Path(model) / "config.yaml").is_file():
        trained = ("tuner.",)
    changed = [key for key in given if key.startswith(trained) and saved.get(key) != given[key]]
    if unread := [key for key in changed if key not in ("tuner.adapt", "tuner.new_rows")] if trained else []:
        raise ConfigError(
            f"`{unread[0]}`: the model of '{model}' is evaluated as it was trained. Train another, or "
            "give the path of other weights in its place."
        )
    path = given.get("data.path")
    if path is not None and "data.eval_path" in saved:
        saved["data.eval_path"] = None
    elif path is not None and Path(path).resolve() != Path(saved["data.path"]).resolve():
        # What the run's own images need says nothing about others; without a split, all of them are judged.
        saved = {key: value for key, value in saved.items() if not key.startswith("data.")}
        saved["data.eval_fraction"] = 1.0
    if "tuner.adapt" in saved:  # start from the trained adapter, so that it can be adapted without training
        saved["tuner.start_from"] = str(model)
    return build_config([(str(model), saved), (source, overrides)], options)


def predict(
    model: str | Path,
    texts: str | Sequence[str] = (),
    *,
    source: str | Path | int | Sequence[str | Path] | None = None,
    **options: Any,
) -> list[str] | Summary:
    """Answer texts, or with `source` detect objects in images and videos.

    Args:
        model: folder of a run, adapter or model, or a model's Hub id; for detection a run, a weights file
            or a size.
        texts: inputs, instructions, users' turns or texts to continue, by the format trained on.
        source: image, folder or pattern, or several of them; a video file, a camera's number, or the address
            of a stream.
        options: of `thawline.run.predict` for texts (`choices`, `task`, `batch_size`, sampling), of `detect`
            for a source (`out`, `threshold`, `classes`, …). `temperature` above 0 samples.
    Returns: an answer per text; for a source, counts, unreadable files and COCO results.
    """
    at_least("batch_size", options.get("batch_size", 1), 1)
    if source is not None:
        return detect(model, source, **options)
    at_least("max_new_tokens", options.get("max_new_tokens", 1), 1)
    temperature = options.pop("temperature", 0)
    at_least("temperature", temperature, 0)
    if temperature:
        options = {"do_sample": True, "temperature": temperature, **options}
    from thawline.run import predict

    return predict(model, [texts] if isinstance(texts, str) else texts, **options)


def detect(
    model: str | Path,
    source: str | Path | int | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    variant: str | None = None,
    weights: Literal["pretrained", "random"] = "pretrained",
    device: str | None = None,
    threshold: float | None = None,
    domain: str | None = None,
    on_prediction: Callable[[Prediction], object] | None = None,
    **options: Any,
) -> Summary:
    """Detect objects in images and videos, and draw them where `out` is given.

    Args:
        model, variant, weights, device, threshold: as in `Detector.from_pretrained`; or `model` is a shared
            folder of several domains, each with its own threshold where None is given, which refuses
            variant and weights.
        domain: of a shared folder: the name of one, or "all". None: its only one.
        source, out, on_prediction: as in `thawline.inference.files.predict_files`.
        options: of `Detector.stream` (`classes`, `max_detections`, `tile`, `batch_size`), and `save_results`.
    """
    from thawline.inference import Detector
    from thawline.inference.files import predict_files

    detector: Any
    if is_shared(model):
        from thawline.inference.shared import SharedDetector

        check_base_options(model, variant, weights)
        detector = SharedDetector.from_pretrained(model, device=device)
        options |= {"domain": domain, "threshold": threshold}
    elif domain is not None:
        raise ConfigError(f"`domain={domain!r}`: '{model}' is no folder of base/ and domains/.")
    else:
        lowest: dict[str, Any] = {} if threshold is None else {"threshold": threshold}
        detector = Detector.from_pretrained(model, variant, weights=weights, device=device, **lowest)
    return predict_files(detector, source, None if out is None else Path(out), on_prediction, **options)


def evaluate_domains(
    folder: str | Path, domain: str | None = None, **overrides: Any
) -> dict[str, Evaluation | str]:
    """Evaluate the domains of a shared folder, each on the held-out images of its own data.

    Args:
        domain: name of one. None: all of them.
        overrides: values over those of the recipe that trained it: `data="other/"`, for one domain.
    Returns: by name the evaluation, or why there is none.
    Raises: ConfigError: no such domain, or other data for several.
    """
    from thawline.domains.domain import base_digest
    from thawline.domains.folder import SharedFolder
    from thawline.run import evaluate_domain

    shared = SharedFolder(folder)
    if overrides and domain is None:
        raise ConfigError(f"`{next(iter(overrides))}` is for one domain: give `domain` as well.")
    base = shared.base()
    digest = base_digest(base)
    found: dict[str, Evaluation | str] = {}
    for name, about in shared.domains() if domain is None else [(domain, "")]:
        try:
            found[name] = evaluate_domain(base, digest, shared.folder(name), overrides)
        except (CheckpointError, DataError) as error:
            if domain is not None:
                raise
            found[name] = about if isinstance(about, str) else str(error)
    return found


def list_domains(folder: str | Path) -> dict[str, Domain | str]:
    """Return the domains of a shared folder by name: what each says of itself, or why it cannot be read."""
    from thawline.domains.folder import SharedFolder

    return dict(SharedFolder(folder).domains())


def add_domain(
    folder: str | Path, source: str | Path, name: str | None = None, base: str | Path | None = None
) -> list[str]:
    """Copy the domains of a run into a shared folder, which is made if it does not exist.

    Args:
        folder: shared folder (`base/` and `domains/<name>/`).
        source: run that trained one or several, or a domain's own folder.
        name: name in the folder, for a single one. None: the one it was trained under.
        base: detector that they were trained on, for a new folder. None: the one that the run names.
    Returns: the names of the domains that were added.
    Raises: ConfigError: a name is taken. CheckpointError: a domain is damaged, or of another base. Nothing
        is copied then.
    """
    from thawline.domains.folder import SharedFolder, check_new, find_domains, load_base

    found = find_domains(source)
    if name is not None and len(found) > 1:
        raise ConfigError(f"`name={name!r}`: '{source}' holds {len(found)} domains. Give the folder of one.")
    shared = SharedFolder(folder) if is_shared(folder) else None
    detector = load_base(found[0], base) if shared is None else shared.base()
    names = check_new(folder if shared is None else shared.path, found, detector, name)
    shared = shared or SharedFolder.create(folder, detector)
    for domain, new in zip(found, names, strict=True):
        shared.copy(domain, new)
    return names


def remove_domain(folder: str | Path, name: str) -> None:
    """Delete a domain of a shared folder. Raises: ConfigError: there is none of this name."""
    from thawline.domains.folder import SharedFolder

    SharedFolder(folder).remove(name)


def rename_domain(folder: str | Path, name: str, new: str) -> None:
    """Rename a domain of a shared folder. Raises: ConfigError: no such domain, or the new name is taken."""
    from thawline.domains.folder import SharedFolder

    SharedFolder(folder).rename(name, new)


def check_data(
    path: str | Path,
    *,
    format: str | None = None,
    images: str | Path | None = None,
    out: str | Path | None = None,
    fix: str | Path | None = None,
    size: int | Sequence[int] = 640,
) -> DataCheck:
    """Check a detection dataset for errors before training.

    Args:
        path: folder of images and annotations, a COCO JSON, or a data.yaml.
        format: coco, yolo or voc. None: detected.
        images: folder that image names are relative to. None: searched for.
        out: folder for check.json and sample images. None: runs/check-NAME.
        fix: new folder for a repaired copy; the original is only read.
        size: side of the augmented samples in pixels, or height and width.
    """
    from thawline.data.detection.check import check_detection, save_augmented, save_samples
    from thawline.data.detection.repair import write_repaired

    height, width = height_width("size", size)
    check = check_detection(path, format, images)
    out = Path(out or f"runs/check-{Path(path).resolve().name}")
    write_json(out / "check.json", check.to_dict())
    samples = [*save_samples(check.data, out), save_augmented(check.data, out, (height, width))]
    logger.info("Sample images: %s", ", ".join(str(file) for file in samples if file))
    if fix is not None:
        copy = write_repaired(check, fix)
        logger.info("Repaired copy: '%s', %d images.", fix, sum(map(len, copy.splits.values())))
    return check


def convert(source: str | Path, out: str | Path, to: str, variant: str | None = None) -> float:
    """Write a detector's weights in another layout, read them back, and compare what both detect.

    Args:
        source: weights, file or folder, of any layout.
        out: new folder to write; for the layout `authors` a file.
        to: layout: thawline, authors, authors_hub or transformers.
        variant: size of the detector, where the weights do not say.
    Returns: the largest difference of a logit.
    """
    from thawline.models.deimv2.checkpoints.write import convert_checkpoint

    return convert_checkpoint(source, out, to, variant)


def export(
    model: str | Path | DEIMv2,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    variant: str | None = None,
    weights: Literal["pretrained", "random"] = "pretrained",
    domain: str | None = None,
    task: str | None = None,
    **settings: Any,
) -> ExportReport | list[Path]:
    """Write a detector for another runtime, with a certificate of how far it equals the model in torch.

    With `format` merged, lora or gguf-ready: write the language model of a run for serving.

    Args:
        model: a detector, or what `DEIMv2.from_pretrained` reads: a run's folder, weights, a size; or a
            shared folder of several domains.
        out: file to write, or a folder. None: exports/ in a run's folder, exports/DOMAIN/ in a shared one,
            else the current folder.
        data: labelled images to compare on. None: the run's held-out images, else generated ones.
        variant: the size, for weights that do not determine it.
        weights: "random" builds the size untrained, to try things out.
        domain: of a shared folder: the domain to export, as the detector that it makes of the base. None: its
            only one.
        task: of a text run that serves several: one of them, or "all".
        settings: `format` (onnx, openvino, tensorrt, pt2, executorch, or web), `batch`, `opset`, `sampling`,
            `half`, `int8`, `single_input`, `budget`, `ap_budget`: fields of
            `thawline.exporters.settings.Settings`.
    Returns: the report, which is also written as PATH.report.json; for text the folders.
    Raises: BudgetError: the detections differ by more than the budget; no file is kept.
    """
    if settings.get("format") in ("merged", "lora", "gguf-ready"):
        untrained = weights if weights == "random" else None
        foreign = {"data": data, "variant": variant, "weights": untrained, "domain": domain}
        return _export_text(str(model), out, settings.pop("format"), task, {**settings, **foreign})
    if task is not None:
        raise ConfigError("`task` is for the formats of text: merged, lora, gguf-ready.")
    if settings.get("format") == "web":
        options = {"data": data, "variant": variant, "weights": weights, "domain": domain}
        return _export_site(model, out, settings, **options)
    from thawline.exporters.export import export_detector, read_samples
    from thawline.exporters.settings import Settings
    from thawline.models.deimv2 import DEIMv2
    from thawline.run_folder import RunFolder

    chosen = Settings(**settings)
    if isinstance(model, DEIMv2):
        detector = model
    elif is_shared(model):
        from thawline.domains.folder import SharedFolder

        check_base_options(model, variant, weights)
        shared = SharedFolder(model)
        name = shared.only_one(domain)
        detector, out = shared.load(name), out or shared.path / "exports" / name
    elif domain is not None:
        raise ConfigError(f"`domain={domain!r}`: '{model}' is no folder of base/ and domains/.")
    elif weights == "random":
        detector = DEIMv2.from_variant(variant or str(model))
    else:
        detector = DEIMv2.from_pretrained(model, variant)
    is_run = not isinstance(model, DEIMv2) and not is_shared(model) and RunFolder(Path(model)).is_run
    run = Path(str(model)) if is_run else None
    samples = None
    if data is not None or run is not None:
        training, held_out = _images(str(model), data, detector.config.class_names or ())
        samples = read_samples(held_out, detector, training if chosen.int8 else ()) if held_out else None
    if out is None:
        out = "." if run is None else run / "exports"
    report = export_detector(detector, out, chosen, samples)
    if run is not None:
        _report(run)
    return report


def _export_site(
    model: str | Path | DEIMv2, out: str | Path | None, settings: dict[str, Any], **options: Any
) -> ExportReport | list[Path]:
    """Write a folder of static files for the browser, around the ONNX file."""
    from thawline.web.build import find_runtime, write_site

    for name in ("batch", "half", "int8", "single_input"):
        if settings.get(name):
            raise ConfigError(f"`{name}`: the page decides it, for web: one image and one input, in float32.")
    folder = Path(out or "site")
    if (folder / "index.html").exists() and not (folder / "model.json").exists():
        raise ConfigError(f"`out`: '{folder}' holds another page. Give a new folder.")
    runtime = find_runtime()
    fixed = {"format": "onnx", "batch": 1, "single_input": True}
    report: Any = export(model, folder / "model.onnx", **options, **{**settings, **fixed})
    write_site(folder, report.path, runtime)
    report.notes.append(f"To see it: python -m http.server --directory {folder}")
    return report


def _export_text(
    run: str, out: str | Path | None, format: str, task: str | None, rest: Mapping[str, Any]
) -> list[Path]:
    from thawline.exporters.text import export_text
    from thawline.run import load_tuned

    if given := [name for name, value in rest.items() if value]:
        raise ConfigError(f"`{given[0]}` is for detectors, not for {format}.")

    def load() -> tuple[Any, Any]:
        objective, model = load_tuned(run)
        tokenizer = getattr(objective, "processor", None)
        if tokenizer is None:
            raise ConfigError(f"'{run}' is no text run: {format} is for language models.")
        return model, tokenizer

    return export_text(load, Path(out or Path(run) / "exports" / format), format, task)


def _images(
    model: str, data: str | Path | None, names: Sequence[str]
) -> tuple[Sequence[ImageRecord], Sequence[ImageRecord]]:
    """Return training and held-out images of a dataset or of a run's own; none where the latter are missing.

    Args:
        names: classes of the detector, which annotations are joined with; none for any.
    """
    from thawline.data.detection.dataset import load_detection
    from thawline.recipe import DetectionData
    from thawline.run import saved_config
    from thawline.training.detection.split import join_classes, split_images

    if data is not None:
        section, seed = DetectionData(path=str(data)), 0
    else:
        config = saved_config(model)
        if not isinstance(config.data, DetectionData):
            raise ConfigError(
                f"'{model}' is no detection run. Text models are exported as merged, lora, gguf-ready."
            )
        section, seed = config.data, config.seed
    path, *others = section.datasets.values()
    if others:
        raise ConfigError(f"'{model}' has {1 + len(others)} datasets: give `data`, the path of one.")
    try:
        found = load_detection(path, section.format, section.images)
    except DataError as error:
        if data is not None:
            raise
        logger.info("Compared on generated images: the run's dataset cannot be read here. %s", error)
        return (), ()
    training, held_out = split_images(found, section, seed)
    return training, join_classes(held_out, found.class_names, names or found.class_names)


def serve(
    models: str | Path | Sequence[str] | Mapping[str, str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    variant: str | None = None,
    weights: Literal["pretrained", "random"] = "pretrained",
    device: str | None = None,
    threshold: float | None = None,
    workers: int = 1,
    batch_size: int = 1,
    batch_wait: float = 0.005,
    **limits: Any,
) -> None:
    """Serve detectors by HTTP, until Ctrl-C or SIGTERM: `POST /predict` with an image.

    Call it below `if __name__ == "__main__":`, since it starts processes.

    Args:
        models: what `Detector.from_pretrained` reads: a run, weights, a size or an exported file; several by
            name, which makes their paths /predict/NAME.
        host, port: address to listen at; port 0: any free one.
        token: bearer token that requests must send. None: the environment's THAWLINE_TOKEN, or none.
        variant, weights, device, threshold: as in `Detector.from_pretrained`; a shared folder of domains
            refuses the first two.
        workers: processes per model.
        batch_size, batch_wait: largest number of images in a forward pass, and seconds to wait for others;
            batches are for GPUs, on a CPU they save no time.
        limits: `max_bytes`, `max_pixels`, `max_requests`, `timeout`: fields of
            `thawline.service.limits.Limits`.
    Raises: ConfigError: the address is in use, or a setting cannot work. CheckpointError: as in `Detector`.
    """
    from thawline.service.limits import Limits

    with requires_extra("Serving", "litserve", "serve"):
        from thawline.service.server import serve_models

    at_least("workers", workers, 1)
    at_least("batch_size", batch_size, 1)
    at_least("batch_wait", batch_wait, 0)
    options: dict[str, Any] = {"variant": variant, "weights": weights, "device": device}
    options |= {} if threshold is None else {"threshold": threshold}
    serve_models(
        models, Limits(**limits), options, host=host, port=port, workers=workers, batch_size=batch_size,
        batch_wait=batch_wait, token=token or os.environ.get("THAWLINE_TOKEN") or None,
    )  # fmt: skip


def align(
    source: str | Path,
    *,
    beside: Sequence[str | Path] = (),
    measure: bool = False,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Write what routing learned and how far tasks' gradients agree, as JSON and as plots.

    Args:
        source: folder of a run, of an adapter (MHR, Poly), or of `save_routing`.
        beside: other runs whose alignment is plotted too.
        measure: measure alignment first, at the run's checkpoints.
        out: folder to write to. None: align/ in `source`.
    Returns: the contents of align.json.
    """
    from thawline.analysis.align import align
    from thawline.report.run_report import ALIGN

    if measure:
        from thawline.run import measure_alignment

        measure_alignment(source)
    out = Path(out or Path(source) / ALIGN)
    found = align(source, out, beside=beside)
    logger.info("Plots: %s", ", ".join(str(path) for path in sorted(out.glob("*.png"))))
    return found


def is_main_process() -> bool:
    """Return True in the first process that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _report(folder: Path) -> None:
    """Write the report of a finished run or evaluation; without the libraries that draw it, say so."""
    if not is_main_process():
        return
    from thawline.report.run_report import build_report

    try:
        logger.info("Report: %s", build_report(folder))
    except MissingExtraError as error:
        logger.info("No report. %s", error)

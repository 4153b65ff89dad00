"""thawline: the line where a frozen model starts to move.

Every public name is loaded on first touch: `import thawline` imports neither torch nor transformers.
`import thawline.tuners` registers thawline's tuners with PEFT, the one import with an effect;
touching a tuner's name here (`thawline.PacaConfig`) does the same.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "AlignmentRecorder": "thawline.analysis.recorder",
    "CheckpointError": "thawline.errors",
    "ConfigError": "thawline.errors",
    "DEIMv2": "thawline.models.deimv2",
    "DEIMv2Config": "thawline.models.deimv2",
    "DataError": "thawline.errors",
    "DetectionDataset": "thawline.data.detection.dataset",
    "DetectionEvaluator": "thawline.metrics.detection",
    "Detector": "thawline.inference.detector",
    "MHRConfig": "thawline.tuners",
    "MissingExtraError": "thawline.errors",
    "PacaConfig": "thawline.tuners",
    "RoutingError": "thawline.errors",
    "RunConfig": "thawline.recipe",
    "ThawlineError": "thawline.errors",
    "VARIANTS": "thawline.models.deimv2",
    "add_tasks": "thawline.tuners",
    "apply_lean": "thawline.ops.lean",
    "attach_tuner": "thawline.tuners.build",
    "build_report": "thawline.report.run_report",
    "derive_schedule": "thawline.training.detection.schedule",
    "from_poly": "thawline.tuners",
    "gradient_alignment": "thawline.analysis.gradients",
    "load_detection": "thawline.data.detection.dataset",
    "load_recipe": "thawline.recipe",
    "load_routing": "thawline.tuners",
    "published_schedule": "thawline.training.detection.schedule",
    "read_routing": "thawline.analysis.routing",
    "route_by_batch": "thawline.tuners",
    "routing_statistics": "thawline.analysis.routing",
    "save_routing": "thawline.tuners",
    "select_columns": "thawline.tuners",
    "set_task_ids": "thawline.tuners",
    "start_adaptation": "thawline.tuners",
    "to_lora": "thawline.tuners",
    "undo_lean": "thawline.ops.lean",
}

__version__ = "0.1.0"
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'thawline' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

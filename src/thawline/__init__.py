"""thawline: the line where a frozen model starts to move.

Every public name is loaded on first use: `import thawline` imports neither torch nor transformers.
`import thawline.tuners` registers thawline's tuners with PEFT, the one import with an effect;
using a tuner's name here (`thawline.PacaConfig`) does the same.
"""

from __future__ import annotations

import importlib

_NAMES = {
    "thawline.analysis.gradients": ["gradient_alignment"],
    "thawline.analysis.recorder": ["AlignmentRecorder"],
    "thawline.analysis.routing": ["read_routing", "routing_statistics", "task_similarity"],
    "thawline.data.detection.dataset": ["DetectionDataset", "load_detection"],
    "thawline.errors": [
        "BudgetError", "CheckpointError", "ConfigError", "DataError", "MissingExtraError", "RoutingError",
        "ThawlineError",
    ],
    "thawline.inference.detector": ["Detector"],
    "thawline.inference.shared": ["SharedDetector"],
    "thawline.jobs": [
        "add_domain", "align", "check_data", "convert", "evaluate", "evaluate_domains", "export",
        "list_domains", "plan", "predict", "remove_domain", "rename_domain", "serve", "train",
    ],
    "thawline.planning.plan": ["Plan"],
    "thawline.metrics.detection": ["DetectionEvaluator"],
    "thawline.models.deimv2": ["DEIMv2", "DEIMv2Config", "VARIANTS"],
    "thawline.ops.lean": ["apply_lean", "undo_lean"],
    "thawline.recipe": ["RunConfig", "list_choices", "load_recipe"],
    "thawline.report.run_report": ["build_report"],
    "thawline.training.detection.schedule": ["derive_schedule", "published_schedule"],
    "thawline.tuners": [
        "MHRConfig", "PacaConfig", "add_tasks", "apply_columns", "from_peft_paca", "from_poly",
        "hotswap", "load_routing", "pack_columns", "route_by_batch", "save_routing", "select_columns",
        "set_task_ids", "start_adaptation", "to_lora", "to_peft_paca",
    ],
    "thawline.tuners.build": ["attach_tuner"],
    "thawline.tuners.mhr": ["parameter_groups"],
}  # fmt: skip
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> object:
    if name == "runtime":
        return importlib.import_module("thawline.runtime")
    if name not in _HOMES:
        raise AttributeError(f"module 'thawline' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

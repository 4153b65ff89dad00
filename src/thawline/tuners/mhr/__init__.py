"""MHR: skills that tasks share, mixed for each task by its row of a routing table. One head is Poly."""

from thawline.tuners.mhr.adapt import (
    add_tasks,
    parameter_groups,
    set_uniform_mix,
    split_heads,
    start_adaptation,
    uniform_annealing,
)
from thawline.tuners.mhr.config import MHRConfig
from thawline.tuners.mhr.convert import from_loras, from_mttl, from_poly
from thawline.tuners.mhr.layer import MHRLinear
from thawline.tuners.mhr.model import MHRModel
from thawline.tuners.mhr.routing import ROUTERS
from thawline.tuners.mhr.routing_file import load_routing, save_routing
from thawline.tuners.mhr.task_ids import route_by_batch, set_task_ids

__all__ = [
    "MHRConfig",
    "MHRLinear",
    "MHRModel",
    "ROUTERS",
    "add_tasks",
    "from_loras",
    "from_mttl",
    "from_poly",
    "load_routing",
    "parameter_groups",
    "route_by_batch",
    "save_routing",
    "set_task_ids",
    "set_uniform_mix",
    "split_heads",
    "start_adaptation",
    "uniform_annealing",
]

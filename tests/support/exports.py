"""Exports of small detectors, of which each is traced once: a trace takes seconds, whatever the network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.export import ExportedProgram

from thawline.exporters import job
from thawline.exporters.settings import Settings
from thawline.models.deimv2.model import DEIMv2

_TRACED: dict[tuple[object, ...], ExportedProgram] = {}
_trace = job._trace


@contextmanager
def equal_networks_share_a_trace() -> Iterator[None]:
    """Let exports of equal networks with settings that give the same program share it."""

    def traced(model: DEIMv2, settings: Settings) -> ExportedProgram:
        digest = hashlib.sha256()
        for name, value in model.state_dict().items():
            digest.update(name.encode() + value.numpy(force=True).tobytes())
        layout = settings.format == "executorch"
        key = (digest.digest(), str(model.config), settings.sampling, settings.single_input, settings.batch)
        if (*key, layout) not in _TRACED:
            _TRACED[*key, layout] = _trace(model, settings)
        return _TRACED[*key, layout]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_trace", traced)
        yield

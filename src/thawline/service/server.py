"""The service: LitServe's workers behind one HTTP server in this process.

LitServe brings workers, queues and batches. Its `run` is not used: it listens on every address, writes a
client file into the current folder, and loses the requests it has taken when it stops. Here uvicorn stops
accepting and finishes what it took, and only then the workers are ended.
"""

from __future__ import annotations

__all__ = ["serve_models"]

import asyncio
import logging
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from litserve import LitServer
from litserve.utils import WorkerSetupStatus, wrap_litserve_start
from starlette.responses import PlainTextResponse, Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from thawline.errors import ConfigError
from thawline.service.api import DetectionAPI, load_detector
from thawline.service.gate import Gate
from thawline.service.limits import Limits
from thawline.service.metrics import Metrics

logger = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", "::1", "localhost")
CONNECTIONS = 512
"""Connections at once; each beyond is answered 503."""
PATIENCE = 20.0
"""Seconds between two looks at a connection; one that has not begun a request at two of them is closed."""


def serve_models(
    models: str | Path | Sequence[str] | Mapping[str, str | Path],
    limits: Limits,
    options: dict[str, Any],
    *,
    host: str,
    port: int,
    token: str | None,
    workers: int,
    batch_size: int,
    batch_wait: float,
) -> None:
    """Serve detectors until SIGINT or SIGTERM; then finish the requests that were taken.

    Args:
        models: one model, or several by name; as texts NAME=MODEL.
        options: of `Detector.from_pretrained`.
    """
    endpoints = _endpoints(models)
    for model in endpoints.values():
        load_detector(model, options)  # what cannot be loaded ends here, in one line
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=CONNECTIONS
        )
    except OSError as error:
        raise ConfigError(f"Cannot listen at {host}, port {port}: {error.strerror}.") from error
    apis = [
        DetectionAPI(path, model, options, batch_size=batch_size, batch_wait=batch_wait)
        for path, model in endpoints.items()
    ]
    logging.getLogger("litserve").setLevel(logging.WARNING)
    server = LitServer(
        apis, accelerator="cpu", devices=1, workers_per_device=workers, timeout=limits.timeout,
        healthcheck_path="/ready", disable_openapi_url=True, restart_workers=True,
    )  # fmt: skip
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if host not in LOCAL and token is None:
        logger.warning("Everyone who reaches %s may use the service: there is no token.", host)
    with listening, wrap_litserve_start(server, worker_monitor=True):
        _wait_for(server)
        port = listening.getsockname()[1]
        for path, model in endpoints.items():
            logger.info("%s: http://%s:%d%s", model, f"[{host}]" if ":" in host else host, port, path)
        app = _application(server, list(endpoints), limits, token)
        config = uvicorn.Config(
            app, http=_Protocol, ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=int(2 * limits.timeout) + 10,
        )  # fmt: skip
        try:
            uvicorn.Server(config).run([listening])
        except KeyboardInterrupt:
            logger.info("Stopped.")


def _endpoints(models: str | Path | Sequence[str] | Mapping[str, str | Path]) -> dict[str, str]:
    """Return the model of each path."""
    if isinstance(models, str | Path):
        models = [str(models)]
    if not isinstance(models, Mapping):
        named = [_name(model) for model in models]
        if len(named) == 1 and not named[0][0]:
            return {"/predict": named[0][1]}
        if len({name for name, _ in named}) < len(named) or not all(name for name, _ in named):
            raise ConfigError(f"Name each of {len(named)} models, and no two alike: NAME=MODEL.")
        models = dict(named)
    if not models or not all(re.fullmatch(r"[\w.-]+", name) for name in models):
        raise ConfigError("Names of models are letters, digits, '-', '_' and '.', e.g. cards=runs/cards.")
    return {f"/predict/{name}": str(model) for name, model in models.items()}


def _name(model: str) -> tuple[str, str]:
    """Split NAME=MODEL; a model without a name, or a path with such a sign, has the name ""."""
    name, separator, rest = str(model).partition("=")
    return (name, rest) if separator and not Path(model).exists() else ("", str(model))


def _application(server: LitServer, models: Sequence[str], limits: Limits, token: str | None) -> Gate:
    metrics = Metrics(models)
    server.app.state.limits = limits

    async def health() -> Response:
        return PlainTextResponse("ok")

    async def show_metrics() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    server.app.add_api_route("/health", health)
    server.app.add_api_route("/metrics", show_metrics)
    return Gate(server.app, [*models, "/health", "/ready", "/metrics"], models, limits, metrics, token)


def _wait_for(server: LitServer) -> None:
    """Wait until every worker has loaded its model."""
    while set(states := server.workers_setup_status.values()) != {WorkerSetupStatus.READY}:
        if WorkerSetupStatus.ERROR in states:
            raise ConfigError("A worker could not load its model; the lines above say why.")
        time.sleep(0.05)


class _Protocol(H11Protocol):
    """HTTP/1.1 by h11, which limits headers to 64 KiB; a client that sends them slowly is cut off."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look(None)

    def _look(self, before: object) -> None:
        if self.transport.is_closing():
            return
        waiting = self.cycle is None or self.cycle.response_complete
        now = (self.cycle or self) if waiting else None
        if waiting and now is before:
            self.transport.close()
        else:
            self.loop.call_later(PATIENCE, self._look, now)

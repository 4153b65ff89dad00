"""A service of a small exported detector, in a process of its own."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.exporters.conftest import build_detector
from tests.support.exports import equal_networks_share_a_trace
from thawline.exporters.export import export_detector

TOKEN = "opensesame"


@dataclass
class Service:
    """A running service: its process, port and log."""

    process: subprocess.Popen[str]
    port: int = 0
    log: list[str] = field(default_factory=list)

    def ask(
        self, path: str = "/predict", body: Any = None, token: str | None = TOKEN, **headers: str
    ) -> tuple[int, bytes]:
        """POST a body, or GET without one; returns status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {} if token is None else {"Authorization": f"Bearer {token}"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, body, given)
        answer = connection.getresponse()
        content = answer.status, answer.read()
        connection.close()
        return content

    def stop(self) -> int:
        """Stop it as a container would; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def start(*words: str, folder: Path, token: str = TOKEN) -> Service:
    """Start `thawline serve` with a free port, and wait until it listens."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "THAWLINE_TOKEN": token}
    process = subprocess.Popen(
        [sys.executable, "-m", "thawline", "serve", *words, "--port", "0"],
        cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    service = Service(process)
    for line in process.stderr:
        service.log.append(line)
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            service.port = int(found[1])
            break
    assert service.port, "".join(service.log)
    threading.Thread(target=lambda: service.log.extend(process.stderr), daemon=True).start()
    return service


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "model.onnx"
    with equal_networks_share_a_trace():
        export_detector(build_detector("lite", class_names=tuple("abcde")), path)
    return path


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("working")
    limits = (
        "--max_bytes",
        "100_000",
        "--max_pixels",
        "40_000",
        "--timeout",
        "6",
        "--batch_size",
        "4",
        "--max_requests",
        "6",
    )
    running = start(f"small={model}", f"other={model}", "--threshold", "0", *limits, folder=folder)
    yield running
    assert running.stop() == 0, "".join(running.log)
    assert list(folder.iterdir()) == []  # nothing was written


@pytest.fixture
def fresh(model: Path, tmp_path: Path) -> Iterator[Service]:
    """A service to break, and to stop."""
    running = start(str(model), "--timeout", "6", folder=tmp_path)
    yield running
    running.stop()


@pytest.fixture
def open_service(model: Path, tmp_path: Path) -> Iterator[Service]:
    """A service without a token, where every request gets through to what reads it."""
    running = start(str(model), "--timeout", "3", "--max_requests", "99", folder=tmp_path, token="")
    yield running
    assert running.stop() == 0

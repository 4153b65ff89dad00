"""`thawline serve` under load, under malformed requests, and its memory after 10,000 requests, on loopback.

    thawline export runs/cards --out model.onnx
    python benchmarks/serving.py model.onnx photo.jpg

Load: clients that each send their next request when they have their answer, with and without batches, beside
the bare network on the same image, resized once. Malformed: cut and damaged files, bombs, wrong forms,
headers, lengths and chunks, requests that are no HTTP, slow and abandoned bodies.
"""

from __future__ import annotations

import argparse
import http.client
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from harness import study_results
from thawline.files import read_json, write_json
from thawline.inference.exported import ExportedNetwork

CLIENTS = (1, 4, 16)
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
METHODS = (b"GET", b"PUT", b"BREW", b"\x00", b"X" * 999)
CHUNKS = (b"zz\r\n", b"-5\r\nx", b"fffffffffffffffff\r\n", b"5\r\nab")
NO_HTTP = (b"\x16\x03\x01\x02\x00", b"\r\n\r\n", b"GET\r\n\r\n", bytes(range(256)))
PATHS = (
    "/predict",
    "/predict/",
    "/predict/none",
    "/%00",
    "/..%2f..%2fetc/passwd",
    "/" + "a" * 3000,
    "*",
    "/é",
)


class Service:
    """`thawline serve` in a process of its own, with its log."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "thawline", "serve", *words, "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise RuntimeError("".join(self.log))
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()

    def memory_mib(self) -> list[float]:
        """Return the resident memory of the server's process and of those it started."""
        family = [psutil.Process(self.process.pid)]
        family += family[0].children(recursive=True)
        return [round(process.memory_info().rss / 2**20, 1) for process in family]

    def cpu_seconds(self) -> float:
        """Return the processor time of all processes, which other load on the machine hardly changes."""
        family = [
            psutil.Process(self.process.pid),
            *psutil.Process(self.process.pid).children(recursive=True),
        ]
        return sum(sum(process.cpu_times()[:2]) for process in family)

    def stop(self) -> int:
        """Stop it; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def running(*words: str) -> Iterator[Service]:
    service = Service(*words)
    try:
        yield service
    finally:
        service.stop()


def load(port: int, image: bytes, clients: int, n: int) -> dict[str, float]:
    """Send n requests from several clients, each over a connection of its own."""
    seconds: list[float] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for _ in range(n // clients):
            start = time.perf_counter()
            connection.request("POST", "/predict", image)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            seconds.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = time.perf_counter() - start
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {"images_per_s": len(seconds) / total, "p50_ms": p50, "p99_ms": p99, "requests": len(seconds)}


def bare(model: Path, image: np.ndarray, n: int, batch: int) -> float:
    """Return the images per second of the network alone, on an image of its own size."""
    network = ExportedNetwork(model)
    height, width = network.size
    images = [np.asarray(Image.fromarray(image).resize((width, height)))] * batch
    network(images)
    start = time.perf_counter()
    for _ in range(n // batch):
        network(images)
    return n // batch * batch / (time.perf_counter() - start)


def malformed(rng: random.Random) -> tuple[str, bytes, bool]:
    """Return a malformed request: its kind, its bytes, and whether the client leaves without its answer."""
    kind = rng.choice(list(MALFORMED))
    return kind, MALFORMED[kind](rng), kind == "left"


def post(body: bytes, path: str = "/predict", length: object = None, **headers: str) -> bytes:
    """Return a request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def picture(rng: random.Random) -> bytes:
    """Return a small image of some format."""
    data = io.BytesIO()
    pixels = np.frombuffer(rng.randbytes(20 * 30 * 3), np.uint8).reshape(20, 30, 3)
    Image.fromarray(pixels).save(data, rng.choice(KINDS))
    return data.getvalue()


def damaged(rng: random.Random) -> bytes:
    data = bytearray(picture(rng))
    for _ in range(rng.randint(1, 30)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def bomb(rng: random.Random) -> bytes:
    """Return a PNG of a few bytes whose header states up to 10¹⁴ pixels."""
    header = (
        b"IHDR"
        + b"".join(rng.randint(30_000, 10**7).to_bytes(4, "big") for _ in range(2))
        + b"\x08\x02\0\0\0"
    )
    data = b"IDAT" + zlib.compress(bytes(10_000))
    chunks = [
        (len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big")
        for c in (header, data, b"IEND")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def wrong_form(rng: random.Random) -> bytes:
    boundary = rng.choice(["xyz", "", '"', "x" * 500, "é"])
    parts = [
        b"--xyz\r\n",
        b'Content-Disposition: form-data; name="f"; filename="a"\r\n',
        b"\r\n",
        picture(rng),
        b"\r\n",
    ]
    body = b"".join(part for part in parts if rng.random() < 0.7) + b"--xyz--"[: rng.randrange(8)]
    return post(body, Content_Type=f"multipart/form-data; boundary={boundary}")


def wrong_query(rng: random.Random) -> bytes:
    name = rng.choice(["draw", "threshold", "classes", "%00", "&&&=", "draw=1&draw"])
    return post(picture(rng), f"/predict?{name}={rng.choice(['2', 'nan', '-1', '1e999', '%ff', 'x' * 900])}")


def large_headers(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return post(b"", X_Long="y" * rng.randint(10_000, 300_000))
    return post(b"", **{f"X_{index}": "y" * 50 for index in range(rng.randint(100, 3000))})


MALFORMED = {
    "cut": lambda rng: post(whole[: rng.randrange(len(whole))] if (whole := picture(rng)) else b""),
    "damaged": lambda rng: post(damaged(rng)),
    "noise": lambda rng: post(rng.randbytes(rng.randint(1, 5000))),
    "empty": lambda rng: post(b""),
    "bomb": lambda rng: post(bomb(rng)),
    "form": wrong_form,
    "query": wrong_query,
    "path": lambda rng: post(picture(rng), rng.choice(PATHS)),
    "method": lambda rng: post(picture(rng)).replace(b"POST", rng.choice(METHODS), 1),
    "headers": large_headers,
    "length": lambda rng: post(picture(rng), length=rng.choice([-1, "ten", 10**12, "1, 2", "", 3])),
    "chunks": lambda rng: post(rng.choice(CHUNKS)).replace(
        b"Content-Length: ", b"Transfer-Encoding: chunked\r\nX-Was: ", 1
    ),
    "no http": lambda rng: rng.choice(NO_HTTP) + b"\r\n\r\n",
    "slow": lambda rng: post(b"abc", length=5000),
    "left": lambda rng: post(picture(rng), length=9000),
}  # fmt: skip
"""Kind of a malformed request → a function that makes one."""


def send(port: int, request: bytes, leaves: bool) -> str:
    """Send bytes; returns the status of the answer, "closed" for none, or "left"."""
    with socket.create_connection(("127.0.0.1", port), timeout=90) as connection:
        try:
            connection.sendall(request)
            if leaves:
                return "left"
            connection.shutdown(socket.SHUT_WR) if b"HTTP/1.1" not in request else None
            answer = connection.recv(100)
        except (ConnectionResetError, BrokenPipeError):
            return "closed"
    return answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"


def fuzz(port: int, n: int, seed: int = 0, clients: int = 8) -> dict[str, dict[str, int]]:
    """Send n malformed requests; returns how often each kind got each status."""
    rng = random.Random(seed)
    requests = [malformed(rng) for _ in range(n)]
    found: dict[str, Counter[str]] = {}

    def client(first: int) -> None:
        for kind, request, leaves in requests[first::clients]:
            status = send(port, request, leaves)
            found.setdefault(kind, Counter())[status] += 1

    threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {kind: dict(counts) for kind, counts in sorted(found.items())}


def measure_load(model: Path, image: bytes, options: argparse.Namespace) -> dict[str, Any]:
    """Return medians over rounds, in turn: the network alone, and services with and without batches."""
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
    alone: dict[int, list[float]] = {1: [], 8: []}
    rows: dict[tuple[int, int], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        services = {n: stack.enter_context(running(str(model), "--batch_size", str(n))) for n in alone}
        for _ in range(options.rounds):
            for batch, service in services.items():
                alone[batch].append(bare(model, pixels, options.requests, batch))
                for clients in CLIENTS:
                    before = service.cpu_seconds()
                    row = load(service.port, image, clients, options.requests)
                    row["cpu_ms"] = (service.cpu_seconds() - before) / row["requests"] * 1000
                    rows.setdefault((batch, clients), []).append(row)
    pairs = zip(rows[8, CLIENTS[-1]], rows[1, CLIENTS[-1]], strict=True)
    ratio = float(np.median([a["images_per_s"] / b["images_per_s"] for a, b in pairs]))
    names = ("images_per_s", "p50_ms", "p99_ms", "cpu_ms")
    return {
        "rounds": options.rounds, "requests": options.requests, "load_average": os.getloadavg(),
        "bare": [{"batch": batch, "images_per_s": float(np.median(n))} for batch, n in alone.items()],
        "serve": [
            {"batch_size": batch, "clients": clients}
            | {name: float(np.median([row[name] for row in group])) for name in names}
            for (batch, clients), group in sorted(rows.items())
        ],
        "batches_by_single_at_16": ratio,
    }  # fmt: skip


def measure_memory(model: Path, image: bytes, options: argparse.Namespace) -> dict[str, Any]:
    """Return the memory of the service's processes before and after many requests."""
    with running(str(model)) as service:
        load(service.port, image, 8, 1000)
        before = service.memory_mib()
        load(service.port, image, 8, options.many)
        return {"requests": options.many, "before": before, "after": service.memory_mib()}


def measure_malformed(model: Path, image: bytes, options: argparse.Namespace) -> dict[str, Any]:
    """Return the statuses of malformed requests, and whether the service goes on."""
    with running(str(model), "--timeout", "3") as service:
        statuses = fuzz(service.port, options.malformed)
        errors = sum(
            n for counts in statuses.values() for status, n in counts.items() if status.startswith("5")
        )
        lines = sum(bool(re.search(r": 5\d\d$", line)) for line in service.log)
        alive = load(service.port, image, 2, 20)["requests"] == 20
        return {
            "requests": options.malformed, "statuses": statuses, "errors_of_the_server": errors,
            "their_log_lines": lines, "answers_afterwards": alive, "exit_status": service.stop(),
        }  # fmt: skip


PARTS = {"load": measure_load, "memory": measure_memory, "malformed": measure_malformed}


def main() -> int:
    """Measure the parts that are asked for; the results of the others stay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Exported detector, .onnx or .xml.")
    parser.add_argument("image", type=Path, help="Image to send.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--requests", type=int, default=320, help="Requests per load test.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds of load tests.")
    parser.add_argument("--many", type=int, default=10_000, help="Requests before memory is read again.")
    parser.add_argument("--malformed", type=int, default=1000, help="Malformed requests.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve.json"))
    options = parser.parse_args()
    found = read_json(options.out)
    image = options.image.read_bytes()
    for part in options.parts:
        found |= study_results(__file__, **{part: PARTS[part](options.model, image, options)})
        write_json(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Frames per second of `thawline export --format web` in headless Chromium, beside onnxruntime.

    thawline export runs/cards --format web --out site
    python benchmarks/browser.py site

Both run the same file on the same bytes, in turn; Chromium is driven over a pipe.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from harness import study_results
from thawline.files import read_json, write_json
from thawline.sessions import open_onnx

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


class Browser:
    """A page in headless Chromium.

    Args:
        profile: folder for the browser's files.
    """

    def __init__(self, profile: Path) -> None:
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()

        def connect() -> None:  # Chromium reads commands from descriptor 3, and answers to 4
            os.dup2(to_browser, 100)
            os.dup2(from_browser, 101)
            os.dup2(100, 3)
            os.dup2(101, 4)

        self._process = subprocess.Popen(
            [
                CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe",
            ],
            preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._rest, self._id, self._session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol, and return its result."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                self._rest += os.read(self._from, 1 << 20) or b'{"id":-1}\0'
            one, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(one)
            assert answer.get("id") != -1, "the browser has ended"
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression, or of what it promises, in the page."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(20)


@contextmanager
def open_page(site: Path) -> Iterator[Browser]:
    """Serve a folder, and yield a browser that shows its page, ready to detect."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = Browser(Path(profile))
        try:
            browser.call("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/index.html")
            deadline = time.monotonic() + 120
            while not browser.evaluate("'thawline' in self"):  # it loads twice: with threads, the second time
                assert time.monotonic() < deadline, browser.evaluate("document.body.innerText")
                time.sleep(0.2)
            yield browser
        finally:
            browser.close()
            server.shutdown()


IN_PAGE = """(async () => {
  const { detector } = thawline, milliseconds = { network: [], whole: [] };
  const [height, width] = detector.about.image_size, bytes = new Uint8Array(3 * height * width).fill(90);
  const frame = new ImageData(640, 480);
  for (let n = 0; n < %d; n++) {
    let start = performance.now();
    await detector.run(bytes);
    milliseconds.network.push(performance.now() - start);
    start = performance.now();
    await detector.detect(frame);
    milliseconds.whole.push(performance.now() - start);
  }
  return milliseconds;
})()"""
"""Times of the network on its own size, and of a frame of 640 × 480 with resizing."""


def main() -> int:
    """Measure a folder's page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="Folder of `thawline export --format web`.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=20, help="Calls of each in a round.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/browser.json"))
    options = parser.parse_args()
    height, width = read_json(options.site / "model.json")["image_size"]
    image = np.full((1, 3, height, width), 90 / 255, np.float32)
    rounds = []
    with open_page(options.site) as browser:
        about = browser.evaluate(
            "[thawline.detector.provider, thawline.detector.threads, navigator.userAgent]"
        )
        native = open_onnx(options.site / "model.onnx", threads=about[1])
        for _ in range(options.rounds + 1):
            times = []
            for _ in range(options.calls):
                start = time.perf_counter()
                native({"images": image})
                times.append((time.perf_counter() - start) * 1000)
            found = browser.evaluate(IN_PAGE % options.calls) | {"native": times}
            rounds.append({f"{name}_ms": float(np.median(one)) for name, one in found.items()})
    rounds = rounds[1:]  # the first one warms up
    median = {name: float(np.median([one[name] for one in rounds])) for name in rounds[0]}
    results = {
        "provider": about[0], "threads": about[1], "size": [height, width],
        "load_average": os.getloadavg(), "rounds": options.rounds, **median,
        "network_by_native": float(np.median([one["network_ms"] / one["native_ms"] for one in rounds])),
        "frames_per_s": 1000 / median["whole_ms"],
    }  # fmt: skip
    write_json(options.out, study_results(__file__, **results))
    sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

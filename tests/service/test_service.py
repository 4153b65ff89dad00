"""The service answers, refuses what goes beyond its limits, and ends well."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.service.conftest import TOKEN, Service
from thawline.cli import main
from thawline.errors import ConfigError
from thawline.runtime import Detector
from thawline.service.server import _endpoints

PATH = "/predict/small"


def encoded(width: int = 90, height: int = 60, kind: str = "PNG") -> bytes:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8))
    data = io.BytesIO()
    small.resize((width, height)).save(data, kind)
    return data.getvalue()


def form(data: bytes, name: str = "file") -> tuple[bytes, str]:
    head = '--xyz\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n--xyz\r\n'
    head += (
        f'Content-Disposition: form-data; name="{name}"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    return head.encode() + data + b"\r\n--xyz--\r\n", "multipart/form-data; boundary=xyz"


def test_an_image_gives_the_detectors_boxes(service: Service, model: Path) -> None:
    image = encoded()
    status, body = service.ask(PATH, image)
    assert status == 200
    found = json.loads(body)["detections"]
    expected = Detector(model, threshold=0.0)(Image.open(io.BytesIO(image)))
    assert [one["class_name"] for one in found] == expected.data["class_name"].tolist()
    np.testing.assert_allclose([one["box"] for one in found], expected.xyxy, atol=0.006)
    np.testing.assert_allclose([one["score"] for one in found], expected.confidence, atol=1e-5)
    body, kind = form(image)
    assert service.ask("/predict/other", body, Content_Type=kind) == (status, service.ask(PATH, image)[1])
    few = json.loads(service.ask(f"{PATH}?threshold={found[1]['score']:.5f}", image)[1])["detections"]
    assert len(few) <= 2 < len(found)


def test_draw_gives_a_labelled_png_of_the_images_size(service: Service) -> None:
    status, body = service.ask(f"{PATH}?draw=1", encoded(), Accept_Encoding="gzip")
    drawn = Image.open(io.BytesIO(body))
    assert (status, drawn.format, drawn.size) == (200, "PNG", (90, 60))
    assert (np.asarray(drawn) != np.asarray(Image.open(io.BytesIO(encoded())))).any()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_formats_are_accepted(service: Service, kind: str) -> None:
    assert service.ask(PATH, encoded(kind=kind))[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        (PATH, b"", 400, "body is empty"),
        (PATH, b"no image", 415, "Expected an image (JPEG, PNG"),
        (PATH, encoded()[:-30], 400, "truncated"),
        (PATH, encoded(200, 150, "JPEG")[:1500], 400, "truncated"),
        (PATH, b"x" * 100_001, 413, "larger than 100,000 bytes"),
        (PATH, encoded(300, 200), 413, "300×200 pixels are more than 40,000"),
        (f"{PATH}?draw=yes", encoded(), 400, "draw=yes: expected 0 or 1"),
        (f"{PATH}?threshold=high", encoded(), 400, "threshold=high: expected a number"),
        (f"{PATH}?threshold=nan", encoded(), 400, "threshold=nan: expected a number"),
        (f"{PATH}?size=3", encoded(), 400, "Unknown parameter 'size'. Known: draw, threshold"),
        ("/predict", encoded(), 404, "Not Found"),
        (PATH, None, 405, "Method Not Allowed"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(
    service: Service, path: str, body: bytes | None, status: int, text: str
) -> None:
    found, answer = service.ask(path, body)
    assert (found, text in json.loads(answer)["detail"]) == (status, True), answer


def test_a_form_without_a_file_is_refused(service: Service) -> None:
    for body, kind in ((b"--xyz--", "multipart/form-data; boundary=xyz"), (encoded(), "multipart/form-data")):
        status, answer = service.ask(PATH, body, Content_Type=kind)
        assert (status, b"holds no file" in answer) == (400, True)


def test_the_token_is_asked_for_everywhere_but_by_probes(service: Service) -> None:
    for path, body in ((PATH, encoded()), ("/metrics", None), ("/info", None), ("/nothing", None)):
        for token in (None, "", "guess", TOKEN + "x"):
            assert service.ask(path, body, token)[0] == 401
    assert service.ask("/health", token=None) == (200, b"ok")
    assert service.ask("/ready", token=None) == (200, b"ok")


def count(service: Service, line: str) -> float:
    lines = service.ask("/metrics")[1].decode().splitlines()
    return sum(float(one.split()[-1]) for one in lines if one.startswith(line))


def test_metrics_count_requests_by_path_and_status(service: Service) -> None:
    good, times = f'thawline_requests_total{{path="{PATH}",status="200"}}', "thawline_request_seconds_count"
    before, timed = count(service, good), count(service, times)
    service.ask(PATH, encoded())
    service.ask("/secret/../place")
    assert (count(service, good) - before, count(service, times) - timed) == (1, 1)
    assert count(service, 'thawline_requests_total{path="other",status="404"}') >= 1
    assert count(service, "thawline_active_requests") == 0


def raw(service: Service, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send bytes one after another, and return the answer."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        answer = b""
        while b"}" not in answer and (data := connection.recv(65536)):
            answer += data
        return answer


HEAD = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()


def test_bodies_are_cut_when_they_are_slow_or_larger_than_they_say(service: Service) -> None:
    start = time.monotonic()
    assert b" 408 " in raw(service, HEAD + b"Content-Length: 500\r\n\r\n", b"a", b"b", pause=0.2)
    assert 5.5 < time.monotonic() - start < 10
    # Refused by what the header says, before any of it is read, and by what comes where it says nothing.
    assert b" 413 " in raw(service, HEAD + b"Content-Length: 99999999999\r\n\r\n")
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    assert b" 413 " in raw(service, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk)
    assert b" 400 " in raw(service, HEAD + b"X-Long: " + b"y" * 100_000 + b"\r\n\r\n")


def test_more_requests_at_once_than_allowed_are_refused_and_the_rest_goes_on(service: Service) -> None:
    waiting = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(6)]
    for connection in waiting:
        connection.sendall(HEAD + b"Content-Length: 500\r\n\r\n")
    time.sleep(0.3)
    assert service.ask(PATH, encoded()) == (503, b'{"detail":"Too many requests at once. Try again."}')
    assert service.ask("/health")[0] == 200
    for connection in waiting:
        connection.close()
    time.sleep(0.3)
    assert service.ask(PATH, encoded())[0] == 200
    assert any("503" in line for line in service.log)


def test_many_clients_get_each_their_own_answer(service: Service) -> None:
    images = [encoded(40 + 9 * n, 50) for n in range(6)]
    alone = [service.ask(PATH, image) for image in images]
    together: list[tuple[int, bytes] | None] = [None] * len(images)

    def ask(index: int) -> None:
        together[index] = service.ask(PATH, images[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert other is not None
        assert one[0] == other[0] == 200
        boxes = [[found["box"] for found in json.loads(body)["detections"]] for _, body in (one, other)]
        np.testing.assert_allclose(*boxes, atol=0.02)


def test_models_are_named_as_paths_or_texts(tmp_path: Path) -> None:
    assert _endpoints("a.onnx") == _endpoints(["a.onnx"]) == {"/predict": "a.onnx"}
    assert _endpoints({"a": Path("x.onnx")}) == _endpoints(["a=x.onnx"]) == {"/predict/a": "x.onnx"}
    with pytest.raises(ConfigError, match=r"Name each of 2 models.*NAME=MODEL"):
        _endpoints(["a.onnx", "b.onnx"])
    with pytest.raises(ConfigError, match="letters, digits"):
        _endpoints({"a b": "x.onnx"})


def test_what_cannot_be_served_ends_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, text in (
            ((str(tmp_path / "none.onnx"),), "No exported detector"),
            ((str(model), "--port", str(taken.getsockname()[1])), "Address already in use"),
            ((str(model), "--timeout", "0"), "expected seconds, more than 0"),
            ((str(model), "--batch_size", "0"), "`batch_size` must be a number of at least 1"),
        ):
            assert main(["serve", *words]) != 0
            (line,) = capsys.readouterr().err.splitlines()
            assert text in line


def test_a_worker_that_dies_is_replaced_and_taken_requests_are_finished(fresh: Service) -> None:
    import psutil

    service = fresh
    (worker,) = (
        child
        for child in psutil.Process(service.process.pid).children()
        if "spawn_main" in str(child.cmdline())
    )
    worker.kill()
    deadline = time.monotonic() + 60
    while service.ask("/predict", encoded())[0] != 200:
        assert time.monotonic() < deadline
    answers: list[int] = []
    image = encoded(900, 700)
    asking = [
        threading.Thread(target=lambda: answers.append(service.ask("/predict?draw=1", image)[0]))
        for _ in range(4)
    ]
    for thread in asking:
        thread.start()
    while len(answers) + count(service, "thawline_active_requests") < 4:
        time.sleep(0.01)
    family = psutil.Process(service.process.pid).children(recursive=True)
    assert service.stop() == 0
    for thread in asking:
        thread.join()
    assert answers == [200] * 4
    assert not psutil.wait_procs(family, timeout=5)[1]

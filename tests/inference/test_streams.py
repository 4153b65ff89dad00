"""Network streams: opened, opened again when they are lost, and what is said when they cannot be."""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch

from thawline.cli import main
from thawline.errors import DataError
from thawline.inference import Detector, videos
from thawline.inference.files import predict_files
from thawline.inference.videos import is_video
from thawline.models.deimv2 import DEIMv2


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    model = DEIMv2.from_variant("atto", class_names=("a", "b"), image_size=(64, 64), num_queries=9)
    return Detector(model, device="cpu", threshold=0.0)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "PAUSES", (0, 0.01, 0.01))


def jpeg(grey: int) -> bytes:
    return cv2.imencode(".jpg", np.full((48, 64, 3), grey, np.uint8))[1].tobytes()


class Camera(BaseHTTPRequestHandler):
    """Serves `images` as MJPEG once per connection, `lives` times; also a photo and a page."""

    lives = 1
    images = 6

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/private.jpg":
            login = self.headers.get("Authorization")
            path = "/photo.jpg" if login == f"Basic {b64encode(b'admin:p@ss').decode()}" else "/denied"
        if path == "/photo.jpg":
            self.answer("image/jpeg", jpeg(100))
        elif path == "/page.jpg":
            self.answer("text/html", b"<p>please log in</p>")
        elif path == "/clip.mp4":
            self.answer("video/mp4", Camera.clip)
        elif path == "/stream" and Camera.lives > 0:
            Camera.lives -= 1
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for number in range(self.images):
                data = jpeg(30 * number)
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                self.wfile.write(head.encode() + data + b"\r\n")
        else:
            self.send_error(404)

    def answer(self, kind: str, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass

    clip: ClassVar[bytes] = b""


@pytest.fixture
def server() -> Iterator[str]:
    Camera.lives = 1
    with ThreadingHTTPServer(("127.0.0.1", 0), Camera) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_stream_is_read_and_opened_again_when_it_stops(
    detector: Detector, server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Camera.lives = 2
    summary = predict_files(detector, f"{server}/stream", tmp_path)
    assert 2 <= summary.images <= 12  # of those that come while another is predicted, the newest
    (reason,) = summary.unreadable.values()
    assert f"ended after {summary.images} images" in reason
    assert "Reopening it" in caplog.text
    written = cv2.VideoCapture(str(tmp_path / "stream.mp4"))
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == summary.images
    assert cv2.VideoCapture(str(tmp_path / "stream.mp4")).read()[1].shape == (48, 64, 3)


def test_images_and_files_behind_an_address_end(detector: Detector, server: str, tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "x.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48))
    for grey in range(4):
        writer.write(np.full((48, 64, 3), 40 * grey, np.uint8))
    writer.release()
    Camera.clip = (tmp_path / "x.mp4").read_bytes()
    assert len(list(detector(f"{server}/clip.mp4"))) == 4
    assert detector(f"{server}/photo.jpg?size=large").xyxy.shape[1] == 4
    assert detector(f"{server}/private.jpg".replace("//", "//admin:p%40ss@")).xyxy.shape[1] == 4
    with pytest.raises(DataError, match="private.jpg' cannot be downloaded") as caught:
        detector(f"{server}/private.jpg".replace("//", "//admin:wr@ng@"))
    assert "ng@" not in str(caught.value)
    summary = predict_files(detector, [f"{server}/photo.jpg"], tmp_path / "out")
    assert summary.images == 1
    assert (tmp_path / "out" / "photo.jpg.png").is_file()
    with pytest.raises(DataError, match="is text/html, not an image"):
        detector(f"{server}/page.jpg")
    with pytest.raises(DataError, match="cannot be downloaded"):
        detector(f"{server}/missing.jpg")


def test_what_cannot_be_opened_is_said_in_one_line_without_the_password(
    tmp_path: Path, server: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = DEIMv2.from_variant("atto", class_names=("a", "b"), image_size=(64, 64), num_queries=9)
    model.save_pretrained(tmp_path / "model")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for address in (f"rtsp://admin:secret@127.0.0.1:{port}/live", f"{server}/nothing.m3u8"):
        assert main(["predict", str(tmp_path / "model"), "--source", address]) == 1
        # In a process of its own the command also silences OpenCV, which here is imported already.
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("thawline: Stream '")
        assert "cannot be opened. Check address, user and password" in line
        assert "secret" not in line


class RtspCamera(socketserver.StreamRequestHandler):
    """Plays `video`, an MPEG transport stream, over RTSP's own TCP connection, `lives` times."""

    video: ClassVar[bytes] = b""
    lives: ClassVar[int] = 0

    def handle(self) -> None:
        while request := self.read_request():
            verb, headers = request
            more, body = {
                "OPTIONS": ("Public: DESCRIBE, SETUP, PLAY\r\n", ""),
                "DESCRIBE": (
                    "Content-Type: application/sdp\r\n",
                    "v=0\r\ns=x\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\n",
                ),
                "SETUP": ("Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n", ""),
            }.get(verb, ("Session: 1\r\n", ""))
            code = "200 OK" if RtspCamera.lives > 0 else "404 Not Found"
            head = f"RTSP/1.0 {code}\r\nCSeq: {headers['cseq']}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
            self.wfile.write((head + body).encode())
            if verb == "PLAY":
                RtspCamera.lives -= 1
                self.play()
                return

    def read_request(self) -> tuple[str, dict[str, str]] | None:
        lines = list(iter(lambda: self.rfile.readline().decode().strip(), ""))
        pairs = (line.partition(":")[::2] for line in lines[1:])
        return (lines[0].split()[0], {key.lower(): value.strip() for key, value in pairs}) if lines else None

    def play(self) -> None:
        packets = range(0, len(self.video), 7 * 188)
        for number, start in enumerate(packets):
            packet = (
                struct.pack("!BBHII", 0x80, 33, number, 3000 * number, 1)
                + self.video[start : start + 7 * 188]
            )
            self.wfile.write(b"$\0" + struct.pack("!H", len(packet)) + packet)


class Silent(socketserver.StreamRequestHandler):
    """Accepts a connection and never answers."""

    def handle(self) -> None:
        self.rfile.read()


@contextmanager
def tcp_server(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    """Serve connections on a free port of this machine."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running.server_address[1]
        running.shutdown()


def test_an_rtsp_stream_is_read_and_opened_again_when_it_stops(tmp_path: Path, caplog) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "x.ts"), cv2.VideoWriter.fourcc(*"MPG2"), 25.0, (64, 48))
    for grey in range(30):
        writer.write(np.full((48, 64, 3), 8 * grey, np.uint8))
    writer.release()
    RtspCamera.video, RtspCamera.lives = (tmp_path / "x.ts").read_bytes(), 2
    with tcp_server(RtspCamera) as port:
        source = videos.open_video(f"rtsp://admin:secret@127.0.0.1:{port}/live")
        *frames, last = source.frames
    assert source.is_live
    assert {frame.load().shape for frame in frames} == {(48, 64, 3)}
    with pytest.raises(DataError, match=f"ended after {len(frames)} images: 3 attempts to reopen it failed"):
        last.load()
    assert RtspCamera.lives == 0
    assert "Reopening it" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(videos, "TIMEOUT", 1)
    with tcp_server(Silent) as port, pytest.raises(DataError, match="cannot be opened. Check address"):
        videos.open_video(f"{scheme}://127.0.0.1:{port}/live")


class Flaky:
    """A stream that gives two images, fails, cannot be opened once, and comes back."""

    opened: ClassVar[list[tuple]] = []
    lives: ClassVar[list[int]] = []

    def __init__(self, *arguments: object) -> None:
        Flaky.opened.append(arguments)
        self.left = Flaky.lives.pop(0) if Flaky.lives else 0

    def isOpened(self) -> bool:
        return self.left > 0

    def get(self, prop: int) -> float:
        return -1.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (True, np.full((48, 64, 3), self.left, np.uint8)) if self.left >= 0 else (False, None)

    def release(self) -> None:
        pass


def test_attempts_count_from_the_last_image_on(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv2.VideoCapture", Flaky)
    Flaky.opened.clear()
    Flaky.lives[:] = [2, 0, 0, 1, 0, 0, 3]
    seen = list(detector.stream("rtsp://camera.local/live"))
    assert [prediction.error == "" for prediction in seen] == [True] * (len(seen) - 1) + [False]
    assert [prediction.name for prediction in seen[:-1]] == [f"frame {n}" for n in range(len(seen) - 1)]
    assert 3 <= len(seen) - 1 <= 6
    assert len(Flaky.opened) == 7 + 3
    address, backend, limits = Flaky.opened[0]
    assert (address, backend) == ("rtsp://camera.local/live", cv2.CAP_FFMPEG)
    assert cv2.CAP_PROP_READ_TIMEOUT_MSEC in limits


@pytest.mark.parametrize("source", [0, "rtsp://camera.local/live"])
def test_a_slow_detector_sees_the_newest_image(monkeypatch: pytest.MonkeyPatch, source: int | str) -> None:
    is_busy, has_ended = threading.Event(), threading.Event()

    class Fast(Flaky):
        def read(self) -> tuple[bool, np.ndarray | None]:
            assert self.left == 90 or is_busy.wait(10)
            return super().read()

        def release(self) -> None:
            has_ended.set()

    monkeypatch.setattr("cv2.VideoCapture", Fast)
    Flaky.lives[:] = [90]
    frames = iter(videos.open_video(source).frames)
    assert next(frames).load().max() == 89
    is_busy.set()
    assert has_ended.wait(10)
    assert next(frames).load().max() == 0


def test_ctrl_c_ends_a_stream_and_keeps_its_results(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(prediction: object) -> None:
        if prediction.name == "frame 0":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cv2.VideoCapture", Flaky)
        Flaky.lives[:] = [9]
        summary = predict_files(detector, "rtsp://camera.local/live", tmp_path, interrupt, save_results=True)
        # What a camera saw cannot be seen again: a second recording gets a name of its own.
        Flaky.lives[:] = [9]
        predict_files(detector, "rtsp://camera.local/live", tmp_path, interrupt)
    assert cv2.VideoCapture(str(tmp_path / "stream-2.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 1
    assert summary.images == 1
    assert (tmp_path / "predictions.json").is_file()
    assert cv2.VideoCapture(str(tmp_path / "stream.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 1


def test_cameras_are_numbers_digits_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in (0, "0", "/dev/video2", "rtsp://x/1", "RTMP://x/live", "https://x/a.m3u8", "http://x/"):
        assert is_video(source), source
    (tmp_path / "7").mkdir()
    for source in ("7", "a.jpg", "https://x/a.jpg?b=c.mp4", "0.png", True, Path("x")):
        assert not is_video(source), source
    monkeypatch.setattr("cv2.VideoCapture", Flaky)
    Flaky.lives[:], Flaky.opened[:] = [1, 1], []
    for source in ("3", "/dev/video3"):
        videos.open_video(source)
    assert Flaky.opened == [(3,), ("/dev/video3",)]

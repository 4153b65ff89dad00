"""A detector in LitServe's terms: requests predicted in batches and encoded, in a process of its own."""
# No `from __future__ import annotations`: LitServe reads the annotation of `decode_request` as a value.

__all__ = ["DetectionAPI", "load_detector"]

import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty
from typing import Annotated, Any

import numpy as np
from fastapi import Depends
from litserve import LitAPI
from litserve.loops.simple_loops import BatchedLoop
from litserve.utils import LitAPIStatus, LoopResponseType
from starlette.responses import JSONResponse, Response

from thawline.data.detection.drawing import encode_image
from thawline.data.detection.images import decode_image
from thawline.domains import check_base_options, is_shared
from thawline.errors import ThawlineError
from thawline.inference.detector import Detector, Prediction, empty_detections
from thawline.inference.files import draw
from thawline.inference.frames import Frame, Source
from thawline.service.upload import Upload, read_upload


class Loop(BatchedLoop):
    """Batches of what is waiting; LitServe's own loop asks the queue without a pause while nothing is."""

    def get_batch_requests(self, lit_api: LitAPI, request_queue: Any, transport: Any) -> tuple[list, list]:
        """Wait for a request, and take those that wait already or arrive within `batch_timeout`.

        Returns: (queue of the answer, id, request) of each, and (queue, id) of those that waited too long.
        """
        taken: list[tuple[int, str, Any]] = []
        late: list[tuple[int, str]] = []
        end = None
        while len(taken) < lit_api.max_batch_size:
            wait = 1.0 if end is None else end - time.monotonic()
            try:
                queue, uid, since, request = request_queue.get(block=wait > 0, timeout=max(wait, 0))
            except Empty:
                break
            start = {"response_data": (), "status": LitAPIStatus.START}
            self.put_response(transport, queue, uid, response_type=LoopResponseType.REGULAR, **start)
            end = end or time.monotonic() + lit_api.batch_timeout
            if time.monotonic() - since > lit_api.request_timeout:
                late.append((queue, uid))
            else:
                taken.append((queue, uid, request))
        return taken, late


def load_detector(model: str, options: dict[str, Any]) -> Any:
    """Load a detector, or the domains of a shared folder."""
    if not is_shared(model):
        return Detector.from_pretrained(model, **options)
    check_base_options(model, options.get("variant"), options.get("weights", "pretrained"))
    from thawline.inference.shared import SharedDetector  # loads torch, which an exported file does without

    return SharedDetector.from_pretrained(model, device=options.get("device"))


class DetectionAPI(LitAPI):
    """Endpoint of a detector.

    Args:
        path: of the endpoint.
        model, options: arguments of `Detector.from_pretrained`; or the model is a shared folder of domains.
        batch_size: largest number of images in a forward pass.
        batch_wait: seconds that a request waits for others.
    """

    def __init__(
        self, path: str, model: str, options: dict[str, Any], *, batch_size: int, batch_wait: float
    ) -> None:
        super().__init__(batch_size, batch_wait, path, loop=Loop())
        self._model, self._options = model, options

    def setup(self, device: str) -> None:
        """Load the detector, in the process that runs it."""
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # Ctrl-C reaches all processes: what was taken is finished
        self._threads = ThreadPoolExecutor()
        self._detector = load_detector(self._model, self._options)
        self._is_shared = is_shared(self._model)
        # A runtime's first call is its slowest.
        self._detector(np.zeros((8, 8, 3), np.uint8), **({"domain": "all"} if self._is_shared else {}))

    def decode_request(self, request: Annotated[Upload, Depends(read_upload)]) -> Upload:
        """Return the upload: it is read in the server's process, and decoded in `predict`."""
        return request

    def predict(self, uploads: Sequence[Upload]) -> list[tuple[Upload, Prediction]]:
        """Detect in a batch of images."""
        # Decoding takes as long as a small network, and only a batch can use several cores for it.
        images = [self._threads.submit(decode_image, upload.data) for upload in uploads]
        frames = [Frame("image", image.result) for image in images]
        if self._is_shared:
            return [(one, self._in_domain(one, frame)) for one, frame in zip(uploads, frames, strict=True)]
        scores = [self._threshold(upload) for upload in uploads]
        source = Source(frames, len(frames))
        found = self._detector.stream(source, threshold=min(scores), batch_size=len(frames))
        return list(zip(uploads, found, strict=True))

    def encode_response(self, output: tuple[Upload, Prediction]) -> Response:
        """Return detections as JSON, or drawn, as PNG."""
        upload, prediction = output
        if prediction.image is None:
            return JSONResponse({"detail": prediction.error}, 400)
        found = prediction.detections
        if not self._is_shared:
            if upload.domain is not None:
                return JSONResponse({"detail": f"domain={upload.domain}: this model has no domains."}, 400)
            found = found[found.confidence >= self._threshold(upload)]
        if upload.draw:
            # The encoding keeps LitServe from compressing it again.
            headers = {"Content-Encoding": "identity"}
            return Response(encode_image(draw(prediction.image, found), ".png"), 200, headers, "image/png")
        rows = [
            {"box": [round(edge, 2) for edge in box], "score": round(score, 5), "class_name": str(name)}
            for box, score, name in zip(
                found.xyxy.tolist(), found.confidence.tolist(), found.data.get("class_name", []), strict=True
            )
        ]
        if "domain" in found.data:
            rows = [
                {**row, "domain": str(name)} for row, name in zip(rows, found.data["domain"], strict=True)
            ]
        return JSONResponse({"detections": rows})

    def _in_domain(self, upload: Upload, frame: Frame) -> Prediction:
        """Detect by the domain that a request names."""
        threshold = self._options.get("threshold") if upload.threshold is None else upload.threshold
        try:
            return next(self._detector.stream(Source([frame], 1), domain=upload.domain, threshold=threshold))
        except ThawlineError as error:  # no such domain, or a broken one
            return Prediction(frame.name, None, empty_detections(), str(error))

    def _threshold(self, upload: Upload) -> float:
        return self._detector.threshold if upload.threshold is None else upload.threshold

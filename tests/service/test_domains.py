"""A shared folder behind the service: the domain of a request decides who answers."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from tests.support.domains import NAMES, make_base, make_domain
from thawline.domains.folder import SharedFolder
from thawline.recipe import Frozen

pytest.importorskip("litserve")

from thawline.service.api import DetectionAPI
from thawline.service.upload import Upload


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> DetectionAPI:
    folder = tmp_path_factory.mktemp("shop")
    base = make_base()
    shared = SharedFolder.create(folder / "shared", base)
    for name in ("cards", "pcb"):
        shared.add(make_domain(base, folder / name, name, Frozen()))
    api = DetectionAPI("/predict", str(folder / "shared"), {"device": "cpu"}, batch_size=4, batch_wait=0.0)
    api.setup("cpu")
    return api


def ask(api: DetectionAPI, *domains: str | None, **options: object) -> list[tuple[int, dict]]:
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    data = cv2.imencode(".png", image)[1].tobytes()
    uploads = [Upload(data, domain=domain, **options) for domain in domains]  # type: ignore[arg-type]
    answers = [api.encode_response(output) for output in api.predict(uploads)]
    return [(answer.status_code, json.loads(answer.body)) for answer in answers]


def test_each_request_of_a_batch_is_answered_by_its_domain(api: DetectionAPI) -> None:
    (_, cards), (_, pcb), (_, every) = ask(api, "cards", "pcb", "all")
    for name, found in (("cards", cards), ("pcb", pcb)):
        assert {row["domain"] for row in found["detections"]} == {name}
        assert {row["class_name"] for row in found["detections"]} <= set(NAMES[name])
    assert len(every["detections"]) == len(cards["detections"]) + len(pcb["detections"])
    ((_, few),) = ask(api, "cards", threshold=0.5)
    assert all(row["score"] >= 0.5 for row in few["detections"])


def test_an_unknown_domain_is_the_callers_mistake(api: DetectionAPI) -> None:
    (status, answer), (other, which) = ask(api, "card", None)
    assert status == other == 400
    assert "Did you mean 'cards'" in answer["detail"]
    assert "Which domain" in which["detail"]

"""Malformed requests: each is answered or cut, none ends the service or becomes an error of the server."""

from __future__ import annotations

import json

from serving import MALFORMED, fuzz
from tests.service.conftest import Service
from tests.service.test_service import PATH, encoded


def test_malformed_requests_are_refused_and_the_service_goes_on(open_service: Service) -> None:
    found = fuzz(open_service.port, 150, seed=1)
    assert set(found) == set(MALFORMED)
    for kind, statuses in found.items():
        assert set(statuses) <= {"200", "400", "404", "405", "408", "413", "415", "431", "closed", "left"}, (
            kind
        )
    assert found["slow"].keys() == {"408"}
    assert found["bomb"].keys() == {"413"}
    status, answer = open_service.ask(PATH.replace("/small", ""), encoded())
    assert status == 200
    assert "detections" in json.loads(answer)

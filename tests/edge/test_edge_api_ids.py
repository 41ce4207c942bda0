"""The id of a request: the client's own where it sends one, in every reply and with every choice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.edge.edge_world import TinyModel
from tests.edge.live_edge import LiveEdge, live_edge

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def edge(tiny: TinyModel) -> Iterator[LiveEdge]:
    with live_edge(tiny.pack) as edge:
        yield edge


@pytest.mark.parametrize("asked", ["mine", "a.b_c-D9" * 16])
def test_a_clients_id_is_the_requests(edge: LiveEdge, asked: str) -> None:
    for path, status in ((CHAT, 200), (COMPLETIONS, 400), ("/nowhere", 404), ("/livez", 405)):
        answer = edge.http.post(path, json=BODY, headers={"x-request-id": asked})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, asked)
        assert path != CHAT or answer.json()["isthmus"]["request_id"] == asked


@pytest.mark.parametrize("asked", [b"", b"x" * 129, b"a b", "é".encode()])
def test_what_is_no_id_is_replaced(edge: LiveEdge, asked: bytes) -> None:
    answers = [edge.http.get("/livez", headers={b"x-request-id": asked}) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2
    assert all(each.startswith("req-") for each in ids)


def test_a_stranger_is_told_his_requests_id_too(edge: LiveEdge) -> None:
    answer = edge.http.get("/v1/models", headers={"host": "evil.example", "x-request-id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (403, "mine")


def test_each_choice_has_an_id_of_its_own(edge: LiveEdge) -> None:
    answer = edge.http.post(CHAT, json={**BODY, "n": 2}, headers={"x-request-id": "x" * 127})
    assert answer.status_code == 400  # the second one's would be too long
    assert answer.json()["error"]["code"] == "bad_request_id"
    assert edge.http.post(CHAT, json={**BODY, "n": 2}, headers={"x-request-id": "x"}).status_code == 200

"""POST /v1/route decides and runs nothing; wishes about speed and money; decisions in replies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from isthmus.edge.requests import Slo
from isthmus.edge.routing import RoutingOptions
from isthmus.splitter.profile_store import example
from tests.edge.edge_world import TinyModel
from tests.edge.live_edge import LiveEdge, live_edge
from tests.edge.test_edge_api_models import chat, completion, requests

CHAT, COMPLETIONS, ROUTE = "/v1/chat/completions", "/v1/completions", "/v1/route"
HELLO = [{"role": "user", "content": "hello"}]
NUM_LAYERS = 4
PROFILE = example("laptop-8-core-smollm2-135m").model_copy(
    update={"num_layers": NUM_LAYERS, "layer_share": (1.0,) * NUM_LAYERS}
)


@pytest.fixture(scope="module")
def edge(tiny: TinyModel) -> Iterator[LiveEdge]:
    """An edge that can predict, without a cloud."""
    with live_edge(tiny.pack, routing=RoutingOptions(profile=PROFILE)) as edge:
        yield edge


def refused(edge: LiveEdge, path: str, body: dict[str, Any] | bytes, code: str) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = edge.http.post(path, content=content)
    assert answer.status_code in (400, 404, 409, 422, 503), answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == code, error
    return error


# ---- deciding without running ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "max_tokens"),
    [
        ({"messages": HELLO, "max_tokens": 9}, 9),
        ({"messages": HELLO}, None),
        ({"prompt": "hello 2", "max_tokens": 9}, 9),
        ({"prompt": [5, 6, 7]}, 16),
    ],
    ids=str,
)
def test_the_decision_of_either_body(edge: LiveEdge, body: dict[str, Any], max_tokens: int | None) -> None:
    before = edge.stats()
    answer = edge.http.post(ROUTE, json=body)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said.keys() == {"route", "split", "shape", "reason", "decision", "request"}
    assert (said["route"], said["split"], said["shape"]) == ("local", NUM_LAYERS, None)
    assert answer.headers["x-isthmus-route"] == "local"
    assert said["reason"] == said["decision"]["reason"]
    if "messages" in body:
        ids = edge.template.encode(body["messages"])
    else:
        ids = body["prompt"] if isinstance(body["prompt"], list) else edge.template.encode_raw(body["prompt"])
    limit = max_tokens if max_tokens is not None else 512 - len(ids)
    assert said["request"] == {"prompt_tokens": len(ids), "max_tokens": limit}
    assert [(c["route"], c["split"]) for c in said["decision"]["candidates"]] == [
        ("local", 4), ("offload", 0), ("split", 1), ("split", 2), ("split", 3)
    ]  # fmt: skip
    local = said["decision"]["candidates"][0]
    assert sum(local["terms"].values()) == pytest.approx(local["total_s"])
    assert sum(local["score_parts"].values()) == pytest.approx(local["score"])
    after = edge.stats()
    for name in ("requests", "finished", "failed", "cancelled", "tokens", "loaded_layers", "kept_caches"):
        assert before[name] == after[name], name


def test_what_is_decided_is_what_a_request_then_takes(edge: LiveEdge) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "isthmus": {"route": "local"}}
    decided = edge.http.post(ROUTE, json=body).json()
    ran = edge.http.post(CHAT, json=body).json()["isthmus"]
    assert (decided["route"], decided["split"], decided["shape"]) == (
        ran["route"], ran["split"], ran["shape"]
    )  # fmt: skip
    assert decided["reason"].startswith("route local was asked")
    assert edge.stats()["tokens"] >= 2


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ({"messages": HELLO, "stream": True}, "bad_request", "stream is not honoured here"),
        ({"prompt": "x", "n": 2}, "bad_request", "n is not honoured here"),
        ({"max_tokens": 5}, "bad_request", "neither messages nor prompt"),
        ({"messages": HELLO, "prompt": "x"}, "unknown_field", "'prompt'"),
        ({"prompt": "x", "max_completion_tokens": 5}, "unknown_field", "'max_completion_tokens'"),
        ({"prompt": "x", "isthmus": {"explian": True}}, "unknown_field", "'isthmus.explian'"),
        ({"messages": HELLO, "model": "other"}, "model_not_found", "other"),
        ({"prompt": "x", "max_tokens": 512}, "context_overflow", "512"),
        ({"prompt": "x", "isthmus": {"route": "offload"}}, "route_infeasible", "no cloud is configured"),
        (b"{", "invalid_json", "no JSON"),
        (b"[" * 100_000, "invalid_json", "no JSON"),
        (b"[]", "bad_request", "object"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_decided(edge: LiveEdge, body: dict[str, Any] | bytes, code: str, said: str) -> None:
    assert said in refused(edge, ROUTE, body, code)["message"]


def test_saying_what_is_so_anyway_is_no_mistake(edge: LiveEdge) -> None:
    body = {"prompt": "x", "n": 1, "stream": False, "isthmus": {"explain": True, "slo": None}}
    assert edge.http.post(ROUTE, json=body).status_code == 200


# ---- speed and money ---------------------------------------------------------------------------------


def test_what_is_expected_reaches_the_agent() -> None:
    body = chat(isthmus={"slo": {"ttft_s": 0.5, "tokens_per_s": 20}, "max_cost_usd": 0})
    assert (requests(body)[0].slo, requests(body)[0].max_cost_usd) == (Slo(0.5, 20.0), 0.0)
    silent = requests(completion(isthmus={"slo": {}}))[0]
    assert (silent.slo, silent.max_cost_usd) == (Slo(), None)
    default: dict[str, Any] = {"slo": {"ttft_s": 3.0, "tokens_per_s": 4.0}, "max_cost_usd": 1.0}
    some = requests(chat(isthmus={"slo": {"ttft_s": 0.5}}), **default)[0]
    assert (some.slo, some.max_cost_usd) == (Slo(0.5, 4.0), 1.0)
    assert requests(body, **default)[0].max_cost_usd == 0.0


@pytest.mark.parametrize("path", [CHAT, ROUTE])
@pytest.mark.parametrize(
    ("extension", "param"),
    [
        ('{"slo": {"ttft_s": 0}}', "isthmus.slo.ttft_s"),
        ('{"slo": {"ttft_s": -1}}', "isthmus.slo.ttft_s"),
        ('{"slo": {"ttft_s": NaN}}', "isthmus.slo.ttft_s"),
        ('{"slo": {"tokens_per_s": Infinity}}', "isthmus.slo.tokens_per_s"),
        ('{"slo": {"tokens_per_s": "fast"}}', "isthmus.slo.tokens_per_s"),
        ('{"slo": 3}', "isthmus.slo"),
        ('{"max_cost_usd": -0.01}', "isthmus.max_cost_usd"),
        ('{"max_cost_usd": NaN}', "isthmus.max_cost_usd"),
        ('{"max_cost_usd": true}', "isthmus.max_cost_usd"),
        ('{"explain": "yes"}', "isthmus.explain"),
    ],
)
def test_a_wrong_wish_is_named(edge: LiveEdge, path: str, extension: str, param: str) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "isthmus": {extension}}}'
    assert refused(edge, path, body.encode(), "bad_request")["param"] == param


def test_an_unknown_wish_is_named(edge: LiveEdge) -> None:
    body = {"messages": HELLO, "isthmus": {"slo": {"ttft": 1}}}
    assert refused(edge, CHAT, body, "unknown_field")["param"] == "isthmus.slo.ttft"


# ---- decisions in replies ------------------------------------------------------------------------------


@pytest.mark.parametrize("explain", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_reply_lists_every_candidate_only_where_asked(
    edge: LiveEdge, explain: bool, streamed: bool
) -> None:
    body = {
        "messages": HELLO, "max_tokens": 2, "stream": streamed, "isthmus": {"explain": explain}
    }  # fmt: skip
    answer = edge.http.post(CHAT, json=body)
    if streamed:
        *_, last, done = [line for line in answer.text.split("\n\n") if line]
        assert done == "data: [DONE]"
        decision = json.loads(last.removeprefix("data: "))["isthmus"]["decision"]
    else:
        decision = answer.json()["isthmus"]["decision"]
    ways = [(one["route"], one["split"]) for one in decision["candidates"]]
    everything = [("local", 4), ("offload", 0), ("split", 1), ("split", 2), ("split", 3)]
    assert ways == (everything if explain else everything[:3])
    assert decision["candidates"][0]["total_s"] > 0

"""The served OpenAPI document is true: requests made from it, valid and not, get only what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.routing import Mount, Route

from isthmus.edge.api import ServedModel, make_app
from isthmus.edge.openapi import document
from isthmus.protocol.keys import add_key, make_key
from tests.edge.edge_world import make_model
from tests.edge.live_edge import LiveEdge, live_edge

KEY = make_key()
CONFIG: dict[str, Any] = {
    "generation": {"max-examples": 5, "deterministic": True, "database": "none"},
    "auth": {"openapi": {"key": {"bearer": KEY}}},
    # Takes the bodies of the two others: a thousand cases that they have had.
    "operations": [{"include-path": "/v1/route", "phases": {"coverage": {"enabled": False}}}],
}
# What no schema can say: that prompt and max_tokens must fit the context, or which fields go together.
GENERATION = {"/v1/chat/completions", "/v1/completions", "/v1/route"}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEdge]:
    """Of a model with a short context, so that whatever is asked is soon answered."""
    folder = tmp_path_factory.mktemp("openapi")
    model = make_model(folder / "model", max_position_embeddings=48)
    add_key(folder / "keys", "tests", KEY)
    served = {"key_file": folder / "keys"}
    with live_edge(model.pack, served=served, conversations=folder / "data" / "kept.db") as edge:
        edge.http.headers["authorization"] = f"Bearer {KEY}"
        yield edge


API = schemathesis.openapi.from_dict(document(keys=True), config=SchemathesisConfig.from_dict(CONFIG))


@API.exclude(path="/v1/stats/stream").parametrize()
def test_every_answer_is_as_documented(edge: LiveEdge, case: schemathesis.Case[Any]) -> None:
    beyond: list[Any] = [positive_data_acceptance] if case.operation.path in GENERATION else []
    case.call_and_validate(base_url=edge.url, excluded_checks=beyond)


def test_the_document_is_served_and_valid(edge: LiveEdge) -> None:
    served = edge.http.get("/openapi.json").json()
    assert served == document(keys=True)
    API.validate()


def test_every_path_and_method_is_in_the_document() -> None:
    model = ServedModel("m", None, None, {})  # type: ignore[arg-type]  # only its routes are looked at
    routed: set[tuple[str, str]] = set()
    for route in make_app(model).routes:
        if isinstance(route, Mount):
            routed.add((f"{route.path}/{{path}}", "get"))
        elif isinstance(route, Route):
            path = route.path.replace(":path}", "}")
            routed |= {(path, method.lower()) for method in (route.methods or set()) - {"HEAD"}}
    documented = {
        (path, method) for path, methods in document(keys=False)["paths"].items() for method in methods
    }
    assert routed == documented


def test_an_agent_without_keys_does_not_ask_for_one() -> None:
    text = json.dumps(document(keys=False))
    assert "securitySchemes" not in text
    assert '"401"' not in text
    assert '"401"' in json.dumps(document(keys=True))

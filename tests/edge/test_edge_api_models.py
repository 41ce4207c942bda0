"""Request bodies in, generation requests out; and what a field means where it is null or left out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.advice import sampling_params
from isthmus.edge.api_errors import FieldError
from isthmus.edge.api_models import Ask, ChatRequest, CompletionRequest
from isthmus.edge.api_parse import parse_body
from isthmus.edge.requests import GenerateRequest
from isthmus.protocol.errors import RequestError

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatRequest:
    return parse_body(ChatRequest, json.dumps({"messages": HELLO, **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse_body(CompletionRequest, json.dumps({"prompt": "hello", **fields}).encode())


def requests(
    body: ChatRequest | CompletionRequest,
    *,
    prompt: int = 3,
    defaults: dict[str, Any] | None = None,
    **ask: Any,
) -> list[GenerateRequest]:
    ids = list(range(prompt))
    return body.to_requests(ids, defaults=defaults or {}, end_ids=(2,), context=512, ask=Ask(**ask))


# ---- defaults --------------------------------------------------------------------------------------


def test_nothing_said_is_openais_defaults() -> None:
    (request,) = requests(chat())
    assert request.prompt_ids == (0, 1, 2)
    assert request.max_tokens == 509
    assert request.end_ids == (2,)
    assert request.stop == ()
    assert (request.route, request.split, request.shape, request.row_format) == ("auto", None, None, None)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert sampling.logprobs == -1


@pytest.mark.parametrize("name", sorted(set(ChatRequest.model_fields) - {"messages"}))
def test_null_is_nothing_said(name: str) -> None:
    seeded = requests(chat(seed=1))
    assert [r.sampling for r in requests(chat(**{"seed": 1, name: None}))] == [
        r.sampling for r in seeded
    ] or (name == "seed")


def test_a_full_context_leaves_one_token_to_ask_for() -> None:
    """The agent refuses it with both numbers, rather than this module with none."""
    assert requests(chat(), prompt=600)[0].max_tokens == 1


def test_choices_share_the_seed_and_differ_in_their_number() -> None:
    first, second = requests(chat(n=2))
    assert first.sampling.seed == second.sampling.seed
    assert (first.sampling.choice, second.sampling.choice) == (0, 1)
    assert second.request_id == f"{first.request_id}-1"


@pytest.mark.parametrize(
    ("body", "logprobs"),
    [
        (chat(logprobs=True), 0),
        (chat(logprobs=True, top_logprobs=5), 5),
        (chat(logprobs=False), -1),
        (completion(logprobs=0), 0),
        (completion(logprobs=5), 5),
        (completion(), -1),
    ],
)
def test_logprobs(body: ChatRequest | CompletionRequest, logprobs: int) -> None:
    assert requests(body)[0].sampling.logprobs == logprobs


def test_stop_may_be_one_or_several() -> None:
    assert requests(chat(stop="a"))[0].stop == ("a",)
    assert requests(chat(stop=["a", "b"]))[0].stop == ("a", "b")


# ---- how it runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "default", "result"),
    [
        ({}, {}, (None, None)),
        ({}, {"route": "split", "split": 2}, ("split", 2)),
        ({"route": "local"}, {"route": "split", "split": 2}, ("local", None)),
        ({"route": "split"}, {"route": "auto", "split": 2}, ("split", 2)),
        ({"route": "auto"}, {"route": "local"}, ("auto", None)),
        ({"split": 3}, {"route": "local"}, (None, 3)),
        ({"split": 3}, {"route": "split", "split": 2}, (None, 3)),
    ],
)
def test_what_is_asked_goes_before_the_default(
    asked: dict[str, Any], default: dict[str, Any], result: tuple[str | None, int | None]
) -> None:
    way = Ask(**asked).over(Ask(**default))
    assert (way.route, way.split) == result


def test_shape_and_codec_are_kept_whatever_the_route() -> None:
    way = Ask(route="split", codec="f32").over(Ask(shape="u", codec="bf16"))
    assert (way.shape, way.codec) == ("u", "f32")


@pytest.mark.parametrize(
    ("asked", "default", "result"),
    [(None, None, "any"), (None, "none", "none"), ("any", "none", "any"), ("cloud", None, "cloud")],
)
def test_where_a_request_may_go_reaches_the_agent(
    asked: str | None, default: str | None, result: str
) -> None:
    body = chat(isthmus={"fallback": asked})
    assert requests(body, fallback=default)[0].fallback == result


def test_privacy_reaches_the_agent() -> None:
    assert requests(chat(isthmus={"privacy": "activations-only"}))[0].privacy == "activations-only"


def test_priority_reaches_the_agent() -> None:
    assert requests(chat())[0].priority == 0
    assert [one.priority for one in requests(chat(n=2, isthmus={"priority": -7}))] == [-7, -7]
    with pytest.raises(RequestError, match="priority is 11, allowed are -10 to 10"):
        GenerateRequest((1,), 1, priority=11)


# ---- advice of the model's makers ----------------------------------------------------------------------


def test_advice_holds_where_nothing_is_asked() -> None:
    advice = {"do_sample": True, "temperature": 0.6, "top_k": 20.0, "top_p": None, "eos_token_id": [2]}
    params = sampling_params({"temperature": None, "top_p": 0.5}, advice, temperature=1.0, seed=3)
    assert (params.temperature, params.top_k, params.top_p, params.seed) == (0.6, 20, 0.5, 3)
    assert sampling_params({"temperature": 0}, advice, temperature=1.0).temperature == 0


def test_advice_not_to_sample_is_greedy() -> None:
    advice = {"do_sample": False, "temperature": 0.6}
    assert sampling_params({}, advice, temperature=1.0).temperature == 0
    assert sampling_params({"temperature": 0.3}, advice, temperature=1.0).temperature == 0.3


@pytest.mark.parametrize(("asked", "advice"), [({"top_p": 7}, {}), ({}, {"top_p": 7})])
def test_a_value_out_of_range_says_whose_it_is(asked: dict[str, Any], advice: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="top_p is 7") as caught:
        sampling_params(asked, advice, temperature=1.0)
    assert ("generation.json" in str(caught.value)) == bool(advice)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_no_temperature_is_not_a_number(value: float) -> None:
    with pytest.raises(RequestError, match="temperature"):
        sampling_params({"temperature": value}, {}, temperature=0.0)


# ---- what is refused -----------------------------------------------------------------------------------


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def field_error(**fields: Any) -> FieldError | None:
    """What a chat body with these fields is refused for."""
    try:
        chat(**fields)
    except FieldError as error:
        return error
    return None


@given(st.dictionaries(st.sampled_from([*ChatRequest.model_fields, "logit_bias"]), JSON, max_size=4))
def test_any_json_is_read_or_refused_by_name(fields: dict[str, Any]) -> None:
    error = field_error(**fields)
    if error is not None:
        named = error.param.split(".")[0]
        assert named in (*fields, "messages", "")
        assert named in str(error)
    assert error is not None or "logit_bias" not in fields


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with pytest.raises(FieldError):
        parse_body(ChatRequest, body)

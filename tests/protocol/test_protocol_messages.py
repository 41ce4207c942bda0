"""Control bodies: exact JSON in both directions, refusal of anything else, errors that keep their type."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from isthmus.protocol import errors
from isthmus.protocol.errors import FrameError, IsthmusError, OverloadedError, RejectedError
from isthmus.protocol.frames import MsgType, decode_frame, encode_frame, json_frame, parse_json
from isthmus.protocol.handshake import answer_hello
from isthmus.protocol.messages import (
    CanaryResult,
    Cancel,
    Close,
    Closed,
    Credit,
    ErrorBody,
    GoAway,
    Hello,
    Load,
    Open,
    Opened,
    Reject,
    ResultBody,
    Resume,
    Resumed,
    Status,
    StreamBody,
    Welcome,
)
from isthmus.protocol.wire_types import Message
from tests.protocol.pairing import HELLO, IDENTITY, INFO, LIMITS, SESSION_ID, make_open, offer

WELCOME = answer_hello(HELLO, INFO, LIMITS, Load(), (2,))
IDENTITY_JSON = '{"architecture":{"hidden":8},"tokenizer_hash":"t","base_name":"tiny","weights_hash":"w"}'

# What is not pinned here is pinned by the transcripts.
GOLDEN: list[tuple[MsgType, BaseModel, str]] = [
    (
        MsgType.HELLO,
        HELLO,
        f'{{"versions":[1],"identity":{IDENTITY_JSON},"edge_precision":"fp32",'
        '"row_formats":["f32","bf16","int8o"],"client":""}',
    ),
    (
        MsgType.WELCOME,
        WELCOME,
        f'{{"version":1,"identity":{IDENTITY_JSON},"match":"equal","cloud_precision":"fp32",'
        '"limits":{"max_message_bytes":8388608,"max_control_bytes":262144,"max_rows_per_step":512,'
        '"max_tokens_per_session":8192,"max_sessions":64,"initial_credits_rows":2048,'
        '"stream_window_tokens":256,"heartbeat_s":1.0,"dead_after_s":2.3,"max_probe_bytes":262144},"server":"","num_layers":4,'
        '"hidden":8,"vocab_size":100,"context_length":512,"row_formats":["f32","bf16","int8o"],"kl":{},'
        '"profile":null,"prices":null,"load":{"queue":0,"running":0,"kv_total_pages":0,"kv_free_pages":0,'
        '"kv_cached_pages":0,"rows_computed":0,"step_s":0.0,"queue_s":0.0},"canary_passed":[2]}',
    ),
    (
        MsgType.REJECT,
        Reject(code="c", message="m", retry_after_s=1.5),
        '{"code":"c","message":"m","hint":"","retry_after_s":1.5}',
    ),
]
RESUME = Resume(
    session_id=SESSION_ID, resume_token="t", attempt=2, next_index=3, last_seq=4, rows=5, digest="0f" * 16
)
RESUMED = Resumed(
    epoch=2,
    seq=4,
    kv_len=6,
    rows=5,
    digest="0f" * 16,
    action="ok",
    credits=7,
    chunk_rows=8,
    resume_token="t2",
)
GOLDEN += [
    (
        MsgType.RESUME,
        RESUME,
        f'{{"session_id":"{SESSION_ID}","resume_token":"t","attempt":2,"next_index":3,"last_seq":4,"rows":5,'
        f'"digest":"{"0f" * 16}"}}',
    ),
    (
        MsgType.RESUMED,
        RESUMED,
        f'{{"epoch":2,"seq":4,"kv_len":6,"rows":5,"digest":"{"0f" * 16}","action":"ok","credits":7,'
        '"chunk_rows":8,"resume_token":"t2"}',
    ),
]
EXAMPLES: list[Message] = [
    *(model for _, model, _ in GOLDEN if isinstance(model, Message)),
    make_open(),
    Opened(session_id=SESSION_ID, credits=1, chunk_rows=1),
    ResultBody(first_index=0, tokens=(1,)),
    StreamBody(first_index=0, tokens=()),
    Credit(),
    Cancel(),
    Close(),
    Closed(),
    Status(load=Load()),
    GoAway(deadline_s=1.0),
    ErrorBody(kind="cloud", code="c", message="m"),
    CanaryResult(split=1, ok=True, error=0.0, tolerance=0.1),
]


@pytest.mark.parametrize(("msg_type", "model", "text"), GOLDEN, ids=lambda v: getattr(v, "name", ""))
def test_golden_json_both_directions(msg_type: MsgType, model: BaseModel, text: str) -> None:
    stream = int(msg_type in (MsgType.RESUME, MsgType.RESUMED))
    frame = json_frame(msg_type, model, stream=stream)
    assert frame.body.decode() == text
    assert parse_json(decode_frame(encode_frame(frame), max_body=1 << 20), type(model)) == model


@pytest.mark.parametrize("model", EXAMPLES, ids=lambda m: type(m).__name__)
def test_unknown_field_is_refused_by_name(model: Message) -> None:
    body = model.model_dump_json()
    forged = body[:-1] + ("," if len(body) > 2 else "") + '"surprise":1}'
    with pytest.raises(ValidationError, match="surprise"):
        type(model).model_validate_json(forged)


@pytest.mark.parametrize("model", EXAMPLES, ids=lambda m: type(m).__name__)
def test_messages_are_frozen(model: Message) -> None:
    for name in type(model).model_fields:
        with pytest.raises(ValidationError):
            setattr(model, name, None)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Credit, '{"rows":-1}'),
        (Credit, '{"rows":9007199254740993}'),
        (Credit, '{"rows":"1"}'),
        (Credit, '{"rows":true}'),
        (Closed, '{"kv_len":4294967296}'),
        (GoAway, '{"deadline_s":NaN}'),
        (GoAway, '{"deadline_s":-1}'),
        (Opened, '{"session_id":"xyz","credits":1,"chunk_rows":1}'),
        (Opened, f'{{"session_id":"{SESSION_ID}\\n","credits":1,"chunk_rows":1}}'),
        (Resume, RESUME.model_dump_json().replace('"attempt":2', '"attempt":0')),
        (Resume, RESUME.model_dump_json().replace("0f0f", "0F0F")),
        (Resume, RESUME.model_dump_json().replace(SESSION_ID, SESSION_ID[1:])),
        (Resumed, RESUMED.model_dump_json().replace('"ok"', '"fine"')),
        (Resumed, RESUMED.model_dump_json().replace('"credits":7', '"credits":-7')),
        (ErrorBody, '{"kind":"nonsense","code":"c","message":"m"}'),
        (ResultBody, '{"first_index":0,"tokens":[1,2],"logprobs":[-1.0]}'),
        (StreamBody, '{"first_index":0,"tokens":[],"top":[[[1,-1.0]]]}'),
        (ResultBody, '{"first_index":0,"tokens":[1],"finish":"tired"}'),
        (Hello, '{"versions":[],"identity":{},"edge_precision":"","row_formats":[]}'),
    ],
)
def test_wrong_values_are_refused(model: type[BaseModel], text: str) -> None:
    frame = json_frame(MsgType.CREDIT, Credit(), stream=1)
    body = text.encode()
    forged = type(frame)(frame.type, 1, dtype=frame.dtype, raw_len=len(body), body=body)
    with pytest.raises(FrameError) as caught:
        parse_json(forged, model)
    assert caught.value.code == "bad_message"


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (3, None, (3, (30, 31, 32), "stop")),
        (0, None, (3, (30, 31, 32), "stop")),
        (4, None, (4, (31, 32), "stop")),
        (6, None, (6, (), "stop")),
        (3, 5, (3, (30, 31), None)),
        (3, 6, (3, (30, 31, 32), "stop")),
        (3, 9, (3, (30, 31, 32), "stop")),
    ],
)
def test_part_cuts_tokens_with_all_that_belongs_to_them(
    start: int, stop: int | None, expected: tuple[int, tuple[int, ...], str | None]
) -> None:
    body = StreamBody(
        first_index=3,
        tokens=(30, 31, 32),
        logprobs=(-0.1, -0.2, -0.3),
        top=tuple(((token, -0.1),) for token in (30, 31, 32)),
        finish="stop",
    )
    part = body.part(start, stop)
    assert (part.first_index, part.tokens, part.finish) == expected
    assert part.logprobs is not None
    assert len(part.logprobs) == len(part.tokens)
    assert part.top is not None
    assert tuple(entry[0][0] for entry in part.top) == part.tokens
    bare = StreamBody(first_index=3, tokens=(30, 31, 32)).part(start, stop)
    assert (bare.logprobs, bare.top) == (None, None)


def _all_errors() -> list[type[IsthmusError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    return [cls for cls in found if issubclass(cls, IsthmusError)]


@pytest.mark.parametrize("kind", _all_errors(), ids=lambda cls: cls.__name__)
def test_errors_keep_code_message_hint_and_kind_across_the_wire(kind: type[IsthmusError]) -> None:
    there = kind("what", code="some_code", hint="do this")
    back = ErrorBody.model_validate_json(ErrorBody.from_error(there).model_dump_json()).to_error()
    assert (back.message, back.code, back.hint) == ("what", "some_code", "do this")
    travels_as = {errors.IsthmusError: errors.CloudError, errors.UsageError: errors.CloudError}
    expected: Any = travels_as.get(kind, kind)
    assert isinstance(back, expected) or type(back) is errors.CloudError


@given(st.floats(0, 1e6), st.text(max_size=20))
def test_retry_after_travels(seconds: float, text: str) -> None:
    for error in (OverloadedError(text, retry_after_s=seconds), RejectedError(text, retry_after_s=seconds)):
        back = ErrorBody.from_error(error, expected=(3, 4))
        assert (back.expected_seq, back.expected_pos) == (3, 4)
        revived = back.to_error()
        assert isinstance(revived, OverloadedError | RejectedError)
        assert revived.retry_after_s == seconds
    rejected = Reject.from_error(RejectedError(text, code="x", hint=text)).to_error()
    assert (rejected.message, rejected.code, rejected.hint, rejected.retry_after_s) == (text, "x", text, None)


def test_errors_read_the_same_everywhere() -> None:
    error = RejectedError("full", code="capacity", hint="try later")
    assert error.to_dict() == {"code": "capacity", "message": "full", "hint": "try later"}
    assert str(error) == "full (try later)"
    assert str(RejectedError("full")) == "full"


def test_overlong_texts_are_cut_not_refused() -> None:
    error = RejectedError("m" * 10_000, hint="h" * 10_000)
    assert len(ErrorBody.from_error(error).message) == 4096
    assert len(Reject.from_error(error).hint) == 4096


def test_open_knows_its_kind() -> None:
    assert make_open(split=0).streams
    assert not make_open(split=0, shape="u").streams
    assert not make_open().streams
    assert make_open(row_format="int8o").result_format == "bf16"
    assert make_open().result_format == "f32"
    assert make_open(prompt_tokens=4).index_after(6) == 2
    assert make_open(offer=offer(2)) != make_open()


def test_open_has_no_default_for_what_changes_the_result() -> None:
    required = {name for name, spec in Open.model_fields.items() if spec.is_required()}
    assert required == {
        "split",
        "shape",
        "row_format",
        "max_tokens",
        "prompt_tokens",
        "max_context",
        "sampling",
    }
    assert Welcome.model_fields["limits"].is_required()
    assert IDENTITY.key == INFO.identity.key


def test_priority_is_bounded_and_everybodys_by_default() -> None:
    assert make_open().priority == 0
    assert [make_open(priority=bound).priority for bound in (-10, 10)] == [-10, 10]
    for wrong in (11, -11, 1.5, "high"):
        with pytest.raises(ValidationError, match="priority"):
            make_open(priority=wrong)

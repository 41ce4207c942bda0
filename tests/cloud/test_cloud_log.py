"""Nothing of what a session says, and no secret, is in the cloud's log, at any level."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isthmus.cloud.serve import Prepared, run_cloud
from isthmus.protocol.errors import IsthmusError
from isthmus.protocol.events import ConnectionFailed, ResultTokens, Welcomed
from isthmus.protocol.frames import MsgType, json_frame
from isthmus.protocol.keys import KeyFile
from isthmus.protocol.messages import ErrorBody
from isthmus.protocol.sampling import SamplingParams
from tests.cloud.cloud_clients import prompt_of
from tests.cloud.cloud_edges import connected, open_of, running_cloud
from tests.cloud.cloud_traveller import Traveller, detached
from tests.logged import Stderr, process_log

KEY = "a-key-that-nobody-may-read"


@pytest.fixture
def log() -> Iterator[Stderr]:
    """The log as a cloud's process writes it to stderr, at debug level."""
    with process_log() as stderr:
        yield stderr


def shows_ids(text: str, ids: list[int]) -> bool:
    """Whether three of `ids` in a row stand there, however they are written."""
    return any(
        re.search(rf"(?<!\d){a}\D{{1,3}}{b}\D{{1,3}}{c}(?!\d)", text)
        for a, b, c in zip(ids, ids[1:], ids[2:], strict=False)
    )


def test_the_search_finds_ids() -> None:
    assert shows_ids("tokens=[5, 6, 7]", [4, 5, 6, 7])
    assert not shows_ids("pages=5 rows=67", [4, 5, 6, 7])


async def test_no_prompt_token_row_key_or_resume_token(
    prepared: Prepared,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    log: Stderr,
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "keys"
    path.write_text(f"alice:{KEY}\n")
    prompt = prompt_of(40, 12)
    penalised = SamplingParams(temperature=0.0, repetition_penalty=1.3)
    request = open_of(
        prompt,
        split=2,
        context_ids=tuple(prompt),
        sampling=penalised,
        request_id="\x1b[31m words of the edge",
    )
    secrets = [KEY, "words of the edge", "31999"]
    with running_cloud(replace(prepared, options=replace(prepared.options, keys=KeyFile(path)))) as cloud:
        edge = Traveller(prepared, request, prompt)
        async with connected(cloud, key=KEY) as first:
            await edge.open(first)
            assert edge.session.opened is not None
            secrets += [edge.session.opened.resume_token, edge.session.opened.session_id]
            await edge.send_prompt()
            await edge.take()
            await edge.abort()
        await detached(cloud)
        async with connected(cloud, key=KEY) as second:
            await edge.resume(second)
            secrets.append(edge.session._resume_token)
            await edge.send_newest()
            await edge.finish()
            bad = second.core.open(open_of([1, 2]))
            await second.flush()
            bad._vocab_size = 40_000
            await second.send_ids(bad, [1, 31999], final=True)
            with pytest.raises(IsthmusError, match="31999"):
                await second.wait(ResultTokens, bad.stream)
        async with connected(cloud, key=KEY) as third:
            await third.wait(Welcomed)
            body = ErrorBody(kind="cloud", code="words of the edge", message="words of the edge", fatal=True)
            third.core._send(json_frame(MsgType.ERROR, body))
            await third.flush()
            await third.wait(ConnectionFailed)
        async with connected(cloud, key=KEY) as fourth:
            await fourth.wait(Welcomed)
            await fourth.socket.send(b"words of the edge")
            await fourth.wait(ConnectionFailed)
    # The edge in this test has a log too.
    text = "\n".join(json.dumps(line) for line in log.events() if line["logger"] != "websockets.client")
    assert "edge_connected" in text
    assert "resume" in text
    for secret in secrets:
        assert secret not in text
    row = edge.codec.encode_raw(edge.rows[:1])
    assert bytes(row[0, :8]).hex() not in text
    assert str(np.round(edge.rows[0, 0], 4)) not in text
    assert not shows_ids(text, [*prompt, *edge.tokens])


def test_every_start_warns_of_what_is_open(log: Stderr, tmp_path: Path) -> None:
    """Before the model is looked for, which here is nowhere."""
    path = tmp_path / "keys"
    path.write_text(f"alice:{KEY}\n")
    for _ in range(2):
        with pytest.raises(IsthmusError):
            run_cloud(str(tmp_path / "none"), host="0.0.0.0", port=0, insecure=True, api_key_file=path)
    insecure = log.events("insecure")
    assert len(insecure) == 2
    assert "--tls-cert" in insecure[0]["reason"]
    assert "--api-key-file" not in insecure[0]["reason"]
    remarks = " ".join(line["remark"] for line in log.events("api_keys"))
    assert "unhashed" in remarks
    assert "every key may drain" in remarks
    assert KEY not in log.getvalue()


async def test_a_session_is_told_of_by_its_request_id(prepared: Prepared, log: Stderr) -> None:
    """When it opens and when it ends, with the figures; nothing else of it."""
    prompt = prompt_of(9, 3)
    with running_cloud(prepared) as cloud:
        edge = Traveller(prepared, open_of(prompt, split=2, request_id="req-7.a_B"), prompt)
        async with connected(cloud) as peer:
            await edge.open(peer)
            await edge.send_prompt()
            await edge.finish()
    (opened,), (ended,) = log.events("session_open"), log.events("session_end")
    way = {"request_id": "req-7.a_B", "tenant": "local", "split": 2, "shape": "prefix"}
    assert opened == opened | way | {"prompt_tokens": 9, "level": "info", "logger": "isthmus.cloud"}
    assert ended == ended | way | {"outcome": "closed", "tokens": len(edge.tokens)}
    assert 0 < ended["seconds"] < 60

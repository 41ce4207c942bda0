"""Who may not resume, and which of two connections a session belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.serve import Prepared
from isthmus.protocol.errors import IsthmusError
from isthmus.protocol.events import ResultTokens, SessionResumed, Welcomed
from isthmus.protocol.frames import Frame, MsgType, json_frame
from isthmus.protocol.keys import KeyFile
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Cancel, Resume
from tests.cloud.cloud_clients import greedy_reference, prompt_of
from tests.cloud.cloud_edges import Edge, RunningCloud, connected, open_of, running_cloud
from tests.cloud.cloud_traveller import Traveller, detached, held_decoder, held_engine, taken, until


@pytest.fixture
def cloud(prepared: Prepared) -> Iterator[RunningCloud]:
    with running_cloud(prepared) as running:
        yield running


def with_limits(prepared: Prepared, **limits: Any) -> Prepared:
    options = replace(prepared.options, limits=replace(Limits(), **limits))
    return replace(prepared, options=options)


def outcomes(cloud: RunningCloud, outcome: str) -> float:
    return float(cloud.hub.telemetry.resumes.labels(outcome=outcome)._value.get())


async def begun(edge: Edge, prepared: Prepared) -> Traveller:
    """A session with one token drawn."""
    prompt = prompt_of(18, 2)
    traveller = Traveller(prepared, open_of(prompt, split=2), prompt)
    await traveller.open(edge)
    await traveller.send_prompt(32)
    await traveller.take()
    return traveller


def resume_of(edge: Traveller, **changes: Any) -> Resume:
    """The RESUME that the edge would send, changed."""
    assert edge.session.opened is not None
    rows, digest = edge.session.digests.state
    fields: dict[str, Any] = {
        "session_id": edge.session.opened.session_id,
        "resume_token": edge.session.opened.resume_token,
        "attempt": 1,
        "next_index": len(edge.tokens),
        "last_seq": 1,
        "rows": rows,
        "digest": digest,
    }
    return Resume(**{**fields, **changes})


async def raw_resume(edge: Edge, resume: Resume, stream: int = 1) -> list[Frame]:
    """Sends what EdgeConnection would not. The list gets what the cloud answers on session streams."""
    await edge.wait(Welcomed)
    answers: list[Frame] = []

    def collect(frame: Frame) -> list[Any]:
        answers.append(frame)
        return []

    edge.core._on_session_frame = collect  # type: ignore[method-assign]
    edge.core._send(json_frame(MsgType.RESUME, resume, stream=stream, epoch=1))
    await edge.flush()
    return answers


async def refusal(edge: Edge, resume: Resume) -> str:
    """The body of the ERROR that answers `resume`; the connection lives on."""
    answers = await raw_resume(edge, resume)
    await until(lambda: bool(answers))
    assert answers[0].type is MsgType.ERROR
    assert await edge.rtt() < 30
    return answers[0].body.decode()


def tampered(token: str) -> str:
    return token[:-1] + ("1" if token[-1] == "0" else "0")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (lambda r: {"resume_token": tampered(r.resume_token)}, "resume_refused"),
        (lambda r: {"resume_token": ""}, "resume_refused"),
        (lambda r: {"resume_token": "€" * 40}, "resume_refused"),
        (lambda r: {"session_id": "0" * 32}, "resume_refused"),
        (lambda r: {"last_seq": 0}, "resume_behind"),
    ],
)
async def test_what_no_token_of_ours_covers_is_refused(
    cloud: RunningCloud, prepared: Prepared, changes: Callable[[Resume], dict[str, Any]], code: str
) -> None:
    async with connected(cloud) as first:
        edge = await begun(first, prepared)
        await edge.abort()
    await detached(cloud)
    asked = resume_of(edge)
    async with connected(cloud) as second:
        assert f'"code":"{code}"' in await refusal(second, asked.model_copy(update=changes(asked)))
    if code == "resume_refused":
        assert cloud.hub.sessions.num_detached == 1  # as it was
        assert outcomes(cloud, "refused") == 1
        async with connected(cloud) as third:
            await edge.resume(third)
            await edge.send_newest()
            assert await edge.finish() == greedy_reference(prepared.model, edge.prompt, 8)
    else:
        assert len(cloud.hub.sessions) == 0  # nobody can go on with it


async def test_another_tenant_with_the_token_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:" + "a" * 20 + "\nbob:" + "b" * 20 + "\n")
    options = replace(prepared.options, keys=KeyFile(path))
    with running_cloud(replace(prepared, options=options)) as cloud:
        async with connected(cloud, key="a" * 20) as first:
            edge = await begun(first, prepared)
            await edge.abort()
        await detached(cloud)
        async with connected(cloud, key="b" * 20) as thief:
            assert "resume_refused" in await refusal(thief, resume_of(edge))
        async with connected(cloud, key="a" * 20) as second:
            await edge.resume(second)
            await edge.send_newest()
            assert await edge.finish() == greedy_reference(prepared.model, edge.prompt, 8)


async def test_an_expired_token_is_refused(prepared: Prepared) -> None:
    with running_cloud(with_limits(prepared, resume_token_s=0.0)) as cloud:
        async with connected(cloud) as first:
            edge = await begun(first, prepared)
            await edge.abort()
        await detached(cloud)
        async with connected(cloud) as second:
            assert "resume_expired" in await refusal(second, resume_of(edge))
        assert outcomes(cloud, "expired") == 1


async def test_a_session_that_is_gone_is_unknown(cloud: RunningCloud, prepared: Prepared) -> None:
    async with connected(cloud) as first:
        edge = await begun(first, prepared)
        asked = resume_of(edge)
        await first.close(edge.session)
    async with connected(cloud) as second:
        assert "unknown_session" in await refusal(second, asked)
    assert outcomes(cloud, "unknown") == 1


async def test_too_many_resumes_of_a_tenant(prepared: Prepared) -> None:
    with running_cloud(with_limits(prepared, max_resumes_per_minute_per_tenant=1)) as cloud:
        async with connected(cloud) as first:
            edge = await begun(first, prepared)
            await edge.abort()
        await detached(cloud)
        async with connected(cloud) as second:
            await edge.resume(second)
            await edge.abort()
        await detached(cloud)
        async with connected(cloud) as third:
            with pytest.raises(IsthmusError) as caught:
                await edge.resume(third)
            assert caught.value.code == "tenant_resumes"


async def test_the_newest_connection_has_the_session(cloud: RunningCloud, prepared: Prepared) -> None:
    """The old one still lives (the network only seemed dead): it is told, and what it sends is dropped."""
    async with connected(cloud) as first, connected(cloud) as second:
        edge = await begun(first, prepared)
        await raw_resume(second, resume_of(edge))
        with pytest.raises(IsthmusError) as caught:
            await first.wait(ResultTokens, edge.session.stream)
        assert caught.value.code == "superseded"
        assert await first.rtt() < 30
        await until(lambda: next(iter(cloud.hub.sessions)).core.epoch == 2)
        (live,) = cloud.hub.sessions
        before = live.core.last_seq
        first.core._send(json_frame(MsgType.CANCEL, Cancel(), stream=1, epoch=1))
        await first.flush()
        assert await first.rtt() < 30
        assert live.core.last_seq == before
        assert live.peer is not None
        assert len(cloud.hub.sessions) == 1
        async with connected(cloud) as third:
            assert "stale_attempt" in await refusal(third, resume_of(edge))
        assert live.peer is not None
    await until(lambda: len(cloud.hub.sessions) == 0)


async def test_two_resumes_at_once_leave_one_holder(
    cloud: RunningCloud, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both wait for the decoder; the later attempt wins whichever of them is first through."""
    async with connected(cloud) as first:
        edge = await begun(first, prepared)
        with held_decoder(monkeypatch) as release:
            await edge.send_newest()
            await taken(cloud, 2)
            await edge.abort()
            await detached(cloud)
            async with connected(cloud) as second, connected(cloud) as third:
                asked = resume_of(edge, last_seq=2)
                await raw_resume(third, asked.model_copy(update={"attempt": 2}))
                assert await third.rtt() < 30
                await raw_resume(second, asked)
                assert await second.rtt() < 30
                (live,) = cloud.hub.sessions
                assert live.core.epoch == 1
                release.set()
                await until(lambda: outcomes(cloud, "ok") + outcomes(cloud, "stale") >= 2)
                assert live.core.attempt == 2
                assert live.peer is not None
                assert len(cloud.hub.sessions) == 1


async def test_a_resume_waits_for_the_rows_already_here(
    cloud: RunningCloud, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large chunk is still being decoded: a second connection must not overtake it. PINGs pass."""
    prompt = prompt_of(40, 6)
    edge = Traveller(prepared, open_of(prompt, split=2), prompt)
    async with connected(cloud) as first:
        await edge.open(first)
        with held_decoder(monkeypatch) as release:
            await edge.send(0, prompt[:30])
            await taken(cloud, 1)
            edge.queue(30, prompt[30:], final=True)
            await edge.abort()
            await detached(cloud)
            async with connected(cloud) as second:
                await second.wait(Welcomed)
                second.core.resume(edge.session)
                await second.flush()
                assert await second.rtt() < 30
                assert not any(isinstance(event, SessionResumed) for event in second.events)
                release.set()
                resumed = await second.wait(SessionResumed, edge.session.stream)
                assert resumed.replay is not None
                assert resumed.replay.start == 30
                edge.edge = second
                await edge.replay(resumed.replay)
                assert await edge.finish() == greedy_reference(prepared.model, prompt, 8)


@pytest.mark.parametrize("expires", [False, True])
async def test_a_connection_that_dies_within_its_resume(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, expires: bool
) -> None:
    """The session waits for the next one, or expires meanwhile: then it is unknown."""
    with running_cloud(with_limits(prepared, detached_s=0.3 if expires else 120.0)) as cloud:
        async with connected(cloud) as first:
            edge = await begun(first, prepared)
            with held_decoder(monkeypatch) as release:
                await edge.send_newest()
                await taken(cloud, 2)
                await edge.abort()
                async with connected(cloud) as second:
                    await second.wait(Welcomed)
                    second.core.resume(edge.session)
                    await second.flush()
                    assert await second.rtt() < 30
                    if expires:
                        await until(lambda: len(cloud.hub.sessions) == 0)
                        release.set()
                        with pytest.raises(IsthmusError) as caught:
                            await second.wait(SessionResumed, edge.session.stream)
                        assert caught.value.code == "unknown_session"
                        return
                    edge.edge = second
                    await edge.abort()
                await until(lambda: len(cloud.hub.peers) == 0)
                release.set()
        async with connected(cloud) as third:
            assert (await edge.resume(third)).action == "ok"
            assert await edge.finish() == greedy_reference(prepared.model, edge.prompt, 8)


async def test_a_cancelled_session_cannot_be_resumed(
    cloud: RunningCloud, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(cloud) as first, connected(cloud) as second:
        edge = await begun(first, prepared)
        with held_engine(cloud, monkeypatch):
            await edge.send_newest()
            await taken(cloud, 2)
            edge.session.cancel()
            await first.flush()
            assert "unknown_session" in await refusal(second, resume_of(edge))

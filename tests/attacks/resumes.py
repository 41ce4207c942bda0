"""Attacks on the way back to a session: who resumes, with what, how often, and when."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection

from isthmus.protocol.digests import RowDigests
from isthmus.protocol.frames import Flag, Frame, MsgType, encode_frame, json_frame, parse_json
from isthmus.protocol.messages import ErrorBody, Opened, ResultBody, Resume, Resumed
from tests.attacks.corpus_session import CANCEL
from tests.attacks.live_cloud import Target, next_frame
from tests.attacks.messages import FIRST_STEP, LAST_STEP, PING, SHORT, control, open_message, raw_rows, step
from tests.attacks.peers import Peer
from tests.attacks.sansio import hello_message


@dataclass
class Held:
    """A session of two rows that waits for its edge to come back."""

    session_id: str
    token: str
    digest: str

    def resume(self, **changes: Any) -> bytes:
        """What its own edge would say."""
        values: dict[str, Any] = {
            "session_id": self.session_id,
            "resume_token": self.token,
            "attempt": 1,
            "next_index": 0,
            "last_seq": 1,
            "rows": 2,
            "digest": self.digest,
        }
        body = Resume(**{**values, **changes})
        return encode_frame(json_frame(MsgType.RESUME, body, stream=1, epoch=1))


def digest_of(rows: bytes, n: int) -> str:
    chain = RowDigests()
    chain.append(np.frombuffer(rows, np.uint8).reshape(n, -1))
    return chain.at(n)


@contextlib.asynccontextmanager
async def greeted(target: Target) -> AsyncIterator[ClientConnection]:
    async with target.socket() as socket:
        await socket.send(hello_message(target.identity))
        await next_frame(socket, MsgType.WELCOME)
        yield socket


async def opened(socket: ClientConnection, *steps: bytes) -> Held:
    """A session on stream 1 of a greeted connection, and these steps of it."""
    await socket.send(open_message(**SHORT))
    body = parse_json(await next_frame(socket, MsgType.OPENED), Opened)
    for data in steps:
        await socket.send(data)
    return Held(body.session_id, body.resume_token, digest_of(raw_rows(2), 2))


async def left_behind(target: Target, *steps: bytes) -> Held:
    """A session whose connection has just died."""
    async with greeted(target) as socket:
        held = await opened(socket, *steps)
        assert held.token
        if steps[-1:] == (FIRST_STEP,):
            await socket.send(PING)  # behind the step, so that it has arrived
            await next_frame(socket, MsgType.PONG)
        socket.transport.abort()
    return held


async def answer(socket: ClientConnection, message: bytes) -> Frame:
    await socket.send(message)
    return await next_frame(socket, MsgType.RESUMED, MsgType.ERROR)


async def refused(socket: ClientConnection, message: bytes, code: str) -> None:
    """The attempt is answered with this code, and the connection goes on."""
    frame = await answer(socket, message)
    assert frame.type is MsgType.ERROR, frame
    error = parse_json(frame, ErrorBody)
    assert (error.code, error.fatal) == (code, False)
    await socket.send(PING)
    await next_frame(socket, MsgType.PONG)


async def resumed(socket: ClientConnection, message: bytes) -> Frame:
    frame = await answer(socket, message)
    assert frame.type is MsgType.RESUMED, frame.body
    return frame


def on_stream(message: bytes, stream: int) -> bytes:
    """The same message on another stream."""
    return message[:6] + stream.to_bytes(4, "little") + message[10:]


def of_epoch(message: bytes, epoch: int) -> bytes:
    """The same message in another epoch."""
    return message[:10] + epoch.to_bytes(4, "little") + message[14:]


async def token_of(socket: ClientConnection, epoch: int) -> int:
    """Send the last step; the token that comes."""
    await socket.send(of_epoch(LAST_STEP, epoch))
    frame = await next_frame(socket, MsgType.RESULT, MsgType.ERROR)
    assert frame.type is MsgType.RESULT, frame.body
    assert frame.epoch == epoch
    return parse_json(frame, ResultBody).tokens[0]


async def give_up(socket: ClientConnection, epoch: int) -> None:
    await socket.send(of_epoch(CANCEL, epoch))
    await next_frame(socket, MsgType.CLOSED)


async def undisturbed_token(target: Target) -> int:
    async with greeted(target) as socket:
        await opened(socket, FIRST_STEP)
        token = await token_of(socket, 1)
        await give_up(socket, 1)
    return token


async def by_another_tenant(target: Target) -> None:
    held = await left_behind(target, FIRST_STEP)
    async with greeted(replace(target, key="two")) as bob:
        await refused(bob, held.resume(), "resume_refused")
        await refused(bob, on_stream(held.resume(resume_token=""), 2), "resume_refused")
    async with greeted(target) as alice:  # whose session it still is
        frame = await resumed(alice, held.resume())
        assert parse_json(frame, Resumed).action == "ok"
        await give_up(alice, frame.epoch)


async def tampered(target: Target) -> None:
    held = await left_behind(target, FIRST_STEP)
    other = await left_behind(target, FIRST_STEP)
    token = held.token

    def flipped(at: int) -> str:
        return token[:at] + ("0" if token[at] != "0" else "1") + token[at + 1 :]

    wrong = [flipped(at) for at in (0, 7, 15, 16, len(token) // 2, len(token) - 1)]
    wrong += ["", token[:-1], token + "0", token.upper() + " ", "0" * len(token), "ÿ" * 80, other.token]
    async with greeted(target) as socket:
        for stream, bad in enumerate(wrong, start=1):
            await refused(socket, on_stream(held.resume(resume_token=bad), stream), "resume_refused")
    for mine in (held, other):
        async with greeted(target) as socket:
            frame = await resumed(socket, mine.resume())
            await give_up(socket, frame.epoch)


async def closed_long_ago(target: Target) -> None:
    async with greeted(target) as socket:
        held = await opened(socket, FIRST_STEP)
        await give_up(socket, 1)
    async with greeted(target) as socket:
        await refused(socket, held.resume(), "unknown_session")


async def malformed(target: Target) -> None:
    bodies = ("{}", "[]", "{", '{"session_id":"x"}', '{"session_id":"%s","attempt":-1}' % ("0" * 32))
    async with greeted(target) as socket:
        for stream, body in enumerate(bodies, start=1):
            await refused(socket, control(MsgType.RESUME, body, stream=stream), "bad_message")


async def two_at_once(target: Target) -> None:
    """The same attempt twice: one has the session, the other is told that it came too late."""
    held = await left_behind(target, FIRST_STEP)
    token = await undisturbed_token(target)
    async with greeted(target) as one, greeted(target) as two:
        frames = await asyncio.gather(*(answer(socket, held.resume()) for socket in (one, two)))
        kinds = [frame.type for frame in frames]
        assert sorted(kinds) == [MsgType.RESUMED, MsgType.ERROR], kinds
        loser = frames[kinds.index(MsgType.ERROR)]
        assert parse_json(loser, ErrorBody).code == "stale_attempt"
        winner = (one, two)[kinds.index(MsgType.RESUMED)]
        assert await token_of(winner, 2) == token
        await give_up(winner, 2)


async def a_newer_one_wins(target: Target) -> None:
    """A second attempt takes the session from the connection that the first brought it to."""
    held = await left_behind(target, FIRST_STEP)
    token = await undisturbed_token(target)
    async with greeted(target) as one, greeted(target) as two:
        first = parse_json(await resumed(one, held.resume()), Resumed)
        again = replace(held, token=first.resume_token)
        frame = await resumed(two, again.resume(attempt=2))
        assert frame.epoch == 3
        lost = parse_json(await next_frame(one, MsgType.ERROR), ErrorBody)
        assert (lost.code, lost.fatal) == ("superseded", False)
        await one.send(of_epoch(LAST_STEP, 2))  # neither executed nor acknowledged
        await one.send(PING)
        await next_frame(one, MsgType.PONG)
        assert await token_of(two, 3) == token
        await give_up(two, 3)
    async with greeted(target) as socket:
        await refused(socket, again.resume(attempt=2), "unknown_session")


async def a_stale_attempt(target: Target) -> None:
    held = await left_behind(target, FIRST_STEP)
    async with greeted(target) as socket:
        frame = await resumed(socket, held.resume(attempt=5))
        async with greeted(target) as late:
            for stream, attempt in enumerate((5, 4, 1), start=1):
                await refused(late, on_stream(held.resume(attempt=attempt), stream), "stale_attempt")
        await give_up(socket, frame.epoch)


async def a_stale_epoch(target: Target) -> None:
    held = await left_behind(target, FIRST_STEP)
    token = await undisturbed_token(target)
    async with greeted(target) as socket:
        assert (await resumed(socket, held.resume())).epoch == 2
        await socket.send(LAST_STEP)  # of epoch 1
        await socket.send(step(raw_rows(9), 9, seq=44))
        assert await token_of(socket, 2) == token
        await give_up(socket, 2)


async def during_compute(target: Target) -> None:
    """The connection dies with the last step on its way; its result comes once, on the new one."""
    token = await undisturbed_token(target)
    chain = digest_of(raw_rows(2) + raw_rows(2), 4)
    for _ in range(5):
        held = await left_behind(target, FIRST_STEP, LAST_STEP)
        async with greeted(target) as socket:
            frame = await resumed(socket, held.resume(last_seq=2, rows=4, digest=chain))
            body = parse_json(frame, Resumed)
            if body.seq < 2:  # the step was lost with the connection
                assert body.action == "replay"
                await socket.send(of_epoch(LAST_STEP, 2))
            result = await next_frame(socket, MsgType.RESULT)
            assert parse_json(result, ResultBody).tokens == (token,)
            # A step that answers to it is taken: there is one session, in one state.
            await socket.send(step(raw_rows(1), 1, seq=3, pos=4, epoch=2, flags=Flag.FINAL))
            assert (await next_frame(socket, MsgType.RESULT, MsgType.ERROR)).seq == 3
            await give_up(socket, 2)


async def other_rows(target: Target) -> None:
    """A digest that does not fit is no error: the rows are sent anew."""
    held = await left_behind(target, FIRST_STEP)
    async with greeted(target) as socket:
        frame = await resumed(socket, held.resume(digest="f" * 32))
        assert parse_json(frame, Resumed).action == "rebuild"
        await give_up(socket, frame.epoch)


_OTHERS = "RESUME by another tenant, expired, tampered"
RESUMES: tuple[Peer, ...] = (
    Peer(_OTHERS, "another tenant", by_another_tenant),
    Peer(_OTHERS, "tampered", tampered),
    Peer(_OTHERS, "closed long ago", closed_long_ago),
    Peer(_OTHERS, "malformed", malformed),
    Peer("two RESUMEs at once", "the same attempt", two_at_once),
    Peer("two RESUMEs at once", "a newer one wins", a_newer_one_wins),
    Peer("two RESUMEs at once", "a stale attempt", a_stale_attempt),
    Peer("stale epoch", "a step from before the cut", a_stale_epoch),
    Peer("RESUME during compute", "the result comes once", during_compute),
    Peer("duplicate seq with a different payload", "other rows than were sent", other_rows),
)

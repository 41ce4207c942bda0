"""Whole connections under mutated messages: whatever comes, in whatever state, becomes events."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from isthmus.protocol.activations import Encoded
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.errors import IsthmusError
from isthmus.protocol.events import ResultRows
from isthmus.protocol.frames import HEADER_BYTES, decode_frame
from tests.attacks.bad_inputs import Attack
from tests.attacks.corpus import ATTACKS
from tests.attacks.corpus_edge import EDGE_ATTACKS, U
from tests.attacks.fuzz_targets import FRAMES, sealed
from tests.attacks.hostile_cloud import CODEC, HELLO, LIMITS, asked, first_rows, opened, welcome
from tests.attacks.messages import FIRST_STEP, LAST_STEP, NEXT_STEP, SHORT, open_message
from tests.attacks.mutation import apply, draw_edits
from tests.attacks.sansio import PureCloud

# Mutating a large body finds nothing that a small one does not.
_MAX_MESSAGE = 4096


@dataclass(frozen=True)
class Side:
    """One end. `play` takes messages one by one and checks what must hold all the while."""

    name: str
    good: tuple[bytes, ...]
    play: Callable[[Sequence[bytes]], None]


def _play_cloud(data: Sequence[bytes]) -> None:
    cloud = PureCloud()
    cloud.say(cloud.hello)
    for message in data:
        closed = cloud.core.is_closed
        frames = cloud.say(message)
        assert not closed or frames == []
        assert cloud.usage.num_sessions == len(cloud.core.sessions)
    cloud.core.on_tick(0.1)
    cloud.core.lost()


def _play_edge(data: Sequence[bytes]) -> None:
    edge = EdgeConnection(HELLO, LIMITS)
    edge.start(0.0)
    # Two sessions: stream 1 waits for tokens, stream 2 for rows.
    edge.receive(welcome(), 0.0)
    for attack in _WAITING:
        session = edge.open(asked(attack))
        edge.receive(opened(session.stream), 0.0)
        session.step_rows(*_FIRST_ROWS[session.open.prompt_tokens], final=True)
    for message in data:
        closed = edge.is_closed
        events = edge.receive(message, 0.0)
        assert not closed or events == []
        for event in events:
            if isinstance(event, ResultRows):
                with contextlib.suppress(IsthmusError):
                    CODEC.decode_frame(event.frame, max_raw=LIMITS.max_message_bytes)
        for reply in edge.data_to_send():
            decode_frame(reply, max_body=2**24)
    edge.on_tick(0.1)
    edge.lost()


def _messages(attacks: Sequence[Attack]) -> tuple[bytes, ...]:
    """The corpus's own messages are good beginnings too."""
    found = (message for attack in attacks for message in attack.messages[-1:])
    return tuple(
        message
        for message in found
        if isinstance(message, bytes) and HEADER_BYTES <= len(message) < _MAX_MESSAGE
    )


_WAITING = tuple(Attack("", "", (), opening=fields) for fields in ({}, U))


def _first_rows() -> dict[int, tuple[Encoded, int, int]]:
    """By the length of the prompt: its rows, the position of the first, their number."""
    found = {}
    for attack in _WAITING:
        rows, n = first_rows(asked(attack))
        found[n] = (rows, 0, n)
    return found


_FIRST_ROWS = _first_rows()

CLOUD_SIDE = Side(
    "CloudConnection",
    (open_message(**SHORT), open_message(), FIRST_STEP, NEXT_STEP, LAST_STEP, *FRAMES, *_messages(ATTACKS)),
    _play_cloud,
)
EDGE_SIDE = Side("EdgeConnection", (*FRAMES, *_messages(EDGE_ATTACKS)), _play_edge)


def draw_conversation(rng: Random, side: Side, length: int) -> list[bytes]:
    """`length` messages: good ones in any order, and mutated ones, most of them with a right checksum."""
    drawn = []
    for at in range(length):
        # A conversation that begins well gets further.
        message = side.good[at] if at < 3 and rng.random() < 0.7 else rng.choice(side.good)
        if rng.random() < 0.6:
            message = apply(message, draw_edits(rng, min(len(message), 200)))
            if rng.random() < 0.85:
                message = sealed(message)
        drawn.append(message)
    return drawn

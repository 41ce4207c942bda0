"""Both ends paired in memory in a random world: opens, steps, draft chains, rewinds, cancels, closes and any
order between streams; then with repeated messages, then with connections that are lost at any message. No
session fails but by a loss that it could not outlive, every token arrives once and in order, every row is
appended once at its place, and both ends agree on kv_len, rows and credits when it is quiet.
"""

from __future__ import annotations

from collections import deque
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.protocol.events import ResultTokens, StepReceived
from tests.protocol.conversation import CODEC, LIMITS
from tests.protocol.paired_loss import HostileWorld, LossyWorld
from tests.protocol.paired_world import Action, World
from tests.protocol.pairing import HIDDEN, SESSION_ID, connected, make_open

CHOICES = st.lists(st.integers(0, 2**32 - 1), min_size=60, max_size=200)


class RepeatingWorld(World):
    """Messages come again, any time later."""

    def actions(self) -> list[Action]:
        found = super().actions()
        found += [self.repeat_up] if self.link.history["up"] else []
        found += [self.repeat_down] if self.link.history["down"] else []
        return found

    def repeat_up(self, rng: Random) -> None:
        self.hand_over(self.link, "up", rng.choice(self.link.history["up"]))

    def repeat_down(self, rng: Random) -> None:
        self.hand_over(self.link, "down", rng.choice(self.link.history["down"]))


@settings(max_examples=150, deadline=None)
@given(CHOICES)
def test_repeated_messages_change_nothing(choices: list[int]) -> None:
    world = RepeatingWorld()
    for choice in choices:
        world.act(choice)
    world.finish()


@settings(max_examples=200, deadline=None)
@given(CHOICES)
def test_lost_connections_lose_and_repeat_nothing(choices: list[int]) -> None:
    world = LossyWorld()
    for choice in choices:
        world.act(choice)
    world.finish()


@settings(max_examples=150, deadline=None)
@given(CHOICES)
def test_a_network_that_repeats_and_reorders_ends_a_session_or_changes_nothing(choices: list[int]) -> None:
    world = HostileWorld()
    for choice in choices:
        world.act(choice)
    world.finish()


def test_upload_overlaps_compute_under_credits() -> None:
    """A prompt far larger than the credits goes up without the edge ever waiting for the whole."""
    pair = connected(limits=LIMITS)
    core = pair.edge.open(make_open(prompt_tokens=18, max_tokens=2, max_context=20))
    waiting: deque[int] = deque()  # chunks the engine has not computed
    most_waiting = 0
    while not core.awaiting_result:
        while core.can_send(n := min(4, 18 - core.kv_len, core.credits)):
            rows = np.zeros((n, HIDDEN), np.float32)
            core.step_rows(CODEC.encode(rows), core.kv_len, n, final=core.kv_len + n == 18)
        for event in pair.up():
            if isinstance(event, StepReceived):
                waiting.append(event.n_tok)
            else:
                pair.cloud.opened(1, session_id=SESSION_ID)
        most_waiting = max(most_waiting, sum(waiting))
        pair.cloud.credit(1, waiting.popleft())
        pair.down()
    assert most_waiting == LIMITS.initial_credits_rows  # the pipe was full and never fuller
    pair.cloud.result_tokens(1, [7], kv_len=18)
    pair.pump()
    assert isinstance(pair.edge_events[-1], ResultTokens)
    assert core.credits == LIMITS.initial_credits_rows

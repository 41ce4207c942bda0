"""The paired machines in one world: the owners of an edge and a cloud, and connections between them.
Everything that may happen next is an action; the tests choose.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from isthmus.protocol.events import StepReceived
from isthmus.protocol.limits import TenantUsage
from isthmus.protocol.states import CloudState, EdgeState
from tests.protocol.conversation import LIMITS, MAX_CONTEXT, MAX_TOKENS, Conversation, token_of
from tests.protocol.paired_cloud import CloudOwner
from tests.protocol.paired_edge import EdgeOwner
from tests.protocol.paired_link import Link
from tests.protocol.pairing import VOCAB, make_open, offer

Action = Callable[[Random], None]


class World(EdgeOwner, CloudOwner):
    def __init__(self) -> None:
        self.usage = TenantUsage.from_limits(LIMITS)
        self.links = [Link(self.usage)]
        self.talks = {}
        self.counter = 0

    @property
    def link(self) -> Link:
        """The edge's connection. Older ones live on until the cloud notices."""
        return self.links[-1]

    def act(self, choice: int) -> None:
        """One of the actions that are possible now, as `choice` says; 0 is none."""
        if choice:
            rng = Random(choice)
            rng.choice(self.actions())(rng)
            self.collect()
        self.check()

    def actions(self) -> list[Action]:
        """What may happen on a link that holds; some of it more often."""
        found: list[Action] = [self.tick]
        if len(self.link.pair.edge.sessions) < LIMITS.max_sessions and not self.link.pair.edge.is_closed:
            found += [self.open]
        if self.sendable():
            found += [self.step] * 3
        if self.verifiable():
            found += [self.verify] * 2
        if self.busy():
            found += [self.compute] * 4
        if any(link.ways["up"] for link in self.links):
            found += [self.deliver_up] * 4
        if self.link.ways["down"]:
            found += [self.deliver_down] * 4
        if self.counter % 7 == 6 and self.leavable():
            found += [self.leave]
        return found

    def collect(self) -> None:
        for link in self.links:
            link.collect()

    def hand_over(self, link: Link, way: str, message: bytes) -> None:
        if way == "up":
            for cloud_event in link.up(message):
                self.on_cloud(link, cloud_event)
        else:
            for edge_event in link.down(message):
                self.on_edge(link, edge_event)

    # ---- the edge's owner

    def open(self, rng: Random) -> None:
        kind = rng.choice(["prefix", "prefix", "u", "offload"])
        prompt = rng.randint(1, 9)
        offered = rng.choice([0, 0, rng.randint(1, prompt)])
        core = self.link.pair.edge.open(
            make_open(
                split=0 if kind == "offload" else 1,
                shape="u" if kind == "u" else "prefix",
                prompt_tokens=prompt,
                max_tokens=MAX_TOKENS,
                max_context=MAX_CONTEXT,
                offer=offer(*range(1, offered + 1)),
            )
        )
        number = len(self.talks) + 1
        self.talks[number] = self.link.talks[core.stream] = Conversation(number, core, kind, prompt)

    def step(self, rng: Random) -> None:
        talk = rng.choice(self.sendable())
        core = talk.core
        truncate = rng.random() < 0.2 and talk.kind != "offload"
        pos = rng.randint(0, core.kv_len) if truncate else core.kv_len
        most = min(core.credits, core.chunk_rows, MAX_CONTEXT - pos)
        if most < 1:
            return
        n = rng.randint(1, most)
        if talk.kind != "u" and pos < talk.prompt and not truncate:
            n = min(n, talk.prompt - pos)
        index = core.open.index_after(pos + n)
        may_answer = talk.kind == "u" or (core.next_index <= index < MAX_TOKENS and index >= 0)
        final = may_answer and rng.random() < 0.7
        all_rows = talk.kind == "u" and rng.random() < 0.3
        contents = [(self.counter + i) % VOCAB for i in range(n)]
        self.counter += n
        self.send(talk, contents, pos, final=final, all_rows=all_rows, truncate=truncate)
        talk.edge_rows = talk.edge_rows[:pos] + contents
        if final and talk.kind != "u":
            talk.due_index = index  # an edge that knows tokens from elsewhere may go on beyond them
        if all_rows:
            talk.expected_rows.append(contents)
        elif final and talk.kind == "u":
            talk.expected_rows.append(contents[-1:])

    def verify(self, rng: Random) -> None:
        """A chain whose first drafts are what the cloud will draw."""
        talk = rng.choice(self.verifiable())
        core = talk.core
        truncate = rng.random() < 0.3
        pos = rng.randint(talk.first_pos, core.kv_len) if truncate else core.kv_len
        n, num_right = rng.randint(1, 4), rng.randint(0, 3)
        if n > min(core.credits, core.chunk_rows, MAX_CONTEXT - pos):
            return
        index = core.open.index_after(pos + 1)
        drafts = [(token_of(talk.number, index + i) + (i >= num_right)) % VOCAB for i in range(n - 1)]
        contents = [self.counter % VOCAB, *drafts]
        self.counter += 1
        self.send(talk, contents, pos, truncate=truncate, drafts=tuple(contents))
        talk.edge_rows = talk.edge_rows[:pos] + contents
        if talk.kind == "u":
            talk.expected_rows.append(contents)
        else:
            talk.due_index = index

    def verifiable(self) -> list[Conversation]:
        return [
            talk
            for talk in self.sendable()
            if talk.kind != "offload" and talk.first_pos <= talk.core.kv_len < talk.last_pos
        ]

    def sendable(self) -> list[Conversation]:
        return [talk for talk in self.talks.values() if talk.replay is None and talk.core.can_send(1)]

    def leave(self, rng: Random) -> None:
        self.leave_by(rng.choice(self.leavable()), rng.choice(["cancel", "close", "both"]))

    def leave_by(self, talk: Conversation, how: str) -> None:
        core = talk.core
        if how != "cancel":
            core.close(offer(core.kv_len) if core.kv_len else None)
        if how != "close":
            core.cancel()
        talk.failed = core.state is EdgeState.CLOSED  # between two connections nobody answers

    def leavable(self) -> list[Conversation]:
        return [talk for talk in self.talks.values() if talk.core.state is not EdgeState.CLOSED]

    # ---- the engine

    def compute(self, rng: Random) -> None:
        self.work_on(rng.choice(self.busy()), rng.randint(0, 9), rng.randint(1, 3))

    def busy(self) -> list[Conversation]:
        return [talk for talk in self.talks.values() if self.is_busy(talk)]

    # ---- the link's doings

    def deliver_up(self, rng: Random) -> None:
        link = rng.choice([link for link in self.links if link.ways["up"]])
        self.hand_over(link, "up", link.take("up", rng.choice(link.deliverable("up"))))

    def deliver_down(self, rng: Random) -> None:
        stream = rng.choice(self.link.deliverable("down"))
        self.hand_over(self.link, "down", self.link.take("down", stream))

    def tick(self, rng: Random) -> None:
        del rng
        pair = self.link.pair
        pair.now += 0.4
        assert pair.edge.on_tick(pair.now) == []
        assert pair.cloud.on_tick(pair.now) == []

    # ---- always

    def check(self) -> None:
        live = [talk for talk in self.talks.values() if talk.session is not None]
        assert self.usage.num_sessions == len(live)
        for talk in live:
            session = talk.session
            assert session is not None
            waiting = sum(item.n_tok for item in talk.work if isinstance(item, StepReceived))
            assert waiting <= LIMITS.initial_credits_rows
            assert session.credits >= 0
            assert sum(len(body.tokens) for body in session.unacked) <= LIMITS.stream_window_tokens
            assert talk.core.credits >= 0 or talk.core.state is EdgeState.CLOSING
        if not self.link.is_cut:
            for stream, session in self.link.pair.cloud.sessions.items():
                talk = self.link.talks[stream]
                if not (talk.work or self.link.in_flight(stream)) and session.state is CloudState.ACTIVE:
                    self.check_quiet(talk)

    def check_quiet(self, talk: Conversation) -> None:
        """Nothing is on its way: both ends hold the same."""
        session, core = talk.session, talk.core
        assert session is not None
        if core.state not in (EdgeState.PREFILL, EdgeState.DECODE) or talk.replay is not None:
            return
        assert core.kv_len == len(talk.edge_rows)
        assert session.credits == core.credits == LIMITS.initial_credits_rows
        assert session.digests.state == core.digests.state
        if not session.generating:
            assert session.kv_len == core.kv_len
            assert talk.cloud_rows == talk.edge_rows
            assert session.next_index == core.next_index or talk.kind == "u"

    # ---- the end

    def finish(self) -> None:
        """Carry on until everything is done, then close: nothing is left anywhere."""
        self.settle()
        for talk in self.leavable():
            self.leave_by(talk, "close")
        self.collect()
        self.settle()
        self.part()
        assert self.link.pair.edge.sessions == {}
        for talk in self.talks.values():
            assert talk.closed or talk.failed
            assert talk.core.state is EdgeState.CLOSED
            if talk.session is not None:
                assert talk.failed, "only a session whose edge lost it is left behind"
                self.evict(talk)
        assert all(link.pair.cloud.sessions == {} for link in self.links)
        assert (self.usage.num_sessions, self.usage.kv_bytes) == (0, 0)

    def part(self) -> None:
        """Every session was closed in an orderly way: the connection has nothing left."""
        assert all(link.pair.cloud.sessions == {} for link in self.links if not link.is_cut)

    def settle(self) -> None:
        """Carry and compute until nothing moves."""
        while any(any(link.ways.values()) for link in self.links) or self.busy():
            for link in self.links:
                for way in ("up", "down"):
                    for stream in link.deliverable(way):
                        self.hand_over(link, way, link.take(way, stream))
                        self.collect()
            for talk in self.busy():
                self.work_on(talk, 9, 2)
            self.collect()
            self.check()

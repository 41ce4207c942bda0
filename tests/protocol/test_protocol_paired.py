"""Both ends paired in memory under a state machine: random opens, steps, draft chains, rewinds, cancels,
closes, repeated messages and any order between streams. Whatever happens, no session fails, every token
arrives once and in order, every row is appended once at its place, and both ends agree on kv_len and credits
when it is quiet.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from isthmus.protocol.activations import decode_ids
from isthmus.protocol.events import (
    CancelRequested,
    CloseRequested,
    CloudEvent,
    CreditGranted,
    EdgeEvent,
    ResultRows,
    ResultTokens,
    SessionClosed,
    SessionOpened,
    SessionOpenRequested,
    StepReceived,
    StreamTokens,
    StreamWindow,
)
from isthmus.protocol.frames import MsgType
from isthmus.protocol.limits import TenantUsage
from isthmus.protocol.messages import Close
from isthmus.protocol.states import CloudState, EdgeState
from tests.protocol.conversation import (
    CODEC,
    LIMITS,
    MAX_CONTEXT,
    MAX_TOKENS,
    NEVER_REPEATED,
    Conversation,
    content_of_cache,
    drawn_along,
    finish_at,
    token_of,
)
from tests.protocol.pairing import HIDDEN, SESSION_ID, VOCAB, Pair, connected, make_open, offer, parse


class PairedMachine(RuleBasedStateMachine):
    @initialize()
    def connect(self) -> None:
        self.usage = TenantUsage.from_limits(LIMITS)
        self.pair: Pair = connected(limits=LIMITS, usage=self.usage)
        self.talks: dict[int, Conversation] = {}
        self.ways: dict[str, dict[int, deque[bytes]]] = {"up": {}, "down": {}}
        self.history: dict[str, list[bytes]] = {"up": [], "down": []}
        self.counter = 0

    # ---- the link: any order between streams, in order within one

    def collect(self) -> None:
        for way, end in (("up", self.pair.edge), ("down", self.pair.cloud)):
            for message in end.data_to_send():
                self.ways[way].setdefault(parse(message).stream, deque()).append(message)

    def hand_over(self, way: str, message: bytes) -> None:
        if way == "up":
            for cloud_event in self.pair.cloud.receive(message, self.pair.now):
                self.on_cloud(cloud_event)
        else:
            for edge_event in self.pair.edge.receive(message, self.pair.now):
                self.on_edge(edge_event)
        self.collect()

    def deliver_from(self, way: str, stream: int) -> None:
        queue = self.ways[way][stream]
        message = queue.popleft()
        if not queue:
            del self.ways[way][stream]
        if parse(message).type not in NEVER_REPEATED:
            self.history[way].append(message)
        self.hand_over(way, message)

    def deliverable(self, way: str) -> list[int]:
        """Streams whose next message may come next. OPENs come in the order of their ids, which ascend."""
        opens = [s for s, queue in self.ways[way].items() if parse(queue[0]).type is MsgType.OPEN]
        return sorted(s for s in self.ways[way] if s not in opens or s == min(opens))

    def in_flight(self, stream: int) -> bool:
        return any(stream in streams for streams in self.ways.values())

    # ---- what each end reports

    def on_cloud(self, event: CloudEvent) -> None:
        match event:
            case SessionOpenRequested():
                self.talks[event.stream].work.append("open")
            case StepReceived():
                talk = self.talks[event.stream]
                assert event.seq == talk.last_seq + 1
                talk.last_seq = event.seq
                talk.work.append(event)
            case CancelRequested():
                talk = self.talks[event.stream]
                assert not talk.closing
                talk.closing = True
                talk.work.clear()
                talk.work.append(event)
            case CloseRequested():
                talk = self.talks[event.stream]
                assert not talk.closing
                talk.closing = True
                talk.work.append(event)
            case StreamWindow():
                assert 0 <= event.room <= LIMITS.stream_window_tokens
            case _:
                raise AssertionError(f"the cloud reports {event}")

    def on_edge(self, event: EdgeEvent) -> None:
        match event:
            case SessionOpened():
                talk = self.talks[event.stream]
                if talk.core.open.offer.entries:
                    talk.edge_rows = [content_of_cache(i) for i in range(event.opened.cached_rows)]
            case ResultTokens() | StreamTokens():
                talk = self.talks[event.stream]
                for index, token in enumerate(event.tokens, event.first_index):
                    assert index == talk.due_index, "each index once, in order"
                    talk.due_index += 1
                    assert token == token_of(event.stream, index)
                    if isinstance(event, StreamTokens):
                        talk.edge_rows.append(talk.edge_tokens[-1])  # the cloud fed the one before to itself
                    talk.edge_tokens.append(token)
                if isinstance(event, ResultTokens):
                    talk.edge_rows = talk.edge_rows[: event.kv_len]  # the rest of a draft chain
            case ResultRows():
                talk = self.talks[event.stream]
                rows = CODEC.decode_frame(event.frame, max_raw=1 << 20)
                assert rows[:, 0].astype(int).tolist() == talk.expected_rows.popleft()
            case CreditGranted():
                assert 0 <= event.rows <= LIMITS.initial_credits_rows
            case SessionClosed():
                talk = self.talks[event.stream]
                assert not talk.closed
                talk.closed = True
            case _:
                raise AssertionError(f"the edge reports {event}")

    # ---- the edge's owner

    @precondition(lambda self: len(self.pair.edge.sessions) < LIMITS.max_sessions)
    @rule(
        kind=st.sampled_from(["prefix", "u", "offload"]),
        prompt=st.integers(1, 9),
        offered=st.integers(0, 9),
    )
    def open(self, kind: str, prompt: int, offered: int) -> None:
        offered = min(offered, prompt)
        core = self.pair.edge.open(
            make_open(
                split=0 if kind == "offload" else 1,
                shape="u" if kind == "u" else "prefix",
                prompt_tokens=prompt,
                max_tokens=MAX_TOKENS,
                max_context=MAX_CONTEXT,
                offer=offer(*range(1, offered + 1)),
            )
        )
        self.talks[core.stream] = Conversation(core, kind, prompt)
        self.collect()

    @precondition(lambda self: self.sendable())
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        talk = data.draw(st.sampled_from(self.sendable()))
        core = talk.core
        truncate = data.draw(st.booleans()) and talk.kind != "offload"
        pos = data.draw(st.integers(0, core.kv_len)) if truncate else core.kv_len
        most = min(core.credits, core.chunk_rows, MAX_CONTEXT - pos)
        if most < 1:
            return
        n = data.draw(st.integers(1, most))
        if talk.kind != "u" and pos < talk.prompt and not truncate:
            n = min(n, talk.prompt - pos)
        index = core.open.index_after(pos + n)
        may_answer = talk.kind == "u" or (core.next_index <= index < MAX_TOKENS and index >= 0)
        final = may_answer and data.draw(st.booleans())
        all_rows = talk.kind == "u" and data.draw(st.booleans())
        contents = [(self.counter + i) % VOCAB for i in range(n)]
        self.counter += n
        if talk.kind == "offload":
            core.step_ids(contents, pos, final=final)
        else:
            rows = np.repeat(np.array(contents, np.float32)[:, None], HIDDEN, axis=1)
            core.step_rows(CODEC.encode(rows), pos, n, final=final, all_rows=all_rows, truncate=truncate)
        talk.edge_rows = talk.edge_rows[:pos] + contents
        if final and talk.kind != "u":
            talk.due_index = index  # an edge that knows tokens from elsewhere may go on beyond them
        if all_rows:
            talk.expected_rows.append(contents)
        elif final and talk.kind == "u":
            talk.expected_rows.append(contents[-1:])
        self.collect()

    @precondition(lambda self: self.verifiable())
    @rule(data=st.data(), right=st.integers(0, 3))
    def verify(self, data: st.DataObject, right: int) -> None:
        """A chain whose first `right` drafts are what the cloud will draw."""
        talk = data.draw(st.sampled_from(self.verifiable()))
        core = talk.core
        truncate = data.draw(st.booleans())
        pos = data.draw(st.integers(talk.first_pos, core.kv_len)) if truncate else core.kv_len
        n = data.draw(st.integers(1, 4))
        if n > min(core.credits, core.chunk_rows, MAX_CONTEXT - pos):
            return
        index = core.open.index_after(pos + 1)
        drafts = [(token_of(core.stream, index + i) + (i >= right)) % VOCAB for i in range(n - 1)]
        contents = [self.counter % VOCAB, *drafts]
        self.counter += 1
        rows = np.repeat(np.array(contents, np.float32)[:, None], HIDDEN, axis=1)
        core.verify_rows(contents, CODEC.encode(rows), pos, truncate=truncate)
        talk.edge_rows = talk.edge_rows[:pos] + contents
        if talk.kind == "u":
            talk.expected_rows.append(contents)
        else:
            talk.due_index = index
        self.collect()

    def verifiable(self) -> list[Conversation]:
        return [
            talk
            for talk in self.sendable()
            if talk.kind != "offload" and talk.first_pos <= talk.core.kv_len < talk.last_pos
        ]

    def sendable(self) -> list[Conversation]:
        return [talk for talk in self.talks.values() if talk.core.can_send(1)]

    @precondition(lambda self: self.pair.edge.sessions)
    @rule(data=st.data(), how=st.sampled_from(["cancel", "close", "both"]))
    def leave(self, data: st.DataObject, how: str) -> None:
        core = data.draw(st.sampled_from(list(self.pair.edge.sessions.values())))
        if how != "cancel":
            core.close(offer(core.kv_len) if core.kv_len else None)
        if how != "close":
            core.cancel()
        self.collect()

    # ---- the engine

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        talk = data.draw(st.sampled_from(self.busy()))
        self.work_on(talk, data.draw(st.integers(0, 9)), data.draw(st.integers(1, 3)))

    def busy(self) -> list[Conversation]:
        return [
            talk
            for talk in self.talks.values()
            if talk.work or (0 < talk.num_generated < MAX_TOKENS and not talk.closing)
        ]

    def work_on(self, talk: Conversation, cached: int, run: int) -> None:
        cloud = self.pair.cloud
        if not talk.work:
            self.generate(talk, run)
        else:
            match talk.work.popleft():
                case "open":
                    entries = talk.core.open.offer.entries
                    cached = min(cached, entries[-1][0], talk.prompt - 1) if entries else 0
                    talk.cloud_rows = [content_of_cache(i) for i in range(cached)]
                    cloud.opened(talk.stream, session_id=SESSION_ID, cached_rows=cached)
                case StepReceived() as step:
                    self.execute(talk, step)
                case CloseRequested(close=close):
                    self.check_kept(talk, close)
                    cloud.closed(talk.stream)
                case _:
                    cloud.closed(talk.stream)
        self.collect()

    def execute(self, talk: Conversation, step: StepReceived) -> None:
        cloud = self.pair.cloud
        if talk.kind == "offload":
            contents = decode_ids(step.frame.body, n_tok=step.n_tok, vocab_size=VOCAB)
        else:
            contents = CODEC.decode_frame(step.frame, max_raw=1 << 20)[:, 0].astype(int).tolist()
        assert step.pos == len(talk.cloud_rows) or (step.truncate and step.pos < len(talk.cloud_rows))
        talk.cloud_rows = talk.cloud_rows[: step.pos] + contents
        kv_len = len(talk.cloud_rows)
        if talk.kind == "u" and (step.all_rows or step.final):
            out = contents if step.all_rows else contents[-1:]
            rows = np.repeat(np.array(out, np.float32)[:, None], HIDDEN, axis=1)
            cloud.result_rows(talk.stream, CODEC.encode(rows), len(out), kv_len=kv_len)
        elif step.drafts:
            assert step.next_index == step.pos + 1 - talk.prompt
            tokens = drawn_along(talk.stream, step.next_index, step.drafts)
            talk.cloud_rows = talk.cloud_rows[: step.pos + len(tokens)]
            finish = finish_at(step.next_index + len(tokens) - 1)
            cloud.result_tokens(talk.stream, tokens, kv_len=len(talk.cloud_rows), finish=finish)
        elif step.final:
            assert step.next_index == kv_len - talk.prompt
            cloud.result_tokens(
                talk.stream,
                [token_of(talk.stream, step.next_index)],
                kv_len=kv_len,
                finish=finish_at(step.next_index),
            )
            if talk.kind == "offload":
                talk.num_generated = step.next_index + 1
        else:
            cloud.credit(talk.stream, step.n_tok)

    def generate(self, talk: Conversation, run: int) -> None:
        run = min(run, MAX_TOKENS - talk.num_generated)
        first = talk.num_generated
        tokens = [token_of(talk.stream, index) for index in range(first, first + run)]
        talk.cloud_rows += [token_of(talk.stream, index) for index in range(first - 1, first + run - 1)]
        talk.num_generated += run
        self.pair.cloud.stream_tokens(talk.stream, tokens, finish=finish_at(talk.num_generated - 1))

    def check_kept(self, talk: Conversation, close: Close) -> None:
        """The rows the edge offers for the next turn are the rows the engine holds."""
        if close.offer.entries:
            kept = close.offer.entries[-1][0]
            assert talk.cloud_rows[:kept] == talk.edge_rows[:kept]

    # ---- the link's doings

    @precondition(lambda self: self.ways["up"])
    @rule(data=st.data())
    def deliver_up(self, data: st.DataObject) -> None:
        self.deliver_from("up", data.draw(st.sampled_from(self.deliverable("up"))))

    @precondition(lambda self: self.ways["down"])
    @rule(data=st.data())
    def deliver_down(self, data: st.DataObject) -> None:
        self.deliver_from("down", data.draw(st.sampled_from(self.deliverable("down"))))

    @precondition(lambda self: self.history["up"])
    @rule(data=st.data())
    def repeat_up(self, data: st.DataObject) -> None:
        self.hand_over("up", data.draw(st.sampled_from(self.history["up"])))

    @precondition(lambda self: self.history["down"])
    @rule(data=st.data())
    def repeat_down(self, data: st.DataObject) -> None:
        self.hand_over("down", data.draw(st.sampled_from(self.history["down"])))

    @rule()
    def tick(self) -> None:
        self.pair.now += 0.4
        assert self.pair.edge.on_tick(self.pair.now) == []
        assert self.pair.cloud.on_tick(self.pair.now) == []
        self.collect()

    # ---- always

    @invariant()
    def nothing_is_over_its_bound(self) -> None:
        assert self.usage.num_sessions == len(self.pair.cloud.sessions)
        for stream, session in self.pair.cloud.sessions.items():
            talk = self.talks[stream]
            waiting = sum(item.n_tok for item in talk.work if isinstance(item, StepReceived))
            assert waiting <= LIMITS.initial_credits_rows
            assert sum(len(body.tokens) for body in session.unacked) <= LIMITS.stream_window_tokens
            assert session.credits >= 0
            assert talk.core.credits >= 0 or talk.core.state is EdgeState.CLOSING

    @invariant()
    def quiet_sessions_agree(self) -> None:
        for stream, session in self.pair.cloud.sessions.items():
            talk = self.talks[stream]
            if talk.work or self.in_flight(stream) or session.state is not CloudState.ACTIVE:
                continue
            if talk.core.state in (EdgeState.CLOSING, EdgeState.CLOSED):
                continue
            assert talk.core.kv_len == len(talk.edge_rows)
            assert session.credits == talk.core.credits == LIMITS.initial_credits_rows
            if not session.generating:
                assert session.kv_len == talk.core.kv_len
                assert talk.cloud_rows == talk.edge_rows
                assert session.next_index == talk.core.next_index or talk.kind == "u"

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        self.settle()
        for core in list(self.pair.edge.sessions.values()):
            core.close(offer(core.kv_len) if core.kv_len else None)
        self.collect()
        self.settle()
        assert self.pair.edge.sessions == {}
        assert self.pair.cloud.sessions == {}
        assert (self.usage.num_sessions, self.usage.kv_bytes) == (0, 0)
        for talk in self.talks.values():
            assert talk.closed
            assert talk.core.state is EdgeState.CLOSED

    def settle(self) -> None:
        """Carry and compute until nothing moves."""
        while any(self.ways.values()) or self.busy():
            for way in ("up", "down"):
                for stream in self.deliverable(way):
                    self.deliver_from(way, stream)
            for talk in self.busy():
                self.work_on(talk, 9, 2)


PairedMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestPairedMachine = PairedMachine.TestCase


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

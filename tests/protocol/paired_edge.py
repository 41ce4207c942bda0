"""The edge's owner in the paired machines: what it sends, what must come back, what it sends again."""

from __future__ import annotations

import numpy as np

from isthmus.protocol.activations import encode_ids
from isthmus.protocol.errors import CloudLostError
from isthmus.protocol.events import (
    ConnectionFailed,
    CreditGranted,
    EdgeEvent,
    ResultRows,
    ResultTokens,
    RttMeasured,
    SessionClosed,
    SessionFailed,
    SessionOpened,
    SessionResumed,
    SessionSuspended,
    StreamTokens,
)
from isthmus.protocol.states import EdgeState
from tests.protocol.conversation import CODEC, LIMITS, Conversation, content_of_cache, token_of
from tests.protocol.paired_link import Link
from tests.protocol.pairing import HIDDEN


class EdgeOwner:
    """Follows each session's events; asserts that every index comes once, in order, with its token."""

    talks: dict[int, Conversation]
    network_lies = False  # then a session may end with any typed error

    def on_edge(self, link: Link, event: EdgeEvent) -> None:
        match event:
            case SessionOpened():
                talk = link.talks[event.stream]
                if talk.core.open.offer.entries:
                    talk.edge_rows = [content_of_cache(i) for i in range(event.opened.cached_rows)]
            case ResultTokens() | StreamTokens():
                self.on_tokens(link.talks[event.stream], event)
            case ResultRows():
                rows = CODEC.decode_frame(event.frame, max_raw=1 << 20)
                assert rows[:, 0].astype(int).tolist() == link.talks[event.stream].expected_rows.popleft()
            case CreditGranted():
                assert 0 <= event.rows <= LIMITS.initial_credits_rows
            case SessionClosed():
                talk = link.talks[event.stream]
                assert not talk.closed
                talk.closed = True
            case SessionSuspended():
                assert link.talks[event.stream].core.state is EdgeState.SUSPENDED
            case SessionResumed():
                self.on_resumed(link.talks[event.stream], event)
            case SessionFailed():
                talk = link.talks[event.stream]
                lost = isinstance(event.error, CloudLostError)
                expired = event.error.code == "unknown_session" and talk.evicted
                assert lost or expired or self.network_lies, event.error
                talk.failed = True
            case ConnectionFailed():
                assert isinstance(event.error, CloudLostError)
            case RttMeasured():
                assert event.seconds >= 0
            case _:
                raise AssertionError(f"the edge reports {event}")

    def on_tokens(self, talk: Conversation, event: ResultTokens | StreamTokens) -> None:
        for index, token in enumerate(event.tokens, event.first_index):
            assert index == talk.due_index, "each index once, in order"
            talk.due_index += 1
            assert token == token_of(talk.number, index)
            if isinstance(event, StreamTokens):
                talk.edge_rows.append(talk.edge_tokens[-1])  # the cloud fed the one before to itself
            talk.edge_tokens.append(token)
        if isinstance(event, ResultTokens):
            talk.edge_rows = talk.edge_rows[: event.kv_len]  # the rest of a draft chain

    def on_resumed(self, talk: Conversation, event: SessionResumed) -> None:
        assert (event.replay is None) is (event.action == "ok")
        assert event.action != "rebuild", talk.number
        if event.replay is not None:
            assert event.replay.start < event.replay.stop <= len(talk.edge_rows)
        talk.replay = event.replay

    # ---- sending

    def send(
        self,
        talk: Conversation,
        contents: list[int],
        pos: int,
        *,
        final: bool = False,
        all_rows: bool = False,
        truncate: bool = False,
        drafts: tuple[int, ...] = (),
    ) -> None:
        """One STEP, or with `drafts` one VERIFY; and the digests that the owner keeps."""
        core = talk.core
        raw = CODEC.encode_raw(np.repeat(np.array(contents, np.float32)[:, None], HIDDEN, axis=1))
        if drafts:
            core.verify_rows(drafts, CODEC.pack(raw), pos, truncate=truncate)
        elif talk.kind == "offload":
            core.step_ids(contents, pos, final=final)
        else:
            core.step_rows(
                CODEC.pack(raw), pos, len(contents), final=final, all_rows=all_rows, truncate=truncate
            )
        core.digests.truncate(pos)
        core.digests.append(encode_ids(contents) if talk.kind == "offload" else raw)

    def send_again(self, talk: Conversation, n_rows: int) -> bool:
        """Up to `n_rows` of the replay, if the credits allow."""
        replay, core = talk.replay, talk.core
        assert replay is not None
        left = replay.stop - replay.start
        plain = left - replay.last_rows
        n = min(n_rows, plain) if plain > 0 else replay.last_rows
        # With FINAL alone, rows before the last may be part of its step.
        if replay.final and not replay.all_rows and n_rows > plain:
            n = left
        if not core.can_send(n):
            return False
        ends = n == left
        contents = talk.edge_rows[replay.start : replay.start + n]
        self.send(
            talk,
            contents,
            replay.start,
            final=ends and replay.final,
            all_rows=ends and replay.all_rows,
            truncate=replay.truncate,
            drafts=replay.drafts if ends else (),
        )
        talk.replay = None if ends else replay._replace(start=replay.start + n, truncate=False)
        return True

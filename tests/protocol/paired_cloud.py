"""The cloud's owner in the paired machines: an engine that computes when it is told to, and its sessions."""

from __future__ import annotations

import numpy as np

from isthmus.protocol.activations import decode_ids
from isthmus.protocol.errors import IsthmusError, NotFoundError, RejectedError
from isthmus.protocol.events import (
    CancelRequested,
    CloseRequested,
    CloudEvent,
    ConnectionFailed,
    ResumeRequested,
    SessionDetached,
    SessionFailed,
    SessionOpenRequested,
    StepReceived,
    StreamWindow,
)
from isthmus.protocol.limits import TenantUsage
from isthmus.protocol.messages import Close, Finish
from isthmus.protocol.resume_tokens import check_token, make_token
from isthmus.protocol.states import CloudState
from tests.protocol.conversation import (
    CODEC,
    LIMITS,
    MAX_TOKENS,
    Conversation,
    content_of_cache,
    drawn_along,
    finish_at,
    token_of,
)
from tests.protocol.paired_link import Link
from tests.protocol.pairing import HIDDEN, VOCAB

SECRET = b"secret of this cloud"


class CloudOwner:
    """Steps are decoded (and digested) as they come; computed, one at a time, when the test says so."""

    talks: dict[int, Conversation]
    usage: TenantUsage
    links: list[Link]
    network_lies = False

    def on_cloud(self, link: Link, event: CloudEvent) -> None:
        match event:
            case SessionOpenRequested():
                talk = link.talks[event.stream]
                talk.session = link.pair.cloud.sessions[event.stream]
                talk.work.append("open")
            case StepReceived():
                talk = link.talks[event.stream]
                assert event.seq == talk.last_seq + 1
                talk.last_seq = event.seq
                talk.work.append(event)
                assert talk.session is not None
                talk.session.digests.truncate(event.pos)
                if talk.kind == "offload":
                    talk.session.digests.append(event.frame.body)
                else:
                    talk.session.digests.append(CODEC.unpack(event.frame, max_raw=1 << 20))
            case CancelRequested():
                talk = link.talks[event.stream]
                assert not talk.closing
                talk.closing = True
                talk.work.clear()
                talk.work.append(event)
            case CloseRequested():
                talk = link.talks[event.stream]
                assert not talk.closing
                talk.closing = True
                talk.work.append(event)
            case StreamWindow():
                assert 0 <= event.room <= LIMITS.stream_window_tokens
            case SessionDetached():
                assert link.talks[event.stream].session is event.session
            case ResumeRequested():
                link.resumes.append((event.stream, event.resume))
            case SessionFailed():
                assert event.error.code == "edge_gone" or self.network_lies, event.error
                self.forget(link.talks[event.stream])
            case ConnectionFailed():
                assert event.error.code == "edge_gone"
            case _:
                raise AssertionError(f"the cloud reports {event}")

    def forget(self, talk: Conversation) -> None:
        talk.session = None
        talk.closing = True
        talk.work.clear()

    # ---- resume

    def token(self, talk: Conversation) -> str:
        return make_token(SECRET, tenant="tenant", session_id=talk.session_id, model="m", expires_s=1e9)

    def holder(self, talk: Conversation) -> Link | None:
        """The connection that holds the cloud's half."""
        assert talk.session is not None
        for link in self.links:
            if link.pair.cloud.sessions.get(talk.session.stream) is talk.session:
                return link
        return None

    def answer_resume(self, link: Link) -> None:
        """As the server does: the token, the session, what holds it; then RESUMED."""
        stream, resume = link.resumes.popleft()
        cloud = link.pair.cloud
        session_id, token = resume.session_id, resume.resume_token
        try:
            check_token(SECRET, token, tenant="tenant", session_id=session_id, model="m", now_s=0)
            talk = self.talks[int(session_id, 16)]
            if talk.session is None:
                raise NotFoundError("no such session", code="unknown_session")
            talk.session.check_resume(resume)
            if (holder := self.holder(talk)) is not None:
                superseded = RejectedError("a newer connection has it", code="superseded")
                holder.pair.cloud.release(talk.session.stream, superseded)
            assert talk.session.state is CloudState.DETACHED
            taken = cloud.resumed(stream, talk.session, resume, resume_token=self.token(talk))
            assert taken is not cloud.is_closed
        except IsthmusError as error:
            cloud.refuse(stream, error)

    def evict(self, talk: Conversation) -> None:
        session = talk.session
        assert session is not None
        session.evict()
        self.usage.release(session.kv_bytes)
        talk.evicted = True
        self.forget(talk)

    # ---- the engine

    def is_busy(self, talk: Conversation) -> bool:
        generates = 0 < talk.num_generated < MAX_TOKENS and not talk.closing
        return talk.session is not None and (bool(talk.work) or generates)

    def work_on(self, talk: Conversation, cached: int, run: int) -> None:
        """The next thing the engine has to do for this session."""
        if not talk.work:
            self.generate(talk, run)
            return
        match talk.work.popleft():
            case StepReceived() as step:
                self.execute(talk, step)
            case what:
                self.attend(talk, what, cached)

    def attend(self, talk: Conversation, what: CloseRequested | CancelRequested | str, cached: int) -> None:
        """What ends with the connection, so there is one."""
        holder = self.holder(talk)
        assert holder is not None
        cloud = holder.pair.cloud
        match what:
            case CloseRequested(close=close, stream=stream):
                self.check_kept(talk, close)
                cloud.closed(stream)
                self.forget(talk)
            case CancelRequested(stream=stream):
                cloud.closed(stream)
                self.forget(talk)
            case _:
                entries = talk.core.open.offer.entries
                cached = min(cached, entries[-1][0], talk.prompt - 1) if entries else 0
                talk.cloud_rows = [content_of_cache(i) for i in range(cached)]
                token = self.token(talk)
                cloud.opened(talk.stream, session_id=talk.session_id, cached_rows=cached, resume_token=token)

    def execute(self, talk: Conversation, step: StepReceived) -> None:
        session = talk.session
        assert session is not None
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
            session.result_rows(CODEC.encode(rows), len(out), kv_len)
        elif step.drafts:
            assert step.next_index == step.pos + 1 - talk.prompt
            tokens = drawn_along(talk.number, step.next_index, step.drafts)
            talk.cloud_rows = talk.cloud_rows[: step.pos + len(tokens)]
            finish = finish_at(step.next_index + len(tokens) - 1)
            self.give_tokens(talk, tokens, len(talk.cloud_rows), finish)
        elif step.final:
            assert step.next_index == kv_len - talk.prompt
            token = token_of(talk.number, step.next_index)
            self.give_tokens(talk, [token], kv_len, finish_at(step.next_index))
            if talk.kind == "offload":
                talk.num_generated = step.next_index + 1
        else:
            session.credit(step.n_tok)

    def give_tokens(self, talk: Conversation, tokens: list[int], kv_len: int, finish: Finish | None) -> None:
        assert talk.session is not None
        talk.session.result_tokens(tokens, kv_len, None, None, finish)

    def generate(self, talk: Conversation, run: int) -> None:
        assert talk.session is not None
        run = min(run, MAX_TOKENS - talk.num_generated)
        first = talk.num_generated
        tokens = [token_of(talk.number, index) for index in range(first, first + run)]
        talk.cloud_rows += [token_of(talk.number, index) for index in range(first - 1, first + run - 1)]
        talk.num_generated += run
        talk.session.stream_tokens(tokens, None, None, finish_at(talk.num_generated - 1))

    def check_kept(self, talk: Conversation, close: Close) -> None:
        """The rows the edge offers for the next turn are the rows the engine holds. (Not where CLOSE has
        overtaken a step.)"""
        if close.offer.entries and not self.network_lies:
            kept = close.offer.entries[-1][0]
            assert talk.cloud_rows[:kept] == talk.edge_rows[:kept], talk.number

"""What the server and its engine tell a cloud connection: answers to sessions, status, going away.

Calls for a stream that is gone or closing are dropped quietly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from isthmus.protocol.activations import Encoded
from isthmus.protocol.canaries import CloudCanaries
from isthmus.protocol.cloud_session import CloudSession
from isthmus.protocol.connection import Connection
from isthmus.protocol.errors import IsthmusError
from isthmus.protocol.events import CloudEvent
from isthmus.protocol.frames import MsgType, json_frame
from isthmus.protocol.limits import Limits, TenantUsage
from isthmus.protocol.messages import (
    CanaryResult,
    Closed,
    ErrorBody,
    Finish,
    GoAway,
    Load,
    Opened,
    Resume,
    Status,
    TopTokens,
    Welcome,
)
from isthmus.protocol.states import CloudInput, ConnectionState


class Agreed(NamedTuple):
    """What HELLO and WELCOME settled."""

    terms: Welcome
    canaries: CloudCanaries


class CloudAnswers(Connection[CloudEvent]):
    """What goes out of a CloudConnection; the signatures are explained there."""

    def __init__(self, limits: Limits, usage: TenantUsage) -> None:
        super().__init__(limits, ConnectionState.HANDSHAKE)
        self.sessions: dict[int, CloudSession] = {}
        self._usage = usage
        self._resuming: set[int] = set()  # streams whose RESUME has no answer yet
        self._agreed: Agreed | None = None
        self._newest_ping = 0

    @property
    def _agreement(self) -> Agreed:
        assert self._agreed is not None  # the state table lets nothing else through before HELLO
        return self._agreed

    def _forget(self, stream: int) -> CloudSession:
        session = self.sessions.pop(stream)
        self._usage.release(session.kv_bytes)
        return session

    # ---- resume

    def resumed(
        self,
        stream: int,
        session: CloudSession,
        resume: Resume,
        *,
        resume_token: str,
        chunk_rows: int | None = None,
    ) -> bool:
        """Answer ResumeRequested: `session`, of this tenant and DETACHED, goes on here. False: the request or
        the connection is gone, and the session stays as it is. Raises as CloudSession.check_resume, without
        any change; answer with `refuse` then."""
        if stream not in self._resuming:
            return False
        session.resumed(
            stream,
            resume,
            self._send,
            resume_token=resume_token,
            chunk_rows=self.limits.max_rows_per_step if chunk_rows is None else chunk_rows,
        )
        self._resuming.remove(stream)
        self.sessions[stream] = session
        return True

    def refuse(self, stream: int, error: IsthmusError) -> None:
        """Answer ResumeRequested with ERROR. Nothing else changes."""
        if stream in self._resuming:
            self._resuming.remove(stream)
            self._send_error(stream, 0, ErrorBody.from_error(error))

    def release(self, stream: int, error: IsthmusError | None = None) -> CloudSession:
        """Take an ACTIVE session out of this connection, without an end and without giving back its quota: it
        is DETACHED. With `error`, the edge is told. What still comes on the stream is dropped."""
        session = self.sessions[stream]
        session.detach()
        del self.sessions[stream]
        if error is not None:
            self._send_error(stream, session.epoch, ErrorBody.from_error(error))
        return session

    # ---- from the engine; a stream that is gone is dropped quietly

    def opened(
        self,
        stream: int,
        *,
        session_id: str,
        cached_rows: int = 0,
        credits: int | None = None,
        chunk_rows: int | None = None,
        resume_token: str = "",
    ) -> None:
        """Answer SessionOpenRequested. `credits` (default, and at least, initial_credits_rows): rows in
        flight; `chunk_rows` (default max_rows_per_step): the step size the cloud likes."""
        if session := self.sessions.get(stream):
            session.opened(
                Opened(
                    session_id=session_id,
                    resume_token=resume_token,
                    cached_rows=cached_rows,
                    credits=self.limits.initial_credits_rows if credits is None else credits,
                    chunk_rows=self.limits.max_rows_per_step if chunk_rows is None else chunk_rows,
                )
            )

    def credit(self, stream: int, rows: int) -> None:
        """`rows` more rows of steps without output are computed. (A RESULT returns its step's credits.)"""
        if session := self.sessions.get(stream):
            session.credit(rows)

    def result_tokens(
        self,
        stream: int,
        tokens: Sequence[int],
        *,
        kv_len: int,
        logprobs: Sequence[float | None] | None = None,
        top: Sequence[TopTokens] | None = None,
        finish: Finish | None = None,
        cloud_us: int = 0,
    ) -> None:
        """Prefix shape: the one token of the FINAL step, or those of VERIFY up to the first that is not its
        draft; `kv_len` rows are kept. In offload, without `finish`, `stream_tokens` goes on from here.
        `cloud_us` as in messages.ResultBody."""
        if session := self.sessions.get(stream):
            session.result_tokens(tokens, kv_len, logprobs, top, finish, cloud_us)

    def result_rows(self, stream: int, encoded: Encoded, n_tok: int, *, kv_len: int) -> None:
        """U-shape: final hidden rows (before the final norm) of the step, encoded in `open.result_format`."""
        if session := self.sessions.get(stream):
            session.result_rows(Encoded(*encoded), n_tok, kv_len)

    def stream_tokens(
        self,
        stream: int,
        tokens: Sequence[int],
        *,
        logprobs: Sequence[float | None] | None = None,
        top: Sequence[TopTokens] | None = None,
        finish: Finish | None = None,
        cloud_us: int = 0,
    ) -> None:
        """Offload: the next tokens. What exceeds the edge's window waits here until it acknowledges; an
        engine that minds `stream_room` and StreamWindow generates no further ahead than that."""
        if session := self.sessions.get(stream):
            session.stream_tokens(tokens, logprobs, top, finish, cloud_us)

    def stream_room(self, stream: int) -> int:
        """Tokens that would go out at once; 0 for a stream that is gone."""
        session = self.sessions.get(stream)
        return session.stream_room if session else 0

    def closed(
        self, stream: int, *, pages_freed: int = 0, kv_len: int | None = None, cached: bool = False
    ) -> None:
        """Answer CancelRequested or CloseRequested once the pages are free (or kept). Ends the session."""
        if session := self.sessions.get(stream):
            held = session.kv_len if kv_len is None else kv_len
            session.closed(Closed(pages_freed=pages_freed, kv_len=held, cached=cached))
            self._forget(stream)

    def fail(self, stream: int, error: IsthmusError) -> None:
        """End one session with ERROR. The caller frees what it held; no event follows."""
        if session := self.sessions.get(stream):
            body = ErrorBody.from_error(error, expected=(session.last_seq + 1, session.kv_len))
            self._send_error(stream, session.epoch, body)
            self._forget(stream).end(CloudInput.ERROR)

    def canary_result(self, seq: int, split: int, *, ok: bool, error: float, tolerance: float) -> None:
        """Answer CanaryRequested; the result is cached for (edge weights, edge precision, split)."""
        if self._state is ConnectionState.OPEN:
            result = CanaryResult(split=split, ok=ok, error=error, tolerance=tolerance)
            self._send(self._agreement.canaries.answer(seq, result))

    def status(self, load: Load, received: int = 0) -> None:
        """Push STATUS; a newer one replaces one that has not left. `received`: bytes that have come in."""
        if self._state is ConnectionState.OPEN:
            status = Status(load=load, echo=self._newest_ping, received=received)
            self._send_latest(json_frame(MsgType.STATUS, status))

    def go_away(self, deadline_s: float, alternative: str = "") -> None:
        """Tell the edge to open nothing new. Its sessions go on; `fail` OPENs that crossed."""
        if self._state is ConnectionState.OPEN:
            self._send_urgent(MsgType.GOAWAY, GoAway(deadline_s=deadline_s, alternative=alternative))

"""RESUME: whose session it is, from whom it is taken, and when it may go on (PROTOCOL.md, rules 4 and 5)."""

from __future__ import annotations

import secrets
from time import monotonic
from typing import TYPE_CHECKING

from isthmus.protocol.errors import IsthmusError, NotFoundError, RejectedError, SequenceError
from isthmus.protocol.messages import Resume
from isthmus.protocol.resume_tokens import check_token, make_token
from isthmus.protocol.states import CloudState

if TYPE_CHECKING:
    from isthmus.cloud.connection import Peer
    from isthmus.cloud.hub import Hub
    from isthmus.cloud.sessions import LiveSession

# The metric's outcomes; every other refusal counts as "refused".
_OUTCOMES = {"unknown_session": "unknown", "resume_expired": "expired", "stale_attempt": "stale"}


class Resumes:
    """Makes the tokens and answers RESUME. The secret lives as long as the process, as its sessions do."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._secret = secrets.token_bytes(32)
        identity = hub.info.identity
        self._model = f"{identity.key} {identity.weights_hash}"

    def token(self, live: LiveSession) -> str:
        """For OPENED and RESUMED."""
        return make_token(
            self._secret,
            tenant=live.tenant,
            session_id=live.session_id,
            model=self._model,
            expires_s=monotonic() + self._hub.limits.resume_token_s,
        )

    async def answer(self, peer: Peer, stream: int, resume: Resume) -> None:
        """RESUMED or ERROR on `stream`; the session then is `peer`'s, or as it was."""
        try:
            outcome = await self._resume(peer, stream, resume)
        except IsthmusError as error:
            peer.core.refuse(stream, error)
            outcome = _OUTCOMES.get(error.code, "refused")
            # At debug level: else a flood of them would flood the log.
            self._hub.log.debug("resume", tenant=peer.tenant, outcome=outcome, code=error.code)
        self._hub.telemetry.resumes.labels(outcome=outcome).inc()
        peer.wake()

    async def _resume(self, peer: Peer, stream: int, resume: Resume) -> str:
        # The token before the look-up: who has none of ours learns nothing about what is kept here.
        check_token(
            self._secret,
            resume.resume_token,
            tenant=peer.tenant,
            session_id=resume.session_id,
            model=self._model,
            now_s=monotonic(),
        )
        self._hub.usage(peer.tenant).admit_resume(monotonic())
        while True:
            if peer.core.is_closed:
                return "gone"
            live = self._find(resume)
            if live.peer is not None:
                self._take_away(live)
            if live.feed.decoded:
                break
            # Its steps are in order, whoever sent them, but digests speak of decoded rows only. Meanwhile
            # it may end, expire, or go to a newer attempt.
            await live.feed.wait_decoded()
        sessions = self._hub.sessions
        try:
            action = live.core.resume_action(resume)
            taken = peer.core.resumed(
                stream,
                live.core,
                resume,
                resume_token=self.token(live),
                chunk_rows=sessions.chunk_rows(live),
            )
        except SequenceError as error:
            # The two ends disagree on what happened: its edge can only begin anew.
            sessions.evict(live, error.code)
            raise
        if not taken:
            return "gone"
        sessions.adopt(live, peer)
        self._hub.log.info("resume", **live.told(), outcome=action)
        return action

    def _find(self, resume: Resume) -> LiveSession:
        self._hub.drain.check_open()
        live = self._hub.sessions.by_id(resume.session_id)
        if live is None or live.core.state is CloudState.CLOSING:
            raise NotFoundError(
                "no such session is kept here",
                code="unknown_session",
                hint="open a new one and send all rows",
            )
        if resume.attempt <= live.core.attempt:
            raise SequenceError(
                f"attempt {resume.attempt} to resume, attempt {live.core.attempt} was accepted",
                code="stale_attempt",
            )
        return live

    def _take_away(self, live: LiveSession) -> None:
        """The newest connection is right: an older one that still lives loses the session."""
        holder = live.peer
        assert holder is not None
        holder.core.release(
            live.core.stream,
            RejectedError("the session goes on on a newer connection", code="superseded"),
        )
        holder.wake()
        self._hub.sessions.unhold(live)

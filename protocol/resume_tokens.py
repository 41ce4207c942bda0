"""Resume tokens: what lets an edge come back to its session, and nobody else (rule 5).

A token is its expiry (f64, the cloud's monotonic seconds) and an HMAC-SHA256 over tenant, session, model and
expiry, in hex. The cloud keeps nothing: it computes the token that would be right, and compares.
"""

from __future__ import annotations

import hmac
import struct
from typing import Final

from isthmus.protocol.errors import RejectedError

_EXPIRY: Final = struct.Struct("<d")
_PURPOSE: Final = b"isthmus resume token 1"
_HINT: Final = "open the session anew; the edge still has its history"


def make_token(secret: bytes, *, tenant: str, session_id: str, model: str, expires_s: float) -> str:
    """The token that `check_token` takes until `expires_s`."""
    expiry = _EXPIRY.pack(expires_s)
    parts = [_PURPOSE, tenant.encode(), session_id.encode(), model.encode(), expiry]
    # Each part behind its length: no two lists of parts make the same message.
    message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return (expiry + hmac.digest(secret, message, "sha256")).hex()


def check_token(secret: bytes, token: str, *, tenant: str, session_id: str, model: str, now_s: float) -> None:
    """RejectedError `resume_refused` for a token that was not made for exactly this, `resume_expired` for one
    whose time is over. Constant time in what a guesser could learn from."""
    expires_s = _expiry_of(token)
    right = make_token(secret, tenant=tenant, session_id=session_id, model=model, expires_s=expires_s)
    if not hmac.compare_digest(right.encode(), token.encode(errors="replace")):
        raise RejectedError(
            "the resume token is not valid for this session", code="resume_refused", hint=_HINT
        )
    if now_s >= expires_s:
        raise RejectedError(
            f"the resume token expired {now_s - expires_s:.0f} s ago", code="resume_expired", hint=_HINT
        )


def _expiry_of(token: str) -> float:
    """What the token says of itself; 0 where it can't be read, which then fails the comparison."""
    try:
        (expires_s,) = _EXPIRY.unpack(bytes.fromhex(token[: 2 * _EXPIRY.size]))
    except (ValueError, struct.error):
        return 0.0
    return float(expires_s)

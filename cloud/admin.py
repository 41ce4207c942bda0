"""`POST /admin/drain`: who may ask for it, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from isthmus.cloud.drain import DrainPolicy, check_alternative
from isthmus.cloud.hub import Hub
from isthmus.protocol.addresses import is_loopback
from isthmus.protocol.errors import ConfigError, IsthmusError, RejectedError, RequestError
from isthmus.protocol.keys import KeyRing

MAX_BODY_BYTES: Final = 4096
_ADMIN: Final = "admin"

Refuse = Callable[[IsthmusError, int], Response]


class DrainRequest(BaseModel):
    """The body; both fields default to what the cloud was started with."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    deadline_s: Annotated[float, Field(ge=0, le=86_400)] | None = None
    alternative: Annotated[str, Field(max_length=256)] | None = None


def is_admin_label(label: str) -> bool:
    return label == _ADMIN or label.startswith(f"{_ADMIN}-")


def admin_remarks(ring: KeyRing) -> list[str]:
    """What to warn of at the start about who may drain this cloud."""
    if ring.open or _has_admin(ring):
        return []
    return ["no key is labelled admin or admin-…: every key may drain this cloud"]


def _has_admin(ring: KeyRing) -> bool:
    return any(is_admin_label(label) for label in ring.labels)


async def drain(request: Request, hub: Hub, policy: DrainPolicy, refuse: Refuse) -> Response:
    """202 with how many sessions are left and until when; asking again changes nothing but a later end."""
    error, status = _not_allowed(request, hub.keys.ring)
    if error is not None:
        return refuse(error, status)
    try:
        asked = parse_drain(await _body(request))
    except IsthmusError as problem:
        return refuse(problem, 400)
    deadline_s = policy.deadline_s if asked.deadline_s is None else asked.deadline_s
    alternative = policy.alternative if asked.alternative is None else asked.alternative
    hub.start_drain(deadline_s, alternative)
    left_s = hub.drain.left_s(monotonic())
    answer = {"draining": True, "sessions": len(hub.sessions), "deadline_s": round(left_s, 3)}
    return JSONResponse(answer, status_code=202)


def _not_allowed(request: Request, ring: KeyRing) -> tuple[IsthmusError | None, int]:
    if "origin" in request.headers:
        return RejectedError("web pages may not drain a cloud", code="foreign_origin"), 403
    label = ring.authenticate(request.headers.get("authorization"))
    if label is None:
        return (
            RejectedError(
                "no valid API key was given", code="unauthorized", hint="send `Authorization: Bearer KEY`"
            ),
            401,
        )
    if ring.open:
        # Without keys only this machine may ask, whatever the port is bound to.
        here = request.client is not None and is_loopback(request.client.host)
        if not here or not is_loopback(request.url.hostname or ""):
            return RejectedError("without API keys only this machine may drain", code="not_local"), 403
    elif _has_admin(ring) and not is_admin_label(label):
        return (
            RejectedError(
                "this key may not drain the cloud",
                code="not_admin",
                hint="use a key whose label is admin or begins with admin-",
            ),
            403,
        )
    return None, 200


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the body has more than {MAX_BODY_BYTES} bytes", code="body_too_large")
    return body


def parse_drain(body: bytes) -> DrainRequest:
    """RequestError naming the field for anything but the two known ones, rightly typed. Empty is fine."""
    try:
        asked = DrainRequest.model_validate_json(body or b"{}")
        check_alternative(asked.alternative or "")
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise RequestError(f"{where}: {first['msg']}", code="bad_drain_request") from None
    except ConfigError as error:
        raise RequestError(error.message, code=error.code, hint=error.hint) from None
    return asked

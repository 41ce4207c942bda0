"""The exception tree of the whole project.

    IsthmusError
    ├── UsageError                  the caller asked for something impossible (exit 2, HTTP 400)
    │   ├── ConfigError             a setting or command-line value
    │   ├── RequestError            a generation request: unknown field, context overflow, bad sampling
    │   └── UnsupportedModelError   architecture, field, tensor type we cannot honour
    ├── ModelFileError              checkpoint or pack is damaged, cut short, or of another version
    ├── NotFoundError               no such model, pack or session
    ├── ProtocolError               the peer broke the session protocol
    │   ├── FrameError              header, length or checksum
    │   ├── CodecError              tensor body does not decode to what was negotiated
    │   └── SequenceError           STEP out of order, wrong position, wrong state
    ├── RejectedError               the cloud refused: version, auth, model mismatch, capacity, limits
    ├── CloudError                  the cloud is gone, silent or failed in the middle
    │   ├── CloudUnreachableError   no connection could be made
    │   ├── CloudLostError          the connection died while a request ran
    │   └── CloudTimeoutError       a step missed its deadline
    ├── OverloadedError             the queue is full (HTTP 429)
    └── RouteInfeasibleError        the asked route cannot be taken (privacy, memory, shape)

Every error carries a stable `code` (snake_case, safe to match on), a message that names the
offending thing and, where two numbers disagree, both, and a `hint` saying what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class IsthmusError(Exception):
    """Root of the tree. `code` is stable; `hint` tells the way out."""

    default_code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, code: str | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def to_dict(self) -> dict[str, str]:
        """The `error` object of `--json` output: code, message, hint."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class UsageError(IsthmusError):
    default_code = "usage"
    http_status = 400
    exit_code = 2


class ConfigError(UsageError):
    default_code = "bad_setting"


class RequestError(UsageError):
    default_code = "bad_request"


class UnsupportedModelError(UsageError):
    default_code = "unsupported_model"
    exit_code = 1


class ModelFileError(IsthmusError):
    default_code = "bad_model_file"


class NotFoundError(IsthmusError):
    default_code = "not_found"
    http_status = 404


class ProtocolError(IsthmusError):
    default_code = "protocol"
    http_status = 502


class FrameError(ProtocolError):
    default_code = "bad_frame"


class CodecError(ProtocolError):
    default_code = "bad_tensor"


class SequenceError(ProtocolError):
    default_code = "bad_sequence"


class RejectedError(IsthmusError):
    """The cloud said no. `retry_after_s` is None when trying again cannot help."""

    default_code = "rejected"
    http_status = 502

    def __init__(
        self, message: str, *, code: str | None = None, hint: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.retry_after_s = retry_after_s


class CloudError(IsthmusError):
    default_code = "cloud_failed"
    http_status = 502


class CloudUnreachableError(CloudError):
    default_code = "cloud_unreachable"
    http_status = 503


class CloudLostError(CloudError):
    default_code = "cloud_lost"


class CloudTimeoutError(CloudError):
    default_code = "cloud_timeout"
    http_status = 504


class OverloadedError(IsthmusError):
    default_code = "overloaded"
    http_status = 429

    def __init__(
        self, message: str, *, code: str | None = None, hint: str = "", retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.retry_after_s = retry_after_s


class RouteInfeasibleError(IsthmusError):
    default_code = "route_infeasible"
    http_status = 400

"""From the bytes of a request's body to its model, or to an error that names the offending field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from isthmus.edge.api_errors import FieldError
from isthmus.edge.api_models import ChatRequest, CompletionRequest

T = TypeVar("T", bound=BaseModel)

# By the same parser, which is stricter than Python's here and more lenient there.
_ANYTHING: Final[TypeAdapter[Any]] = TypeAdapter(Any)


class _Kind(BaseModel):
    """Which of the two a body is; the rest of it is not looked at."""

    messages: Any = None
    prompt: Any = None


def parse_either(body: bytes) -> ChatRequest | CompletionRequest:
    """The body as that of a chat or a completion, by which of `messages` and `prompt` it has. FieldError as
    `parse_body`, and for a body with neither."""
    said = parse_body(_Kind, body).model_fields_set
    if not said:
        raise FieldError(
            "the body has neither messages nor prompt",
            param="messages",
            hint="send the body of a chat or of a completion",
        )
    return parse_body(ChatRequest, body) if "messages" in said else parse_body(CompletionRequest, body)


def parse_body(kind: type[T], body: bytes) -> T:
    """The body as `kind`, or a FieldError naming the first offending field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _field_error(kind, error, body) from error


def _field_error(kind: type[BaseModel], error: ValidationError, body: bytes) -> FieldError:
    problems = error.errors(include_url=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        return FieldError(f"the body is no JSON: {first['msg']}", param="", code="invalid_json")
    read = _ANYTHING.validate_json(body)
    where = _place(first, read)
    if first["type"] == "extra_forbidden":
        return FieldError(
            f"unknown field {where!r}",
            param=where,
            code="unknown_field",
            hint=f"fields here: {', '.join(sorted(kind.model_fields))}",
        )
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        where = f"{where}.{first['ctx']['discriminator']}".replace("'", "")
        return FieldError(f"{where}: {first['msg']}", param=where)
    # A field that may be one of several types is refused by each of them; what lies inside one of them tells
    # which was meant.
    places = [_place(problem, read) for problem in problems]
    inner = [place for place in places if place.startswith(f"{where}.")]
    where = inner[0] if inner else where
    reasons = dict.fromkeys(
        str(problem["msg"]) for problem, place in zip(problems, places, strict=True) if place == where
    )
    return FieldError(f"{where or 'the body'}: {' or: '.join(reasons)}", param=where)


def _place(problem: Mapping[str, Any], body: Any) -> str:
    """`messages.0.content` from a pydantic location, without the alternatives of a union in it: what stands
    there is found by walking through the body."""
    names = []
    here = body
    location = problem["loc"]
    for number, part in enumerate(location, start=1):
        indexes = isinstance(here, list) and isinstance(part, int)
        if indexes or (isinstance(here, Mapping) and part in here):
            here = here[part]
        elif problem["type"] != "missing" or number < len(location):
            continue
        names.append(str(part))
    return ".".join(names)

"""What a JSON schema may ask of the grammar compiler, which runs in this process and cannot be stopped.

llguidance counts most of what it does and gives up in time. These it does not, measured with 1.9 on one core:

    patterns of which one string must match all    time doubles with each: 12 take 44 ms, 16 a second
    multiples of which one number must be all      by the product: 991 with 997 takes 3.4 s and 190 MB
    one `multipleOf`                               by its value: 99991 takes 0.5 s and 37 MB
    a long pattern                                 by its square: 8 KB take 0.1 s, 60 KB 6 s
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from math import isfinite, prod
from typing import Any, Final

from isthmus.protocol.errors import RequestError

MAX_PATTERN_CHARS: Final = 4096
MAX_JOINED_PATTERNS: Final = 8
MAX_MULTIPLES: Final = 20_000

_ANNOTATIONS: Final = {
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples",
    "deprecated", "readOnly", "writeOnly", "discriminator",
}  # fmt: skip


@dataclass
class _Seen:
    """What stands in a schema. `joins`: one value may have to satisfy several of them at once."""

    patterns: set[str] = field(default_factory=set)
    multiples: set[int] = field(default_factory=set)
    joins: bool = False


def check_schemas(schemas: Iterable[Any]) -> None:
    """RequestError `bad_grammar` where the schemas of one grammar, parsed from JSON, would take too long."""
    multiples = 0
    for schema in schemas:
        seen = _walk(schema)
        longest = max(map(len, seen.patterns), default=0)
        if longest > MAX_PATTERN_CHARS:
            raise _too_much(f"a pattern has {longest} characters, at most {MAX_PATTERN_CHARS} are taken")
        if seen.joins and len(seen.patterns) > MAX_JOINED_PATTERNS:
            raise _too_much(
                f"{len(seen.patterns)} patterns in a schema that joins others (by allOf, or by anyOf, oneOf "
                f"or $ref beside other keywords), at most {MAX_JOINED_PATTERNS} are taken"
            )
        multiples += prod(seen.multiples) if seen.multiples and seen.joins else sum(seen.multiples)
    if multiples > MAX_MULTIPLES:
        raise _too_much(
            f"the values of multipleOf come to {multiples} (added up; multiplied in a schema that joins "
            f"others), at most {MAX_MULTIPLES} is taken"
        )


def _walk(schema: Any) -> _Seen:
    seen, rest = _Seen(), [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            _look(value, seen)
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    return seen


def _look(node: Mapping[str, Any], seen: _Seen) -> None:
    """One object of a schema. What only looks like a keyword, in `const` or `enum`, counts as well."""
    if isinstance(pattern := node.get("pattern"), str):
        seen.patterns.add(pattern)
    if isinstance(properties := node.get("patternProperties"), Mapping):
        seen.patterns.update(properties)
    if multiple := _whole(node.get("multipleOf")):
        seen.multiples.add(multiple)
    one_of_many = any(name in node for name in ("anyOf", "oneOf", "$ref"))
    if "allOf" in node or (one_of_many and len(node.keys() - _ANNOTATIONS) > 1):
        seen.joins = True


def _whole(value: Any) -> int:
    """A number with its point left out: 5 of 0.05. 0 for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    if isinstance(value, int) or value.is_integer():
        return abs(int(value))
    if not isfinite(value):
        return 0
    return int("".join(map(str, Decimal(repr(value)).as_tuple().digits)))


def _too_much(what: str) -> RequestError:
    return RequestError(what, code="bad_grammar", hint="write the schema with fewer or simpler patterns")

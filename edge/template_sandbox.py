"""The sandbox that chat templates run in. A template is input from a stranger: it cannot reach Python's
internals, step through endless ranges, or make a small text huge."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Final

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

# A template may step through ranges of this many numbers in all, and a text may be this long. The longest
# honest templates (tools, several rounds) stay two orders of magnitude below both.
MAX_RANGE_STEPS: Final = 100_000
MAX_CHARS: Final = 16 * 1024 * 1024
# Widths, indents, batch sizes: nothing honest comes near.
MAX_INT_ARGUMENT: Final = 10_000

_LARGE_WIDTH: Final = re.compile(r"[0-9]{5,}|\*|:[^}]*\{")


class _Code(CodeGenerator):
    """Compiles `a ~ b` to a bounded join."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox without what multiplies strings: every operator, method and filter that makes
    a text longer is bounded before it does."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])
    code_generator_class = _Code

    def __init__(self) -> None:
        # The options transformers renders chat templates with.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda fmt: datetime.now().astimezone().strftime(str(fmt))
        self.filters["tojson"] = _to_json
        for name, filter_ in self.filters.items():
            self.filters[name] = _bounded(name, filter_)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_length(len(left) + len(right))
        elif operator == "**" or (
            operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float))
        ):
            raise SecurityError(
                f"the template uses {operator} on {type(left).__name__} and {type(right).__name__}"
            )
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_text(method.__name__, owner, args)
        return super().call(__context, __obj, *args, **kwargs)

    def joined(self, parts: Iterable[Any]) -> str:
        """What `~` gives."""
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)


def budgeted_range() -> Callable[..., range]:
    """`range` for one rendering, with MAX_RANGE_STEPS numbers to give out."""
    left = MAX_RANGE_STEPS

    def budgeted(*args: int) -> range:
        nonlocal left
        steps = range(*args)
        left -= len(steps) if abs(steps.stop - steps.start) < 1 << 62 else MAX_RANGE_STEPS + 1
        if left < 0:
            raise SecurityError(f"the template loops over more than {MAX_RANGE_STEPS} numbers")
        return steps

    return budgeted


def _bounded(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with its arguments looked at first."""
    takes_more = hasattr(filter_, "jinja_pass_arg")  # the first argument is the environment or the context

    @functools.wraps(filter_)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        given = args[takes_more:]
        if given and isinstance(given[0], str):
            _check_text(name, given[0], (*given[1:], *kwargs.values()))
        else:
            _check_ints(name, (*given[1:], *kwargs.values()))
            if name == "join" and given and hasattr(given[0], "__len__"):
                between = next((str(arg) for arg in (*given[1:], *kwargs.values())), "")
                _check_text(name, between, given[:1])
        return filter_(*args, **kwargs)

    return bounded


def _check_text(name: str, text: str, args: tuple[Any, ...]) -> None:
    """Before `name` is done to `text`: would it become huge?"""
    _check_ints(name, args)
    if name in ("format", "format_map"):
        _check_format(text)
    if name == "replace" and len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        _check_length(len(text) + text.count(old) * len(new))
    if name == "join" and args and hasattr(args[0], "__len__"):
        _check_length(len(text) * len(args[0]) + sum(len(str(part)) for part in args[0]))
    if name in ("indent", "expandtabs"):
        width = next((arg for arg in args if isinstance(arg, int)), 8)
        _check_length(len(text) + (text.count("\n") + text.count("\t") + 1) * width)


def _check_ints(name: str, args: tuple[Any, ...]) -> None:
    for arg in args:
        if isinstance(arg, int) and abs(arg) > MAX_INT_ARGUMENT:
            raise SecurityError(f"the template calls {name} with {arg}, allowed are {MAX_INT_ARGUMENT}")


def _check_format(text: str) -> None:
    if _LARGE_WIDTH.search(text):
        raise SecurityError("the template formats with a width that is huge or computed")


def _check_length(length: int) -> None:
    if length > MAX_CHARS:
        raise SecurityError(f"the template makes a text of {length} characters, allowed are {MAX_CHARS}")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

"""Cases of packs that were damaged, forged or made by somebody else, and of what a pack carries along."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Change = Callable[[Path], None]


@dataclass(frozen=True)
class PackAttack:
    """`change` spoils the pack in a folder; opening and verifying it then fails with `code`."""

    item: str
    name: str
    change: Change
    code: str

    def __str__(self) -> str:
        return f"{self.item}: {self.name}"


def _flip(file: str, share: float) -> Change:
    def change(pack: Path) -> None:
        path = pack / file
        data = bytearray(path.read_bytes())
        data[int(len(data) * share)] ^= 1
        path.write_bytes(data)

    return change


def _manifest(edit: Callable[[dict[str, Any]], Any]) -> Change:
    def change(pack: Path) -> None:
        manifest = json.loads((pack / "manifest.json").read_text())
        edit(manifest)
        (pack / "manifest.json").write_text(json.dumps(manifest))

    return change


def _field(number: int, payload: bytes) -> bytes:
    """One protobuf field; every payload here is shorter than 128 bytes."""
    assert len(payload) < 128
    return bytes([number << 3 | 2, len(payload)]) + payload


def _graph_reading(location: str) -> Change:
    """An ONNX graph whose one weight lies at `location`, under a manifest that vouches for it."""
    entries = {"location": location, "offset": "0", "length": "4"}
    tensor = _field(8, b"w") + bytes([14 << 3, 1])
    for key, value in entries.items():
        tensor += _field(13, _field(1, key.encode()) + _field(2, value.encode()))
    graph = _field(7, _field(5, tensor))

    def change(pack: Path) -> None:
        (pack / "blocks/layer.1.onnx").write_bytes(graph)
        digest = hashlib.sha256(graph).hexdigest()
        _manifest(lambda manifest: manifest["blocks"][2].update(graph_sha256=digest))(pack)

    return change


def _linked(file: str) -> Change:
    def change(pack: Path) -> None:
        outside = pack.parent / "outside"
        (pack / file).rename(outside)
        (pack / file).symlink_to(outside)

    return change


_LAYERS = [f"blocks/layer.{i}.onnx" for i in range(4)]
# Every file of a pack but manifest.json, whose hashes are what the others are held against, and build.json,
# which holds figures only.
HASHED_FILES = (
    "weights.bin", "blocks/embed.onnx", *_LAYERS, "blocks/head.onnx", "tokenizer.json", "chat_template.jinja",
    "generation.json",
)  # fmt: skip

_flipped = partial(PackAttack, "pack with a flipped byte")
_version = partial(PackAttack, "pack of another version", code="pack_version")
_outside = partial(PackAttack, "ONNX external data path outside the pack", code="path_outside_pack")

_OTHER_VERSIONS: tuple[Any, ...] = (0, 2, 999, "1", None, [])

PACK_ATTACKS: tuple[PackAttack, ...] = (
    *(
        _flipped(f"{file} at {share:.0%}", _flip(file, share), "hash_mismatch")
        for file in HASHED_FILES
        for share in (0.0, 0.5, 0.999)
    ),
    _flipped(
        "a hash in the manifest",
        _manifest(lambda m: m["blocks"][1].update(sha256="0" * 64)),
        "hash_mismatch",
    ),
    _flipped("a bracket of the manifest", _flip("manifest.json", 0.0), "bad_pack"),
    *(
        _version(f"format {version!r}", _manifest(partial(lambda v, m: m.update(format=v), version)))
        for version in _OTHER_VERSIONS
    ),
    _version("no format", _manifest(lambda m: m.pop("format"))),
    *(
        _outside(f"a weight at {location}", _graph_reading(location))
        for location in ("../../secret", "/etc/passwd", "..\\secret", "weights.bin/../../x", "")
    ),
    *(_outside(f"{file} is a link", _linked(file)) for file in ("weights.bin", "blocks/layer.1.onnx")),
    *(
        _outside(f"a graph at {path}", _manifest(partial(lambda p, m: m["blocks"][1].update(graph=p), path)))
        for path in ("../outside.onnx", "/etc/passwd")
    ),
)


@dataclass(frozen=True)
class TemplateAttack:
    """A chat template that must neither run away nor get at anything: refused, or harmless text."""

    name: str
    source: str
    text: str | None = None
    item: str = "chat template with lipsum.__globals__ or range(10**9)"

    def __str__(self) -> str:
        return f"{self.item}: {self.name}"


TEMPLATE_ATTACKS: tuple[TemplateAttack, ...] = (
    TemplateAttack("the globals themselves", "{{ lipsum.__globals__ }}", ""),
    TemplateAttack("a shell", "{{ lipsum.__globals__['os'].popen('id').read() }}"),
    TemplateAttack("another way to the globals", "{{ cycler.__init__.__globals__.os }}"),
    TemplateAttack("the classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    TemplateAttack("the template itself", "{{ self.__init__.__globals__ }}"),
    TemplateAttack("a file", "{% include '/etc/passwd' %}"),
    TemplateAttack("a loop over 10⁹", "{% for i in range(1000000000) %}x{% endfor %}"),
    TemplateAttack("range(10**9)", "{% for i in range(10**9) %}{% endfor %}"),
    TemplateAttack("a list of 10⁹", "{{ range(1000000000) | list | length }}"),
    TemplateAttack(
        "ranges in ranges", "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    ),
    TemplateAttack("a string of 10⁹", "{{ 'x' * 1000000000 }}"),
    TemplateAttack("a number of 10⁹ digits", "{{ 10 ** 1000000000 }}"),
    TemplateAttack("a width by %", "{{ '%1000000000d' % 1 }}"),
    TemplateAttack("a width by % and *", "{{ '%*d' % (1000000000, 1) }}"),
    TemplateAttack("a width by format", "{{ '{:1000000000d}'.format(1) }}"),
    TemplateAttack("a width by format, kept", "{% set f = '{:1000000000d}'.format %}{{ f(1) }}"),
    TemplateAttack("a width by format_map", "{{ '{x:1000000000d}'.format_map({'x': 1}) }}"),
    TemplateAttack("a width by attr", "{{ ('{:1000000000d}' | attr('format'))(1) }}"),
    TemplateAttack("a computed width", "{{ '{:{}}'.format(1, 1000000000) }}"),
    TemplateAttack("a width by the format filter", "{{ '%1000000000d' | format(1) }}"),
    TemplateAttack("a width by ljust", "{{ 'x'.ljust(1000000000) }}"),
    TemplateAttack("a width by center", "{{ 'x' | center(1000000000) }}"),
    TemplateAttack("an indent", "{{ 'x\ny' | indent(1000000000) }}"),
    TemplateAttack("an indent in JSON", "{{ [1] | tojson(1000000000) }}"),
    TemplateAttack("a batch", "{{ [1] | batch(1000000000, 'x') | list | length }}"),
    TemplateAttack(
        "doubling by ~",
        "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    ),
    TemplateAttack(
        "doubling by +",
        "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    ),
    TemplateAttack(
        "multiplying by replace",
        "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x.replace('x', 'xx') %}"
        "{% endfor %}",
    ),
    TemplateAttack(
        "multiplying by join",
        "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x.join(['a', 'b', 'c']) %}"
        "{% endfor %}",
    ),
    TemplateAttack(
        "multiplying by the join filter",
        "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = [1, 2, 3] | join(n.x) %}"
        "{% endfor %}",
    ),
    TemplateAttack("itself without end", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
)

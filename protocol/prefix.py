"""Prefix offers: an HMAC chain over token ids by which the cloud finds KV it holds, without learning them."""

from __future__ import annotations

import hmac
import itertools
import json
import struct
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, field_validator

from isthmus.protocol.errors import ConfigError, RequestError
from isthmus.protocol.identity import ModelIdentity

PAGE: Final = 16  # tokens per digest of the chain, and per KV page of the cloud
DIGEST_BYTES: Final = 16
MAX_ENTRIES: Final = 2048
MIN_SECRET_BYTES: Final = 16
# Every page up to here is offered; beyond, the step grows with the length (at most 1/32 of it), because an
# offer travels with every OPEN: 8,000 tokens would else be 500 entries, 21 KB of JSON.
_DENSE: Final = 1024
_STEPS_PER_OCTAVE: Final = 32

_Length = Annotated[int, Field(ge=1, lt=2**32)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class PrefixOffer(BaseModel):
    """What a session's sequence begins with: (number of tokens, digest in hex) by ascending number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    entries: Annotated[list[tuple[_Length, _Digest]], Field(max_length=MAX_ENTRIES)] = []

    @field_validator("entries")
    @classmethod
    def _ascending(cls, entries: list[tuple[int, str]]) -> list[tuple[int, str]]:
        for (before, _), (after, _) in itertools.pairwise(entries):
            if after <= before:
                raise ValueError(f"lengths must ascend, {after} follows {before}")
        return entries


def prefix_context(identity: ModelIdentity, *, edge_precision: str, split: int, row_format: str) -> bytes:
    """Everything besides the token ids that the cloud's KV depends on, as the chain's context."""
    return json.dumps([identity.key, identity.weights_hash, edge_precision, split, row_format]).encode()


def is_offered(length: int) -> bool:
    """Whether a chain publishes its digest at `length` tokens: a function of the length alone, so that the
    offer at OPEN and the one left at CLOSE meet."""
    if length % PAGE or length <= 0:
        return False
    step = max(PAGE, (1 << (length.bit_length() - 1)) // _STEPS_PER_OCTAVE)
    return length <= _DENSE or length % step == 0


def digest_chain(
    secret: bytes, context: bytes, ids: Sequence[int], *, extra_lengths: Iterable[int] = ()
) -> PrefixOffer:
    """The offer for the sequence `ids`: digests at page borders (`is_offered`) and at each extra length.

    h_0 = HMAC(secret, "root" ‖ context), h_i = HMAC(secret, "page" ‖ h_{i-1} ‖ ids of page i as u32), and
    for a length that ends inside a page HMAC(secret, "tail" ‖ h_i ‖ the rest): all HMAC-SHA256, published
    as their first 16 bytes. Extra lengths (where earlier turns ended) beyond `ids` don't apply and are left
    out. ConfigError for a secret under 16 bytes, RequestError for an id that is not a u32.
    """
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"prefix secret has {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed",
            code="weak_secret",
            hint="draw it with secrets.token_bytes(32)",
        )
    try:
        packed = struct.pack(f"<{len(ids)}I", *ids)
    except struct.error:
        bad = next(i for i, token in enumerate(ids) if not 0 <= token < 2**32)
        message = f"token {bad} of the sequence is {ids[bad]}, not a u32"
        raise RequestError(message, code="bad_token_id") from None
    extras = {n for n in extra_lengths if 1 <= n <= len(ids)}
    link = _mac(secret, b"root", context)
    entries: list[tuple[int, str]] = []
    for start in range(0, len(ids), PAGE):
        end = start + PAGE
        entries.extend(
            (n, _hex(_mac(secret, b"tail", link, packed[4 * start : 4 * n])))
            for n in range(start + 1, min(end, len(ids) + 1))
            if n in extras
        )
        if end > len(ids):
            break
        link = _mac(secret, b"page", link, packed[4 * start : 4 * end])
        if is_offered(end) or end in extras:
            entries.append((end, _hex(link)))
    return PrefixOffer(entries=entries)


def _mac(secret: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"".join(parts), "sha256")


def _hex(digest: bytes) -> str:
    return digest[:DIGEST_BYTES].hex()

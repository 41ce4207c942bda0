"""The body of VERIFY: a fixed-width prefix of token ids, then the rows of a draft chain.

    n_tok x i32     the id of each row: the newest token, then the draft; all 0 in the U-shape
    rows            as the session's row codec encodes them, or n_tok x i32 at split 0

zstd, where the header names it, is over the rows alone. So the ids are read and checked before anything is
decompressed, and what then is, must be exactly raw_len - 4 * n_tok bytes, the size of n_tok negotiated rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from isthmus.protocol.activations import decode_ids, encode_ids
from isthmus.protocol.frames import DRAFT_ID_BYTES, Frame


def with_drafts(ids: Sequence[int], frame: Frame, vocab_size: int) -> Frame:
    """The VERIFY that carries the rows of `frame` behind their `ids`, one each. CodecError for an id outside
    the vocabulary."""
    prefix = encode_ids(ids)
    decode_ids(prefix, n_tok=frame.n_tok, vocab_size=vocab_size)  # checks them
    return replace(frame, body=prefix + frame.body, raw_len=len(prefix) + frame.raw_len)


def split_drafts(frame: Frame, vocab_size: int) -> tuple[tuple[int, ...], Frame]:
    """The ids of a VERIFY that decode_frame let through, and the frame with its rows alone. CodecError for
    an id outside the vocabulary."""
    size = frame.n_tok * DRAFT_ID_BYTES
    ids = decode_ids(frame.body[:size], n_tok=frame.n_tok, vocab_size=vocab_size)
    return tuple(ids), replace(frame, body=frame.body[size:], raw_len=frame.raw_len - size)

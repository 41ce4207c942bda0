"""What makes an OPEN, a STEP or a VERIFY acceptable: one set of checks, applied by the edge before it sends
and by the cloud before it allocates (rules 1, 7, 10, 11).
"""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.errors import CodecError, FrameError, RequestError, SequenceError
from isthmus.protocol.frames import Dtype, Flag, Frame, MsgType
from isthmus.protocol.messages import Open, Welcome


def check_open(request: Open, terms: Welcome) -> None:
    """RequestError or CodecError naming the field that the terms of WELCOME don't allow."""
    if request.split >= terms.num_layers:
        raise RequestError(
            f"split {request.split} leaves the cloud nothing of {terms.num_layers} layers",
            code="bad_split",
            hint=f"splits go from 0 to {terms.num_layers - 1}",
        )
    if request.row_format not in terms.row_formats:
        raise RequestError(
            f"row format {request.row_format!r} was not negotiated, {', '.join(terms.row_formats)} were",
            code="bad_row_format",
        )
    if request.split == 0 and request.outliers:
        raise CodecError(
            f"{len(request.outliers)} outlier channels with split 0, where token ids are sent",
            code="bad_outliers",
        )
    row_codec(request, terms.hidden)  # checks the outlier channels
    _check_tokens(request, terms)
    _check_context_ids(request, terms)


def _check_tokens(request: Open, terms: Welcome) -> None:
    limit = min(terms.limits.max_tokens_per_session, terms.context_length)
    if request.max_context > limit:
        raise RequestError(
            f"max_context {request.max_context}, this cloud allows {limit} tokens per session",
            code="too_many_tokens",
        )
    if request.prompt_tokens + request.max_tokens > request.max_context:
        raise RequestError(
            f"{request.prompt_tokens} prompt tokens and {request.max_tokens} new ones are "
            f"{request.prompt_tokens + request.max_tokens}, max_context is {request.max_context}",
            code="too_many_tokens",
            hint="shorten the prompt or ask for fewer tokens",
        )
    if request.offer.entries and request.offer.entries[-1][0] > request.prompt_tokens:
        raise RequestError(
            f"the prefix offer names {request.offer.entries[-1][0]} tokens, the prompt has "
            f"{request.prompt_tokens}",
            code="bad_offer",
        )
    if request.end_ids and max(request.end_ids) >= terms.vocab_size:
        raise RequestError(
            f"end id {max(request.end_ids)}, the vocabulary has {terms.vocab_size}", code="bad_token_id"
        )


def _check_context_ids(request: Open, terms: Welcome) -> None:
    """Rule 10. At split 0 the STEPs show the ids, but not those of rows that the offer makes unnecessary."""
    ids = request.context_ids
    if ids is None:
        hidden_from_sampler = request.split > 0 or bool(request.offer.entries)
        if request.shape == "prefix" and request.sampling.needs_context and hidden_from_sampler:
            raise RequestError(
                "the cloud's sampler needs the prompt's token ids for these penalties",
                code="context_ids_required",
                hint="send context_ids, or use the U-shape where privacy forbids them",
            )
        return
    if request.shape == "u" or not request.sampling.needs_context:
        raise RequestError(
            f"{len(ids)} context ids that no sampler of the cloud needs",
            code="context_ids_refused",
            hint="token ids leave the device only where the request depends on it",
        )
    if not 0 <= len(ids) - request.prompt_tokens < request.max_tokens:
        raise RequestError(
            f"{len(ids)} context ids for a prompt of {request.prompt_tokens} tokens and at most "
            f"{request.max_tokens} new ones",
            code="bad_context_ids",
        )
    if max(ids) >= terms.vocab_size:
        raise RequestError(
            f"context id {max(ids)}, the vocabulary has {terms.vocab_size}", code="bad_token_id"
        )


def row_codec(request: Open, hidden: int) -> RowCodec:
    """The codec of the session's boundary rows. CodecError for outlier channels that don't fit."""
    return RowCodec(RowFormat(request.row_format), hidden, request.outliers)


def result_codec(request: Open, hidden: int) -> RowCodec:
    """The codec of the rows that the U-shape returns."""
    return RowCodec(RowFormat(request.result_format), hidden)


def check_body(frame: Frame, codec: RowCodec) -> None:
    """CodecError unless the frame declares rows of exactly the negotiated dtype and size."""
    if frame.dtype is not codec.dtype:
        raise CodecError(
            f"rows of dtype {frame.dtype.name}, negotiated was {codec.dtype.name}", code="bad_dtype"
        )
    expected = frame.n_tok * codec.row_bytes
    if frame.raw_len != expected:
        raise CodecError(
            f"{frame.n_tok} rows of {codec.row_bytes} bytes are {expected} bytes, the frame declares "
            f"{frame.raw_len}",
            code="bad_length",
        )


def check_step(
    frame: Frame,
    request: Open,
    codec: RowCodec,
    *,
    kv_len: int,
    credits: int,
    max_rows: int,
    drafts: Sequence[int] = (),
    begins_at: int | None = None,
) -> None:
    """A STEP or VERIFY in its order, against the session as it stands.

    `kv_len` rows are in the KV, `credits` more may be sent, `max_rows` in one step. Of a VERIFY, `frame`
    holds the rows and `drafts` the ids (drafts.py). `begins_at` is `first_due` until there was an output.
    SequenceError for position, flow, flags and drafts, FrameError for size, CodecError for the body. Nothing
    is changed: the caller commits seq and kv_len together afterwards.
    """
    if frame.n_tok > max_rows:
        raise FrameError(
            f"{frame.n_tok} rows in one step, at most {max_rows} are taken", code="too_many_rows"
        )
    truncate = Flag.TRUNCATE in frame.flags
    if frame.pos > kv_len or (frame.pos < kv_len and not truncate):
        wanted = f"at most {kv_len}" if truncate else f"{kv_len}"
        raise SequenceError(
            f"step {frame.seq} is at position {frame.pos}, expected {wanted}", code="bad_position"
        )
    if frame.n_tok > credits:
        raise SequenceError(
            f"step {frame.seq} has {frame.n_tok} rows, {credits} are credited", code="no_credit"
        )
    end = frame.pos + frame.n_tok
    if end > request.max_context:
        raise SequenceError(
            f"step {frame.seq} ends at row {end}, the session was opened for {request.max_context}",
            code="context_full",
        )
    if request.split > 0:
        check_body(frame, codec)
    elif frame.dtype is not Dtype.TOKEN_IDS:
        raise CodecError(f"dtype {frame.dtype.name} at split 0, which takes token ids", code="bad_dtype")
    if frame.type is MsgType.VERIFY:
        _check_drafts(frame, request, drafts)
    if request.shape == "prefix":
        _check_output(frame, request, begins_at)


def _check_drafts(frame: Frame, request: Open, drafts: Sequence[int]) -> None:
    if request.streams:
        raise SequenceError(
            f"step {frame.seq} is a draft chain in offload, where the cloud generates by itself",
            code="verify_in_offload",
            hint="send the prompt with FINAL, or open the session at split 1 or more",
        )
    if request.shape == "u" and any(drafts):
        raise SequenceError(
            f"step {frame.seq} shows token ids in the U-shape, where they stay on the edge",
            code="draft_ids_refused",
            hint="send zeros: the hidden rows come back, and the edge judges its draft",
        )


def _check_output(frame: Frame, request: Open, begins_at: int | None) -> None:
    if Flag.ALL_ROWS in frame.flags:
        raise SequenceError(
            f"step {frame.seq} asks for every row's output, which only the U-shape returns",
            code="all_rows_in_prefix_shape",
        )
    index = first_index(frame, request)
    if index is not None and not 0 <= index < request.max_tokens:
        raise SequenceError(
            f"step {frame.seq} has {frame.n_tok} rows from {frame.pos} on and would produce token {index}; "
            f"a prompt of {request.prompt_tokens} and at most {request.max_tokens} tokens were agreed",
            code="bad_output_index",
        )
    if index is not None and begins_at not in (None, index):
        raise SequenceError(
            f"step {frame.seq} would produce token {index} first, the context ends before token {begins_at}",
            code="bad_output_index",
        )


def first_due(request: Open) -> int | None:
    """The token that a session must produce first, where its sampler was told all those before it."""
    return None if request.context_ids is None else len(request.context_ids) - request.prompt_tokens


def first_index(frame: Frame, request: Open) -> int | None:
    """Prefix shape: index of the first token that the step produces, None where it produces none. The
    later tokens of a VERIFY may lie beyond `max_tokens`: the cloud ends the answer before them."""
    if frame.type is MsgType.VERIFY:
        return request.index_after(frame.pos + 1)
    return request.index_after(frame.pos + frame.n_tok) if Flag.FINAL in frame.flags else None


def num_outputs(frame: Frame) -> int:
    """How many rows of the step produce output; of a VERIFY in the prefix shape, the most that do."""
    if frame.type is MsgType.VERIFY or Flag.ALL_ROWS in frame.flags:
        return frame.n_tok
    return 1 if Flag.FINAL in frame.flags else 0


def rows_kept(frame: Frame, request: Open) -> int:
    """Rows in the KV once the step is taken, whatever the cloud draws: a VERIFY in the prefix shape keeps
    its first row for certain, and each other one only if the draft before it was right."""
    unsure = frame.n_tok - 1 if frame.type is MsgType.VERIFY and request.shape == "prefix" else 0
    return frame.pos + frame.n_tok - unsure

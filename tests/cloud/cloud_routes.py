"""One request by any route, driven as an edge would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from isthmus.cloud.serve import Prepared
from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.events import ResultRows, ResultTokens, SessionOpened, StreamTokens
from isthmus.protocol.messages import Open
from isthmus.protocol.prefix import PrefixOffer
from tests.cloud.cloud_clients import EdgeHalf, offer_of
from tests.cloud.cloud_edges import Edge

MIXES: Final = [(split, shape) for shape in ("prefix", "u") for split in range(4)]


async def generate(
    edge: Edge, prepared: Prepared, request: Open, prompt: Sequence[int], *, chunk: int = 16
) -> list[int]:
    """One request by whatever route `request` says; tokens as the edge would show them."""
    half = EdgeHalf(prepared.model, request.split)
    codec = RowCodec(RowFormat(request.row_format), half.model.spec.hidden, request.outliers)
    session = edge.core.open(request)
    await edge.flush()
    start = 0
    if request.offer.entries:
        start = (await edge.wait(SessionOpened, session.stream)).opened.cached_rows
        if request.split and start:
            half.rows(prompt[:start])

    async def send(ids: Sequence[int], *, final: bool) -> None:
        if request.split == 0:
            await edge.send_ids(session, ids, final=final)
        else:
            await edge.send_rows(session, half.rows(ids), final=final, codec=codec)

    for first in range(start, len(prompt), chunk):
        await send(prompt[first : first + chunk], final=first + chunk >= len(prompt))
    tokens: list[int] = []
    while len(tokens) < request.max_tokens:
        if request.streams and tokens:
            more = await edge.wait(StreamTokens, session.stream)
            tokens += more.tokens
        elif request.shape == "prefix":
            result = await edge.wait(ResultTokens, session.stream)
            tokens += result.tokens
        else:
            rows_result = await edge.wait(ResultRows, session.stream)
            result_codec = RowCodec(RowFormat(request.result_format), half.model.spec.hidden)
            rows = result_codec.decode_frame(rows_result.frame, max_raw=1 << 20)
            tokens.append(int(prepared.model.head(torch.from_numpy(rows))[-1].argmax()))
        if not request.streams and len(tokens) < request.max_tokens:
            await send(tokens[-1:], final=True)
    held = [*prompt, *tokens][: len(prompt) + len(tokens) - 1]
    closed = await edge.close(session, PrefixOffer(entries=list(offer_of(held, len(held)))))
    assert closed.closed.kv_len == len(held)
    assert closed.closed.cached
    return tokens

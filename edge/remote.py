"""The cloud's half of one request: OPEN with a prefix offer, rows or ids up, tokens or hidden rows down.

Privacy is checked here once more, at the last place before the wire, whatever the router decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from isthmus.edge.conversation import CloudMemory
from isthmus.edge.half import Chunk
from isthmus.edge.requests import Decision, GenerateRequest, LinkUse, RowFormatName
from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.errors import RequestError, RouteInfeasibleError, SequenceError
from isthmus.protocol.events import ResultRows, ResultTokens, StreamTokens
from isthmus.protocol.messages import Open
from isthmus.protocol.prefix import PrefixOffer, digest_chain, prefix_context
from isthmus.protocol.sampling import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from isthmus.edge.link import CloudLink
    from isthmus.edge.wire import LinkSession, Output
    from isthmus.protocol.messages import Welcome
    from isthmus.splitter.pack import Pack

# A frame this large takes 0.5 s at 4 Mbit/s; pings and other streams pass between frames.
FRAME_BYTES: Final = 256 * 1024
# What stands for the row format where token ids travel: KV made from ids is the cloud's own.
IDS_FORMAT: Final = "ids"


@dataclass(frozen=True)
class OfferContext:
    """What all prefix offers of one agent share: the edge's secret, its pack, its memory of clouds."""

    secret: bytes
    pack: Pack
    memory: CloudMemory


class CloudHalf:
    """Layers [`split`, N) of one request. RouteInfeasibleError where the request's privacy forbids it."""

    def __init__(
        self,
        link: CloudLink,
        welcome: Welcome,
        request: GenerateRequest,
        decision: Decision,
        row_format: RowFormatName,
        offers: OfferContext,
    ) -> None:
        _guard(request, decision)
        if decision.split > 0 and row_format not in welcome.row_formats:
            raise RequestError(
                f"row format {row_format} is not among the cloud's: {', '.join(welcome.row_formats)}",
                code="bad_row_format",
            )
        spec = offers.pack.spec
        form = RowFormat(row_format)
        outliers = offers.pack.outliers(decision.split) if form is RowFormat.INT8 else ()
        self.codec = RowCodec(form, spec.hidden, outliers)
        self.rows_sent = 0
        self.cached_rows = 0
        self._down = RowCodec(RowFormat.F32 if form is RowFormat.F32 else RowFormat.BF16, spec.hidden)
        self._max_raw = welcome.limits.max_message_bytes
        self._link = link
        self._request = request
        self._decision = decision
        self._offers = offers
        self._format = row_format if decision.split else IDS_FORMAT
        self._context = prefix_context(
            offers.pack.identity,
            edge_precision=offers.pack.scheme,
            split=decision.split,
            row_format=self._format,
        )
        self.offered = 0  # prompt tokens the offer covers
        self._session: LinkSession | None = None

    @property
    def chunk_rows(self) -> int:
        """Rows a step should carry: what the cloud takes, in a frame that others can pass between."""
        row_bytes = self.codec.row_bytes if self._decision.split else 4
        return max(1, min(self._live.max_rows, FRAME_BYTES // row_bytes))

    async def start(self) -> None:
        """Send OPEN. Where the cloud may hold the beginning of the prompt, it carries an offer."""
        self._session = await self._link.open(self._open_message())

    async def cached(self) -> int:
        """Rows the cloud needs no upload for. Without an offer that is 0 and nothing is waited for."""
        if self.offered:
            self.cached_rows = (await self._live.opened()).cached_rows
            if self.cached_rows > self.offered:
                raise SequenceError(
                    f"the cloud claims {self.cached_rows} cached rows, {self.offered} were offered",
                    code="bad_cached_rows",
                )
        return self.cached_rows

    @property
    def kv_len(self) -> int:
        """Rows the cloud holds once all that was sent has arrived."""
        return self._live.core.kv_len

    async def send_rows(self, chunk: Chunk, pos: int, *, final: bool, truncate: bool = False) -> None:
        """Send boundary rows from position `pos` on as the credits allow; `final`: the last one makes an
        output; `truncate`: the cloud first forgets what it holds from `pos` on. A chunk that turns out too
        large for the cloud is cut and encoded again."""
        n_tok = len(chunk.rows)
        if await self._live.room(n_tok):
            await self._live.send_rows(chunk.encoded, pos, n_tok, final=final, truncate=truncate)
            self.rows_sent += n_tok
            return
        size = self.chunk_rows
        for at in range(0, n_tok, size):
            rows = chunk.rows[at : at + size]
            part = Chunk(rows, self.codec.encode(rows))
            last = at + size >= n_tok
            await self.send_rows(part, pos + at, final=final and last, truncate=truncate and at == 0)

    async def verify(
        self, ids: Sequence[int], chunk: Chunk, pos: int, *, truncate: bool = False
    ) -> ResultTokens | NDArray[np.float32]:
        """Have the cloud judge a draft (K > 0): `ids` are the newest token and what may follow it, within
        what is left of `max_tokens`; `chunk` their boundary rows, for the positions from `pos` on.

        Prefix shape: the tokens that the cloud drew, up to the first that differs from the draft, and the
        `kv_len` it kept; the edge cuts its own rows to that. U-shape: the final hidden rows f32[n, hidden] of
        the whole chain, to draw from until one differs; the ids stay here, and the next step after a
        rejection says `truncate`. SequenceError where the chain is longer than one step may be.
        """
        live = self._live
        if not await live.room(len(ids), decode=True):
            raise SequenceError(
                f"a draft chain of {len(ids)} rows, one step takes at most {live.max_rows}",
                code="chain_too_long",
                hint="draft fewer tokens at once",
            )
        await live.verify_rows(ids, chunk.encoded, pos, truncate=truncate)
        self.rows_sent += len(ids)
        output = await self.next()
        assert not isinstance(output, StreamTokens), "only offload streams, and it takes no draft"
        return self.decode(output) if isinstance(output, ResultRows) else output

    async def send_ids(self, ids: Sequence[int], pos: int, *, final: bool) -> None:
        """Send token ids (offload) as the credits allow, cut where they are too many for one step."""
        if await self._live.room(len(ids)):
            self._live.send_ids(ids, pos, final=final)
            self.rows_sent += len(ids)
            return
        size = self.chunk_rows
        for at in range(0, len(ids), size):
            await self.send_ids(ids[at : at + size], pos + at, final=final and at + size >= len(ids))

    async def next(self) -> Output:
        """The next output: tokens (the cloud drew) or hidden rows. SequenceError for a token that the
        vocabulary does not have."""
        output = await self._live.next()
        if not isinstance(output, ResultRows):
            vocab_size = self._offers.pack.spec.vocab_size
            for token in output.tokens:
                if token >= vocab_size:
                    raise SequenceError(
                        f"the cloud drew token {token}, the vocabulary has {vocab_size}", code="bad_token_id"
                    )
        return output

    def decode(self, output: ResultRows) -> NDArray[np.float32]:
        """Final hidden rows f32[n, hidden] of a U-shape result."""
        return self._down.decode_frame(output.frame, max_raw=self._max_raw)

    def close(self, ids: Sequence[int]) -> None:
        """Done: the cloud holds the rows of `ids` and may keep them for the next turn."""
        if self._session is None:
            return
        memory = self._offers.memory
        memory.remember(self._link.url, self._decision.split, self._format, ids)
        self._session.close(self._chain(ids, (len(ids),)))

    def cancel(self) -> None:
        """Given up: the cloud keeps nothing."""
        if self._session is not None:
            self._session.cancel()

    def use(self) -> LinkUse:
        """What this request sent and received so far."""
        if self._session is None:
            return LinkUse()
        return LinkUse(self._session.rtt_s, self._session.bytes_up, self._session.bytes_down)

    @property
    def _live(self) -> LinkSession:
        assert self._session is not None, "start() first"
        return self._session

    def _open_message(self) -> Open:
        request, decision = self._request, self._decision
        num_prompt = len(request.prompt_ids)
        prefix = decision.shape != "u"
        self.offered, exact = self._offers.memory.offer_lengths(
            self._link.url, decision.split, self._format, request.prompt_ids
        )
        offer = self._chain(request.prompt_ids[: self.offered], exact)
        # In the U-shape the cloud draws nothing: it learns neither how nor when to stop.
        return Open(
            split=decision.split,
            shape="prefix" if prefix else "u",
            row_format=self.codec.format.value,
            outliers=self.codec.outliers,
            max_tokens=request.max_tokens,
            prompt_tokens=num_prompt,
            max_context=num_prompt + request.max_tokens,
            sampling=request.sampling if prefix else SamplingParams(temperature=0.0),
            end_ids=request.end_ids if prefix else (),
            offer=offer,
            context_ids=request.prompt_ids if prefix and request.sampling.needs_context else None,
            request_id=request.request_id,
            priority=request.priority,
        )

    def _chain(self, ids: Sequence[int], exact: tuple[int, ...]) -> PrefixOffer:
        return digest_chain(self._offers.secret, self._context, ids, extra_lengths=exact)


def _guard(request: GenerateRequest, decision: Decision) -> None:
    """The last check before anything is sent."""
    if request.privacy == "local-only":
        raise RouteInfeasibleError("privacy is local-only: nothing may leave the device", code="privacy")
    if request.privacy == "activations-only" and (decision.split < 1 or decision.shape != "u"):
        raise RouteInfeasibleError(
            f"privacy is activations-only: K = {decision.split} in the shape {decision.shape} would show "
            "token ids to the cloud",
            code="privacy",
        )

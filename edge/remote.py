"""The cloud's half of one request: OPEN with a prefix offer, rows or ids up, tokens or hidden rows down, and
the rows that were sent, for whoever has to go on from them.

Privacy is checked here once more, at the last place before the wire, whatever the router decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from isthmus.edge.conversation import CloudMemory
from isthmus.edge.half import Chunk
from isthmus.edge.history import SentRows
from isthmus.edge.requests import Decision, GenerateRequest, LinkUse, RowFormatName
from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.errors import RequestError, RouteInfeasibleError, SequenceError
from isthmus.protocol.events import ResultRows, ResultTokens, StreamTokens
from isthmus.protocol.messages import Open
from isthmus.protocol.prefix import PrefixOffer, digest_chain, prefix_context
from isthmus.protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from isthmus.edge.history import HistoryBudget
    from isthmus.edge.link import CloudLink
    from isthmus.edge.link_session import LinkSession, Output
    from isthmus.protocol.events import SessionResumed
    from isthmus.protocol.messages import GoAway, Welcome
    from isthmus.splitter.pack import Pack

# A frame this large takes 0.5 s at 4 Mbit/s; pings and other streams pass between frames.
FRAME_BYTES: Final = 256 * 1024
# What stands for the row format where token ids travel: KV made from ids is the cloud's own.
IDS_FORMAT: Final = "ids"


@dataclass(frozen=True)
class OfferContext:
    """What all requests of one agent share: the secret of its prefix offers, its pack, its memory of clouds,
    and the bytes that rows already sent may take."""

    secret: bytes
    pack: Pack
    memory: CloudMemory
    history: HistoryBudget


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
        self.split = decision.split
        self.history = SentRows(offers.history, self.codec.row_bytes)
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

    async def start(self, ids: Sequence[int] | None = None) -> None:
        """Send OPEN. Where the cloud may hold the beginning of the prompt, it carries an offer. `ids`
        (default: the prompt): all tokens so far, where a request goes on here that began elsewhere."""
        known = tuple(ids) if ids is not None else self._request.prompt_ids
        self._session = await self._link.open(self._open_message(known))

    # ---- when the connection broke, or the cloud goes away

    @property
    def suspended(self) -> bool:
        """The connection is gone, and the cloud may still hold the session."""
        return self._session is not None and self._session.suspended

    @property
    def goaway(self) -> GoAway | None:
        """The cloud's notice that it is going away, once there is one."""
        return None if self._session is None else self._session.goaway

    @property
    def awaiting(self) -> bool:
        """An output is due without anything more to send."""
        return self._live.core.awaiting_result

    async def resume(self) -> SessionResumed:
        """Take the suspended session up over a new connection. What the answer says was lost is to be sent
        again by `send_rows`, `send_ids` or `verify`. Raises what ended the attempt."""
        return await self._link.resume(self._live)

    def kept(self, start: int, stop: int) -> Chunk | None:
        """The rows [start, stop) as they were sent, if they are all still held."""
        if not self.history.start <= start < stop <= self.history.stop:
            return None
        raw = self.history.rows(start, stop)
        return Chunk(raw, self.codec.pack(raw))

    def _note(self, chunk: Chunk, pos: int, *, again: bool = False) -> None:
        """The rows of a step that is about to go out: for the history, and for the digest of RESUME. `again`:
        they were sent before, so what the history holds behind them stays right."""
        if not again or pos == self.history.stop or not self.history:
            self.history.put(pos, chunk.raw)
        digests = self._live.core.digests
        digests.truncate(pos)
        digests.append(chunk.raw)

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

    async def send_rows(
        self, chunk: Chunk, pos: int, *, final: bool, truncate: bool = False, again: bool = False
    ) -> None:
        """Send boundary rows from position `pos` on as the credits allow; `final`: the last one makes an
        output; `truncate`: the cloud first forgets what it holds from `pos` on. A chunk that turns out too
        large for the cloud is cut and encoded again."""
        n_tok = len(chunk.raw)
        if await self._live.room(n_tok):
            self._note(chunk, pos, again=again)
            await self._live.send_rows(chunk.encoded, pos, n_tok, final=final, truncate=truncate)
            self.rows_sent += n_tok
            return
        size = self.chunk_rows
        for at in range(0, n_tok, size):
            raw = chunk.raw[at : at + size]
            part = Chunk(raw, self.codec.pack(raw))
            last = at + size >= n_tok
            first = truncate and at == 0
            await self.send_rows(part, pos + at, final=final and last, truncate=first, again=again)

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
        await self.send_draft(ids, chunk, pos, truncate=truncate)
        return await self.verified()

    async def send_draft(
        self, ids: Sequence[int], chunk: Chunk, pos: int, *, truncate: bool = False, again: bool = False
    ) -> None:
        """The first half of `verify`; `verified` is the second."""
        live = self._live
        if not await live.room(len(ids), decode=True):
            raise SequenceError(
                f"a draft chain of {len(ids)} rows, one step takes at most {live.max_rows}",
                code="chain_too_long",
                hint="draft fewer tokens at once",
            )
        self._note(chunk, pos, again=again)
        await live.verify_rows(ids, chunk.encoded, pos, truncate=truncate)
        self.rows_sent += len(ids)

    async def verified(self) -> ResultTokens | NDArray[np.float32]:
        """The cloud's answer to the draft that was sent; after a loss, once more."""
        output = await self.next()
        assert not isinstance(output, StreamTokens), "only offload streams, and it takes no draft"
        if isinstance(output, ResultRows):
            return self.decode(output)
        self.history.truncate(output.kv_len)
        return output

    async def send_ids(self, ids: Sequence[int], pos: int, *, final: bool, truncate: bool = False) -> None:
        """Send token ids (offload) as the credits allow, cut where they are too many for one step."""
        if await self._live.room(len(ids)):
            digests = self._live.core.digests
            digests.truncate(pos)
            digests.append(np.asarray(ids, dtype="<i4").view(np.uint8).reshape(len(ids), 4))
            self._live.send_ids(ids, pos, final=final, truncate=truncate)
            self.rows_sent += len(ids)
            return
        size = self.chunk_rows
        for at in range(0, len(ids), size):
            last = at + size >= len(ids)
            await self.send_ids(
                ids[at : at + size], pos + at, final=final and last, truncate=truncate and at == 0
            )

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
        self.history.close()
        if self._session is None:
            return
        memory = self._offers.memory
        memory.remember(self._link.url, self._decision.split, self._format, ids)
        self._session.close(self._chain(ids, (len(ids),)))

    def cancel(self, *, keep_history: bool = False) -> None:
        """Given up: the cloud keeps nothing. `keep_history`: the rows serve another cloud."""
        if not keep_history:
            self.history.close()
        if self._session is not None:
            self._session.cancel()

    @property
    def cloud_s(self) -> float:
        """Seconds from each step's arrival in the cloud to its answer, in all; 0.0 where it does not tell."""
        return 0.0 if self._session is None else self._session.cloud_s

    @property
    def first_cloud_s(self) -> float | None:
        """Seconds from the prompt's arrival in the cloud to its first output; None where it does not tell."""
        return None if self._session is None else self._session.first_cloud_s or None

    def use(self) -> LinkUse:
        """What this request sent and received so far."""
        if self._session is None:
            return LinkUse()
        return LinkUse(self._session.rtt_s, self._session.bytes_up, self._session.bytes_down)

    @property
    def _live(self) -> LinkSession:
        assert self._session is not None, "start() first"
        return self._session

    def _open_message(self, ids: tuple[int, ...]) -> Open:
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
            context_ids=ids if prefix and request.sampling.needs_context else None,
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

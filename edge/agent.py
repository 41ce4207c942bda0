"""The edge agent: one pack, the links to its clouds, a bounded number of requests at once."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from isthmus.edge.conversation import CachePool, CloudMemory
from isthmus.edge.generate import Generation
from isthmus.edge.half import EdgeHalf
from isthmus.edge.link import CloudLink
from isthmus.edge.remote import CloudHalf, OfferContext
from isthmus.edge.requests import (
    AgentEvent,
    Decision,
    Finished,
    GenerateRequest,
    RowFormatName,
    Started,
)
from isthmus.edge.router import MIB, RouterInputs, decide
from isthmus.edge.slots import Slots
from isthmus.protocol.activations import RowFormat
from isthmus.protocol.errors import (
    CloudUnreachableError,
    IsthmusError,
    RejectedError,
    RequestError,
    RouteInfeasibleError,
)
from isthmus.protocol.frames import VERSION
from isthmus.protocol.identity import canary_ids
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Hello, Welcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from isthmus.splitter.cache import KVCache
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.runner import BlockRunner

# `auto` leaves a cloud alone for this long after it could not be reached; a route asked for by name
# always tries.
RETRY_S: Final = 5.0
CACHE_MB: Final = 512
KV_DTYPE_BYTES: Final = 4


class _Use(NamedTuple):
    """What a running request holds: layers, whether the head, and tokens its KV may grow to."""

    split: int
    head: bool
    tokens: int


class Agent:
    """Runs generation requests over a pack and, where the route asks for it, a cloud.

    `parallel` requests run at once, `queue` more wait. `memory_mb` bounds what the model adds to an idle
    agent (weights, KV, kept caches). `min_depth`: least K for privacy `activations-only`. `row_format`
    None: f32 for an f32 pack, else int8 with outlier channels.
    """

    def __init__(
        self,
        pack: Pack,
        *,
        cloud_urls: Sequence[str] = (),
        api_key: str | None = None,
        parallel: int = 1,
        queue: int = 64,
        provider: str = "cpu",
        threads: int | None = None,
        memory_mb: float | None = None,
        min_depth: int = 1,
        row_format: RowFormatName | None = None,
        cache_mb: float = CACHE_MB,
        limits: Limits | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.pack = pack
        self.tokenizer = pack.tokenizer()
        self._provider = provider
        self._threads = threads or None
        self._memory_bytes = int(memory_mb * MIB) if memory_mb else None
        self._min_depth = min_depth
        self._row_format: RowFormatName = row_format or ("f32" if pack.scheme == "f32" else "int8o")
        self._slots = Slots(parallel, queue)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="isthmus-edge")
        self._runner: BlockRunner | None = None
        self._pool: CachePool[KVCache] = CachePool(int(cache_mb * MIB))
        self._offers = OfferContext(secrets.token_bytes(32), pack, CloudMemory())
        self._in_use: list[_Use] = []  # what the running requests hold
        self._totals = {"requests": 0, "finished": 0, "failed": 0, "cancelled": 0, "tokens": 0}
        hello = Hello(
            versions=(VERSION,),
            identity=pack.identity,
            edge_precision=pack.scheme,
            row_formats=tuple(form.value for form in RowFormat),
            client="isthmus-edge",
        )
        self._links = [
            CloudLink(url, hello, api_key=api_key, limits=limits, ssl_context=ssl_context)
            for url in cloud_urls
        ]

    # ---- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make the runner (no layer is loaded yet; the first request that needs one loads it)."""
        self._runner = await asyncio.get_running_loop().run_in_executor(self._worker, self._make_runner)

    def _make_runner(self) -> BlockRunner:
        from isthmus.splitter.runner import BlockRunner

        return BlockRunner(self.pack, provider=self._provider, threads=self._threads)

    async def aclose(self) -> None:
        """Close the links and the caches. Running requests fail; close their iterators first."""
        for link in self._links:
            await link.aclose()
        self._worker.submit(self._pool.clear)
        await asyncio.to_thread(self._worker.shutdown)
        self._runner = None

    def not_ready_reason(self) -> str | None:
        """Why no request could be served now; None where one could."""
        if self._runner is None:
            return "the agent was not started, or is closed"
        return None

    def stats(self) -> dict[str, Any]:
        """Counts and states, for inspection and tests."""
        runner = self._runner
        return {
            **self._totals,
            "running": self._slots.running,
            "waiting": self._slots.waiting,
            "parallel": self._slots.parallel,
            "queue": self._slots.queue,
            "provider": runner.provider_used if runner else self._provider,
            "loaded_layers": sorted(runner.loaded_layers) if runner else [],
            "kept_caches": len(self._pool),
            "kept_cache_bytes": self._pool.nbytes,
            "clouds": [
                {
                    "url": link.url,
                    "state": link.state,
                    "detail": link.detail,
                    "rtt_s": link.rtt_s,
                    "bytes_up": link.bytes_up,
                    "bytes_down": link.bytes_down,
                    "connects": link.num_connects,
                }
                for link in self._links
            ],
        }

    # ---- requests --------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AgentEvent, None]:
        """Started, then Tokens, then Finished; or an IsthmusError. Closing the iterator cancels both
        halves and frees the cloud's pages."""
        self._check(request)
        self._totals["requests"] += 1
        outcome = "cancelled"
        try:
            async with self._slots.take(request.priority):
                started_s = perf_counter()
                decision, link = await self._route(request)
                head = decision.route == "local" or decision.shape == "u"
                use = _Use(decision.split, head, len(request.prompt_ids) + request.max_tokens)
                self._in_use.append(use)
                try:
                    yield Started(
                        request.request_id, decision, decision.route, decision.split, decision.shape
                    )
                    generation = await self._generation(request, decision, link, started_s)
                    async with aclosing(generation.run()) as events:
                        async for event in events:
                            if isinstance(event, Finished):
                                outcome = "finished"
                                self._totals["tokens"] += len(event.token_ids)
                            yield event
                finally:
                    self._in_use.remove(use)
        except IsthmusError:
            outcome = "failed"
            raise
        finally:
            self._totals[outcome] += 1

    def decide(self, request: GenerateRequest) -> Decision:
        """The decision as it would be taken now; nothing is run and no cloud is asked."""
        self._check(request)
        return decide(self._inputs(request))

    def _check(self, request: GenerateRequest) -> None:
        """RequestError for what the model cannot do."""
        spec = self.pack.spec
        prompt = len(request.prompt_ids)
        if prompt + request.max_tokens > spec.context_length:
            raise RequestError(
                f"{prompt} prompt tokens + {request.max_tokens} max_tokens = {prompt + request.max_tokens}, "
                f"the model's context is {spec.context_length}",
                code="context_overflow",
                hint=f"at most {max(0, spec.context_length - prompt)} new tokens fit after this prompt",
            )
        if (low := min(request.prompt_ids)) < 0 or (high := max(request.prompt_ids)) >= spec.vocab_size:
            bad = low if low < 0 else high
            raise RequestError(f"token id {bad} is not in 0..{spec.vocab_size - 1}", code="bad_token_id")

    # ---- routing ---------------------------------------------------------------------------------

    def _inputs(self, request: GenerateRequest) -> RouterInputs:
        spec, blocks = self.pack.spec, self.pack.bytes_per_block
        state, detail, welcome = self._cloud_state(request)
        context = None
        if welcome is not None:
            context = min(welcome.context_length, welcome.limits.max_tokens_per_session)
        return RouterInputs(
            num_layers=spec.num_layers,
            layer_bytes=tuple(blocks[1:-1]),
            embed_bytes=blocks[0],
            head_bytes=blocks[-1],
            kv_bytes=spec.kv_bytes_per_token_layer(KV_DTYPE_BYTES),
            tokens=len(request.prompt_ids) + request.max_tokens,
            memory_bytes=None if self._memory_bytes is None else self._memory_bytes - self._kv_in_use(),
            min_depth=self._min_depth,
            cloud_state=state,
            cloud_detail=detail,
            cloud_context=context,
            route=request.route,
            split=request.split,
            shape=request.shape,
            privacy=request.privacy,
        )

    def _cloud_state(self, request: GenerateRequest) -> tuple[str, str, Welcome | None]:
        """(state, detail, WELCOME if there was one) of the best cloud."""
        if not self._links:
            return "none", "no cloud is configured", None
        by_name = request.route in ("split", "offload")
        states = []
        for link in self._links:
            state = link.state
            if state in ("down", "refused") and (by_name or monotonic() - link.failed_at > RETRY_S):
                state = "unknown"
            states.append((("up", "unknown", "refused", "down").index(state), state, link))
        _, state, link = min(states, key=lambda entry: entry[0])
        return state, link.detail, link.welcome if state == "up" else None

    def _fresh_failure(self) -> IsthmusError | None:
        """Why no cloud could be reached a moment ago; None where one stands, or was not tried."""
        if any(link.state in ("up", "unknown") for link in self._links):
            return None
        return next((link.failure for link in self._links if link.failure is not None), None)

    async def _route(self, request: GenerateRequest) -> tuple[Decision, CloudLink | None]:
        """The decision, and a connected link if it needs one. Where the cloud turns out not to be there,
        `auto` decides once more, knowing that."""
        try:
            decision = decide(self._inputs(request))
        except RouteInfeasibleError as error:
            hopeless = request.route != "auto" or request.privacy == "local-only"
            if not hopeless and (fresh := self._fresh_failure()) is not None:
                raise fresh from error  # with the cloud there would have been a way: that is the trouble
            raise
        if decision.route == "local":
            return decision, None
        try:
            link = await self._reach()
        except (CloudUnreachableError, RejectedError) as error:
            if request.route != "auto":
                raise
            try:
                return decide(self._inputs(request)), None
            except RouteInfeasibleError:
                raise error from None
        # Now the cloud's limits are known: the same rule once more, with them.
        decision = decide(self._inputs(request))
        return decision, None if decision.route == "local" else link

    async def _reach(self) -> CloudLink:
        """The first cloud, in the order given, that stands or can be connected to."""
        for link in self._links:
            if link.state == "up":
                return link
        failure: IsthmusError | None = None
        for link in self._links:
            try:
                await link.connect()
            except (CloudUnreachableError, RejectedError) as error:
                failure = failure or error
            else:
                return link
        assert failure is not None, "the router allows a cloud only where one is configured"
        raise failure

    # ---- one generation --------------------------------------------------------------------------

    async def _generation(
        self, request: GenerateRequest, decision: Decision, link: CloudLink | None, started_s: float
    ) -> Generation:
        assert self._runner is not None, "start() first"
        events: list[dict[str, Any]] = []
        cloud: CloudHalf | None = None
        if link is not None:
            welcome = await link.connect()
            if welcome.match == "canary":
                events.append(await self._canary(link, decision.split))
            row_format = request.row_format or self._row_format
            cloud = CloudHalf(link, welcome, request, decision, row_format, self._offers)
        edge_draws = decision.shape == "u" or cloud is None
        edge = EdgeHalf(
            self._runner,
            self._pool,
            decision.split,
            prompt=request.prompt_ids,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            draws=edge_draws,
            codec=cloud.codec if cloud else None,
            make_room=self._make_room,
        )
        return Generation(
            request,
            decision,
            edge=edge,
            cloud=cloud,
            worker=self._worker,
            tokenizer=self.tokenizer,
            events=events,
            started_s=started_s,
            alone=lambda: self._slots.running == 1,
        )

    async def _canary(self, link: CloudLink, split: int) -> dict[str, Any]:
        """Other weights than the cloud's: a split needs both to agree on a fixed sequence (rule 8).
        Offload runs nothing of the edge's, so there it is only said."""
        event: dict[str, Any] = {"event": "other_weights", "split": split}
        if split == 0 or not await link.needs_canary(split):
            return event
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self._worker, self._canary_rows, split)
        result = await link.canary(split, rows)
        if not result.ok:
            raise RejectedError(
                f"at K = {split} the canary's rows differ by {result.error:.3g} from the cloud's, "
                f"allowed are {result.tolerance:.3g}",
                code="canary_failed",
                hint="edge and cloud hold different weights of this model: build the pack from the cloud's",
            )
        return {**event, "canary_error": result.error, "canary_tolerance": result.tolerance}

    def _canary_rows(self, split: int) -> NDArray[np.float32]:
        assert self._runner is not None
        ids = canary_ids(self.pack.spec.vocab_size)
        self._runner.load(range(split), embed=True, head=False)
        cache = self._runner.new_cache(range(split), capacity=len(ids))
        try:
            return self._runner.forward(cache, self._runner.embed(ids), start_layer=0, stop_layer=split)
        finally:
            cache.close()

    def _kv_in_use(self) -> int:
        """Bytes to which the KV of the running requests may grow."""
        per_layer = self.pack.spec.kv_bytes_per_token_layer(KV_DTYPE_BYTES)
        return sum(per_layer * use.split * use.tokens for use in self._in_use)

    def _make_room(self) -> None:
        """Under a memory limit: drop the blocks that no running request uses, and kept caches until what
        the running ones need fits. In the worker."""
        if self._memory_bytes is None or self._runner is None:
            return
        uses = list(self._in_use)
        deepest = max((use.split for use in uses), default=0)
        head = any(use.head for use in uses)
        self._runner.unload(range(deepest, self.pack.spec.num_layers), embed=deepest == 0, head=not head)
        blocks = self.pack.bytes_per_block
        weights = blocks[0] + sum(blocks[1 : 1 + deepest]) + (blocks[-1] if head else 0)
        self._pool.evict(max(0, self._memory_bytes - weights - self._kv_in_use()))

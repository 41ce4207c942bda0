"""The edge agent: one pack, the links to its clouds, a bounded number of requests at once."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from isthmus.edge.canary import Canary
from isthmus.edge.clouds import Clouds
from isthmus.edge.conversation import CachePool, CloudMemory
from isthmus.edge.generate import Generation
from isthmus.edge.history import HistoryBudget
from isthmus.edge.jobs import Jobs
from isthmus.edge.legs import Legs, Means
from isthmus.edge.link import CloudLink
from isthmus.edge.placement import Counts, Placement
from isthmus.edge.recovery import RecoveryConfig
from isthmus.edge.remote import OfferContext
from isthmus.edge.requests import (
    AgentEvent,
    Decision,
    Finished,
    GenerateRequest,
    RouteAsk,
    RowFormatName,
    Shape,
    Started,
)
from isthmus.edge.router import MIB, RouterInputs, decide
from isthmus.edge.slots import Slots
from isthmus.protocol.activations import RowFormat
from isthmus.protocol.errors import (
    CloudUnreachableError,
    IsthmusError,
    NotFoundError,
    RejectedError,
    RequestError,
    RouteInfeasibleError,
)
from isthmus.protocol.frames import VERSION
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Hello

if TYPE_CHECKING:
    from isthmus.splitter.cache import KVCache
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.runner import BlockRunner

CACHE_MB: Final = 512
HISTORY_MB: Final = 64
KV_DTYPE_BYTES: Final = 4


@dataclass(eq=False)
class _Running:
    """What a running request holds: layers, whether the head, and tokens its KV may grow to."""

    request: GenerateRequest
    split: int
    head: bool
    tokens: int
    placement: Placement | None = None

    def use(self, decision: Decision) -> None:
        self.split = decision.split
        self.head = decision.route == "local" or decision.shape == "u"


class Agent:
    """Runs generation requests over a pack and, where the route asks for it, a cloud.

    `parallel` requests run at once, `queue` more wait. `memory_mb` bounds what the model adds to an idle
    agent (weights, KV, kept caches). `min_depth`: least K for privacy `activations-only`. `row_format`
    None: f32 for an f32 pack, else int8 with outlier channels. `history_mb` bounds the rows kept of what was
    sent, by which requests go on elsewhere; `recovery` says how long a lost cloud is looked for.
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
        history_mb: float = HISTORY_MB,
        recovery: RecoveryConfig | None = None,
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
        self._history = HistoryBudget(int(history_mb * MIB))
        self._offers = OfferContext(secrets.token_bytes(32), pack, CloudMemory(), self._history)
        self._recovery = recovery or RecoveryConfig()
        self._running: list[_Running] = []
        self._counts = Counts()
        self._totals = {"requests": 0, "finished": 0, "failed": 0, "cancelled": 0, "tokens": 0}
        hello = Hello(
            versions=(VERSION,),
            identity=pack.identity,
            edge_precision=pack.scheme,
            row_formats=tuple(form.value for form in RowFormat),
            client="isthmus-edge",
        )
        self._clouds = Clouds(cloud_urls, hello, api_key=api_key, limits=limits, ssl_context=ssl_context)

    # ---- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make the runner (no layer is loaded yet; the first request that needs one loads it)."""
        self._runner = await asyncio.get_running_loop().run_in_executor(self._worker, self._make_runner)

    def _make_runner(self) -> BlockRunner:
        from isthmus.splitter.runner import BlockRunner

        return BlockRunner(self.pack, provider=self._provider, threads=self._threads)

    async def aclose(self) -> None:
        """Close the links and the caches. Running requests fail; close their iterators first."""
        await self._clouds.aclose()
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
            "history_bytes": self._history.nbytes,
            **asdict(self._counts),
            "clouds": self._clouds.stats(),
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
                running = _Running(request, 0, False, len(request.prompt_ids) + request.max_tokens)
                running.use(decision)
                self._running.append(running)
                try:
                    yield Started(
                        request.request_id, decision, decision.route, decision.split, decision.shape
                    )
                    generation = self._generation(running, started_s)
                    async with aclosing(generation.run(decision, link)) as events:
                        async for event in events:
                            if isinstance(event, Finished):
                                outcome = "finished"
                                self._totals["tokens"] += len(event.token_ids)
                            yield event
                finally:
                    self._running.remove(running)
        except IsthmusError:
            outcome = "failed"
            raise
        finally:
            self._totals[outcome] += 1

    def decide(self, request: GenerateRequest) -> Decision:
        """The decision as it would be taken now; nothing is run and no cloud is asked."""
        self._check(request)
        return decide(self._inputs(request))

    async def move(
        self, request_id: str, *, route: RouteAsk, split: int | None = None, shape: Shape | None = None
    ) -> Decision:
        """Re-partition a running request: before its next token it goes on by `route` at `split`. Returns
        once it does. NotFoundError if it does not run (any more), RouteInfeasibleError where a hard
        constraint forbids it, or what went wrong at the new place; then it goes on where it was."""
        running = next((one for one in self._running if one.request.request_id == request_id), None)
        if running is None or running.placement is None:
            raise NotFoundError(f"no request {request_id!r} is running", code="unknown_request")
        wish = replace(running.request, route=route, split=split, shape=shape)
        decision, link = await self._route(wish, running)
        if running.placement is None:
            raise NotFoundError(f"the request {request_id!r} has ended", code="request_ended")
        await running.placement.move(decision, link)
        return decision

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

    def _inputs(
        self, request: GenerateRequest, running: _Running | None = None, *, link: CloudLink | None = None
    ) -> RouterInputs:
        """`running`: the request itself, where it runs already; `link`: look at this cloud alone."""
        spec, blocks = self.pack.spec, self.pack.bytes_per_block
        if link is None:
            by_name = request.route in ("split", "offload")
            state, detail, welcome = self._clouds.best_state(by_name=by_name)
        else:
            state, detail, welcome = link.state, link.detail, link.welcome
        context = None
        if welcome is not None:
            context = min(welcome.context_length, welcome.limits.max_tokens_per_session)
        memory = self._memory_bytes
        return RouterInputs(
            num_layers=spec.num_layers,
            layer_bytes=tuple(blocks[1:-1]),
            embed_bytes=blocks[0],
            head_bytes=blocks[-1],
            kv_bytes=spec.kv_bytes_per_token_layer(KV_DTYPE_BYTES),
            tokens=len(request.prompt_ids) + request.max_tokens,
            memory_bytes=None if memory is None else memory - self._kv_in_use(without=running),
            min_depth=self._min_depth,
            cloud_state=state,
            cloud_detail=detail,
            cloud_context=context,
            route=request.route,
            split=request.split,
            shape=request.shape,
            privacy=request.privacy,
        )

    async def _route(
        self, request: GenerateRequest, running: _Running | None = None
    ) -> tuple[Decision, CloudLink | None]:
        """The decision, and a connected link if it needs one. Where the cloud turns out not to be there,
        `auto` decides once more, knowing that."""
        try:
            decision = decide(self._inputs(request, running))
        except RouteInfeasibleError as error:
            hopeless = request.route != "auto" or request.privacy == "local-only"
            if not hopeless and (fresh := self._clouds.fresh_failure()) is not None:
                raise fresh from error  # with the cloud there would have been a way: that is the trouble
            raise
        if decision.route == "local":
            return decision, None
        try:
            link = await self._clouds.reach()
        except (CloudUnreachableError, RejectedError) as error:
            if request.route != "auto":
                raise
            try:
                return decide(self._inputs(request, running)), None
            except RouteInfeasibleError:
                raise error from None
        # Now the cloud's limits are known: the same rule once more, with them.
        decision = decide(self._inputs(request, running))
        return decision, None if decision.route == "local" else link

    # ---- one generation --------------------------------------------------------------------------

    def _generation(self, running: _Running, started_s: float) -> Generation:
        assert self._runner is not None, "start() first"
        request = running.request
        events: list[dict[str, Any]] = []
        ids = list(request.prompt_ids)
        means = Means(
            self._runner,
            self._pool,
            self._offers,
            Canary(self._runner, self._worker),
            self._row_format,
            self._make_room,
        )
        legs = Legs(
            means,
            request,
            Jobs(self._worker),
            events=events,
            alone=lambda: self._slots.running == 1,
            on_use=running.use,
        )
        running.placement = Placement(
            request,
            legs,
            self._clouds,
            _Feasibility(self, running),
            self._recovery,
            ids=ids,
            events=events,
            counts=self._counts,
        )
        return Generation(
            request,
            running.placement,
            ids=ids,
            tokenizer=self.tokenizer,
            events=events,
            started_s=started_s,
        )

    def _kv_in_use(self, *, without: _Running | None = None) -> int:
        """Bytes to which the KV of the running requests may grow."""
        per_layer = self.pack.spec.kv_bytes_per_token_layer(KV_DTYPE_BYTES)
        return sum(per_layer * one.split * one.tokens for one in self._running if one is not without)

    def _make_room(self) -> None:
        """Under a memory limit: drop the blocks that no running request uses, and kept caches until what
        the running ones need fits. In the worker."""
        if self._memory_bytes is None or self._runner is None:
            return
        uses = list(self._running)
        deepest = max((use.split for use in uses), default=0)
        head = any(use.head for use in uses)
        self._runner.unload(range(deepest, self.pack.spec.num_layers), embed=deepest == 0, head=not head)
        blocks = self.pack.bytes_per_block
        weights = blocks[0] + sum(blocks[1 : 1 + deepest]) + (blocks[-1] if head else 0)
        self._pool.evict(max(0, self._memory_bytes - weights - self._kv_in_use()))


class _Feasibility:
    """The router's hard constraints, for a request that runs already."""

    def __init__(self, agent: Agent, running: _Running) -> None:
        self._agent = agent
        self._running = running

    def local(self) -> Decision | None:
        """The decision to go on on this device, if that is possible."""
        wish = replace(self._running.request, route="local", split=None, shape=None)
        try:
            return decide(self._agent._inputs(wish, self._running))
        except RouteInfeasibleError:
            return None

    def check(self, decision: Decision, link: CloudLink) -> None:
        """RouteInfeasibleError where `decision` cannot be taken at this cloud."""
        split = decision.split if decision.route == "split" else None
        shape = decision.shape if decision.route == "split" else None
        wish = replace(self._running.request, route=decision.route, split=split, shape=shape)
        decide(self._agent._inputs(wish, self._running, link=link))

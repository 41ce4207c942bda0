"""The edge agent: one pack, the links to its clouds, a bounded number of requests at once."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from isthmus.edge.canary import Canary
from isthmus.edge.clouds import Clouds
from isthmus.edge.constraints import MIB, RouterInputs
from isthmus.edge.conversation import CachePool, CloudMemory
from isthmus.edge.generate import Generation
from isthmus.edge.grammar import Grammars
from isthmus.edge.history import HistoryBudget
from isthmus.edge.jobs import Jobs
from isthmus.edge.keeper import Keeper
from isthmus.edge.legs import Legs, Means
from isthmus.edge.link import CloudLink, hello_of
from isthmus.edge.placement import Counts, Placement
from isthmus.edge.pulse import pulse
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
    Token,
)
from isthmus.edge.residency import Residency
from isthmus.edge.router import decide
from isthmus.edge.routing import KV_DTYPE_BYTES, EdgeUse, Routing, RoutingOptions
from isthmus.edge.running import Running, StillFeasible
from isthmus.edge.slots import Slots
from isthmus.edge.snapshot import active, loaded_bytes
from isthmus.edge.telemetry import Telemetry
from isthmus.protocol.errors import (
    CloudUnreachableError,
    NotFoundError,
    RejectedError,
    RequestError,
    RouteInfeasibleError,
)
from isthmus.protocol.limits import Limits

if TYPE_CHECKING:
    from isthmus.splitter.cache import KVCache
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.runner import BlockRunner

CACHE_MB: Final = 512
HISTORY_MB: Final = 64
# A device that seems to have changed is looked at again at once.
MOST_PULSES: Final = 4
# How long a request that could also run here waits to learn about a cloud.
LEARN_S: Final = 2.0


class Agent:
    """Runs generation requests over a pack and, where the route asks for it, a cloud.

    `parallel` requests run at once, `queue` more wait. `memory_mb` bounds what the model adds to an idle
    agent (weights, KV, kept caches). `min_depth`: least K for privacy `activations-only`. `row_format`
    None: f32 for an f32 pack, else int8 with outlier channels. `history_mb` bounds the rows kept of what was
    sent, by which requests go on elsewhere; `recovery` says how long a lost cloud is looked for. `routing`:
    what the router predicts from, and how it weighs; without a profile it follows a simple rule.
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
        routing: RoutingOptions | None = None,
        limits: Limits | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.pack = pack
        self.tokenizer = pack.tokenizer()
        self._grammars = Grammars(self.tokenizer, pack.spec.vocab_size)
        self._provider = provider
        self._threads = threads or None
        self._min_depth = min_depth
        self._row_format: RowFormatName = row_format or ("f32" if pack.scheme == "f32" else "int8o")
        self._slots = Slots(parallel, queue)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="isthmus-edge")
        self._runner: BlockRunner | None = None
        self._pool: CachePool[KVCache] = CachePool(int(cache_mb * MIB))
        self._history = HistoryBudget(int(history_mb * MIB))
        self._offers = OfferContext(secrets.token_bytes(32), pack, CloudMemory(), self._history)
        self._recovery = recovery or RecoveryConfig()
        self._running: list[Running] = []
        options = routing or RoutingOptions()
        self._profile = options.profile
        self._residency = Residency(
            pack,
            options.profile,
            self._pool,
            self._running,
            lambda: self._runner,
            kv_bytes=pack.spec.kv_bytes_per_token_layer(KV_DTYPE_BYTES),
            memory_bytes=int(memory_mb * MIB) if memory_mb else None,
        )
        self._counts = Counts()
        self.telemetry = Telemetry()
        hello = hello_of(pack, "isthmus-edge")
        self._clouds = Clouds(cloud_urls, hello, api_key=api_key, limits=limits, ssl_context=ssl_context)
        self.routing = Routing(
            pack,
            self._clouds,
            self._offers.memory,
            options,
            min_depth=min_depth,
            row_format=self._row_format,
        )
        self.telemetry.watch(
            self.stats,
            self.routing.calibrator.ratios,
            memory_bytes=self._residency.memory_bytes,
            cache_bytes=self._pool.max_bytes,
        )
        self._keeper = Keeper(self._clouds, self._look_here, metered=options.radio.usd_per_byte > 0)

    # ---- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make the runner (no layer is loaded yet; the first request that needs one loads it)."""
        self._runner = await asyncio.get_running_loop().run_in_executor(self._worker, self._make_runner)
        if self._profile is not None:
            self._keeper.start()

    def _make_runner(self) -> BlockRunner:
        from isthmus.splitter.runner import BlockRunner

        return BlockRunner(self.pack, provider=self._provider, threads=self._threads)

    async def aclose(self) -> None:
        """Close the links and the caches. Running requests fail; close their iterators first."""
        await self._keeper.aclose()
        await self._clouds.aclose()
        self._grammars.close()
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
        layers = sorted(runner.loaded_layers) if runner else []
        head = runner is not None and runner.head_loaded
        return {
            **self.telemetry.totals,
            "running": self._slots.running,
            "waiting": self._slots.waiting,
            "parallel": self._slots.parallel,
            "queue": self._slots.queue,
            "provider": runner.provider_used if runner else self._provider,
            "loaded_layers": layers,
            "weights_bytes": loaded_bytes(self.pack, layers, embed=bool(layers), head=head),
            "kv_bytes": self._residency.kv_bytes(),
            "kept_caches": len(self._pool),
            "kept_cache_bytes": self._pool.nbytes,
            "history_bytes": self._history.nbytes,
            **asdict(self._counts),
            "min_depth": self._min_depth,
            "routes": dict(self.telemetry.routes),
            "active": active(self._running),
            "clouds": self._clouds.stats(),
            "router": self.routing.stats(),
        }

    # ---- requests --------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AgentEvent, None]:
        """Started, then Tokens (Moved where the link was lost or the place changed), then Finished; or an
        IsthmusError. Closing the iterator cancels both halves and frees the cloud's pages."""
        self._check(request)
        grammar = await self._grammars.of(request)
        self._keeper.in_use()
        with self.telemetry.request(request) as meter:
            async with self._slots.take(request.priority):
                started_s = meter.admitted()
                inputs, decision, link = await self._route(request)
                tokens = len(request.prompt_ids) + request.max_tokens
                running = Running(request, 0, False, tokens, grammar=grammar)
                running.use(decision)
                self._running.append(running)
                self.routing.begin(request, inputs, decision)
                meter.started(decision)
                try:
                    yield Started(
                        request.request_id, decision, decision.route, decision.split, decision.shape
                    )
                    generation = self._generation(running, started_s)
                    async with aclosing(generation.run(decision, link)) as events:
                        async for event in events:
                            if isinstance(event, Finished):
                                running.finished = event
                            elif isinstance(event, Token):
                                running.num_out += 1
                            meter.see(event)
                            yield event
                finally:
                    self._running.remove(running)
                    self.routing.end(request, inputs, decision, running.finished, num_out=running.num_out)
                    self._residency.consider(inputs)  # not before: no token waits for it

    def decide(self, request: GenerateRequest) -> Decision:
        """The decision as it would be taken now; nothing is run and no cloud is asked."""
        self._check(request)
        return decide(self._inputs(request))

    async def route(self, request: GenerateRequest) -> Decision:
        """The decision as `generate` would take it: clouds are connected to where that is due, nothing is
        run."""
        self._check(request)
        await self._grammars.of(request)
        self._keeper.in_use()
        return (await self._route(request))[1]

    async def warm(self, timeout_s: float = LEARN_S) -> None:
        """Learn about the clouds, and the links to them, for `timeout_s` at most."""
        self._keeper.in_use()
        await self._keeper.warm(timeout_s)

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
        _, decision, link = await self._route(wish, running)
        if running.placement is None:
            raise NotFoundError(f"the request {request_id!r} has ended", code="request_ended")
        await running.placement.move(decision, link)
        return decision

    async def _look_here(self) -> None:
        """See how fast this device is now, unless requests show that, and load what would be of use."""
        runner, profile, jobs = self._runner, self._profile, Jobs(self._worker)
        if runner is None or profile is None:
            return
        for _ in range(MOST_PULSES):
            if self._slots.running or not self.routing.learning:
                break
            seen = await jobs.submit(partial(pulse, runner, profile))
            if seen is None or self._slots.running or not self.routing.calibrator.note_pulse(*seen):
                break  # as expected: once is enough
        while not self._slots.running and await jobs.submit(self._residency.load_next):
            pass

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
        self, request: GenerateRequest, running: Running | None = None, *, link: CloudLink | None = None
    ) -> RouterInputs:
        """`running`: the request itself, where it runs already; `link`: look at this cloud alone."""
        residency = self._residency
        memory = residency.memory_bytes
        if memory is not None:
            memory -= residency.kv_in_use(without=running)
        state = residency.state(without=running)
        cached = self._pool.shared(request.prompt_ids)
        return self.routing.inputs(request, EdgeUse(memory, state, cached), link=link)

    async def _route(
        self, request: GenerateRequest, running: Running | None = None
    ) -> tuple[RouterInputs, Decision, CloudLink | None]:
        """The decision, what it was taken from, and a connected link if it needs one. Where the cloud turns
        out not to be there, `auto` decides once more, knowing that."""
        inputs = self._inputs(request, running)
        try:
            decision = decide(inputs)
        except RouteInfeasibleError as error:
            wrong = error.code == "bad_split"  # with any cloud
            hopeless = wrong or request.route != "auto" or request.privacy == "local-only"
            if not hopeless and (fresh := self._clouds.fresh_failure()) is not None:
                raise fresh from error  # with the cloud there would have been a way: that is the trouble
            raise
        if decision.route == "local":
            return inputs, decision, None
        try:
            link = await self._clouds.reach()
        except (CloudUnreachableError, RejectedError) as error:
            if request.route != "auto":
                raise
            inputs = self._inputs(request, running)
            try:
                return inputs, decide(inputs), None
            except RouteInfeasibleError:
                raise error from None
        # Now the cloud's limits are known: the same once more, with them.
        inputs = self._inputs(request, running)
        decision = decide(inputs)
        return inputs, decision, None if decision.route == "local" else link

    # ---- one generation --------------------------------------------------------------------------

    def _generation(self, running: Running, started_s: float) -> Generation:
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
            self._residency.make_room,
        )
        legs = Legs(
            means,
            request,
            Jobs(self._worker),
            grammar=running.grammar,
            events=events,
            alone=lambda: self._slots.running == 1,
            on_use=running.use,
        )
        running.placement = Placement(
            request,
            legs,
            self._clouds,
            StillFeasible(self._inputs, running),
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

"""The edge's metrics (names of CONTRACT.md, Prometheus format), and the log line that each request leaves.

What happens often is counted as it happens; what is a state is read from the agent's stats when asked for.
Latencies count from the request's arrival, so the wait for a slot is in them; their `route` is the one
decided upon at the start.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from isthmus.edge.logs import log, plain_code
from isthmus.edge.requests import Finished, Route, Shape, Token
from isthmus.protocol.errors import IsthmusError, OverloadedError

if TYPE_CHECKING:
    from isthmus.edge.calibration import Term
    from isthmus.edge.requests import AgentEvent, Decision, GenerateRequest

Why = Literal["asked", "only-way", "rule", "kept", "cheapest"]
Outcome = Literal["finished", "failed", "cancelled", "refused"]
"""`refused`: too busy, here or at the cloud. `cancelled`: the client left."""

ROUTES: Final[tuple[Route, ...]] = ("local", "split", "offload")
_LATENCY_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip


def why(request: GenerateRequest, decision: Decision) -> Why:
    """A decision's reason in one word: it was `asked` for; every other route is forbidden or impossible
    (`only-way`); nothing could be predicted, so the stated `rule` holds; the way taken last was `kept`, being
    hardly worse; or it is the `cheapest`."""
    if request.route != "auto" or request.split is not None:
        return "asked"
    feasible = [one for one in decision.candidates if one.feasible]
    if all(one.route == decision.route for one in feasible):
        return "only-way"
    scores = [one.score for one in feasible if one.score is not None]
    chosen = decision.chosen
    if chosen is None or chosen.score is None or len(scores) < len(feasible):
        return "rule"
    return "kept" if chosen.score > min(scores) else "cheapest"


def kv_usage(stats: Mapping[str, Any], *, memory_bytes: int | None, cache_bytes: int) -> float:
    """Share of the room for KV that is taken, 0 … 1: by what running requests may grow to and by kept caches
    of what a memory limit leaves beside the loaded weights; without a limit by kept caches of `cache_bytes`,
    the only bound there is."""
    kept = stats["kept_cache_bytes"]
    if memory_bytes is None:
        taken, room = kept, cache_bytes
    else:
        taken, room = kept + stats["kv_bytes"], memory_bytes - stats["weights_bytes"]
    if taken <= 0:
        return 0.0
    return min(1.0, taken / room) if room > 0 else 1.0


class Telemetry:
    """One registry per agent, so that two agents in one process don't collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="isthmus", registry=self.registry)
        self.totals = {"requests": 0, "finished": 0, "failed": 0, "cancelled": 0, "tokens": 0}
        """Of all requests; a refused one has failed."""
        self.routes: Tally[str] = Tally()
        """Requests by the route decided upon at the start."""
        self.first_token_s = self._histogram(
            "time_to_first_token", "From a request's arrival to its first token"
        )
        self.inter_token_s = self._histogram("inter_token_latency", "Between two tokens of a request")
        self.request_s = self._histogram("e2e_request_latency", "From a request's arrival to its end")
        self.queue_s = Histogram(
            "isthmus_queue_time_seconds", "Wait for a slot", buckets=_LATENCY_S, registry=self.registry
        )
        self.by_route = self._counter("route", "Requests by route and reason", "route", "reason")
        self.ended = self._counter("requests", "Requests by how they ended", "outcome")
        tokens = self._counter("tokens", "Tokens of prompts read and of answers drawn", "kind")
        self.prompt_tokens, self.completion_tokens = tokens.labels("prompt"), tokens.labels("completion")

    def _histogram(self, name: str, text: str) -> dict[Route, Histogram]:
        """By route; made at once, so that looking one up costs no lock."""
        family = Histogram(
            f"isthmus_{name}_seconds", text, ["route"], buckets=_LATENCY_S, registry=self.registry
        )
        return {route: family.labels(route) for route in ROUTES}

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"isthmus_{name}", text, labels, registry=self.registry)

    def watch(
        self,
        stats: Callable[[], Mapping[str, Any]],
        ratios: Callable[[], Mapping[Term, float]],
        *,
        memory_bytes: int | None,
        cache_bytes: int,
    ) -> None:
        """Adds what is read when asked. `stats`: the agent's; `ratios`: observed over predicted seconds of
        each route's terms; the bounds are those of `kv_usage`."""
        self.registry.register(_AgentCollector(stats, ratios, memory_bytes, cache_bytes))

    def request(self, request: GenerateRequest) -> RequestMeter:
        """Of a request that has just arrived."""
        self.totals["requests"] += 1
        return RequestMeter(self, request)

    def render(self) -> bytes:
        """The registry in Prometheus' text format. On the agent's event loop: it reads the agent's state."""
        return generate_latest(self.registry)


class RequestMeter:
    """One request, from its arrival on. A context manager: how the block ends is how the request did."""

    def __init__(self, telemetry: Telemetry, request: GenerateRequest) -> None:
        self.finished: Finished | None = None
        """The last event, once it was seen."""
        self._telemetry = telemetry
        self._request = request
        self._arrived_s = perf_counter()
        self._slot_s: float | None = None
        self._first_s: float | None = None
        self._last_s = 0.0
        self._num_tokens = 0
        self._way: tuple[Route, int, Shape | None] | None = None
        self._why: Why | None = None

    def __enter__(self) -> RequestMeter:
        return self

    def admitted(self) -> float:
        """It has a slot now. perf_counter's seconds."""
        self._slot_s = perf_counter()
        self._telemetry.queue_s.observe(self._slot_s - self._arrived_s)
        return self._slot_s

    def started(self, decision: Decision) -> None:
        """It is decided where it runs."""
        self._way = decision.route, decision.split, decision.shape
        self._why = why(self._request, decision)
        self._telemetry.routes[decision.route] += 1
        self._telemetry.by_route.labels(decision.route, self._why).inc()
        self._inter_token_s = self._telemetry.inter_token_s[decision.route]

    def see(self, event: AgentEvent) -> None:
        """What the request gives out. For a token a few microseconds."""
        if isinstance(event, Token):
            now = perf_counter()
            if self._first_s is None:
                assert self._way is not None, "started() first"
                self._first_s = now
                self._telemetry.first_token_s[self._way[0]].observe(now - self._arrived_s)
            else:
                self._inter_token_s.observe(now - self._last_s)
            self._last_s = now
            self._num_tokens += 1
            self._telemetry.completion_tokens.inc()
        elif isinstance(event, Finished):
            self.finished = event

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome, telemetry = self._outcome(error), self._telemetry
        telemetry.totals["failed" if outcome == "refused" else outcome] += 1
        telemetry.totals["tokens"] += self._num_tokens
        telemetry.ended.labels(outcome).inc()
        now = perf_counter()
        if self._way is not None:
            telemetry.request_s[self._way[0]].observe(now - self._arrived_s)
            telemetry.prompt_tokens.inc(len(self._request.prompt_ids))
        self._log(outcome, error, now)

    def _outcome(self, error: BaseException | None) -> Outcome:
        if self.finished is not None:
            return "finished"
        if isinstance(error, OverloadedError):
            return "refused"
        # Whoever leaves cancels the task or closes the iterator; neither is an Exception.
        return "failed" if isinstance(error, Exception) else "cancelled"

    def _log(self, outcome: Outcome, error: BaseException | None, now: float) -> None:
        """One line. `ttft_s` and `total_s` count from the slot, as in the reply."""
        code = None
        if outcome in ("failed", "refused"):
            code = plain_code(error.code) if isinstance(error, IsthmusError) else "internal_error"
        way, slot_s = self._way or (None, None, None), self._slot_s
        events: tuple[Any, ...] = ()
        if self.finished is not None:
            way = self.finished.route, self.finished.split, self.finished.shape
            events = self.finished.events
        log.info(
            "request",
            request_id=self._request.request_id,
            route=way[0],
            split=way[1],
            shape=way[2],
            reason=self._why,
            outcome=outcome,
            code=code,
            prompt_tokens=len(self._request.prompt_ids),
            tokens=self._num_tokens,
            queue_s=_rounded((slot_s if slot_s is not None else now) - self._arrived_s),
            ttft_s=None if self._first_s is None or slot_s is None else _rounded(self._first_s - slot_s),
            total_s=None if slot_s is None else _rounded(now - slot_s),
            num_events=len(events),
        )


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


class _AgentCollector(Collector):
    """The agent's state at the moment of the scrape."""

    def __init__(
        self,
        stats: Callable[[], Mapping[str, Any]],
        ratios: Callable[[], Mapping[Term, float]],
        memory_bytes: int | None,
        cache_bytes: int,
    ) -> None:
        self._stats = stats
        self._ratios = ratios
        self._memory_bytes = memory_bytes
        self._cache_bytes = cache_bytes

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        usage = kv_usage(stats, memory_bytes=self._memory_bytes, cache_bytes=self._cache_bytes)
        yield _gauge("num_requests_running", "Requests that hold a slot", stats["running"])
        yield _gauge("num_requests_waiting", "Requests that wait for a slot", stats["waiting"])
        yield _gauge("kv_cache_usage_perc", "Share of the room for KV that is taken, 0..1", usage)
        yield _gauge("kept_cache_bytes", "KV of conversations that may go on", stats["kept_cache_bytes"])
        yield _gauge("history_bytes", "Rows kept for a lost cloud", stats["history_bytes"])
        yield _gauge("weights_bytes", "Weights of the loaded blocks", stats["weights_bytes"])
        yield _gauge("loaded_layers", "Layers in memory", len(stats["loaded_layers"]))
        resumes = CounterMetricFamily(
            "isthmus_resumes", "Attempts to take a session up again", labels=["outcome"]
        )
        resumes.add_metric(["resumed"], stats["resumes"])
        resumes.add_metric(["failed"], stats["failed_resumes"])
        yield resumes
        for name, text in _HELPED.items():
            yield CounterMetricFamily(f"isthmus_{name}", text, stats[name])
        yield from _links(stats["clouds"])
        ratios = GaugeMetricFamily(
            "isthmus_predicted_over_observed",
            "Predicted over observed seconds of a route's term, newest request",
            labels=["route", "term"],
        )
        for (route, term), observed in self._ratios().items():
            ratios.add_metric([route, term], 1.0 / observed)
        yield ratios
        yield from _spent(stats["router"])


_HELPED: Final = {
    "failovers": "Requests that went on at another cloud, or with a new session",
    "fallbacks": "Requests that a lost cloud made go on here",
    "moves": "Requests moved on demand",
}


def _links(clouds: list[dict[str, Any]]) -> Iterator[Metric]:
    up = GaugeMetricFamily("isthmus_link_up", "Whether the link stands", labels=["cloud"])
    rtt = GaugeMetricFamily("isthmus_link_rtt_seconds", "Smoothed round trip", labels=["cloud"])
    rate = GaugeMetricFamily(
        "isthmus_link_bandwidth_bytes_per_second", "Bandwidth as measured", labels=["cloud", "direction"]
    )
    num_bytes = CounterMetricFamily("isthmus_link_bytes", "Websocket payload bytes", labels=["direction"])
    for cloud in clouds:
        up.add_metric([cloud["url"]], float(cloud["state"] == "up"))
        if cloud["rtt_s"] is not None:
            rtt.add_metric([cloud["url"]], cloud["rtt_s"])
        for direction in ("up", "down"):
            if (known := cloud[f"{direction}_bytes_per_s"]) is not None:
                rate.add_metric([cloud["url"], direction], known)
    for direction in ("up", "down"):
        num_bytes.add_metric([direction], sum(cloud[f"bytes_{direction}"] for cloud in clouds))
    yield from (up, rtt, rate, num_bytes)


def _spent(router: Mapping[str, Any]) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "isthmus_spent_usd", "Paid to clouds and for data, as priced", router["spent_usd"]
    )
    if router["energy_j"] is not None:
        text = "This device's energy for requests, as modelled from its power"
        yield CounterMetricFamily("isthmus_energy_joules", text, router["energy_j"])


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"isthmus_{name}", text, value)

"""The cloud's metrics (names of CONTRACT.md, Prometheus format) and its log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from isthmus.cloud.engine import Engine
from isthmus.cloud.engine_core import StepRecord

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOTALS = {
    "steps_total": "Engine steps",
    "rows_computed_total": "Rows computed",
    "row_layers_total": "Rows times layers computed",
    "tokens_sampled_total": "Tokens sampled",
    "preemptions_total": "Sessions preempted",
    "prefix_hits_total": "Sessions that found a cached prefix",
    "prefix_hit_rows_total": "Rows that cached prefixes made unnecessary",
    "prefix_evictions_total": "Entries evicted from the prefix cache",
    "batch_wait_seconds_total": "Seconds that steps were held back for further edges' rows",
}


class Telemetry:
    """One registry per server, so that two servers in one process (tests) don't collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="isthmus", registry=self.registry)
        self.first_token_s = self._histogram(
            "isthmus_time_to_first_token_seconds", "From the session's OPEN to its first token or hidden row"
        )
        self.inter_token_s = self._histogram(
            "isthmus_inter_token_latency_seconds", "Between two outputs of a session"
        )
        self.request_s = self._histogram(
            "isthmus_e2e_request_latency_seconds", "From OPEN to the session's end"
        )
        self.step_s = self._histogram("isthmus_step_seconds", "Duration of one engine step")
        self.step_rows = Histogram(
            "isthmus_step_rows", "Rows computed in one engine step", buckets=_ROWS, registry=self.registry
        )
        self.link_bytes = Counter(
            "isthmus_link_bytes", "Websocket payload bytes", ["direction"], registry=self.registry
        )
        self.sessions_ended = Counter(
            "isthmus_sessions_ended", "Sessions by how they ended", ["outcome"], registry=self.registry
        )
        self.resumes = Counter(
            "isthmus_resumes", "RESUME requests by their outcome", ["outcome"], registry=self.registry
        )
        self.detached = Gauge(
            "isthmus_sessions_detached", "Sessions kept for an edge to resume", registry=self.registry
        )
        self.connections = Gauge("isthmus_connections", "Open edge connections", registry=self.registry)
        self._bytes = {way: self.link_bytes.labels(direction=way) for way in ("up", "down")}

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_LATENCY_S, registry=self.registry)

    def watch(self, engine: Engine) -> None:
        """Adds what is read from the engine when asked: sessions, pages by state, totals."""
        self.registry.register(_EngineCollector(engine))

    def on_step(self, record: StepRecord) -> None:
        self.step_s.observe(record.seconds)
        self.step_rows.observe(record.num_rows)

    def count_bytes(self, direction: str, num_bytes: int) -> None:
        """`direction` is "up" (from the edge) or "down"."""
        self._bytes[direction].inc(num_bytes)

    def render(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's counts at the moment of the scrape, from one snapshot."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield _gauge("num_requests_running", "Sessions that hold KV pages", stats.running)
        yield _gauge("num_requests_waiting", "Sessions with rows to compute and no page yet", stats.waiting)
        yield _gauge("sessions", "Open sessions", stats.sessions)
        yield _gauge(
            "kv_cache_usage_perc",
            "Share of KV pages in use, 0..1",
            stats.pages_used / max(1, stats.pages_total),
        )
        for state in ("used", "cached", "free"):
            text = f"KV pages {state} (16 tokens of one layer)"
            yield _gauge(f"kv_pages_{state}", text, getattr(stats, f"pages_{state}"))
        for field, text in _TOTALS.items():
            name = f"isthmus_{field.removesuffix('_total')}"
            yield CounterMetricFamily(name, f"{text} since the start", getattr(stats, field))


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"isthmus_{name}", text, value)


def get_log() -> structlog.stdlib.BoundLogger:
    """Events with figures, to the standard library's logger `isthmus.cloud`; how they look is the process's
    choice. No prompt, token, row or key is ever logged."""
    log: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger("isthmus.cloud"),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
    )
    return log

"""The cloud's metrics (names of CONTRACT.md, Prometheus format) and its log (JSON lines on stderr)."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from isthmus.cloud.engine import Engine
from isthmus.cloud.engine_core import StepRecord

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Telemetry:
    """One registry per server, so that two servers in one process (tests) don't collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
        self.connections = self._gauge("isthmus_connections", "Open edge connections")
        self._bytes = {way: self.link_bytes.labels(direction=way) for way in ("up", "down")}

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_LATENCY_S, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def watch(self, engine: Engine) -> None:
        """Adds what is read from the engine when asked: sessions, pages by state, totals."""

        def live(name: str, text: str, field: str) -> None:
            self._gauge(name, text).set_function(lambda: float(getattr(engine.stats(), field)))

        live("isthmus_num_requests_running", "Sessions that hold KV pages", "running")
        live("isthmus_num_requests_waiting", "Sessions with rows to compute and no page yet", "waiting")
        for state in ("used", "cached", "free"):
            live(f"isthmus_kv_pages_{state}", f"KV pages {state} (16 tokens of one layer)", f"pages_{state}")
        live("isthmus_rows_computed", "Rows computed since the start", "rows_computed_total")
        live("isthmus_preemptions", "Sessions preempted since the start", "preemptions_total")
        live("isthmus_prefix_hits", "Sessions that found a cached prefix", "prefix_hits_total")
        self._gauge("isthmus_kv_cache_usage_perc", "Share of KV pages in use, 0..1").set_function(
            lambda: engine.pool.num_used / max(1, engine.pool.num_pages)
        )

    def on_step(self, record: StepRecord) -> None:
        self.step_s.observe(record.seconds)
        self.step_rows.observe(record.num_rows)

    def count_bytes(self, direction: str, num_bytes: int) -> None:
        """`direction` is "up" (from the edge) or "down"."""
        self._bytes[direction].inc(num_bytes)

    def render(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)


def configure_log(*, verbose: bool = False) -> None:
    """JSON lines on stderr: stdout belongs to the ready line. No prompt, token or key is ever logged."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def get_log(**values: Any) -> Any:
    """A bound structlog logger."""
    return structlog.get_logger("isthmus.cloud", **values)

"""The real router in a simulated world: `edge.router.best` on what its own choices and measurements showed.

It is given what an agent has: a measured profile of each side, the link's estimator fed by heartbeats, probes
and its own transfers, the cloud's published load, the calibrator and the forecast of answers. Nothing of the
world's truth reaches it another way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from isthmus.bench.router_realise import FRAME_BYTES, TOKEN_BYTES
from isthmus.bench.router_recordings import Vector
from isthmus.bench.router_world import Costs, SimWorld, State
from isthmus.edge.calibration import Calibrator, Observed, Residuals
from isthmus.edge.constraints import RouterInputs, Way
from isthmus.edge.lengths import AnswerLengths
from isthmus.edge.link_estimate import PROBE_BYTES, LinkEstimator
from isthmus.edge.router import best
from isthmus.protocol.events import ProbeDone
from isthmus.splitter.cost import CostModel
from isthmus.splitter.situation import CloudState, EdgeState, Factors, Wire, Work, World

PINGS: Final = 10  # heartbeats before a request that are looked at: what came earlier hardly counts
_PROBE_BEFORE_S: Final = 1.0
_MOST_PROBE_BYTES: Final = 256 * 1024
_LEAST_SAMPLE_BYTES: Final = 4096
_STEP_SAMPLES: Final = 3
_TOGETHER_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Ablation:
    """What is taken away from the router; `link_delay_s`: how long it takes to hear of the link."""

    name: str = "router"
    calibration: bool = True
    hysteresis: bool = True
    link_delay_s: float = 0.0


ABLATIONS: Final = (
    Ablation("no_calibration", calibration=False),
    Ablation("no_hysteresis", hysteresis=False),
    Ablation("stale_link", link_delay_s=60.0),
)


class Learner:
    """A `Chooser`."""

    def __init__(self, world: SimWorld, ablation: Ablation = Ablation()) -> None:
        self._world, self._ablation = world, ablation
        self._link = LinkEstimator()
        self._calibrator = Calibrator()
        self._lengths = AnswerLengths()
        self._pings = _pings(world)
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._delay_s = ablation.link_delay_s
        self._decided: tuple[World, Work, Way, bool] | None = None
        self._free_s = 0.0
        self._wire = Wire.of(world.edge.hidden, "int8o")
        self._layer_bytes = (world.edge.layer_bytes,) * world.num_layers
        self.probed = (0.0, 0.0)

    def choose(self, i: int, state: State) -> int:
        world, request = self._world, self._world.requests[i]
        self.probed = (0.0, 0.0)
        self._hear(i, state)
        pinned = self._way(i, state.last) if request.follows and state.last is not None else None
        continued = pinned is not None and world.continues(i, pinned[1], state)
        now_world, work = self._now(i, state), self._work(i, pinned[1] if pinned and continued else None)
        scenario = world.scenario
        way = best(
            RouterInputs(
                num_layers=world.num_layers,
                layer_bytes=self._layer_bytes,
                embed_bytes=world.edge.embed_bytes,
                head_bytes=world.edge.head_bytes,
                kv_bytes=world.kv_bytes,
                tokens=request.prompt + world.max_tokens,
                memory_bytes=world.memory_bytes,
                min_depth=scenario.min_depth,
                cloud_state="up",
                cloud_context=world.context_length,
                privacy=request.privacy,
                world=now_world,
                work=work,
                slo=scenario.slo,
                budget_left_usd=None if world.budget_usd is None else world.budget_usd - state.spent_usd,
                policy=scenario.policy,
                device=world.device(state),
                residuals=self._calibrator.residuals() if self._ablation.calibration else Residuals(),
                pinned=pinned if self._ablation.hysteresis else None,
            )
        )
        self._decided = (now_world, work, way, way == pinned and continued)
        return way[1]

    def served(self, i: int, cut: int, costs: Costs) -> None:
        """When the answer is complete, its times and length are known."""
        assert self._decided is not None
        now_world, work, way, continued = self._decided
        world, request = self._world, self._world.requests[i]
        steps = request.output - 1
        edge_s, cloud_s, decode_s, first_cloud_s, upload_s, upload_bytes = (
            world.outcome(i, cut, name, continued=continued)
            for name in (
                "decode_edge_s",
                "decode_cloud_s",
                "decode_s",
                "first_cloud_s",
                "upload_s",
                "upload_bytes",
            )
        )
        done_s = self._free_s = request.start_s + float(costs.total_s[cut])
        in_split = way[0] == "split"
        if in_split and way[2] == "u":  # the cloud does not tell how long its steps took
            cloud_s = CostModel(now_world, work).predict(*way).decode_cloud_s * (
                steps / max(1e-9, work.output_tokens - 1)
            )
        link_s = max(0.0, decode_s - edge_s - cloud_s)
        observed = Observed(
            ttft_s=float(costs.ttft_s[cut]),
            steps=steps,
            decode_s=decode_s,
            edge_s=edge_s if in_split else None,
            cloud_s=cloud_s if in_split and way[2] == "prefix" else None,
            link_s=link_s if in_split else None,
            first_cloud_s=first_cloud_s if way[0] == "offload" else None,
        )

        def learn() -> None:
            self._lengths.observe(request.prompt, request.output, request.output < world.max_tokens)
            link = self._link.view(done_s - self._delay_s)
            self._calibrator.observe(now_world, work, way, observed, link=link)

        self._later.append((done_s, learn))
        if way[0] != "local" and upload_bytes >= _LEAST_SAMPLE_BYTES:
            first_s = request.start_s + float(costs.ttft_s[cut])
            self._note_link(first_s, partial(self._link.note_up, upload_bytes, upload_s, first_s))
        if in_split and way[2] == "prefix" and steps:
            up, each = int(self._wire.step_row_bytes) + FRAME_BYTES, (link_s + cloud_s) / steps
            for _ in range(min(steps, _STEP_SAMPLES)):
                self._note_link(
                    done_s, partial(self._link.note_step, each, cloud_s / steps, up, TOKEN_BYTES, done_s)
                )

    # ---- what it knows ---------------------------------------------------------------------------

    def _now(self, i: int, state: State) -> World:
        world, at_s = self._world, self._world.requests[i].start_s
        told_s = at_s - float(self._pings.load_age_s[i])
        told = np.array([max(0.0, told_s)])
        return World(
            edge=world.edge,
            cloud=world.cloud,
            link=self._link.view(at_s - self._delay_s),
            wire=self._wire,
            kv_bytes=world.kv_bytes,
            edge_state=EdgeState(loaded_layers=state.loaded, head_loaded=state.head),
            cloud_state=CloudState(
                connected=state.connected,
                sessions=float(np.round(world.hidden.sessions(told)[0])),
                queue_s=float(world.hidden.published_queue_s(told)[0]),
                age_s=at_s - told_s,
            ),
            prices=world.scenario.prices,
            radio=world.scenario.radio,
            factors=self._calibrator.factors() if self._ablation.calibration else Factors(),
        )

    def _work(self, i: int, kept_at: int | None) -> Work:
        request, world = self._world.requests[i], self._world
        forecast = self._lengths.forecast(request.prompt, world.max_tokens, can_end=True)
        kept = {} if kept_at is None else {kept_at: request.kept}
        return Work(request.prompt, forecast.mean, world.max_tokens, kept, kept)

    def _way(self, i: int, cut: int) -> Way:
        if cut == 0:
            return "offload", 0, None
        if cut == self._world.num_layers:
            return "local", cut, None
        private = self._world.requests[i].privacy == "activations-only"
        return "split", cut, "u" if private else "prefix"

    # ---- what it measures ------------------------------------------------------------------------

    def _hear(self, i: int, state: State) -> None:
        """All that came in before request `i`."""
        now = self._world.requests[i].start_s
        if state.connected:
            for sent_s, rtt_s in zip(self._pings.at_s[i], self._pings.rtt_s[i], strict=True):
                if sent_s > self._free_s and rtt_s == rtt_s:
                    at_s = sent_s + rtt_s
                    self._note_link(at_s, partial(self._link.note_rtt, rtt_s, at_s))
        at_s = now - _PROBE_BEFORE_S
        self._deliver(at_s)
        known, metered = self._link.view(at_s), self._world.scenario.radio.usd_per_byte > 0
        wanted = known.up is None or known.down is None or not metered
        if (
            state.connected
            and wanted
            and at_s > self._free_s
            and self._link.needs_probe(at_s - self._delay_s)
        ):
            self._probe(at_s)
        self._deliver(now)

    def _deliver(self, until_s: float) -> None:
        """What is known by then, in order."""
        ready = [each for each in self._later if each[0] <= until_s]
        self._later = [each for each in self._later if each[0] > until_s]
        for _, take_in in sorted(ready, key=lambda each: each[0]):
            take_in()

    def _note_link(self, at_s: float, note: Callable[[], None]) -> None:
        self._later.append((at_s + self._delay_s, note))

    def _probe(self, at_s: float) -> None:
        """As `edge.link_probe`: padding up and down, more of it each time."""
        world = self._world
        lane, zero = np.zeros(1, np.int64), np.zeros(1)
        for up in (True, False):
            due = self._link.needs_up if up else self._link.needs_down
            if not due(at_s - self._delay_s):
                continue
            size: int | None = PROBE_BYTES
            while size:
                padding = np.array([float(size)])
                began = np.array([at_s])
                there, _ = world.up.pass_on(lane, began, padding if up else zero + FRAME_BYTES, zero)
                turned = there + world.scenario.rtt_s * world.hidden.drift("link", np.maximum(began, 0.0))
                back, _ = world.down.pass_on(lane, turned, zero + FRAME_BYTES if up else padding, zero)
                seconds = float(back[0] - at_s)
                self.probed = (self.probed[0] + size * up, self.probed[1] + size * (not up))
                done = ProbeDone(0, size if up else 0, 0 if up else size, seconds)
                larger = self._link.next_probe(size, self._link.added_s(done), _MOST_PROBE_BYTES)
                if larger is None:
                    self._note_link(at_s + seconds, partial(self._link.note_probe, done, at_s + seconds))
                size = larger


@dataclass(frozen=True, slots=True)
class _Pings:
    """Heartbeats before each request [n, PINGS], NaN where the cloud answered a later one that came with it;
    and how old the cloud's load is [n]."""

    at_s: Vector
    rtt_s: Vector
    load_age_s: Vector


def _pings(world: SimWorld) -> _Pings:
    num = len(world.requests)
    rng = np.random.default_rng((num, 13))
    at_s = world.start_s[:, None] - np.arange(PINGS, 0, -1.0)
    lanes = np.broadcast_to(np.arange(num)[:, None], at_s.shape)
    size = np.full(at_s.shape, float(FRAME_BYTES))
    jitter = np.exp(0.15 * rng.standard_normal(at_s.shape))
    travel_s = world.scenario.rtt_s * world.hidden.drift("link", np.maximum(at_s, 0.0)) * jitter
    there = world.up.step(lanes, at_s, size) + travel_s
    rtt_s = world.down.step(lanes, there, size) - at_s
    rtt_s[:, :-1][np.diff(there, axis=1) < _TOGETHER_S] = np.nan
    return _Pings(at_s, rtt_s, rng.random(num))

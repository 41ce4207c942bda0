"""A simulated world: requests of a trace, what they meet, and what serving them in each way really does.

All policies share it, with the same draws per request and way; what differs is the state that their own
choices leave: loaded blocks, kept caches, money spent, the battery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.bench.router_hidden import Hidden
from isthmus.bench.router_link import SteadyLine, TraceLine
from isthmus.bench.router_realise import CHUNK_ROWS, Asked, Conditions, Outcomes, Ranks, realise
from isthmus.bench.router_recordings import Indices, Recordings, Tables, Vector
from isthmus.bench.router_requests import SimRequest
from isthmus.bench.router_scenarios import CONTEXT, ROWS, Scenario, Stretch, as_device
from isthmus.edge.policy import DeviceState, energy_weight
from isthmus.protocol.errors import ConfigError
from isthmus.relay.trace import Trace
from isthmus.splitter.cost import HANDSHAKE_ROUNDS

PRESENT_S: Final = 4.0  # around an instant: what its present state of the link means
# What a causal oracle cannot know of a first token or a step, as the deviation of its log.
_UNKNOWN: Final = 0.1
_MOST_JITTER: Final = 1.5

Flags = NDArray[np.bool_]


@dataclass(slots=True)
class State:
    """What a policy's choices have left. `last`: the cut of the newest request."""

    loaded: int = 0
    head: bool = False
    connected: bool = False
    spent_usd: float = 0.0
    used_j: float = 0.0
    last: int | None = None
    free_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one request by every cut, arrays [cuts]. `cost`: the policy's objective, in dollars; `missed`: how
    likely the expectation is missed, 0 or 1 where it is known."""

    cost: Vector
    ttft_s: Vector
    total_s: Vector
    energy_j: Vector
    usd: Vector
    missed: Vector


class SimWorld:
    """One scenario with its requests. `actual` are the outcomes as they will be, `mean` those that follow
    from the present state alone; both for requests that find nothing in a cache, and `…_kept` for follow-ups
    that go the way of the request before."""

    def __init__(
        self,
        scenario: Scenario,
        recordings: Recordings,
        requests: Sequence[SimRequest],
        link: Trace,
        *,
        max_tokens: int,
        seed: int,
    ) -> None:
        self.scenario, self.requests, self.max_tokens = scenario, requests, max_tokens
        self.tables = Tables(recordings)
        self._here, self._there = self._stretches()
        self.edge = as_device(recordings.edge, self._here, scenario.watts)
        self.cloud = as_device(recordings.cloud, self._there, None)
        self.kv_bytes, self.num_layers = recordings.kv_bytes, recordings.num_layers
        self.context_length = recordings.context_length
        self._draw_conditions(link, seed)
        self._play()
        self._bound(recordings)

    # ---- making it -------------------------------------------------------------------------------

    def _stretches(self) -> tuple[Stretch, Stretch]:
        """The edge's and the cloud's: the scenario's speeds over the medians that were recorded."""
        tables, scenario, last = self.tables, self.scenario, self.tables.num_layers
        one, rows, context, none, half = (np.array([float(v)]) for v in (1, ROWS, CONTEXT, 0, 0.5))
        step = float(tables.edge_steps.draw(one, context, half)[0, last]) + float(tables.head_s(half, 1)[0])
        chunk = float(tables.edge_chunks.draw(rows, none, half)[0, last])
        here = Stretch(scenario.edge.chunk_s / chunk, scenario.edge.step_s / step)
        step = float(tables.cloud_steps.draw(one, context, half)[0, 0])
        chunk = float(tables.cloud_chunks.draw(rows, none, half)[0, 0])
        return here, Stretch(scenario.cloud.chunk_s / chunk, scenario.cloud.step_s / step)

    def _draw_conditions(self, link: Trace, seed: int) -> None:
        scenario, num = self.scenario, len(self.requests)
        start = np.array([r.start_s for r in self.requests])
        rng = np.random.default_rng((seed, 5))
        self.hidden = Hidden(scenario.load, horizon_s=float(start[-1]) + 600.0, seed=seed)
        origin = rng.random(2) * np.array([link.up[-1], link.down[-1]]) / 1000
        self.up, self.down = TraceLine(link.up, origin[0]), TraceLine(link.down, origin[0])
        most = max(1, int(np.ceil(max(r.prompt for r in self.requests) / CHUNK_ROWS)))
        self.ranks = Ranks(
            rng.random((num, most)),
            rng.random((num, most)),
            rng.random(num),
            rng.random(num),
            rng.random(num),
        )
        self._load_rank = rng.random(num)
        jitter = np.minimum(np.exp(0.15 * rng.standard_normal(num)), _MOST_JITTER)
        self.start_s = start
        self.actual_conditions = self._conditions(jitter, self.up, self.down, self.ranks)
        up_rate, up_wait = self.up.around(start, PRESENT_S)
        down_rate, down_wait = self.down.around(start, PRESENT_S)
        present = (SteadyLine(up_rate, up_wait), SteadyLine(down_rate, down_wait))
        self.mean_conditions = self._conditions(np.ones(num), *present, None)

    def _conditions(
        self, jitter: Vector, up: TraceLine | SteadyLine, down: TraceLine | SteadyLine, ranks: Ranks | None
    ) -> Conditions:
        scenario, hidden, at = self.scenario, self.hidden, self.start_s
        return Conditions(
            edge_prefill=self._here.prefill * hidden.drift("edge_prefill", at),
            edge_decode=self._here.decode * hidden.drift("edge_decode", at),
            cloud_prefill=self._there.prefill * hidden.drift("cloud_prefill", at),
            cloud_decode=self._there.decode * hidden.drift("cloud_decode", at),
            queue_s=hidden.published_queue_s(at) * hidden.drift("queue", at),
            sessions=hidden.sessions(at),
            rtt_s=scenario.rtt_s * hidden.drift("link", at) * jitter,
            up=up,
            down=down,
            ranks=ranks,
        )

    def _play(self) -> None:
        requests = self.requests
        self.follow_ups: Indices = np.flatnonzero([r.follows for r in requests])
        self._kept_row = {int(i): row for row, i in enumerate(self.follow_ups)}

        def asked(output: Vector) -> Asked:
            return Asked(
                prompt=np.array([r.prompt for r in requests], np.float64),
                output=output,
                kept=np.zeros(len(requests)),
                u_shape=np.array([r.privacy == "activations-only" for r in requests]),
                start_s=self.start_s,
            )

        self.output = np.array([r.output for r in requests], np.float64)
        self.expected = np.array([r.expected for r in requests])
        kept = np.array([r.kept for r in requests], np.float64)
        self.actual, self.actual_kept = self._both(asked(self.output), self.actual_conditions, kept)
        self.mean, self.mean_kept = self._both(asked(self.expected), self.mean_conditions, kept)

    def _both(self, asked: Asked, conditions: Conditions, kept: Vector) -> tuple[Outcomes, Outcomes | None]:
        hidden = self.edge.hidden
        fresh = realise(self.tables, asked, conditions, hidden=hidden)
        some = self.follow_ups
        if not len(some):
            return fresh, None
        part = asked.only(some)
        again = Asked(part.prompt, part.output, kept[some], part.u_shape, part.start_s)
        return fresh, realise(self.tables, again, conditions.only(some), hidden=hidden)

    def _bound(self, recordings: Recordings) -> None:
        """The scenario's shares as amounts."""
        scenario, num = self.scenario, self.num_layers
        cuts = np.arange(num + 1)
        edge = self.edge
        plain = edge.embed_bytes + cuts * edge.layer_bytes + edge.scratch_bytes
        self._weight_bytes = np.where(cuts == 0, 0, plain)
        middle = np.median([r.prompt for r in self.requests]) + self.max_tokens
        whole = self._weight_bytes[num] + edge.head_bytes + self.kv_bytes * num * middle
        self.memory_bytes = None if scenario.memory is None else int(scenario.memory * whole)
        self.budget_usd: float | None = None
        if scenario.budget is not None:
            prices = scenario.prices
            prompts = sum(r.prompt for r in self.requests)
            tokens = prompts * prices.input_usd_per_mtok + self.output.sum() * prices.output_usd_per_mtok
            self.budget_usd = scenario.budget * float(tokens) / 1e6
        if scenario.budget is not None and not self.budget_usd:
            raise ConfigError(f"scenario {scenario.name}: a budget needs token prices", code="bad_scenario")

    # ---- asking it -------------------------------------------------------------------------------

    def continues(self, i: int, cut: int, state: State) -> bool:
        """Whether request `i` finds its first tokens in the caches if it is cut at `cut`."""
        return self.requests[i].follows and state.last == cut and state.free_s <= self.requests[i].start_s

    def outcome(self, i: int, cut: int, name: str, *, continued: bool) -> float:
        """One figure of how request `i` really turns out."""
        if continued and self.actual_kept is not None:
            return float(getattr(self.actual_kept, name)[self._kept_row[i], cut])
        return float(getattr(self.actual, name)[i, cut])

    def shape_draws(self, i: int) -> Flags:
        """Cuts at which the edge draws the tokens [cuts]."""
        draws = np.zeros(self.num_layers + 1, bool)
        draws[-1] = True
        if self.requests[i].privacy == "activations-only":
            draws[1:] = True
        return draws

    def load_s(self, i: int, state: State) -> Vector:
        """Seconds to load what is missing, by cut."""
        cuts = np.arange(self.num_layers + 1)
        missing = np.maximum(0, cuts - state.loaded) + (self.shape_draws(i) & (not state.head))
        each = self.tables.load_s(self._load_rank[[i]], 1)[0] * self._here.decode
        return np.asarray(missing * each)

    def device(self, state: State) -> DeviceState:
        full = self.scenario.battery_j
        if full is None:
            return DeviceState(plugged=True)
        return DeviceState(max(0.0, self.scenario.battery - state.used_j / full), plugged=False)

    def costs(self, i: int, state: State, *, actual: bool) -> Costs:
        """What each way costs request `i`: as it will turn out, or as the present state lets expect."""
        fresh, kept = (self.actual, self.actual_kept) if actual else (self.mean, self.mean_kept)
        conditions = self.actual_conditions if actual else self.mean_conditions
        output = float(self.output[i] if actual else self.expected[i])
        row = {field.name: getattr(fresh, field.name)[i] for field in fields(fresh)}
        if kept is not None and state.last is not None and self.continues(i, state.last, state):
            for name, values in row.items():
                row[name] = values.copy()
                row[name][state.last] = getattr(kept, name)[self._kept_row[i], state.last]
        num, scenario = self.num_layers, self.scenario
        load = self.load_s(i, state)
        ttft = row["ttft_s"] + load
        if not state.connected:
            ttft[:num] += HANDSHAKE_ROUNDS * conditions.rtt_s[i]
        total = ttft + row["decode_s"]
        busy = load + row["prefill_edge_s"] + row["decode_edge_s"]
        idle_w, active_w = scenario.watts
        energy = active_w * busy + idle_w * np.maximum(0.0, total - busy)
        energy += scenario.radio.up_j * row["bytes_up"] + scenario.radio.down_j * row["bytes_down"]
        usd = self._usd(row["rows"], output, row["cloud_busy_s"], row["bytes_up"], row["bytes_down"])
        missed = self._missed(ttft, row["decode_s"], output, actual)
        policy = scenario.policy
        cuts = np.arange(num + 1) / num
        nats = (self.edge.kl or 0.0) * cuts + (self.cloud.kl or 0.0) * (1 - cuts)
        cost = policy.usd_per_s * total + usd + energy_weight(policy, self.device(state)) * energy
        cost += policy.slo_miss_usd * missed + policy.usd_per_nat * output * nats
        return Costs(cost, ttft, total, energy, usd, missed)

    def _usd(self, rows: Vector, output: float, busy_s: Vector, up: Vector, down: Vector) -> Vector:
        prices, radio = self.scenario.prices, self.scenario.radio
        share = 1 - np.arange(self.num_layers + 1) / self.num_layers
        tokens = rows * prices.input_usd_per_mtok + output * prices.output_usd_per_mtok
        return np.asarray(
            tokens * share / 1e6
            + busy_s / 3600 * prices.gpu_usd_per_h / prices.utilisation
            + down * prices.egress_usd_per_gb / 1e9
            + (up + down) * radio.usd_per_byte
        )

    def _missed(self, ttft: Vector, decode: Vector, output: float, actual: bool) -> Vector:
        slo = self.scenario.slo
        kept = np.ones_like(ttft)
        for limit, seconds in (
            (slo.ttft_s, ttft),
            (1 / slo.tokens_per_s if slo.tokens_per_s else None, decode / max(1.0, output - 1.0)),
        ):
            if limit is None:
                continue
            if actual:
                kept *= seconds <= limit
            else:
                surely = np.log(limit / np.maximum(seconds, 1e-9)) / _UNKNOWN
                kept *= 1 / (1 + np.exp(-1.702 * np.clip(surely, -50, 50)))  # about the normal distribution
        return 1.0 - kept

    def feasible(self, i: int, state: State, *, actual: bool) -> Flags:
        """The cuts that break nothing. `actual`: by what the request will really take, else by what it may
        take at most."""
        request = self.requests[i]
        output = request.output if actual else self.max_tokens
        allowed = self._fits(i, output)
        if self.budget_usd is not None:
            kept = np.zeros(self.num_layers + 1)
            if state.last is not None and self.continues(i, state.last, state):
                kept[state.last] = request.kept
            rows, zero = np.maximum(request.prompt - kept, 1.0), np.zeros(len(kept))
            usd = self._usd(rows, float(output), zero, zero, zero)
            allowed &= (usd <= self.budget_usd - state.spent_usd) | (usd == 0)
        return allowed

    def servable(self, i: int) -> bool:
        """Whether any cut suits the privacy of request `i` and the memory that it may take."""
        return bool(self._fits(i, self.max_tokens).any())

    def _fits(self, i: int, output: int) -> Flags:
        request, num = self.requests[i], self.num_layers
        allowed = np.ones(num + 1, bool)
        if request.privacy == "local-only":
            allowed[:num] = False
        elif request.privacy == "activations-only":
            allowed[: self.scenario.min_depth] = False
        if self.memory_bytes is not None:
            need = self._weight_bytes + self.kv_bytes * np.arange(num + 1) * (request.prompt + output)
            need = need + np.where(self.shape_draws(i), self.edge.head_bytes, 0)
            allowed &= need <= self.memory_bytes
        return allowed

    def charge(self, num_bytes: tuple[float, float], state: State) -> dict[str, float]:
        """What bytes up and down cost that carried no request, by the columns of Costs."""
        radio = self.scenario.radio
        energy = radio.up_j * num_bytes[0] + radio.down_j * num_bytes[1]
        usd = radio.usd_per_byte * sum(num_bytes)
        weight = energy_weight(self.scenario.policy, self.device(state))
        state.used_j += energy
        state.spent_usd += usd
        return {"cost": usd + weight * energy, "energy_j": energy, "usd": usd}

    def serve(self, i: int, cut: int, state: State) -> Costs:
        """Serve request `i` and leave the state behind; all ways' true costs from before."""
        costs = self.costs(i, state, actual=True)
        if self.memory_bytes is not None:  # under a limit, blocks that the request does not use are dropped
            state.loaded = min(state.loaded, cut)
            state.head = state.head and bool(self.shape_draws(i)[cut])
        state.loaded = max(state.loaded, cut)
        state.head = state.head or bool(self.shape_draws(i)[cut])
        state.connected = state.connected or cut < self.num_layers
        state.spent_usd += float(costs.usd[cut])
        state.used_j += float(costs.energy_j[cut])
        state.last = cut
        state.free_s = self.requests[i].start_s + float(costs.total_s[cut])
        return costs

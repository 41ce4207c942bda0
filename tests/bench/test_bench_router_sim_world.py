"""The simulated world of `bench router`: recorded samples, drift, link, and what serving does there."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import tests.bench.router_recorded as made
from isthmus.bench.router_baselines import Constant, Oracle, play
from isthmus.bench.router_hidden import DRIFT_BOUND, DRIFT_TERMS, CloudLoad, Hidden
from isthmus.bench.router_link import SteadyLine, TraceLine
from isthmus.bench.router_realise import Asked, Conditions, realise
from isthmus.bench.router_recordings import Cell, Recordings, Table, Tables
from isthmus.bench.router_requests import SimRequest, draw_requests
from isthmus.bench.router_world import State
from isthmus.protocol.errors import ConfigError
from isthmus.relay.trace import TracePacer
from tests.bench.router_recorded import BY_NAME, LINK, RECORDINGS, world_of

# ---- samples -------------------------------------------------------------------------------------


def test_a_draw_at_a_recorded_cell_is_one_of_its_samples() -> None:
    seconds = (3.0, 1.0, 2.0)
    cells = [Cell(layers=n, rows=1, context=c, seconds=seconds) for n in (1, 3) for c in (0, 100)]
    table = Table(cells, range(4))
    one = np.ones(3)
    drawn = table.draw(one, np.array([0.0, 100.0, 50.0]), np.array([0.0, 0.5, 0.99]))
    assert drawn[:, 0].tolist() == [0, 0, 0]  # no layer, no time
    assert drawn[:, 3].tolist() == [1.0, 2.0, 3.0]
    assert table.draw(one, one, None)[:, 1].tolist() == [2.0] * 3


def test_between_cells_samples_are_interpolated_and_behind_the_last_context_extrapolated() -> None:
    cells = [Cell(layers=n, rows=1, context=c, seconds=(n + c / 100,) * 2) for n in (1, 3) for c in (0, 100)]
    drawn = Table(cells, range(4)).draw(np.ones(2), np.array([50.0, 200.0]), np.zeros(2))
    assert drawn[:, 2].tolist() == [2.5, 4.0]


def test_a_run_of_steps_stands_for_their_mean() -> None:
    cells = [Cell(layers=1, rows=1, context=0, seconds=(1.0, 3.0, 1.0, 3.0))]
    drawn = Table(cells, (1,), runs=2).draw(np.ones(2), np.zeros(2), np.array([0.0, 0.9]))
    assert drawn[:, 0].tolist() == [2.0, 2.0]


def test_recordings_survive_a_file_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recordings.json"
    RECORDINGS.save(path)
    assert Recordings.load(path) == RECORDINGS
    path.write_text(path.read_text().replace('"edge_steps":[{"layers":1,', '"edge_steps":[{"layers":7,'))
    with pytest.raises(ConfigError, match="edge_steps: 9 cells are no whole grid of 12") as error:
        Recordings.load(path)
    assert error.value.code == "bad_recordings"
    with pytest.raises(ConfigError, match=r"absent\.json") as error:
        Recordings.load(tmp_path / "absent.json")
    assert error.value.code == "bad_recordings"


# ---- what is hidden ------------------------------------------------------------------------------


def test_drift_stays_within_its_bound_moves_and_is_seeded() -> None:
    at = np.linspace(0, 20_000, 5001)
    walks = {term: Hidden(CloudLoad(), horizon_s=20_000, seed=1).drift(term, at) for term in DRIFT_TERMS}
    for term, walk in walks.items():
        assert np.all(np.abs(walk - 1) <= DRIFT_BOUND + 1e-12)
        assert np.ptp(walk) > 0.2
        assert np.abs(np.diff(walk)).max() < 0.02  # in four seconds
        again = Hidden(CloudLoad(), horizon_s=20_000, seed=1).drift(term, at)
        assert np.array_equal(walk, again)
    assert not np.array_equal(walks["edge_decode"], walks["cloud_decode"])


def test_the_cloud_is_busy_now_and_then() -> None:
    load = CloudLoad(sessions=4.0, free_sessions=4.0)
    hidden, at = Hidden(load, horizon_s=20_000, seed=2), np.arange(0.0, 20_000, 10)
    assert 2.5 < hidden.sessions(at).mean() < 6
    waits = hidden.published_queue_s(at)
    assert 0.05 < np.mean(waits > 0) < 0.8


# ---- the link ------------------------------------------------------------------------------------


def test_a_traced_line_passes_messages_when_the_relay_would() -> None:
    line, lane = TraceLine(LINK.up, 3.0), np.zeros(1, np.int64)
    pacer = TracePacer(LINK.up, -3.0)
    now, behind = 0.5, np.zeros(1)
    for size in (1500, 4500, 40_000 // 1500 * 1500, 1500):
        done, behind = line.pass_on(lane, np.array([now]), np.array([float(size)]), behind)
        assert done[0] == pytest.approx(pacer.pass_on(now, size)[-1][0], abs=1e-6)
        now += 25.0  # past the end of the recording, too


def test_messages_of_one_request_wait_for_each_other() -> None:
    line, lanes = TraceLine(LINK.up, 0.0), np.zeros(1, np.int64)
    first, place = line.pass_on(lanes, np.zeros(1), np.array([60_000.0]), np.zeros(1))
    second, _ = line.pass_on(lanes, np.zeros(1), np.array([9000.0]), place)
    assert second > first


def test_a_steady_line_takes_its_wait_or_its_bytes() -> None:
    line = SteadyLine(np.array([1000.0]), np.array([0.1]))
    done, behind = line.pass_on(np.zeros(2, np.int64), np.zeros(2), np.array([10.0, 500.0]), np.zeros(2))
    assert done.tolist() == [0.1, 0.5]
    assert behind.tolist() == [0.1, 0.5]


# ---- realise -------------------------------------------------------------------------------------


def conditions(
    num: int, *, bytes_per_s: float = 1e9, rtt_s: float = 0.02, queue_s: float = 0.0
) -> Conditions:
    one = np.ones(num)
    line = SteadyLine(bytes_per_s * one, 0 * one)
    return Conditions(one, one, one, one, queue_s * one, 0 * one, rtt_s * one, line, line)


def asked(prompt: float, output: float, *, kept: float = 0.0, u_shape: bool = False) -> Asked:
    figures = [np.array([value]) for value in (prompt, output, kept)]
    return Asked(figures[0], figures[1], figures[2], np.array([u_shape]), np.zeros(1))


def test_a_decode_costs_a_round_trip_per_token_in_a_split_and_none_else() -> None:
    tables, request = Tables(RECORDINGS), asked(100, 21)
    near = realise(tables, request, conditions(1, rtt_s=0.01), hidden=64)
    far = realise(tables, request, conditions(1, rtt_s=0.11), hidden=64)
    more = (far.decode_s - near.decode_s)[0]
    assert more[[0, -1]] == pytest.approx([0, 0], abs=1e-9)
    assert more[1:-1] == pytest.approx(np.full(made.NUM_LAYERS - 1, 20 * 0.1))
    assert (far.ttft_s - near.ttft_s)[0, 0] == pytest.approx(0.1)


def test_a_split_prefill_is_as_slow_as_its_slowest_stage_and_caches_spare_rows() -> None:
    tables = Tables(RECORDINGS)
    fast = realise(tables, asked(1024, 1), conditions(1), hidden=64)
    slow = realise(tables, asked(1024, 1), conditions(1, bytes_per_s=20_000.0), hidden=64)
    rows_s = 1024 * tables.row_bytes[3] / 20_000
    assert slow.ttft_s[0, 3] > rows_s > fast.ttft_s[0, 3]
    assert slow.ttft_s[0, 3] < rows_s + fast.ttft_s[0, 3]  # the stages overlap
    assert slow.upload_s[0, 3] == pytest.approx(slow.upload_bytes[0, 3] / 20_000)
    kept = realise(tables, asked(1024, 1, kept=900), conditions(1), hidden=64)
    assert np.all(kept.ttft_s < fast.ttft_s)
    assert kept.rows[0].tolist() == [124.0] * made.NUM_LAYERS + [0.0]


def test_a_queue_delays_what_the_cloud_begins_and_the_u_shape_draws_on_the_edge() -> None:
    tables = Tables(RECORDINGS)
    free = realise(tables, asked(64, 9), conditions(1), hidden=64)
    queued = realise(tables, asked(64, 9), conditions(1, queue_s=2.0), hidden=64)
    assert queued.ttft_s[0, 0] - free.ttft_s[0, 0] == pytest.approx(2.0)
    assert np.all(queued.ttft_s[0, 1:-1] >= 2.0)
    assert queued.ttft_s[0, -1] == free.ttft_s[0, -1]
    drawn = realise(tables, asked(64, 9, u_shape=True), conditions(1), hidden=64)
    assert np.all(drawn.decode_edge_s[0, 1:-1] > free.decode_edge_s[0, 1:-1])


def test_one_token_takes_no_decode() -> None:
    outcome = realise(Tables(RECORDINGS), asked(10, 1), conditions(1), hidden=64)
    assert np.all(outcome.decode_s == 0)


# ---- the world -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_world_and_another_one_another() -> None:
    runs = [play(world_of(seed=seed), Constant(world_of(seed=seed), 0)) for seed in (0, 0, 1)]
    assert np.array_equal(runs[0].cost, runs[1].cost)
    assert not np.array_equal(runs[0].cost, runs[2].cost)


def test_given_the_same_state_no_way_beats_hindsight() -> None:
    world = world_of("jetson_lte")
    oracle, state = Oracle(world, hindsight=True), State(connected=True)
    for i in range(len(world.requests)):
        allowed = world.feasible(i, state, actual=True)
        costs = world.costs(i, state, actual=True).cost
        cut = oracle.choose(i, state)
        assert allowed[cut]
        assert costs[cut] == costs[allowed].min()
        world.serve(i, cut, state)


def test_states_cost_blocks_are_loaded_once_and_the_battery_runs_down() -> None:
    world = world_of("laptop_battery")
    state = State()
    cold = world.costs(0, state, actual=True)
    world.serve(0, world.num_layers, state)
    warm = world.costs(0, State(loaded=world.num_layers, head=True), actual=True)
    assert cold.ttft_s[-1] > warm.ttft_s[-1]
    assert (state.loaded, state.head, state.connected) == (world.num_layers, True, False)
    full, begun = world.scenario.battery_j, world.scenario.battery
    assert full is not None
    assert world.device(state).battery == pytest.approx(begun - cold.energy_j[-1] / full)
    connected = world.costs(0, State(connected=True), actual=True)
    assert np.all(cold.ttft_s[:-1] > connected.ttft_s[:-1])


def test_a_memory_limit_drops_what_is_not_used() -> None:
    world, state = world_of("edge_too_small"), State()
    world.serve(0, 3, state)
    world.serve(1, 1, state)
    assert state.loaded == 1


def test_constraints_are_those_of_the_request() -> None:
    world = world_of(replace(BY_NAME["edge_too_small"], private=0.4, local_only=0.2, memory=1.0))
    last = world.num_layers
    for i, request in enumerate(world.requests):
        allowed = world.feasible(i, State(), actual=False)
        assert world.servable(i) == allowed.any()
        if request.privacy == "local-only":
            assert not allowed[:last].any()
        elif request.privacy == "activations-only":
            assert not allowed[: world.scenario.min_depth].any()
        else:
            assert allowed[0]
    assert {r.privacy for r in world.requests} == {"any", "activations-only", "local-only"}
    tight = world_of(replace(BY_NAME["edge_too_small"], local_only=1.0))
    assert not any(map(tight.servable, range(len(tight.requests))))
    tight = world_of("edge_too_small")
    assert not any(tight.feasible(i, State(), actual=True)[-1] for i in range(5))
    broke = world_of("budget_nearly_spent")
    assert broke.budget_usd is not None
    spent = State(spent_usd=broke.budget_usd)
    local_only = broke.feasible(0, spent, actual=True)
    assert local_only[-1]
    assert not local_only[:-1].any()


def test_follow_ups_find_their_cache_only_where_the_one_before_ran() -> None:
    world = world_of(num=200)
    i = int(world.follow_ups[0])
    free = State(connected=True, last=None, loaded=world.num_layers, head=True)
    there = replace_state(free, last=0)
    fresh, again = (world.costs(i, state, actual=True) for state in (free, there))
    differs = fresh.ttft_s != again.ttft_s
    assert differs.tolist() == [True] + [False] * world.num_layers
    busy = replace_state(there, free_s=world.requests[i].start_s + 1)
    assert world.costs(i, busy, actual=True).ttft_s[0] == fresh.ttft_s[0]


def replace_state(state: State, **changes: float | None) -> State:
    return replace(state, **changes)  # type: ignore[arg-type]


# ---- requests ------------------------------------------------------------------------------------


def test_requests_keep_the_traces_order_and_are_clipped() -> None:
    trace = made.requests(50)
    scenario = BY_NAME["laptop_plugged"]
    requests, clipped = draw_requests(trace, trace, scenario, max_context=512, max_tokens=16, seed=0)
    assert all(a.start_s <= b.start_s for a, b in pairwise(requests))
    assert requests[-1].start_s == pytest.approx(49 * scenario.gap_s)
    assert max(r.prompt for r in requests) == 512 - 16
    assert max(r.output for r in requests) == 16
    wanted = sum(line.prompt_tokens > 496 or line.output_tokens > 16 for line in trace)
    assert clipped == wanted > 0
    with pytest.raises(ConfigError, match="leaves no prompt"):
        draw_requests(trace, trace, scenario, max_context=16, max_tokens=16, seed=0)


def test_a_follow_up_is_longer_than_what_it_goes_on_with() -> None:
    trace = made.requests(300)
    requests, _ = draw_requests(
        trace, trace, BY_NAME["laptop_plugged"], max_context=4096, max_tokens=128, seed=3
    )
    pairs: list[tuple[SimRequest, SimRequest]] = list(pairwise(requests))
    follow_ups = [(a, b) for a, b in pairs if b.follows]
    assert follow_ups
    for before, after in follow_ups:
        assert after.kept == before.prompt + before.output - 1 < after.prompt
        assert after.privacy == before.privacy

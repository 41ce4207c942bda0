"""The cost model against tables made by hand: every term of every route, and what changes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from isthmus.protocol.profiles import Prices
from isthmus.splitter.cost import ASSUMED_BYTES_PER_S, ASSUMED_RTT_S, TERMS, CostModel, Prediction
from isthmus.splitter.links import Estimate, LinkView
from isthmus.splitter.situation import CloudState, EdgeState, Factors, Radio, Shape, Work, World
from tests.splitter.worlds import MB, NUM_LAYERS, cloud_profile, edge_profile, make_world

WORK = Work(prompt_tokens=32, output_tokens=11, max_tokens=20)
LONG = Work(prompt_tokens=96, output_tokens=11, max_tokens=20)
# A step behind 32 + 5 tokens, by hand: 2 ms and 37 of the microseconds, per layer.
EDGE_LAYER_S = 0.002037
EDGE_STEP_S = 0.001 + 0.0001
CLOUD_LAYER_S = 0.0005


def local(world: World, work: Work = WORK) -> Prediction:
    return CostModel(world, work).predict("local", NUM_LAYERS, None)


def offload(world: World, work: Work = WORK) -> Prediction:
    return CostModel(world, work).predict("offload", 0, None)


def split(world: World, work: Work = WORK, at: int = 2, shape: Shape = "prefix") -> Prediction:
    return CostModel(world, work).predict("split", at, shape)


def terms(p: Prediction) -> dict[str, float]:
    """The terms that are not 0, after seeing that all of them add up."""
    told = p.terms()
    assert tuple(told) == TERMS
    assert sum(told.values()) == pytest.approx(p.total_s)
    return {name: value for name, value in told.items() if value}


def close(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, rel=1e-9)


# ---- local -----------------------------------------------------------------------------------------


def test_local_is_prefill_and_steps_on_the_edge() -> None:
    p = local(make_world())
    prefill = 0.001 + 4 * 0.032 + 32 * 0.0001 + 0.01
    step = EDGE_STEP_S + 0.01 + 4 * EDGE_LAYER_S
    assert terms(p) == close({"prefill_edge_s": prefill, "decode_edge_s": 10 * step})
    assert p.ttft_s == pytest.approx(prefill)
    assert p.tokens_per_s == pytest.approx(1 / step)
    assert p.bottleneck_s == pytest.approx(step)
    assert (p.bytes_up, p.bytes_down, p.cost_usd, p.most_usd) == (0, 0, 0, 0)


def test_local_prompt_goes_in_chunks_with_growing_context() -> None:
    edge = edge_profile(prefill_context_s=1e-6)
    p = local(make_world(edge=edge), LONG)
    # Three chunks of 32 rows behind 0, 32 and 64 tokens.
    chunks = sum(0.001 + 4 * (0.032 + 1e-6 * 32 * behind) + 32 * 0.0001 for behind in (0, 32, 64))
    assert p.prefill_edge_s == pytest.approx(chunks + 0.01)


def test_local_cached_rows_are_not_computed() -> None:
    p = local(make_world(), replace(WORK, edge_cached={NUM_LAYERS: 24}))
    assert p.prefill_edge_s == pytest.approx(0.001 + 4 * 0.008 + 8 * 0.0001 + 0.01)
    whole = local(make_world(), replace(WORK, edge_cached={NUM_LAYERS: 32}))
    assert whole.prefill_edge_s == pytest.approx(0.001 + 4 * 0.001 + 0.0001 + 0.01)  # the last row, always


def test_layers_take_their_share() -> None:
    edge = edge_profile(layer_share=(0.4, 0.6, 1.0, 2.0))
    before, after = split(make_world(), at=2), split(make_world(edge=edge), at=2)
    assert before.decode_edge_s - after.decode_edge_s == pytest.approx(10 * EDGE_LAYER_S)


def test_loading_counts_blocks_that_are_missing() -> None:
    world = make_world(edge_state=EdgeState(loaded_layers=1, head_loaded=False))
    assert local(world).load_s == pytest.approx(0.5 * (3 + 1))
    assert split(world).load_s == pytest.approx(0.5 * 1)
    assert split(world, shape="u").load_s == pytest.approx(0.5 * 2)
    assert offload(world).load_s == 0
    assert local(make_world(edge_state=EdgeState(loaded_layers=4))).load_s == 0


def test_other_requests_on_the_edge_share_it() -> None:
    alone, crowded = local(make_world()), local(make_world(edge_state=EdgeState(running=2)))
    assert crowded.total_s == pytest.approx(3 * alone.total_s)


# ---- offload ---------------------------------------------------------------------------------------


def test_offload_pays_one_round_trip() -> None:
    p = offload(make_world())
    up = 700 + 48 + 4 * 32
    step = 0.0005 + 0.00001 + 0.001 + 4 * CLOUD_LAYER_S
    prefill = 0.0005 + 4 * 0.0032 + 32 * 0.00001 + 0.001
    expected = {
        "prefill_link_s": 0.05 + up / 1e6 + 150 / 2e6,
        "prefill_cloud_s": prefill,
        "decode_cloud_s": 10 * step,
    }
    assert terms(p) == close(expected)
    assert (p.bytes_up, p.bytes_down) == (up, 700 + 11 * 150)
    assert p.memory_bytes == 0


def test_offload_with_kept_rows_waits_for_the_answer_to_its_offer() -> None:
    p = offload(make_world(), replace(WORK, cloud_cached={0: 24}))
    assert p.prefill_link_s == pytest.approx(2 * 0.05 + (748 + 4 * 8) / 1e6 + 150 / 2e6)
    assert p.prefill_cloud_s == pytest.approx(0.0005 + 4 * 0.0008 + 8 * 0.00001 + 0.001)


def test_offload_streams_no_faster_than_the_downlink() -> None:
    link = LinkView.given(rtt_s=0.05, up_bytes_per_s=1e6, down_bytes_per_s=1e4)
    p = offload(make_world(link=link))
    assert p.tokens_per_s == pytest.approx(1e4 / 150)
    assert p.bottleneck_s == pytest.approx(150 / 1e4)


def test_a_busy_cloud_takes_longer_and_queues() -> None:
    world = make_world(cloud_state=CloudState(sessions=1, queue_s=0.7))
    p, alone = offload(world), offload(make_world())
    assert p.queue_s == 0.7
    assert p.prefill_cloud_s == pytest.approx(1.5 * alone.prefill_cloud_s)
    assert p.decode_cloud_s == pytest.approx(1.5 * alone.decode_cloud_s)
    assert p.bottleneck_s == pytest.approx(1.5 / 2 * alone.bottleneck_s)  # two tokens come of a common step


# ---- split -----------------------------------------------------------------------------------------


def test_split_pays_a_round_trip_per_token() -> None:
    p = split(make_world())
    expected = {
        "prefill_edge_s": 0.001 + 2 * 0.032 + 32 * (0.0001 + 0.0002),
        "prefill_link_s": (32 * 100 + 48) / 1e6 + 0.05 + 700 / 1e6 + 150 / 2e6,
        "prefill_cloud_s": 0.0005 + 2 * 0.0032 + 32 * 0.00002 + 0.001,
        "decode_edge_s": 10 * (EDGE_STEP_S + 0.0002 + 2 * EDGE_LAYER_S),
        "decode_link_s": 10 * (0.05 + (48 + 120) / 1e6 + 150 / 2e6),
        "decode_cloud_s": 10 * (0.0005 + 0.00002 + 2 * CLOUD_LAYER_S + 0.001),
    }
    assert terms(p) == close(expected)
    assert p.bytes_up == 700 + 32 * 100 + 10 * 168
    assert p.bytes_down == 700 + 11 * 150
    assert p.bottleneck_s == pytest.approx(EDGE_STEP_S + 0.0002 + 2 * EDGE_LAYER_S)


def test_u_shape_runs_the_head_on_the_edge_and_brings_rows_down() -> None:
    prefix, u = split(make_world()), split(make_world(), shape="u")
    assert u.decode_edge_s - prefix.decode_edge_s == pytest.approx(10 * 0.01)
    assert prefix.decode_cloud_s - u.decode_cloud_s == pytest.approx(10 * 0.001)
    assert u.prefill_edge_s - prefix.prefill_edge_s == pytest.approx(0.01)
    assert u.bytes_down == 700 + 11 * (48 + 200)
    assert u.decode_link_s - prefix.decode_link_s == pytest.approx(10 * (248 - 150) / 2e6)


@pytest.mark.parametrize(
    ("up", "slowest"), [(1e6, "prefill_edge_s"), (1e4, "prefill_link_s")], ids=["edge", "link"]
)
def test_split_prompt_is_a_pipeline_paced_by_its_slowest_stage(up: float, slowest: str) -> None:
    link = LinkView.given(rtt_s=0.05, up_bytes_per_s=up, down_bytes_per_s=2e6)
    one, three = split(make_world(link=link)), split(make_world(link=link), LONG)
    stage = {"prefill_edge_s": 0.001 + 2 * 0.032 + 32 * 0.0003, "prefill_link_s": 3248 / up}
    for name in ("prefill_edge_s", "prefill_link_s", "prefill_cloud_s"):
        more = getattr(three, name) - getattr(one, name)
        assert more == pytest.approx(2 * stage[name] if name == slowest else 0)


def test_split_sends_nothing_that_the_cloud_holds() -> None:
    p = split(make_world(), replace(WORK, edge_cached={2: 24}, cloud_cached={2: 24}))
    chunk = 0.001 + 2 * 0.008 + 8 * 0.0003
    assert p.prefill_edge_s == pytest.approx(chunk)
    # The offer is answered while the first chunk is computed.
    sent = (8 * 100 + 48 + 700) / 1e6
    assert p.prefill_link_s == pytest.approx(sent + 0.05 + 150 / 2e6 + (0.05 - chunk))
    assert p.bytes_up == 700 + 8 * 100 + 10 * 168


def test_split_edge_catches_up_with_what_the_cloud_kept() -> None:
    p = split(make_world(), replace(WORK, edge_cached={2: 8}, cloud_cached={2: 24}))
    caught_up = 0.001 + 2 * 0.016 + 16 * 0.0001
    assert p.prefill_edge_s == pytest.approx(caught_up + 0.001 + 2 * 0.008 + 8 * 0.0003)


def test_split_sends_again_what_only_the_edge_holds() -> None:
    p = split(make_world(), replace(WORK, edge_cached={2: 24}))
    assert p.bytes_up == split(make_world()).bytes_up


def test_a_canary_takes_a_round_trip() -> None:
    world = make_world(cloud_state=CloudState(canary=True))
    assert split(world).prefill_link_s - split(make_world()).prefill_link_s == pytest.approx(0.05)
    assert offload(world).total_s == offload(make_world()).total_s


@pytest.mark.parametrize(("tls", "rounds"), [(False, 3), (True, 4)])
def test_a_cold_link_shakes_hands(tls: bool, rounds: int) -> None:
    world = make_world(cloud_state=CloudState(connected=False, tls=tls))
    for p in (offload(world), split(world)):
        assert p.handshake_s == pytest.approx(rounds * 0.05)
    assert local(world).handshake_s == 0


# ---- what is not known -----------------------------------------------------------------------------


def test_an_unmeasured_link_is_assumed_to_be_slow() -> None:
    given = LinkView.given(
        rtt_s=ASSUMED_RTT_S, up_bytes_per_s=ASSUMED_BYTES_PER_S, down_bytes_per_s=ASSUMED_BYTES_PER_S
    )
    broken = LinkView(*(Estimate(float("nan")) for _ in range(3)))
    for link in (LinkView(), broken, LinkView(Estimate(-1.0), Estimate(0.0), Estimate(-5.0))):
        assert split(make_world(link=link)) == split(make_world(link=given))


def test_without_a_cloud_only_local_is_predicted() -> None:
    model = CostModel(make_world(cloud=None), WORK)
    assert model.predict("local", NUM_LAYERS, None) == local(make_world())
    with pytest.raises(ValueError, match="no cloud profile"):
        model.predict("offload", 0, None)


def test_factors_stretch_their_terms_alone() -> None:
    usual = split(make_world())
    factors = Factors(split_prefill=2, split_edge=3, split_link=5, split_cloud=7)
    p = split(make_world(factors=factors))
    ratio = {name: getattr(p, name) / getattr(usual, name) for name in terms(usual)}
    assert ratio == close({
        "prefill_edge_s": 2, "prefill_link_s": 2, "prefill_cloud_s": 2,
        "decode_edge_s": 3, "decode_link_s": 5, "decode_cloud_s": 7,
    })  # fmt: skip
    for route, model in ((local, "local"), (offload, "offload")):
        changed = make_world(factors=Factors(**{f"{model}_prefill": 2, f"{model}_decode": 3}))
        before, after = route(make_world()), route(changed)
        assert after.ttft_s == pytest.approx(2 * before.ttft_s)
        assert after.total_s - after.ttft_s == pytest.approx(3 * (before.total_s - before.ttft_s))


# ---- memory, energy, money -------------------------------------------------------------------------


def test_memory_counts_weights_buffers_and_the_longest_kv() -> None:
    kv = 1000 * (32 + 20)
    assert local(make_world()).memory_bytes == (4 + 4 * 10 + 2 + 1) * MB + 4 * kv
    assert split(make_world()).memory_bytes == (4 + 2 * 10 + 1) * MB + 2 * kv
    assert split(make_world(), shape="u").memory_bytes == (4 + 2 * 10 + 2 + 1) * MB + 2 * kv


def test_energy_is_active_while_computing_and_idle_while_waiting() -> None:
    p = split(make_world(), LONG)
    busy = 3 * (0.001 + 2 * 0.032 + 32 * 0.0003) + p.decode_edge_s
    assert p.energy_j == pytest.approx(10 * busy + 2 * (p.total_s - busy))
    radio = split(make_world(radio=Radio(up_j=1e-5, down_j=2e-5)), LONG)
    assert radio.energy_j == pytest.approx((p.energy_j or 0) + 1e-5 * p.bytes_up + 2e-5 * p.bytes_down)
    assert local(make_world()).energy_j == pytest.approx(10 * local(make_world()).total_s)


def test_an_edge_hidden_behind_a_slow_uplink_still_computes() -> None:
    link = LinkView.given(rtt_s=0.05, up_bytes_per_s=1e4)
    p = split(make_world(link=link), LONG)
    busy = 3 * (0.001 + 2 * 0.032 + 32 * 0.0003) + p.decode_edge_s
    assert p.energy_j == pytest.approx(10 * busy + 2 * (p.total_s - busy))


@pytest.mark.parametrize("watts", [None, float("inf"), float("nan")])
def test_energy_is_unknown_without_power(watts: float | None) -> None:
    edge = edge_profile().model_copy(update={"active_w": watts})  # past the check that files go through
    assert local(make_world(edge=edge)).energy_j is None


def test_an_unknown_idle_power_counts_as_none() -> None:
    p = split(make_world(edge=edge_profile(idle_w=None)))
    assert p.energy_j == pytest.approx(10 * (p.prefill_edge_s + p.decode_edge_s))


def test_tokens_are_charged_by_the_share_of_the_cloud() -> None:
    world = make_world(prices=Prices(input_usd_per_mtok=10, output_usd_per_mtok=100))
    whole = (32 * 10 + 11 * 100) / 1e6
    assert offload(world).cost_usd == pytest.approx(whole)
    assert split(world, at=1).cost_usd == pytest.approx(whole * 3 / 4)
    assert offload(world).most_usd == pytest.approx((32 * 10 + 20 * 100) / 1e6)
    assert local(world).most_usd == 0


def test_a_machine_by_the_hour_costs_what_it_computes_over_its_use() -> None:
    world = make_world(prices=Prices(gpu_usd_per_h=3.6, utilisation=0.5))
    p = offload(world)
    assert p.cost_usd == pytest.approx((p.prefill_cloud_s + p.decode_cloud_s) * 0.001 / 0.5)
    crowded = offload(replace(world, cloud_state=CloudState(sessions=1)))
    assert crowded.cost_usd == pytest.approx(p.cost_usd)  # the others pay for their part of the step
    cloud = cloud_profile(prefill=((32.0, 0.0032), (64.0, 0.0064)))
    assert split(replace(world, cloud=cloud), LONG).cost_usd > split(world).cost_usd


def test_bytes_are_charged_where_they_leave() -> None:
    p = split(make_world(prices=Prices(egress_usd_per_gb=1)))
    assert p.cost_usd == pytest.approx(p.bytes_down / 1e9)
    data = split(make_world(radio=Radio(usd_per_byte=1e-9)))
    assert data.cost_usd == pytest.approx((p.bytes_up + p.bytes_down) / 1e9)

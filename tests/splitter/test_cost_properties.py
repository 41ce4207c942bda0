"""What must hold of the cost model in every world: terms add up, more work never takes less, odd sensors."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.profiles import Prices
from isthmus.splitter.cost import CostModel, Prediction
from isthmus.splitter.links import Estimate, LinkView
from isthmus.splitter.situation import CloudState, Factors, Shape, Work, World
from tests.splitter.worlds import NUM_LAYERS, make_world, shapes, worlds

tokens = st.integers(1, 3000)
works = st.builds(
    Work, prompt_tokens=tokens, output_tokens=st.floats(1, 1000), max_tokens=st.integers(1, 1000)
)
odd = st.sampled_from([float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-300, 1e300])
ROUNDING = 1 + 1e-9


def every(world: World, work: Work, shape: Shape = "prefix") -> list[Prediction]:
    model = CostModel(world, work)
    return [model.predict(*way) for way in model.ways(shape)]


@given(worlds, works, shapes)
def test_terms_add_up_and_are_figures(world: World, work: Work, shape: Shape) -> None:
    for p in every(world, work, shape):
        assert sum(p.terms().values()) == pytest.approx(p.total_s)
        assert all(isfinite(value) and value >= 0 for value in p.terms().values())
        assert p.ttft_s <= p.total_s * ROUNDING
        assert p.cost_usd >= 0
        assert isfinite(p.most_usd)
        if p.energy_j is not None:
            idle, active = world.edge.idle_w or 0.0, world.edge.active_w or 0.0
            # The edge may compute behind another stage for as long as that takes, not longer.
            assert 0 <= p.energy_j <= (idle + active) * p.total_s * ROUNDING


@given(worlds, works, shapes, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_more_round_trip_never_makes_a_split_more_attractive(
    world: World, work: Work, shape: Shape, rtt: float, more: float, kept: bool
) -> None:
    """From two tokens on: the offer of a kept prompt can hide behind a split's first chunk, not offload's."""
    if kept:
        rows = dict.fromkeys(range(NUM_LAYERS + 1), work.prompt_tokens // 2)
        work = replace(work, output_tokens=work.output_tokens + 1, edge_cached=rows, cloud_cached=rows)
    near, away = (
        every(replace(world, link=replace(world.link, rtt=Estimate(value))), work, shape)
        for value in (rtt, rtt + more)
    )
    for other in (0, 1):  # local, offload
        for k in range(2, len(near)):
            before = near[k].total_s - near[other].total_s
            after = away[k].total_s - away[other].total_s
            assert after >= before - 1e-9 * away[k].total_s


@given(worlds, works, shapes, st.integers(0, 500), st.floats(0, 500))
def test_more_tokens_never_take_less(
    world: World, work: Work, shape: Shape, prompt: int, output: float
) -> None:
    longer = replace(
        work, prompt_tokens=work.prompt_tokens + prompt, output_tokens=work.output_tokens + output
    )
    for less, more in zip(every(world, work, shape), every(world, longer, shape), strict=True):
        for name in ("ttft_s", "total_s", "bytes_up", "bytes_down", "cost_usd", "memory_bytes"):
            assert getattr(more, name) * ROUNDING >= getattr(less, name)


@given(worlds, works, shapes)
def test_what_is_kept_never_makes_a_prompt_dearer(world: World, work: Work, shape: Shape) -> None:
    kept = dict.fromkeys(range(NUM_LAYERS + 1), work.prompt_tokens // 2)
    for fresh, warm in zip(
        every(world, work, shape),
        every(world, replace(work, edge_cached=kept, cloud_cached=kept), shape),
        strict=True,
    ):
        assert warm.bytes_up <= fresh.bytes_up
        assert warm.cost_usd <= fresh.cost_usd * ROUNDING
        if world.edge.prefill_context_s == 0:  # else the last chunk, which alone may show, is a later one
            assert (
                warm.prefill_edge_s + warm.prefill_cloud_s
                <= (fresh.prefill_edge_s + fresh.prefill_cloud_s) * ROUNDING + 1e-12
            )


@given(works, shapes, odd, odd, odd, odd, odd, odd)
def test_odd_sensors_give_figures(
    work: Work, shape: Shape, rtt: float, up: float, down: float, queue: float, sessions: float, watts: float
) -> None:
    world = make_world(
        link=LinkView(Estimate(rtt), Estimate(up), Estimate(down)),
        cloud_state=CloudState(queue_s=queue, sessions=sessions),
    )
    world = replace(world, edge=world.edge.model_copy(update={"active_w": watts, "idle_w": watts}))
    for p in every(world, work, shape):
        assert all(value >= 0 for value in p.terms().values())  # NaN is not
        assert p.energy_j is None or p.energy_j == p.energy_j
        assert p.memory_bytes >= 0


@given(worlds, works, shapes)
def test_nothing_is_charged_where_nothing_costs(world: World, work: Work, shape: Shape) -> None:
    for p in every(replace(world, prices=Prices()), work, shape):
        assert p.cost_usd == p.most_usd == 0


@given(worlds, works, shapes)
def test_an_infinite_link_leaves_computing_alone(world: World, work: Work, shape: Shape) -> None:
    link = LinkView.given(rtt_s=0)
    calm = replace(world, link=link, cloud_state=CloudState(), factors=Factors())
    for p in every(calm, work, shape):
        assert p.prefill_link_s == p.decode_link_s == p.handshake_s == 0

"""The route decision: hard constraints before the rule, privacy never loosened, every reason named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.router import MIB, RouterInputs, decide, edge_bytes
from isthmus.protocol.errors import RouteInfeasibleError

BASE = RouterInputs(
    num_layers=8,
    layer_bytes=(10 * MIB,) * 8,
    embed_bytes=20 * MIB,
    head_bytes=5 * MIB,
    kv_bytes=1024,
    tokens=1024,
    cloud_state="up",
)


def test_auto_is_local_where_it_fits() -> None:
    decision = decide(BASE)
    assert (decision.route, decision.split, decision.shape) == ("local", 8, None)
    assert len(decision.candidates) == 9
    assert all(c.feasible for c in decision.candidates)


def test_auto_offloads_what_does_not_fit_and_says_both_numbers() -> None:
    decision = decide(replace(BASE, memory_bytes=100 * MIB))
    assert (decision.route, decision.split) == ("offload", 0)
    assert "needs 113.0 MB, the limit is 100.0 MB" in decision.reason


def test_activations_only_splits_deepest_in_the_u_shape() -> None:
    decision = decide(replace(BASE, memory_bytes=60 * MIB, privacy="activations-only"))
    assert (decision.route, decision.split, decision.shape) == ("split", 3, "u")
    assert edge_bytes(BASE, 3, "u") <= 60 * MIB < edge_bytes(BASE, 4, "u")


@pytest.mark.parametrize("state", ["none", "down", "refused"])
def test_without_a_cloud_only_local(state: str) -> None:
    inputs = replace(BASE, cloud_state=state, cloud_detail="says why")
    assert decide(inputs).route == "local"
    for route in ("split", "offload"):
        with pytest.raises(RouteInfeasibleError):
            decide(replace(inputs, route=route))
    with pytest.raises(RouteInfeasibleError, match=r"needs 113\.0 MB"):
        decide(replace(inputs, memory_bytes=MIB))


def test_asked_split_and_its_limits() -> None:
    decision = decide(replace(BASE, route="split", split=3, shape="u"))
    assert (decision.route, decision.split, decision.shape) == ("split", 3, "u")
    assert decide(replace(BASE, route="split")).split == 4
    assert decide(replace(BASE, route="split", memory_bytes=45 * MIB)).split == 2
    assert decide(replace(BASE, split=0)).route == "offload"
    assert decide(replace(BASE, split=8)).route == "local"
    for split in (0, 8, -1, 99):
        with pytest.raises(RouteInfeasibleError, match=f"split is {split}, possible are 1 to 7"):
            decide(replace(BASE, route="split", split=split))


def test_min_depth_binds_activations_only() -> None:
    shallow = replace(BASE, route="split", split=2, min_depth=3)
    assert decide(shallow).split == 2
    with pytest.raises(RouteInfeasibleError, match="K = 2 is below the minimum depth 3"):
        decide(replace(shallow, privacy="activations-only"))
    assert decide(replace(shallow, split=3, privacy="activations-only")).shape == "u"


def test_a_prompt_too_long_for_the_cloud_stays() -> None:
    decision = decide(replace(BASE, cloud_context=1000))
    assert decision.route == "local"
    with pytest.raises(RouteInfeasibleError, match="1024 tokens, the cloud allows 1000"):
        decide(replace(BASE, cloud_context=1000, route="offload"))


INPUTS = st.builds(
    RouterInputs,
    num_layers=st.just(8),
    layer_bytes=st.just((10 * MIB,) * 8),
    embed_bytes=st.just(20 * MIB),
    head_bytes=st.sampled_from([0, 5 * MIB]),
    kv_bytes=st.just(1024),
    tokens=st.sampled_from([1, 1024, 100_000]),
    memory_bytes=st.sampled_from([None, 0, 40 * MIB, 60 * MIB, 1000 * MIB]),
    min_depth=st.integers(1, 9),
    cloud_state=st.sampled_from(["none", "unknown", "up", "down", "refused"]),
    cloud_context=st.sampled_from([None, 512, 8192]),
    route=st.sampled_from(["auto", "local", "split", "offload"]),
    split=st.none() | st.integers(-1, 9),
    shape=st.sampled_from([None, "prefix", "u"]),
    privacy=st.sampled_from(["any", "activations-only", "local-only"]),
)


@given(INPUTS)
def test_no_state_loosens_privacy_or_picks_the_infeasible(inputs: RouterInputs) -> None:
    try:
        decision = decide(inputs)
    except RouteInfeasibleError:
        return
    assert decision == decide(inputs)
    if inputs.privacy == "local-only":
        assert decision.route == "local"
    if inputs.privacy == "activations-only":
        assert decision.route == "local" or (
            decision.route == "split" and decision.shape == "u" and decision.split >= inputs.min_depth
        )
    if decision.route != "local":
        assert inputs.cloud_state in ("unknown", "up")
    if inputs.route != "auto":
        assert decision.route == inputs.route
    if inputs.split is not None:
        assert decision.split == inputs.split
    if inputs.memory_bytes is not None:
        assert edge_bytes(inputs, decision.split, decision.shape) <= inputs.memory_bytes
    chosen = [c for c in decision.candidates if (c.route, c.split) == (decision.route, decision.split)]
    assert [c.feasible for c in chosen] == [True]
    assert all((c.violated is None) == c.feasible for c in decision.candidates)

"""The engine with tiny fp32 models: any mix of sessions gets the tokens each would get alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.cloud.engine import Engine
from isthmus.cloud.engine_session import CanaryRows, Closed, EngineOpen, EngineOutput, Hidden, Opened
from isthmus.cloud.model import CloudModel, model_logits
from isthmus.cloud.scheduler import SchedulerConfig
from isthmus.protocol.identity import canary_ids
from isthmus.protocol.sampling import SamplingParams
from tests.cloud.cloud_clients import (
    Client,
    EdgeHalf,
    alone,
    check_tokens,
    greedy_reference,
    is_idle,
    make_engine,
    offer_of,
    prompt_of,
    run,
)

LAYERS = 4


@pytest.mark.parametrize("split", range(LAYERS))
@pytest.mark.parametrize("shape", ["prefix", "u"])
def test_every_split_and_shape_gives_the_models_tokens(model: CloudModel, split: int, shape: str) -> None:
    prompt = prompt_of(21)
    client = alone(model, prompt=prompt, split=split, shape=shape, chunk=7)
    assert client.tokens == greedy_reference(model, prompt, 8)
    assert client.finish == "length"
    assert client.credits_back == 14
    assert client.kv_len == 21 + 7


def mixed_clients(engine: Engine, model: CloudModel) -> list[Client]:
    mixes = [
        (0, "prefix"),
        (3, "u"),
        (1, "prefix"),
        (0, "u"),
        (2, "prefix"),
        (3, "prefix"),
        (1, "u"),
        (0, "prefix"),
    ]
    return [
        Client(
            engine, model, prompt_of(5 + 9 * i, i), split=split, shape=shape, max_tokens=4 + i, chunk=6 + i
        )
        for i, (split, shape) in enumerate(mixes)
    ]


def test_sessions_of_all_depths_in_one_step_get_the_tokens_they_get_alone(model: CloudModel) -> None:
    engine = make_engine(model, config=SchedulerConfig(max_rows=24, max_chunk_rows=10))
    clients = [client.start() for client in mixed_clients(engine, model)]
    run(engine, clients)
    for client in clients:
        check_tokens(client)
    assert engine.stats().rows_computed_total == sum(len(c.prompt) + c.max_tokens - 1 for c in clients)
    # Rows of layers nobody needs are not computed: a session at K costs N - K layers.
    assert engine.stats().row_layers_total == sum(
        (LAYERS - c.split) * (len(c.prompt) + c.max_tokens - 1) for c in clients
    )


def test_offload_stops_on_an_end_id(model: CloudModel) -> None:
    prompt = prompt_of(9)
    reference = greedy_reference(model, prompt, 8)
    client = alone(model, prompt=prompt, end_ids=(reference[3],), max_tokens=20)
    assert client.tokens == reference[: reference.index(reference[3]) + 1]
    assert client.finish == "stop"
    assert not client.engine.core.scheduler.has_work


def test_offload_stops_at_its_context(model: CloudModel) -> None:
    client = alone(model, prompt=prompt_of(10), max_tokens=100, max_context=13)
    assert client.finish == "length"
    assert client.kv_len == 13
    assert len(client.tokens) == 4


def test_offload_pauses_at_the_edge_of_its_window_and_goes_on(model: CloudModel) -> None:
    engine = make_engine(model)
    prompt = prompt_of(5)
    number = engine.open(
        EngineOpen(split=0, shape="prefix", prompt_tokens=5, max_tokens=9, max_context=64, stream_window=3)
    )
    engine.add_rows(number, prompt, output="last")
    tokens: list[int] = []

    def drain() -> None:
        while True:
            outputs = engine.step()
            tokens.extend(one.token for out in outputs for one in getattr(out, "sampled", ()))
            if not outputs:
                return

    drain()
    assert len(tokens) == 1 + 3  # the answer to the step, and three of the window
    assert not engine.core.scheduler.has_work
    engine.set_stream_limit(number, 5)
    drain()
    assert len(tokens) == 1 + 5
    engine.set_stream_limit(number, 100)
    drain()
    assert tokens == greedy_reference(model, prompt, 9)


@pytest.mark.parametrize("split", [0, 2])
def test_truncate_forgets_rows_and_goes_on_from_there(model: CloudModel, split: int) -> None:
    prompt, other = prompt_of(30), prompt_of(6, seed=9)
    client = Client(make_engine(model), model, prompt, split=split, shape="u", max_tokens=3)
    run(client.engine, [client.start()])
    branch = [*prompt[:20], *other]
    rows: object = other
    if split:
        client.edge.table.truncate(20)
        rows = client.edge.rows(other)
    client.engine.add_rows(client.session_id, rows, output="all", truncate_to=20)  # type: ignore[arg-type]
    (output,) = client.engine.step()
    assert isinstance(output, Hidden)
    assert output.kv_len == 26
    logits = model.head(torch.from_numpy(output.rows)).numpy()
    expected = model_logits(model, branch)[20:]
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_truncating_rows_not_yet_computed_gives_their_credits_back(model: CloudModel) -> None:
    engine = make_engine(model, config=SchedulerConfig(max_chunk_rows=8, max_rows=8))
    number = engine.open(EngineOpen(split=0, shape="u", prompt_tokens=30, max_tokens=2, max_context=64))
    engine.add_rows(number, prompt_of(30))
    progress = [out.num_rows for out in engine.step()[1:]]  # type: ignore[union-attr]
    engine.add_rows(number, [5], output="last", truncate_to=4)
    outputs = engine.step()
    progress += [out.num_rows for out in outputs if hasattr(out, "num_rows")]
    assert progress == [8, 22]
    assert isinstance(outputs[-1], Hidden)
    assert outputs[-1].kv_len == 5


def test_hidden_rows_of_a_chunked_step_come_as_one(model: CloudModel) -> None:
    engine = make_engine(model, config=SchedulerConfig(max_rows=8, max_chunk_rows=5))
    prompt = prompt_of(17)
    number = engine.open(EngineOpen(split=0, shape="u", prompt_tokens=17, max_tokens=2, max_context=64))
    engine.add_rows(number, prompt, output="all")
    outputs: list[EngineOutput] = []
    while engine.core.scheduler.has_work or not outputs:
        outputs += engine.step()
    (hidden,) = [out for out in outputs if isinstance(out, Hidden)]
    expected = model_logits(model, prompt)
    logits = model.head(torch.from_numpy(hidden.rows)).numpy()
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("split", "shape"), [(0, "prefix"), (2, "prefix"), (3, "u")])
def test_the_next_turn_computes_only_its_new_rows(model: CloudModel, split: int, shape: str) -> None:
    engine = make_engine(model)
    first = Client(engine, model, prompt_of(37), split=split, shape=shape, max_tokens=6).start()
    run(engine, [first])
    held = [*first.prompt, *first.tokens][: first.kv_len]
    engine.close(first.session_id, offer_of(held, len(held)))
    (closed,) = engine.step()
    assert isinstance(closed, Closed)
    assert closed.cached_rows == closed.kv_len == 37 + 5
    assert closed.pages_freed == 0
    computed = engine.stats().rows_computed_total

    turn = [*first.prompt, *first.tokens, *prompt_of(10, seed=3)]
    second = Client(
        engine, model, turn, split=split, shape=shape, max_tokens=4, offer=offer_of(turn, len(held))
    ).start()
    run(engine, [second])
    assert second.cached_rows == len(held)
    assert engine.stats().rows_computed_total - computed == len(turn) - len(held) + 3
    assert second.tokens == greedy_reference(model, turn, 4)

    stranger = Client(
        engine, model, turn, split=split, shape=shape, max_tokens=1, offer=offer_of(turn), tenant="other"
    ).start()
    run(engine, [stranger])
    assert stranger.cached_rows == 0


def test_a_session_that_began_from_the_cache_survives_preemption(model: CloudModel) -> None:
    engine = make_engine(model, pages=20, config=SchedulerConfig(idle_preempt_s=0.0))
    base = prompt_of(20)
    first = Client(engine, model, base, split=1, max_tokens=1, max_context=64).start()
    run(engine, [first])
    engine.close(first.session_id, offer_of(base, 20))
    engine.step()
    turn = [*base, *prompt_of(4, seed=5)]
    second = Client(
        engine, model, turn, split=1, max_tokens=12, offer=offer_of(turn, 20), max_context=64
    ).start()
    for output in engine.step():
        second.take(output)
    assert second.cached_rows == 20
    # Sixteen of twenty pages: the session from the cache must let go of all it has, cached rows included.
    rival = Client(engine, model, prompt_of(64, seed=7), max_tokens=1, max_context=65, split=0).start()
    run(engine, [second, rival])
    assert engine.stats().preemptions_total > 0
    assert second.tokens == greedy_reference(model, turn, 12)


def test_a_long_conversation_is_found_where_the_offer_leaves_out_pages(model: CloudModel) -> None:
    """Beyond 1,024 tokens an offer names every second page only."""
    engine = make_engine(model, pages=1000)
    ids = prompt_of(1200)
    number = engine.open(EngineOpen(split=3, shape="u", prompt_tokens=1200, max_tokens=1, max_context=1300))
    engine.add_rows(number, np.ones((1200, 64), dtype=np.float32))
    while engine.step():
        pass
    engine.close(number, offer_of(ids, 1199))
    (closed,) = engine.step()
    assert isinstance(closed, Closed)
    assert closed.cached_rows == 1199
    again = engine.open(
        EngineOpen(
            split=3,
            shape="u",
            prompt_tokens=1210,
            max_tokens=1,
            max_context=1300,
            offer=offer_of([*ids, *prompt_of(10)], 1199),
        )
    )
    (opened,) = engine.step()
    assert opened == Opened(again, 1199)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.9, top_k=20, seed=7),
        SamplingParams(temperature=1.2, top_p=0.9, seed=11, choice=2, logprobs=3),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.3),
    ],
)
def test_cloud_and_edge_draw_the_same_tokens(model: CloudModel, sampling: SamplingParams) -> None:
    prompt = prompt_of(15)
    edge = alone(model, prompt=prompt, split=2, shape="u", sampling=sampling)
    context = tuple(prompt) if sampling.needs_context else None
    for split in (0, 2):
        told = None if split == 0 else context
        cloud = alone(model, prompt=prompt, split=split, sampling=sampling, context_ids=told)
        assert cloud.tokens == edge.tokens
        if sampling.logprobs >= 0:
            assert cloud.sampled[0].logprob == pytest.approx(edge.sampled[0].logprob, abs=1e-4)
            assert len(cloud.sampled[0].top) == 3


def test_canary_rows_are_the_boundaries_of_the_model(model: CloudModel) -> None:
    engine = make_engine(model)
    ids = canary_ids(320)
    for split in range(LAYERS):
        number = engine.canary(split, ids)
        (answer,) = engine.step()
        assert isinstance(answer, CanaryRows)
        assert answer.session_id == number
        assert np.allclose(answer.rows, EdgeHalf(model, split).rows(ids), atol=1e-5)
    assert is_idle(engine)

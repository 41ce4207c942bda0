"""What must not harm the engine: wrong rows, failing models, sessions that end early; and its thread."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from isthmus.cloud.engine_session import Closed, EngineOpen, EngineOutput, Failed, Hidden, Tokens
from isthmus.cloud.model import CloudModel
from isthmus.cloud.scheduler import SchedulerConfig
from isthmus.protocol.errors import RejectedError, RequestError, SequenceError
from isthmus.protocol.sampling import SamplingParams
from tests.cloud.cloud_clients import (
    Client,
    alone,
    greedy_reference,
    is_idle,
    make_engine,
    prompt_of,
    run,
)

LAYERS = 4


def test_cancel_frees_the_pages_at_once(model: CloudModel) -> None:
    engine = make_engine(model)
    client = Client(engine, model, prompt_of(40), split=1, max_tokens=50).start()
    other = Client(engine, model, prompt_of(8), max_tokens=30).start()
    for _ in range(3):
        for output in engine.step():
            (client if output.session_id == client.session_id else other).take(output)
    used = engine.pool.num_used
    engine.cancel(client.session_id)
    outputs = engine.step()
    (closed,) = [out for out in outputs if isinstance(out, Closed)]
    assert closed.pages_freed == 3 * 3  # three columns in each of three layers
    assert engine.pool.num_used == used - 9
    engine.cancel(client.session_id)  # idempotent
    assert not any(isinstance(out, Closed) for out in engine.step())


def test_a_damaged_row_fails_its_session_only(model: CloudModel) -> None:
    engine = make_engine(model)
    good = Client(engine, model, prompt_of(12), split=2).start()
    damaged: list[Client] = []
    for shape in ("prefix", "u"):
        bad = Client(engine, model, prompt_of(5), split=2, shape=shape)
        bad.edge = None  # type: ignore[assignment]
        bad.session_id = engine.open(
            EngineOpen(split=2, shape=shape, prompt_tokens=5, max_tokens=3, max_context=64)
        )
        rows = np.ones((5, 64), dtype=np.float32)
        rows[3] = np.nan
        engine.add_rows(bad.session_id, rows, output="last")
        damaged.append(bad)
    run(engine, [good, *damaged])
    assert good.tokens == greedy_reference(model, good.prompt, 8)
    for bad in damaged:
        assert bad.error is not None
        assert "NaN" in bad.error.message


def test_a_row_that_makes_the_model_fail_fails_its_session_only(model: CloudModel) -> None:
    engine = make_engine(model)
    bugs: list[BaseException] = []
    engine.core._on_bug = bugs.append
    good = Client(engine, model, prompt_of(12)).start()
    bad = Client(engine, model, [5, 100_000]).start()  # outside the vocabulary: torch raises
    run(engine, [good, bad])
    assert good.tokens == greedy_reference(model, good.prompt, 8)
    assert bad.error is not None
    assert bad.error.code == "engine_failed"
    assert len(bugs) == 1


def test_sampling_that_cannot_be_done_fails_its_session_only(model: CloudModel) -> None:
    engine = make_engine(model)
    good = Client(engine, model, prompt_of(12)).start()
    bad = Client(
        engine, model, prompt_of(6), split=1, sampling=SamplingParams(repetition_penalty=1.2)
    ).start()
    run(engine, [good, bad])
    assert bad.error is not None
    assert bad.error.code == "context_needed"
    assert good.tokens == greedy_reference(model, good.prompt, 8)


@pytest.mark.parametrize("gap", [False, True])
def test_penalties_are_never_drawn_with_tokens_missing(model: CloudModel, gap: bool) -> None:
    """Rows sent again stand for ids that the cloud does not see."""
    engine = make_engine(model)
    prompt = prompt_of(6)
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1.2)
    plain = alone(model, prompt=prompt, split=1, sampling=sampling, context_ids=tuple(prompt))
    client = Client(engine, model, prompt, 1, sampling=sampling, context_ids=tuple(prompt)).start()
    while len(client.tokens) < 3:
        for output in engine.step():
            client.take(output)
    engine.step()
    at = len(client.known) - 1
    first = at - 2 if gap else at
    client.send(client.known[first:], "last", at=first)
    (output,) = engine.step()
    if gap:
        assert isinstance(output, Failed)
        assert output.error.code == "context_needed"
        assert "token 3 is to be drawn, 1 are known" in output.error.message
    else:
        assert isinstance(output, Tokens)
        assert [one.token for one in output.sampled] == plain.tokens[3:4]


def test_truncating_past_the_end_fails_the_session(model: CloudModel) -> None:
    engine = make_engine(model)
    number = engine.open(EngineOpen(split=0, shape="u", prompt_tokens=3, max_tokens=2, max_context=64))
    engine.add_rows(number, [1, 2, 3], truncate_to=1)
    outputs = engine.step()
    assert isinstance(outputs[-1], Failed)
    assert isinstance(outputs[-1].error, SequenceError)


def test_more_rows_than_the_context_fail_the_session(model: CloudModel) -> None:
    engine = make_engine(model)
    number = engine.open(EngineOpen(split=0, shape="u", prompt_tokens=3, max_tokens=1, max_context=4))
    engine.add_rows(number, [1, 2, 3, 4, 5])
    failed = engine.step()[-1]
    assert isinstance(failed, Failed)
    assert failed.error.code == "context_overflow"
    assert "5" in failed.error.message
    assert "4" in failed.error.message
    assert is_idle(engine)


def test_a_session_that_could_never_fit_is_refused(model: CloudModel) -> None:
    engine = make_engine(model, pages=15)
    engine.open(EngineOpen(split=0, shape="u", prompt_tokens=3, max_tokens=1, max_context=64))
    (failed,) = engine.step()
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RejectedError)
    assert "16 KV pages, the cloud has 15" in failed.error.message
    assert is_idle(engine)


def test_a_split_outside_the_model_is_refused(model: CloudModel) -> None:
    engine = make_engine(model)
    engine.open(EngineOpen(split=LAYERS, shape="u", prompt_tokens=3, max_tokens=1, max_context=64))
    (failed,) = engine.step()
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RequestError)


def test_commands_for_unknown_sessions_are_ignored(model: CloudModel) -> None:
    engine = make_engine(model)
    engine.add_rows(99, [1, 2])
    engine.cancel(99)
    engine.close(99, ())
    engine.set_stream_limit(99, 5)
    assert engine.step() == []


def test_the_thread_wakes_at_once_and_outputs_go_to_their_sink(model: CloudModel) -> None:
    engine = make_engine(model)
    done = threading.Event()
    outputs: list[EngineOutput] = []

    def sink(batch: list[EngineOutput]) -> None:
        outputs.extend(batch)
        if any(getattr(out, "finish", None) for out in batch):
            done.set()

    engine.start()
    try:
        prompt = prompt_of(9)
        number = engine.open(
            EngineOpen(split=0, shape="prefix", prompt_tokens=9, max_tokens=5, max_context=64), sink
        )
        engine.add_rows(number, prompt, output="last")
        assert done.wait(30)
        tokens = [one.token for out in outputs for one in getattr(out, "sampled", ())]
        assert tokens == greedy_reference(model, prompt, 5)
        assert engine.stuck_for_s() < 1e9
    finally:
        engine.stop()
    assert engine.stats().steps_total == 5


def test_a_blocked_session_runs_once_an_idle_one_may_be_preempted(model: CloudModel) -> None:
    """On the thread and by the real clock: nothing else wakes the engine."""
    engine = make_engine(model, pages=LAYERS * 2, config=SchedulerConfig(idle_preempt_s=0.05))
    engine._clock = engine.core._clock = time.monotonic
    done = threading.Event()
    first = engine.open(EngineOpen(split=0, shape="u", prompt_tokens=17, max_tokens=1, max_context=32))
    engine.add_rows(first, prompt_of(17))
    second = engine.open(
        EngineOpen(split=0, shape="u", prompt_tokens=5, max_tokens=1, max_context=32),
        lambda batch: done.set() if any(isinstance(out, Hidden) for out in batch) else None,
    )
    engine.add_rows(second, prompt_of(5), output="last")
    engine.start()
    try:
        assert done.wait(30)
    finally:
        engine.stop()
    assert engine.stats().preemptions_total == 1


def test_a_bug_in_a_step_fails_the_sessions_and_the_engine_goes_on(
    model: CloudModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    plan, logits = engine.core.scheduler.plan, engine.core.forward.logits
    failed: list[EngineOutput] = []
    done = threading.Event()

    def sink(batch: list[EngineOutput]) -> None:
        failed.extend(out for out in batch if isinstance(out, Failed))
        if failed or any(getattr(out, "finish", None) for out in batch):
            done.set()

    def raising(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    request = EngineOpen(split=0, shape="prefix", prompt_tokens=3, max_tokens=2, max_context=64)
    engine.start()
    try:
        for owner, name in ((engine.core.scheduler, "plan"), (engine.core.forward, "logits")):
            monkeypatch.setattr(type(owner), name, raising)
            engine.add_rows(engine.open(request, sink), [1, 2, 3], output="last")
            assert done.wait(30)
            assert [out.error.code for out in failed] == ["engine_failed"]  # type: ignore[union-attr]
            failed.clear()
            done.clear()
            monkeypatch.undo()
        assert engine.core.scheduler.plan == plan
        assert engine.core.forward.logits == logits
        engine.add_rows(engine.open(request, sink), [1, 2, 3], output="last")
        assert done.wait(30)
        assert not failed
    finally:
        engine.stop()

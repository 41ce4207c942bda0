"""A penalised answer goes on in a new session, at every position, as if it had never moved."""

from __future__ import annotations

import pytest

from isthmus.cloud.engine_session import EngineOpen, Failed, Tokens
from isthmus.cloud.model import CloudModel
from isthmus.protocol.sampling import SamplingParams
from tests.cloud.cloud_clients import EdgeHalf, alone, make_engine, prompt_of

PENALTIES = SamplingParams(
    temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.4
)
MAX_TOKENS = 10


def go_on(model: CloudModel, split: int, prompt: list[int], emitted: list[int], told: bool) -> list[int]:
    """The rest of the answer, from a session that gets prompt and `emitted` at once."""
    engine = make_engine(model)
    half = EdgeHalf(model, split)
    known = [*prompt, *emitted]
    number = engine.open(
        EngineOpen(
            split=split,
            shape="prefix",
            prompt_tokens=len(prompt),
            max_tokens=MAX_TOKENS,
            max_context=64,
            sampling=PENALTIES,
            context_ids=tuple(known) if told else None,
        )
    )
    engine.add_rows(number, half.rows(known) if split else known, output="last")
    tokens: list[int] = []
    finished = False
    while not finished:
        for output in engine.step():
            assert not isinstance(output, Failed), output.error
            if isinstance(output, Tokens):
                assert output.first_index == len(emitted) + len(tokens)
                tokens += [one.token for one in output.sampled]
                finished = output.finish is not None
                if split and not finished:
                    engine.add_rows(number, half.rows(tokens[-1:]), output="last")
    return tokens


@pytest.mark.parametrize(("split", "told"), [(0, False), (0, True), (2, True)])
def test_at_every_position(model: CloudModel, split: int, told: bool) -> None:
    prompt = prompt_of(11, 3)
    whole = alone(
        model, prompt=prompt, split=2, sampling=PENALTIES, context_ids=tuple(prompt), max_tokens=MAX_TOKENS
    ).tokens
    plain = alone(model, prompt=prompt, split=2, max_tokens=MAX_TOKENS).tokens
    assert whole != plain  # else the penalties would prove nothing
    for position in range(MAX_TOKENS):
        assert go_on(model, split, prompt, whole[:position], told) == whole[position:]


@pytest.mark.parametrize("missing", [-1, 1])
def test_ids_that_do_not_reach_the_first_token_are_refused(model: CloudModel, missing: int) -> None:
    prompt, emitted = prompt_of(6), [7, 8, 9]
    engine = make_engine(model)
    told = (*prompt, *emitted)[:-1] if missing > 0 else (*prompt, *emitted, 10)
    number = engine.open(
        EngineOpen(
            split=1,
            shape="prefix",
            prompt_tokens=6,
            max_tokens=8,
            max_context=32,
            sampling=PENALTIES,
            context_ids=told,
        )
    )
    engine.add_rows(number, EdgeHalf(model, 1).rows([*prompt, *emitted]), output="last")
    (failed,) = [output for output in engine.step() if isinstance(output, Failed)]
    assert failed.error.code == "context_needed"
    assert f"token 3 is to be drawn, {3 - missing} are known" in failed.error.message


def test_rows_that_come_back_as_other_ids_are_what_counts(model: CloudModel) -> None:
    """At K = 0 the ids are seen: after a cut, the new ones count and not what was sampled before."""
    prompt = prompt_of(9, 5)
    engine = make_engine(model)
    number = engine.open(
        EngineOpen(
            split=0,
            shape="prefix",
            prompt_tokens=9,
            max_tokens=MAX_TOKENS,
            max_context=64,
            sampling=PENALTIES,
            stream_window=2,
        )
    )
    engine.add_rows(number, prompt, output="last")
    for _ in range(4):
        engine.step()
    emitted = [17, 17, 40]
    engine.add_rows(number, emitted, output="last", truncate_to=9)
    outputs = [output for output in engine.step() if isinstance(output, Tokens)]
    (drawn,) = [one.token for output in outputs for one in output.sampled]
    assert drawn == go_on(model, 2, prompt, emitted, True)[0]

"""VERIFY on the engine and over the real server: draft chains cost no token and leave no row behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from isthmus.cloud.engine import Engine
from isthmus.cloud.engine_session import EngineOpen, EngineOutput, Failed, Hidden, Progress, Tokens
from isthmus.cloud.model import CloudModel
from isthmus.cloud.scheduler import SchedulerConfig
from isthmus.cloud.serve import Prepared
from isthmus.protocol.activations import RowCodec, RowFormat, encode_ids
from isthmus.protocol.errors import IsthmusError
from isthmus.protocol.events import ResultRows, ResultTokens, Welcomed
from isthmus.protocol.frames import MsgType, decode_frame, encode_frame
from isthmus.protocol.sampling import SamplingParams
from tests.cloud.cloud_clients import (
    Client,
    EdgeHalf,
    alone,
    greedy_reference,
    is_idle,
    make_engine,
    prompt_of,
    run,
)
from tests.cloud.cloud_edges import RunningCloud, connected, open_of, prepare_cloud, running_cloud
from tests.tiny import make_tiny

WAYS = [(1, "prefix"), (2, "prefix"), (3, "prefix"), (0, "u"), (2, "u")]

Draft = Callable[[Sequence[int]], Sequence[int]]
"""What to guess after the tokens so far."""


@dataclass
class Drafter(Client):
    """Sends a draft chain instead of each single row."""

    draft: Draft = lambda _tokens: ()
    kept: list[int] = field(default_factory=list)
    """Tokens that each chain brought."""

    def take(self, output: EngineOutput) -> None:
        before = len(self.tokens)
        super().take(output)
        if isinstance(output, Tokens | Hidden) and before:
            self.kept.append(len(self.tokens) - before)

    def step(self) -> None:
        self.send([self.tokens[-1], *self.draft(self.tokens)], "none", chain=True)


def guess(reference: Sequence[int], length: int, *, right: int) -> Draft:
    """`length` drafts, the first `right` of which come true."""

    def draft(tokens: Sequence[int]) -> list[int]:
        after = list(reference[len(tokens) : len(tokens) + length])
        after += [5] * (length - len(after))
        return [token if at < right else (token + 1) % 320 for at, token in enumerate(after)]

    return draft


# ---- tokens


@pytest.mark.parametrize(("split", "shape"), WAYS)
@pytest.mark.parametrize("right", [0, 1, 3, 4])
def test_right_and_wrong_drafts_give_the_models_tokens(
    model: CloudModel, split: int, shape: str, right: int
) -> None:
    prompt = prompt_of(21)
    reference = greedy_reference(model, prompt, 13)
    client = Drafter(
        make_engine(model), model, prompt, split, shape, 13, draft=guess(reference, 4, right=right)
    )
    run(client.engine, [client.start()])
    assert client.tokens == reference
    assert client.finish == "length"
    whole, rest = divmod(12, right + 1)  # the first token came with the prompt
    assert client.kept == [right + 1] * whole + [rest] * bool(rest)
    assert client.kv_len == 21 + 12
    client.engine.cancel(client.session_id)
    client.engine.step()
    assert is_idle(client.engine)


@pytest.mark.parametrize(("split", "shape"), WAYS)
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.9, top_k=20, seed=7, logprobs=2),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.3),
    ],
)
def test_sampling_and_penalties_are_those_of_plain_decoding(
    model: CloudModel, split: int, shape: str, sampling: SamplingParams
) -> None:
    """Rejected drafts are counted by no penalty, and every position draws its own number."""
    prompt = prompt_of(15)
    context = tuple(prompt) if sampling.needs_context and shape == "prefix" else None
    options: dict[str, Any] = {"split": split, "shape": shape, "sampling": sampling, "context_ids": context}
    plain = alone(model, prompt=prompt, max_tokens=12, **options)
    drafter = Drafter(
        make_engine(model), model, prompt, max_tokens=12, draft=guess(plain.tokens, 4, right=2), **options
    )
    run(drafter.engine, [drafter.start()])
    assert drafter.tokens == plain.tokens
    assert drafter.kept == [3, 3, 3, 2]
    for one, other in zip(drafter.sampled, plain.sampled, strict=True):
        if sampling.logprobs >= 0:
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert len(one.top) == 2


@pytest.mark.parametrize(("split", "shape"), [(2, "prefix"), (2, "u")])
def test_a_chain_ends_where_the_answer_does(model: CloudModel, split: int, shape: str) -> None:
    prompt = prompt_of(9)
    reference = greedy_reference(model, prompt, 12)
    end = next(token for at, token in enumerate(reference) if at > 2 and token not in reference[:at])
    client = Drafter(
        make_engine(model),
        model,
        prompt,
        split,
        shape,
        30,
        end_ids=(end,),
        draft=guess(reference, 8, right=8),
    )
    run(client.engine, [client.start()])
    assert client.tokens == reference[: reference.index(end) + 1]
    assert client.finish == "stop"
    assert client.kv_len == 9 + reference.index(end)
    assert not client.engine.core.scheduler.has_work


# ---- rows, pages, steps


def chain_after_prompt(
    model: CloudModel, drafts: int, *, right: int, engine: Engine | None = None, max_context: int = 256
) -> tuple[Drafter, list[int]]:
    """A client at split 1 whose prompt of 20 is answered and whose chain is queued."""
    prompt = prompt_of(20)
    reference = greedy_reference(model, prompt, drafts + 2)
    client = Drafter(
        engine or make_engine(model),
        model,
        prompt,
        1,
        max_tokens=40,
        max_context=max_context,
        draft=guess(reference, drafts, right=right),
    )
    client.start()
    while not client.tokens:
        for output in client.engine.step():
            client.take(output)
    return client, reference


def tokens_of(outputs: Sequence[EngineOutput]) -> list[Tokens]:
    return [output for output in outputs if isinstance(output, Tokens)]


def test_rejected_rows_give_their_pages_back(model: CloudModel) -> None:
    client, reference = chain_after_prompt(model, 40, right=2)
    assert client.engine.pool.num_used == 3 * 2  # 20 rows are two columns in each of three layers
    (output,) = client.engine.step()
    assert isinstance(output, Tokens)
    assert [one.token for one in output.sampled] == reference[1:4]
    assert output.kv_len == 23
    assert client.engine.pool.num_used == 3 * 2  # 61 rows were four columns
    assert client.engine.stats().rows_computed_total == 20 + 41
    client.engine.pool.check()


@pytest.mark.parametrize("right", [0, 3, 10])
def test_a_chain_longer_than_a_chunk_is_answered_once(model: CloudModel, right: int) -> None:
    config = SchedulerConfig(max_rows=8, max_chunk_rows=4)
    client, reference = chain_after_prompt(model, 10, right=right, engine=make_engine(model, config=config))
    outputs = [client.engine.step() for _ in range(3)]
    assert outputs[:2] == [[], []]
    (answer,) = tokens_of(outputs[2])
    assert [one.token for one in answer.sampled] == reference[1 : right + 2]
    assert answer.kv_len == 21 + right
    assert client.engine.step() == []


def test_a_chain_survives_preemption_in_its_middle(model: CloudModel) -> None:
    config = SchedulerConfig(max_rows=4, max_chunk_rows=4, idle_preempt_s=100, reservation="none")
    engine = make_engine(model, pages=16, config=config)
    rival = engine.open(EngineOpen(split=0, shape="u", prompt_tokens=63, max_tokens=1, max_context=64))
    engine.add_rows(rival, [1])
    engine.step()
    client, reference = chain_after_prompt(model, 30, right=6, engine=engine, max_context=64)
    engine.step()
    held = engine.core.sessions[client.session_id].table
    assert held.length == 20 + 4  # of 31 rows
    engine.add_rows(rival, prompt_of(62))  # it will need every page
    was_preempted = False
    outputs: list[EngineOutput] = []
    while not (answers := tokens_of(outputs)):
        outputs += engine.step()
        was_preempted = was_preempted or held.length == 0
    assert was_preempted
    assert [one.token for one in answers[0].sampled] == reference[1:8]
    assert answers[0].kv_len == 27
    assert sum(one.num_rows for one in outputs if isinstance(one, Progress)) == 62  # the rival's alone


def test_a_cancel_in_the_middle_of_a_chain_leaves_nothing(model: CloudModel) -> None:
    engine = make_engine(model, config=SchedulerConfig(max_rows=4, max_chunk_rows=4))
    client, _ = chain_after_prompt(model, 10, right=6, engine=engine)
    client.engine.step()
    client.engine.cancel(client.session_id)
    assert [type(output).__name__ for output in client.engine.step()] == ["Closed"]
    assert is_idle(client.engine)


# ---- refusals


def test_a_chain_in_offload_fails_its_session(model: CloudModel) -> None:
    engine = make_engine(model)
    number = engine.open(EngineOpen(split=0, shape="prefix", prompt_tokens=3, max_tokens=4, max_context=64))
    engine.add_rows(number, [1, 2, 3], drafts=[1, 2, 3])
    failed = engine.step()[-1]
    assert isinstance(failed, Failed)
    assert failed.error.code == "verify_in_offload"
    assert is_idle(engine)


def test_every_row_of_a_chain_has_an_id(model: CloudModel) -> None:
    with pytest.raises(ValueError, match="2 draft ids for 3 rows"):
        make_engine(model).add_rows(1, [1, 2, 3], drafts=[1, 2])


def test_a_damaged_row_in_a_chain_fails_its_session_only(model: CloudModel) -> None:
    client, _ = chain_after_prompt(model, 2, right=2)
    other = Drafter(client.engine, model, prompt_of(8), 2, max_tokens=4).start()
    run(client.engine, [other])
    rows = np.ones((3, 64), np.float32)
    rows[2] = np.inf
    damaged = client.engine.open(
        EngineOpen(split=1, shape="prefix", prompt_tokens=1, max_tokens=9, max_context=64)
    )
    client.engine.add_rows(damaged, rows, drafts=[1, 2, 3])
    (failed,) = [output for output in client.engine.step() if isinstance(output, Failed)]
    assert failed.session_id == damaged
    assert other.tokens == greedy_reference(model, prompt_of(8), 4)


# ---- over the wire


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    path = make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")
    return prepare_cloud(path, threads=1, kv_mb=64)


@pytest.fixture(scope="module")
def cloud(prepared: Prepared) -> Iterator[RunningCloud]:
    with running_cloud(prepared) as running:
        yield running


@pytest.mark.parametrize("row_format", ["f32", "bf16"])
async def test_chains_over_a_real_connection(
    cloud: RunningCloud, prepared: Prepared, row_format: str
) -> None:
    """Right, wrong, sent twice, and reaching beyond the last token."""
    prompt = prompt_of(30, 3)
    half = EdgeHalf(prepared.model, 2)
    codec = RowCodec(RowFormat(row_format), 64)
    plain: list[int] = []
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        request = open_of(prompt, split=2, row_format=row_format, max_tokens=12)
        session = edge.core.open(request)
        await edge.send_rows(session, half.rows(prompt), final=True, codec=codec)
        for _ in range(11):
            plain += (await edge.wait(ResultTokens, session.stream)).tokens
            await edge.send_rows(session, half.rows(plain[-1:]), final=True, codec=codec)
        plain += (await edge.wait(ResultTokens, session.stream)).tokens
        await edge.close(session)

        half = EdgeHalf(prepared.model, 2)
        session = edge.core.open(request)
        await edge.send_rows(session, half.rows(prompt), final=True, codec=codec)
        result = await edge.wait(ResultTokens, session.stream)
        tokens = list(result.tokens)
        drafts = guess(plain, 5, right=3)
        while result.finish is None:
            ids = [tokens[-1], *drafts(tokens)]
            half.truncate(session.kv_len)
            session.verify_rows(ids, codec.encode(half.rows(ids)), session.kv_len)
            (message,) = edge.core.data_to_send()
            await edge.socket.send(message)
            await edge.socket.send(message)  # rule 1: answered from what is kept, never computed again
            result = await edge.wait(ResultTokens, session.stream)
            tokens += result.tokens
        closed = await edge.close(session)
    assert tokens == plain
    assert result.finish == "length"
    assert closed.closed.kv_len == 30 + 11


async def test_hidden_rows_of_a_chain_come_down(cloud: RunningCloud, prepared: Prepared) -> None:
    prompt = prompt_of(12, 4)
    half = EdgeHalf(prepared.model, 3)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        session = edge.core.open(open_of(prompt, split=3, shape="u"))
        codec = RowCodec(RowFormat.F32, 64)
        session.verify_rows(prompt, codec.encode(half.rows(prompt)), 0)
        await edge.flush()
        result = await edge.wait(ResultRows, session.stream)
        assert (result.kv_len, result.frame.n_tok) == (12, 12)
        assert result.frame.type is MsgType.RESULT
        await edge.close(session)


@pytest.mark.parametrize(
    ("shape", "split", "ids", "code"),
    [
        ("prefix", 2, [5, 320], "bad_token_id"),
        ("u", 2, [0, 7], "draft_ids_refused"),
        ("prefix", 0, [5, 6], "verify_in_offload"),
    ],
)
async def test_hostile_chains_end_their_session(
    cloud: RunningCloud, shape: str, split: int, ids: list[int], code: str
) -> None:
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        session = edge.core.open(open_of([1], split=split, shape=shape))
        if split:
            rows = RowCodec(RowFormat.F32, 64).encode(np.ones((2, 64), np.float32))
        session.step_rows(rows, 0, 2, final=False) if split else session.step_ids([1, 2], 0, final=False)
        open_message, step = edge.core.data_to_send()
        await edge.socket.send(open_message)
        await edge.socket.send(hostile(step, ids))
        with pytest.raises(IsthmusError) as caught:
            await edge.wait(ResultTokens, session.stream)
        assert caught.value.code == code


def hostile(step: bytes, ids: list[int]) -> bytes:
    """The STEP as a VERIFY over `ids`, which no edge of ours would send."""
    frame = decode_frame(step, max_body=1 << 20)
    prefix = encode_ids(ids)
    return encode_frame(
        replace(frame, type=MsgType.VERIFY, body=prefix + frame.body, raw_len=frame.raw_len + len(prefix))
    )

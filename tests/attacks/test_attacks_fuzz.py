"""Fuzzing: 10⁵ cases and more here, 10⁶ by `make fuzz`. Parse, or IsthmusError; nothing else, and no memory.

Hypothesis draws the seeds of batches, because an example of its own costs more than a hundred cases. The case
that fails is made smaller by leaving out edits or messages, and told in full.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from isthmus.protocol.errors import IsthmusError
from tests.attacks.fuzz_connections import CLOUD_SIDE, EDGE_SIDE, Side, draw_conversation
from tests.attacks.fuzz_targets import Target, decoder_targets
from tests.attacks.mutation import Edit, apply, draw_edits, shrink

CASES = int(os.environ.get("FUZZ_CASES", "250000"))
IN_CI = "FUZZ_CASES" not in os.environ
BATCH = 250
CONVERSATION = 6
SHARE_OF_CONNECTIONS = 0.06  # of the cases, for each end
MAX_GROWTH_BYTES = 64 * 2**20

count: Counter[str] = Counter()


def examples(share: float, batch: int) -> settings:
    """So many batches that their cases are `share` of all. The same ones each time in CI."""
    return settings(
        max_examples=max(2, round(CASES * share / batch)),
        deadline=None,
        database=None,
        derandomize=IN_CI,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def fails(target: Target, good: bytes, edits: list[Edit]) -> bool:
    try:
        target.run(apply(good, edits))
    except IsthmusError as error:
        return not (error.code and error.message)
    except Exception:
        return True
    return False


def run_batch(target: Target, seed: int) -> None:
    for number in range(BATCH):
        rng = Random(f"{target.name}:{seed}:{number}")
        good = rng.choice(target.good)
        edits = draw_edits(rng, len(good))
        count[target.name] += 1
        if fails(target, good, edits):
            least = shrink(edits, partial(fails, target, good))
            at = target.good.index(good)
            told = f"{target.name}: good input {at} with {least} is {apply(good, least)[:500]!r}"
            try:
                target.run(apply(good, least))
            except IsthmusError as error:
                raise AssertionError(f"an error without a code or a message: {told}") from error
            except Exception as error:
                raise AssertionError(told) from error


TARGETS = decoder_targets()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_decoders_parse_or_raise_a_typed_error(target: Target) -> None:
    for good in target.good:
        target.run(good)

    @examples(target.share, BATCH)
    @given(seed=st.integers(0, 2**40))
    def fuzz(seed: int) -> None:
        run_batch(target, seed)

    before = peak_bytes(reset=True)
    fuzz()
    assert peak_bytes() - before < MAX_GROWTH_BYTES


def breaks(side: Side, messages: list[bytes]) -> bool:
    try:
        side.play(messages)
    except Exception:
        return True
    return False


@pytest.mark.parametrize("side", [CLOUD_SIDE, EDGE_SIDE], ids=lambda side: side.name)
def test_connections_turn_whatever_comes_into_events(side: Side) -> None:
    batch = 40 * CONVERSATION

    @examples(SHARE_OF_CONNECTIONS, batch)
    @given(seed=st.integers(0, 2**40))
    def fuzz(seed: int) -> None:
        for number in range(batch // CONVERSATION):
            messages = draw_conversation(Random(f"{side.name}:{seed}:{number}"), side, CONVERSATION)
            count[side.name] += len(messages)
            if breaks(side, messages):
                for message in list(messages):
                    fewer = [other for other in messages if other is not message]
                    if breaks(side, fewer):
                        messages = fewer
                try:
                    side.play(messages)
                except Exception as error:
                    raise AssertionError(f"{side.name}: {messages!r}") from error

    before = peak_bytes(reset=True)
    fuzz()
    assert peak_bytes() - before < MAX_GROWTH_BYTES


def peak_bytes(*, reset: bool = False) -> int:
    """The process's largest resident size since the last reset; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def test_there_were_enough_cases(capsys: pytest.CaptureFixture[str]) -> None:
    """Last in the file: says how many cases there were, as the tests above counted them."""
    total = sum(count.values())
    if len(count) < len(TARGETS) + 2:
        pytest.skip(f"only {len(count)} of the fuzz tests were run")
    with capsys.disabled():
        print(f"\nfuzz: {total:,} cases ({', '.join(f'{name} {n:,}' for name, n in count.items())})")
    assert total >= min(CASES, 100_000)

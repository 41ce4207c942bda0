"""The corpus against the pure codec and state machine: the right typed answer, in the right scope."""

from __future__ import annotations

import tracemalloc

import pytest

from isthmus.protocol.frames import MsgType, parse_json
from isthmus.protocol.messages import ErrorBody
from tests.attacks.bad_inputs import Attack
from tests.attacks.corpus import ATTACKS
from tests.attacks.sansio import PureCloud

# Above the largest message of the corpus (1 MiB, held twice while it is parsed); a bomb would take 512.
MAX_ALLOCATED = 8 * 2**20


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_the_answer_is_typed_and_reaches_no_further_than_it_must(attack: Attack) -> None:
    cloud = PureCloud()
    tracemalloc.start()
    try:
        frames = list(cloud.play(attack))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_ALLOCATED
    errors = [parse_json(frame, ErrorBody) for frame in frames if frame.type is MsgType.ERROR]
    if attack.reply is not MsgType.ERROR:
        assert errors == []
        assert attack.reply in {frame.type for frame in frames}
    else:
        assert [error.code for error in errors] == [attack.code]
        assert errors[0].message
        assert errors[0].fatal == attack.fatal
    assert cloud.core.is_closed == cloud.failed == attack.fatal
    cloud.core.lost()
    assert (cloud.usage.num_sessions, cloud.usage.kv_bytes) == (0, 0)

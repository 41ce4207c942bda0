"""The corpus: every case that is a matter of messages. Behaviours and files are in tables of their own."""

from __future__ import annotations

from tests.attacks.bad_inputs import Attack
from tests.attacks.corpus_framing import FRAMING_ATTACKS
from tests.attacks.corpus_session import SESSION_ATTACKS
from tests.attacks.corpus_tensor import TENSOR_ATTACKS, ZSTD_ATTACKS

ATTACKS: tuple[Attack, ...] = (*FRAMING_ATTACKS, *TENSOR_ATTACKS, *ZSTD_ATTACKS, *SESSION_ATTACKS)

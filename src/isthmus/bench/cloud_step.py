"""One cloud decode step by itself: an engine driven by hand, no server and no network.

Run as a process (`python -m isthmus.bench.cloud_step MODEL PRECISION SPLIT CONTEXT THREADS`). It reads lines
from standard input and answers each with one JSON line: `open` starts a session that enters at SPLIT with
CONTEXT rows (answer: the precision), `step` runs one decode step (answer: its seconds), `close` ends it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from isthmus.cloud.engine import Engine


MAX_STEPS = 1024


def main() -> None:
    from isthmus.cloud.engine_session import Closed, EngineOpen, Tokens

    model, precision, split, context, threads = sys.argv[1:6]
    engine = _engine(model, precision, int(threads) or None)
    spec = engine.core.forward.spec
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((int(context), spec.hidden), dtype=np.float32)
    session = 0

    def until(kind: type[object]) -> None:
        while not any(isinstance(output, kind) for output in engine.step()):
            pass

    for line in sys.stdin:
        answer: str | float = 0.0
        match line.strip():
            case "open":
                session = engine.open(
                    EngineOpen(
                        split=int(split),
                        shape="prefix",
                        prompt_tokens=int(context),
                        max_tokens=MAX_STEPS,
                        max_context=int(context) + MAX_STEPS,
                    )
                )
                engine.add_rows(session, rows, output="last")
                until(Tokens)
                answer = engine.core.forward.model.precision.value
            case "step":
                started = time.perf_counter()
                engine.add_rows(session, rows[:1], output="last")
                until(Tokens)
                answer = time.perf_counter() - started
            case "close":
                engine.cancel(session)
                until(Closed)
        print(json.dumps(answer), flush=True)


def _engine(model: str, precision: str, threads: int | None) -> Engine:
    """An engine as `isthmus serve cloud` makes it, driven by hand."""
    from isthmus.cloud.engine import Engine
    from isthmus.cloud.serve import CloudOptions, prepare
    from isthmus.logs import configure_log
    from isthmus.splitter.checkpoint import open_checkpoint
    from isthmus.splitter.sources import pull
    from isthmus.splitter.tokenizer import Tokenizer

    configure_log()  # to standard error: standard output is for the answers
    pulled = pull(model)
    with open_checkpoint(pulled.path) as checkpoint:
        options = CloudOptions(precision=precision, threads=threads)
        prepared = prepare(checkpoint, Tokenizer.from_bytes(pulled.tokenizer_json), options)
    return Engine.over(prepared.model, prepared.num_pages)


if __name__ == "__main__":
    main()

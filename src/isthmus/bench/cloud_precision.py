"""`bench cloud` for one model at one precision: decode speed, its floor, the peer, mixed against uniform."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np

from isthmus.bench.cloud_fleet import CloudRig, Decode, Fleet, Shape, equal_work, spread
from isthmus.bench.cloud_peer import TransformersPeer
from isthmus.bench.cloud_subject import Subject
from isthmus.bench.matmul_floor import MatmulFloor, head_matrix, layer_matrices, rows_per_layer
from isthmus.bench.report import spread as stats
from isthmus.cloud.model import CloudModel
from isthmus.protocol.errors import IsthmusError

A = TypeVar("A")
B = TypeVar("B")

PEER_BATCHES: Final = (1, 8)
MAX_PEER_ROUNDS: Final = 3
"""Its rounds are the longest by far: each computes the prompts twice, see `TransformersPeer`."""
ONE_AT_A_TIME: Final = 4
"""What one session does is measured on this many, spread over the depths, each decoding by itself."""


@dataclass
class PrecisionResult:
    """`figures` by the names of CONTRACT.md, and the rows behind them."""

    figures: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def num_uniform(sessions: Sequence[int]) -> int:
    """Sessions at K = 0 that `mixed_over_uniform` compares with; the mixed ones are almost twice as many."""
    return max(2, max(sessions) // 2)


class PrecisionBench:
    """Measures one loaded model. Everything compared alternates within a round; medians are reported."""

    def __init__(
        self,
        model: CloudModel,
        subject: Subject,
        *,
        sessions: Sequence[int],
        prompt_tokens: int,
        output_tokens: int,
        rounds: int,
        bandwidth: float,
    ) -> None:
        """`bandwidth` in bytes per second, for the roofline."""
        self.model = model
        self.subject = subject
        self.sessions = sessions
        self.rounds = rounds
        self.bandwidth = bandwidth
        most = max(*sessions, 2 * num_uniform(sessions), *(PEER_BATCHES if subject.peer else ()))
        self.rig = CloudRig(
            model,
            subject.inputs,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            max_whole_sessions=most,
        )
        self.result = PrecisionResult()

    def run(self) -> PrecisionResult:
        for count in self.sessions:
            self._decode(count)
        speed = {count: self.result.figures[f"decode_tokens_per_s_{count}"] for count in self.sessions}
        for count in self.sessions:
            if count > 1 and 1 in speed:
                self.result.figures[f"scaling_{count}_over_1"] = speed[count] / speed[1]
        if self.subject.peer is not None:
            for batch in PEER_BATCHES:
                self._against_peer(self.subject.peer, batch)
        if self.model.spec.num_layers > 1:
            self._mixed_against_uniform("u")
            self._mixed_against_uniform("prefix")
        return self.result

    def _decode(self, count: int) -> None:
        """`count` sessions over all depths against the floor of their matrix products."""
        together = count > 1
        splits = spread(count if together else ONE_AT_A_TIME, self.model.spec.num_layers)
        steps = self.rig.output_tokens
        with self.rig.fleet(splits, together=together) as fleet:
            floors = [MatmulFloor(self.model, group) for group in fleet.group_splits]
            pairs = alternate(
                self.rounds,
                fleet.decode,
                lambda: [floor.seconds(steps) for floor in floors],
                warm=lambda: (fleet.decode(1), [floor.seconds(1) for floor in floors]),
            )
            for decode, _ in pairs:
                _check_floor(decode, floors, steps)
            account = self.rig.check_kv()
            self._rows_of(fleet, count, pairs)
        self._place("kv_bytes", len(splits), "(N - K) x tokens, in pages", account.to_row())

    def _rows_of(self, fleet: Fleet, count: int, pairs: Sequence[tuple[Decode, list[float]]]) -> None:
        steps, how = self.rig.output_tokens, "spread" if count > 1 else "spread, one at a time"
        num_tokens = len(fleet.sessions) * steps
        speeds = [num_tokens / decode.total_s for decode, _ in pairs]
        shares = [sum(floor) / decode.total_s for decode, floor in pairs]
        self._figure(f"decode_tokens_per_s_{count}", "decode_tokens_per_s", count, how, speeds)
        self._figure(f"over_matmul_floor_{count}", "over_matmul_floor", count, how, shares)
        self._row("step_ms", count, how, [1e3 * d.total_s / steps / len(fleet.groups) for d, _ in pairs])
        self._row("prefill_rows_per_s", count, how, [fleet.num_prompt_rows / fleet.prefill_s])
        num_bytes = sum(self._step_bytes(splits) for splits in fleet.group_splits) * steps
        roofline = [num_bytes / decode.total_s / self.bandwidth for decode, _ in pairs]
        self._figure(f"roofline_share_{count}", "roofline_share", count, how, roofline)
        if count == 1:  # the first of them is the whole model
            whole = [(decode.seconds[0], floor[0]) for decode, floor in pairs]
            self._row("decode_tokens_per_s", 1, "K = 0", [steps / ours for ours, _ in whole])
            self._row("over_matmul_floor", 1, "K = 0", [floor / ours for ours, floor in whole])

    def _against_peer(self, peer: TransformersPeer, batch: int) -> None:
        """`batch` sessions at K = 0 against `generate` at that batch: the same layers for the same rows."""
        steps, texts = self.rig.output_tokens, self.subject.inputs.ids
        prompts = np.stack([texts[i % len(texts)][: self.rig.prompt_tokens] for i in range(batch)])
        with self.rig.fleet([0] * batch) as fleet:
            pairs = alternate(
                min(self.rounds, MAX_PEER_ROUNDS),
                fleet.decode,
                lambda: peer.decode_seconds(prompts, steps),
                warm=lambda: (fleet.decode(1), peer.decode_seconds(prompts, 1)),
            )
        ours = [batch * steps / decode.total_s for decode, _ in pairs]
        theirs = [batch * steps / seconds for _, seconds in pairs]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        how = "K = 0, beside transformers"
        self._row("decode_tokens_per_s", batch, how, ours)
        self._row("decode_tokens_per_s", batch, "transformers generate, bf16", theirs)
        self._figure(f"over_transformers_{batch}", "over_transformers", batch, how, ratios)

    @property
    def _mixed_steps(self) -> int:
        """Half a round is enough: four fleets of many sessions take most of the bench's time."""
        return max(1, self.rig.output_tokens // 2)

    def _mixed_against_uniform(self, shape: Shape) -> None:
        """Row-layers per second of sessions over all depths and of sessions at K = 0, as many of them."""
        count, num_layers = num_uniform(self.sessions), self.model.spec.num_layers
        steps = self._mixed_steps
        with (
            self.rig.fleet([0] * count, shape=shape) as uniform,
            self.rig.fleet(equal_work(count, num_layers), shape=shape) as mixed,
        ):
            pairs = alternate(
                self.rounds,
                lambda: uniform.decode(steps),
                lambda: mixed.decode(steps),
                warm=lambda: (uniform.decode(1), mixed.decode(1)),
            )
            for a, b in pairs:
                if sum(a.row_layers) != sum(b.row_layers):
                    raise IsthmusError(
                        f"mixed steps ran {sum(b.row_layers)} row-layers, uniform ones {sum(a.row_layers)}",
                        code="bench_uneven",
                    )
        how = f"{shape}-shape"
        if shape == "u":
            self._mixed_floor(uniform.splits, mixed.splits)
        for name, decodes in (("uniform", [a for a, _ in pairs]), ("mixed", [b for _, b in pairs])):
            rates = [sum(one.row_layers) / one.total_s for one in decodes]
            size = len((uniform if name == "uniform" else mixed).sessions)
            self._row(f"{name}_row_layers_per_s", size, how, rates)
        ratios = [a.total_s / b.total_s for a, b in pairs]
        name = "mixed_over_uniform" + ("" if shape == "u" else "_prefix")
        self._figure(name, "mixed_over_uniform", len(mixed.sessions), how, ratios)

    def _mixed_floor(self, uniform: Sequence[int], mixed: Sequence[int]) -> None:
        """The same comparison of the bare matrix products: what of it the kernels alone explain."""
        steps = self._mixed_steps
        a, b = (MatmulFloor(self.model, splits, head=False) for splits in (uniform, mixed))
        pairs = alternate(
            self.rounds,
            lambda: a.seconds(steps),
            lambda: b.seconds(steps),
            warm=lambda: (a.seconds(1), b.seconds(1)),
        )
        self._row("mixed_over_uniform", len(mixed), "matrix products alone", [x / y for x, y in pairs])

    def _step_bytes(self, splits: Sequence[int]) -> float:
        """Bytes a decode step must read: the weights of the layers it runs and of the head, once, and the
        keys and values of each session's layers, at the middle of a round."""
        model, spec = self.model, self.model.spec
        running = zip(rows_per_layer(splits, spec.num_layers), layer_matrices(model), strict=True)
        weights = sum(matrix.read_bytes for rows, layer in running if rows for matrix in layer)
        tokens = self.rig.prompt_tokens + (self.rig.output_tokens + 1) / 2
        layers = sum(spec.num_layers - split for split in splits)
        per_token = spec.kv_bytes_per_token_layer(model.precision.compute_dtype.itemsize)
        return weights + head_matrix(model).read_bytes + layers * tokens * per_token

    def _row(self, what: str, sessions: int, how: str, samples: Sequence[float]) -> None:
        self._place(what, sessions, how, stats(samples))

    def _place(self, what: str, sessions: int, how: str, values: Mapping[str, float]) -> None:
        place = {"precision": self.model.precision.value, "what": what, "sessions": sessions, "how": how}
        self.result.rows.append({**place, **values})

    def _figure(self, name: str, what: str, sessions: int, how: str, samples: Sequence[float]) -> None:
        self.result.figures[name] = statistics.median(samples)
        self._row(what, sessions, how, samples)


def alternate(
    rounds: int, a: Callable[[], A], b: Callable[[], B], *, warm: Callable[[], object]
) -> list[tuple[A, B]]:
    """What `a` and `b` return in each round, in the order A B, B A, A B, …: drift of the machine hits both
    alike. `warm` runs first, so that nothing timed is a first time."""
    warm()
    pairs: list[tuple[A, B]] = []
    for number in range(rounds):
        if number % 2:
            second = b()
            pairs.append((a(), second))
        else:
            first = a()
            pairs.append((first, b()))
    return pairs


def _check_floor(decode: Decode, floors: Sequence[MatmulFloor], steps: int) -> None:
    """The floor must have run the rows that the engine counted."""
    ran = tuple(floor.row_layers * steps for floor in floors)
    if ran != decode.row_layers:
        raise IsthmusError(
            f"the floor ran {ran} row-layers, the engine {decode.row_layers}", code="bench_uneven"
        )


def copy_bandwidth(device: str) -> float:
    """Bytes per second of memory read and written by copying a large tensor; the best of a few."""
    import time

    import torch

    size = 1 << (30 if device.startswith("cuda") else 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(6):
        begun = time.perf_counter()
        target.copy_(source)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = max(best, 2 * size / (time.perf_counter() - begun))
    return best

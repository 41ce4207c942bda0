"""From how many rows on widened weights beat torch's integer kernels: measured at start-up, and remembered.

The kernels read the least and win for few rows; bf16 weights run the fast ordinary product. They are kept
beside the integers where memory is plentiful, else widened each time, which costs the same for any number of
rows. Where the two ways cross depends on the processor, the threads and the matrix, so it is measured per
kind and shape. Answers depend on it by rounding only (see `Int8Linear`, `Int4Linear`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Final

import psutil
import torch
from torch import Tensor

from isthmus.cloud.cpu_watch import CpuWatch, too_busy_to_time
from isthmus.cloud.linear_integer import WIDE_BLOCK, IntegerLinear
from isthmus.cloud.start_cache import read_start_cache, start_cache_path, write_start_cache

ROWS: Final = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Where the crossing is looked for."""

NEVER: Final = 1 << 30
"""The kernel won at every number of rows tried."""

KEPT_WIDE_ROWS: Final = 16
"""Until it is measured: where the two ways were seen to cross with kept copies on two AVX-512 cores."""

_REPEATS: Final = 5
_FORMAT: Final = 1


def crossover(seconds: Callable[[int], tuple[float, float]], rows: Sequence[int] = ROWS) -> int:
    """The fewest of `rows` (ascending) for which widening is no slower, or NEVER. Pure.

    `seconds(n)` are the kernel's and widening's times for n rows. Bisection, so a few of `rows` are asked
    for: the two are taken to cross once.
    """
    low, high = 0, len(rows)
    while low < high:
        middle = (low + high) // 2
        kernel_s, widened_s = seconds(rows[middle])
        if widened_s <= kernel_s:
            high = middle
        else:
            low = middle + 1
    return rows[low] if low < len(rows) else NEVER


Seconds = Callable[[Sequence[IntegerLinear], int], tuple[float, float]]
"""Layers of one kind and shape and a number of rows → seconds of the kernel and of widening."""


@torch.inference_mode()
def kernel_and_widened_s(layers: Sequence[IntegerLinear], num_rows: int) -> tuple[float, float]:
    """Both ways in turns, the fastest of a few: other work on the machine only ever adds. Each time on
    another layer, as in a step, which finds no weights in the cache."""
    x = torch.ones((num_rows, layers[0].shape[1]), dtype=torch.bfloat16, device=layers[0].device)
    kernel_s = widened_s = float("inf")
    for linear in islice(cycle(layers), _REPEATS):
        kernel_s = min(kernel_s, _seconds(linear.kernel, x))
        widened_s = min(widened_s, _seconds(linear.widened, x))
    return kernel_s, widened_s


def _seconds(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    begun = time.perf_counter()
    product(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - begun


def tune_widening(
    linears: Iterable[object],
    device: torch.device,
    *,
    keep_bytes: int | None = None,
    seconds: Seconds = kernel_and_widened_s,
) -> dict[str, int]:
    """Sets `wide_rows` of every int8 and int4 layer that has both ways → what was set, by kind and shape.

    bf16 copies are kept ("+bf16") if all of them fit in `keep_bytes`, by default an eighth of free memory.
    The search takes about 20 ms per shape that is not known yet. Where other work on the machine would spoil
    it, the layers keep the default, and the next start tries again.
    """
    layers = [linear for linear in linears if isinstance(linear, IntegerLinear) and linear.has_kernel]
    _keep_copies(layers, free_bytes(device) // 8 if keep_bytes is None else keep_bytes)
    path = start_cache_path("widening", device, _FORMAT)
    known = {name: rows for name, rows in read_start_cache(path).items() if type(rows) is int and rows > 0}
    unknown: dict[str, list[IntegerLinear]] = {}
    for linear in layers:
        if (name := _name(linear)) not in known:
            unknown.setdefault(name, []).append(linear)
    threads, on_cpu = torch.get_num_threads(), device.type == "cpu"
    if unknown and not (on_cpu and too_busy_to_time(threads)):
        watch = CpuWatch(threads)
        fresh = {name: crossover(partial(seconds, _sample(alike))) for name, alike in unknown.items()}
        if not (on_cpu and watch.disturbed()):
            known |= fresh
            write_start_cache(path, known)
    for linear in layers:
        linear.wide_rows = known.get(_name(linear), linear.wide_rows)
    return {_name(linear): linear.wide_rows for linear in layers}


def free_bytes(device: torch.device) -> int:
    """Memory that nothing uses yet."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available: int = psutil.virtual_memory().available
    return available


def _keep_copies(layers: Sequence[IntegerLinear], most_bytes: int) -> None:
    """All or none: a step passes every layer."""
    wanted = sum(2 * linear.shape[0] * linear.shape[1] for linear in layers if linear.wide is None)
    if wanted <= most_bytes:
        for linear in layers:
            if linear.wide is None:
                linear.keep_wide()
                linear.wide_rows = KEPT_WIDE_ROWS


def _name(linear: IntegerLinear) -> str:
    num_out, num_in = linear.shape
    return f"{linear.kind}{'' if linear.wide is None else '+bf16'} {num_out}x{num_in}"


def _sample(alike: Sequence[IntegerLinear]) -> list[IntegerLinear]:
    """A few of them, and of a large matrix the first outputs: both ways take time in proportion to these."""
    num_out, num_in = alike[0].shape
    few = max(64, WIDE_BLOCK // num_in // 64 * 64)
    return [linear.first_rows(few) if few < num_out else linear for linear in alike[:_REPEATS]]

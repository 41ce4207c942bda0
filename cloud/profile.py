"""The cloud's own profile: measured on the real engine once per model and machine, then kept."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import torch

from isthmus.cloud.cpu_watch import CpuWatch
from isthmus.cloud.engine import Engine
from isthmus.cloud.forward import MixedForward
from isthmus.cloud.kv import BlockTable, columns_for
from isthmus.cloud.linear_integer import IntegerLinear
from isthmus.cloud.model import CloudModel
from isthmus.cloud.start_cache import read_start_cache, start_cache_path, write_start_cache
from isthmus.cloud.step_figures import Probe, probes, step_figures
from isthmus.cloud.step_timer import WHOLE_STEPS, StepTimer
from isthmus.protocol.activations import RowCodec, RowFormat, choose_outliers
from isthmus.protocol.errors import ConfigError
from isthmus.protocol.profiles import FIGURES, DeviceProfile, Label
from isthmus.protocol.sampling import SamplingParams, sample
from isthmus.splitter.machine import cpu_name
from isthmus.splitter.power import EnergyMeter, SampledMeter, find_meter, measure_watts

DISTURBED: Final = "other work took the cores while this was measured"
_MOST_STEPS: Final = 5
_ENOUGH_S: Final = 0.03
_BUDGET_S: Final = 10.0  # on a machine so slow, the curves have fewer points
_NEEDED_PROBES: Final = 3
_CODEC_ROWS: Final = 64
_EMBED_ROWS: Final = 64
_REPEATS: Final = 5
_CACHE_BYTES: Final = 64 * 1024 * 1024
_IDLE_S: Final = 0.5
_MOST_SETTLE_S: Final = 1.0  # a meter that takes longer tells nothing of a measurement this short
_FORMAT: Final = 1


def kept_or_measured(model: CloudModel, *, source_hash: str, **measuring: Any) -> DeviceProfile:
    """The profile of an earlier start, or what `measure_cloud` finds now, `measuring` being its parameters.
    One that other work disturbed is not kept: the next start measures again."""
    path = start_cache_path("profile", model.device, _FORMAT, source_hash, model.precision.value)
    if kept := read_start_cache(path):
        # What is damaged or of another version is measured anew.
        with suppress(ConfigError):
            return DeviceProfile.from_json(json.dumps(kept), name=str(path))
    profile = measure_cloud(model, meter=power_meter(model.device), **measuring)
    if profile.note != DISTURBED:
        write_start_cache(path, profile.model_dump(mode="json"))
    return profile


def measure_cloud(
    model: CloudModel,
    *,
    num_pages: int,
    context_length: int,
    load_s: float | None = None,
    kl: float | None = None,
    meter: EnergyMeter | None = None,
    budget_s: float = _BUDGET_S,
) -> DeviceProfile:
    """Times the model as it stands, with nothing else running: about a second for SmolLM2 on two cores.

    `num_pages` (at least one per layer) bounds the KV memory taken meanwhile, `context_length` the tokens of
    a session. `load_s`: seconds that loading the whole model took. After `budget_s` seconds no further point
    of a curve is begun. Every layer is taken to cost the same, and of memory only the weights are counted.
    Raises whatever the engine does.
    """
    spec, device, on_cuda = model.spec, model.device, model.device.type == "cuda"
    watch = CpuWatch(torch.get_num_threads())
    # Loading has just ended and nothing else runs: this is as idle as it gets.
    idle_w = None if meter is None else measure_watts(meter, lambda: time.sleep(_IDLE_S / 10), _IDLE_S)
    timed, active_w = _time_steps(model, num_pages, context_length, budget_s, meter)
    embed_row_s, head_s = _embed_row_s(model), _head_s(model)
    steps = step_figures(timed, num_layers=spec.num_layers, embed_row_s=embed_row_s, head_s=head_s)
    copies = [_copy_bytes(linear) for linear in model.linears]

    def label(known: bool) -> Label:
        return "measured" if known else "unavailable"

    labels: dict[str, Label] = dict.fromkeys(FIGURES, label(True))
    labels["layer_share"] = labels["memory"] = "modelled"
    labels |= {
        "load": label(load_s is not None),
        "power": label(active_w is not None),
        "kl": label(kl is not None),
        "batch": label(len(steps.batch) > 1),
    }
    return DeviceProfile(
        side="cloud",
        device=torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        provider=f"torch {device.type}",
        threads=torch.get_num_threads(),
        model=spec.base_name,
        precision=model.precision.value,
        num_layers=spec.num_layers,
        hidden=spec.hidden,
        dated=datetime.now(UTC).date().isoformat(),
        note=DISTURBED if not on_cuda and watch.disturbed() else "",
        prefill=steps.prefill,
        prefill_context_s=steps.prefill_context_s,
        decode=steps.decode,
        layer_share=(1.0,) * spec.num_layers,
        step_s=steps.step_s,
        embed_row_s=embed_row_s,
        head_s=head_s,
        codec_row_s=_codec_row_s(model),
        batch=steps.batch,
        load_s=(load_s or 0.0) / spec.num_layers,
        layer_bytes=(model.layers_bytes + sum(copies[:-1])) // spec.num_layers,
        embed_bytes=model.embed_bytes,
        head_bytes=model.head_bytes + copies[-1],
        scratch_bytes=0,
        idle_w=idle_w,
        active_w=active_w,
        kl=kl,
        labels=labels,
    )


def _time_steps(
    model: CloudModel, num_pages: int, context_length: int, budget_s: float, meter: EnergyMeter | None
) -> tuple[dict[Probe, float], float | None]:
    """Seconds of those steps whose pages fit, on an engine of its own that is gone afterwards, and the mean
    power meanwhile."""
    num_layers = model.spec.num_layers
    wanted = {
        probe: sum((num_layers - first) * columns_for(start + rows) for first, start, rows in probe.mix)
        for probe in probes(num_layers, context_length)
    }
    fitting = {probe: pages for probe, pages in wanted.items() if pages <= num_pages}
    timer = StepTimer(Engine.over(model, max(fitting.values()), WHOLE_STEPS), seed=0)
    timed: dict[Probe, float] = {}
    begun_j = ended_j = None if meter is None else meter.joules()
    begun = time.monotonic()
    for probe in fitting:
        if len(timed) >= _NEEDED_PROBES and time.monotonic() - begun > budget_s:
            break
        timed[probe] = timer.seconds(probe.mix, least=2, most=_MOST_STEPS, enough_s=_ENOUGH_S)
        ended_j = None if meter is None else meter.joules()
    seconds = time.monotonic() - begun
    if model.device.type == "cuda":
        # The serving engine's pool is about to take most of what is free.
        del timer
        gc.collect()
        torch.cuda.empty_cache()
    return timed, None if begun_j is None or ended_j is None else (ended_j - begun_j) / seconds


def _fastest_s(
    device: torch.device, work: Callable[[], Any], *, before: Callable[[], Any] = lambda: None
) -> float:
    """Seconds of `work`, which runs on `device`: the fastest of a few, each after `before`."""
    taken: list[float] = []
    for _ in range(_REPEATS):
        before()
        _wait_for(device)
        begun = time.perf_counter()
        work()
        _wait_for(device)
        taken.append(time.perf_counter() - begun)
    return min(taken)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _embed_row_s(model: CloudModel) -> float:
    ids = np.arange(_EMBED_ROWS) % model.spec.vocab_size
    return _fastest_s(model.device, lambda: model.embed(ids)) / _EMBED_ROWS


def _head_s(model: CloudModel) -> float:
    """Norm, head and a greedy draw of one row, with caches as the layers leave them: full of other things."""
    greedy = SamplingParams(temperature=0.0)
    row = model.embed([0])
    other = torch.zeros(_CACHE_BYTES, dtype=torch.uint8, device=model.device)

    def work() -> None:
        sample(model.head(row).float().cpu().numpy()[0], greedy, position=1)

    return _fastest_s(model.device, work, before=lambda: other.add_(1))


def _codec_row_s(model: CloudModel) -> float:
    """Decoding a row of the default format, out of a chunk of rows as they leave the middle of the model:
    how far they compress, and so the time, depends on what they hold."""
    spec = model.spec
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, min(_CODEC_ROWS, spec.context_length))
    store, pool = model.new_pages(spec.num_layers * columns_for(len(ids)))
    table = BlockTable(pool, first_layer=0, num_layers=spec.num_layers)
    table.ensure(len(ids))  # nothing is shared, so nothing to copy
    rows = MixedForward(model, store).boundaries(ids, table)[spec.num_layers // 2]
    codec = RowCodec(RowFormat.INT8, spec.hidden, choose_outliers(rows))
    encoded = codec.encode(rows)

    def work() -> None:
        codec.decode(
            encoded.body,
            n_tok=len(rows),
            dtype=encoded.dtype,
            codec=encoded.codec,
            raw_len=encoded.raw_len,
            max_raw=encoded.raw_len,
        )

    return _fastest_s(model.device, work) / len(rows)


def power_meter(device: torch.device) -> EnergyMeter | None:
    """What tells the power of `device` quickly enough for a start, or None."""
    if device.type == "cuda":
        return (
            SampledMeter("NVML", _MOST_SETTLE_S, lambda: _gpu_watts(device)) if _gpu_watts(device) else None
        )
    meter = find_meter()
    return meter if meter is not None and meter.settle_s <= _MOST_SETTLE_S else None


def _gpu_watts(device: torch.device) -> float | None:
    """As NVML tells it, over the last second or less. torch has no NVML of its own: None without pynvml."""
    try:
        return torch.cuda.power_draw(device) / 1e3
    except (ImportError, RuntimeError):
        return None


def _copy_bytes(linear: object) -> int:
    """Of the widened copy that an integer layer keeps beside its weights."""
    return linear.wide.nbytes if isinstance(linear, IntegerLinear) and linear.wide is not None else 0

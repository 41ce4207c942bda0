"""`isthmus profile`: what this device can do with a model, measured and kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from isthmus.commands.options import BitsOption
from isthmus.commands.output import JsonFlag, ModelOption, human_bytes, out, print_json, progress_bar
from isthmus.commands.setup import provide_pack
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.protocol.profiles import DeviceProfile


def profile(
    model: ModelOption = None,
    bits: BitsOption = None,
    provider: Annotated[
        str | None, typer.Option("--provider", help="ONNX Runtime's execution provider.", metavar="NAME")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Compute threads of the edge.", min=1, metavar="N")
    ] = None,
    memory_mb: Annotated[
        int | None,
        typer.Option("--memory-mb", help="Load no more than this at once.", min=1, metavar="MB"),
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="Write the profile there, too, for use elsewhere.", metavar="FILE"),
    ] = None,
    idle_watts: Annotated[
        float | None,
        typer.Option("--idle-watts", help="Power when idle, where no sensor tells.", min=0, metavar="W"),
    ] = None,
    active_watts: Annotated[
        float | None,
        typer.Option(
            "--active-watts", help="Power when computing, where no sensor tells.", min=0, metavar="W"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples; the memory is modelled.")] = False,
    json: JsonFlag = False,
) -> None:
    """Measure this device: seconds, bytes and watts of each part of a model."""
    from isthmus.splitter.profile_store import profile_path, save_profile
    from isthmus.splitter.profiling import measure_edge

    settings = Settings(
        {"model": model, "bits": bits, "provider": provider, "threads": threads, "memory_mb": memory_mb}
    )
    watts = _watts(idle_watts, active_watts)
    pack = provide_pack(settings)
    name, size = settings.text("provider") or "cpu", settings.number("threads")
    with progress_bar() as progress:
        measured = measure_edge(
            pack,
            provider=name,
            threads=size,
            watts=watts,
            quick=quick,
            memory_mb=settings.number("memory_mb"),
            progress=progress,
        )
    kept = profile_path(pack, name, size)
    for file in (kept, *([out_file] if out_file is not None else [])):
        save_profile(file, measured)
    if json:
        print_json(measured.model_dump(mode="json"))
        return
    out.print(profile_table(measured))
    out.print(f"kept in {out_file or kept}", soft_wrap=True, markup=False)


def _watts(idle: float | None, active: float | None) -> tuple[float, float] | None:
    from isthmus.splitter.power import check_watts

    if (idle is None) != (active is None):
        raise ConfigError(
            f"--{'active' if active is None else 'idle'}-watts is missing",
            code="bad_watts",
            hint="give both --idle-watts and --active-watts, or neither",
        )
    watts = None if idle is None or active is None else (idle, active)
    check_watts(watts)
    return watts


def profile_table(profile: DeviceProfile) -> Table:
    """A profile as people read it: each figure with where it comes from."""
    p, layers = profile, profile.num_layers

    def time(seconds: float) -> str:
        return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"

    def points(curve: tuple[tuple[float, float], ...], unit: str) -> str:
        return "\n".join(f"{unit} {x:g}: {time(seconds)}" for x, seconds in curve)

    power = "unknown" if p.idle_w is None or p.active_w is None else f"{p.idle_w:g} / {p.active_w:g} W"
    memory = (
        f"layer {human_bytes(p.layer_bytes)}, embedding {human_bytes(p.embed_bytes)}, head "
        f"{human_bytes(p.head_bytes)}, buffers {human_bytes(p.scratch_bytes)}"
    )
    shares = f"{min(p.layer_share):.2f} … {max(p.layer_share):.2f} of the mean one"
    most, ratio = p.batch[-1]
    rows = {
        "prefill": ("a layer, chunk of", points(p.prefill, "rows")),
        "decode": ("a layer, one row, behind", points(p.decode, "context")),
        "layer_share": ("the layers among themselves", shares),
        "step": ("a step whatever it runs", time(p.step_s)),
        "embed": ("embedding of a row", time(p.embed_row_s)),
        "head": ("norm, head and draw of a row", time(p.head_s)),
        "codec": ("a row to or from the wire", time(p.codec_row_s)),
        "batch": (f"a step of {most:g} sessions over one of one", f"{ratio:g}"),
        "load": ("loading a layer", time(p.load_s)),
        "memory": ("resident bytes", memory),
        "power": ("idle / active", power),
        "kl": ("KL to the source weights", "unknown" if p.kl is None else f"{p.kl:.1e}"),
    }
    table = Table(
        "figure",
        "what",
        "value",
        "origin",
        title=f"{p.device} ({p.provider}) running {p.model}, {p.precision}, {layers} layers; {p.dated}",
        caption=p.note or None,
    )
    for name, (what, value) in rows.items():
        table.add_row(name, what, value, p.labels[name])
    return table

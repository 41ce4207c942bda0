"""`isthmus pull | build | list | show | rm`: models in the cache."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from isthmus.commands.output import JsonFlag, human_bytes, out, print_json, progress_bar
from isthmus.config import Settings

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="Catalog name, Hugging Face repository, folder or .gguf file. Default: the model that is set.",
        metavar="[MODEL]",
    ),
]


def _model(name: str | None) -> str:
    return Settings({"model": name}).text("model") or ""


def pull(model: ModelArgument = None, json: JsonFlag = False) -> None:
    """Fetch a model's files into the cache (resumed if cut, checked by sha256)."""
    from isthmus.splitter.sources import pull as fetch

    with progress_bar() as progress:
        pulled = fetch(_model(model), progress=progress)
    result = {"model": pulled.model, "path": str(pulled.path), "sha256": pulled.sha256, "bytes": pulled.bytes}
    if json:
        print_json(result)
    else:
        out.print(
            f"{pulled.model}: {human_bytes(pulled.bytes)} in {pulled.path}", soft_wrap=True, markup=False
        )


def build(
    model: ModelArgument = None,
    bits: Annotated[str | None, typer.Option("--bits", help="auto, 4, 8 or 32.", metavar="BITS")] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder of the pack; default: in the cache.", metavar="DIR")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Build a model's pack: quantised weights and one ONNX graph per layer."""
    from isthmus.splitter.provide import build_model

    settings = Settings({"model": model, "bits": bits})
    with progress_bar() as progress:
        report = build_model(
            settings.text("model") or "", bits=settings.text("bits") or "auto", out=out_dir, progress=progress
        )
    if json:
        print_json(report.to_json())
        return
    why = report.choice.get("reason", "")
    out.print(
        f"{report.scheme} ({report.bits} bits): {human_bytes(report.weights_bytes)}, "
        f"{report.num_layers} layers, KL to the source {report.kl_to_source:.1e}\n{why}\n{report.pack}",
        soft_wrap=True,
        markup=False,
    )


def list_(json: JsonFlag = False) -> None:
    """List pulled models, built packs, and the names that can be pulled."""
    from isthmus.splitter.catalog import CATALOG
    from isthmus.splitter.store import list_models

    entries = list_models()
    if json:
        models = [{**asdict(entry), "path": str(entry.path)} for entry in entries]
        catalog = [{"name": entry.name, "summary": entry.summary} for entry in CATALOG.values()]
        print_json({"models": models, "catalog": catalog})
        return
    here = Table("name", "kind", "size", "path")
    for entry in entries:
        here.add_row(entry.name, entry.kind, human_bytes(entry.bytes), str(entry.path))
    if entries:
        out.print(here)
    else:
        out.print("nothing pulled yet; start with: isthmus pull")
    known = Table("name", "what it is", title="can be pulled by name")
    for name, known_model in CATALOG.items():
        known.add_row(name, known_model.summary)
    out.print(known)


def show(model: ModelArgument = None, json: JsonFlag = False) -> None:
    """Show a model's shape and its packs."""
    from isthmus.splitter.provide import describe

    described = describe(_model(model))
    if json:
        print_json(described)
        return
    table = Table("field", "value", show_header=False)
    for key in ("model", "kind", "path"):
        table.add_row(key, str(described[key] or "not pulled yet"))
    for key, value in (described["spec"] or {}).items():
        table.add_row(key, "–" if value is None else str(value))
    out.print(table)
    for pack in described["packs"]:
        kl = "unknown" if pack["kl_to_source"] is None else f"{pack['kl_to_source']:.1e}"
        out.print(
            f"{pack['pack']}\n  {pack['scheme']} ({pack['bits']} bits), "
            f"{human_bytes(pack['weights_bytes'])}, KL to the source {kl}\n  {pack['why'] or _pulled(pack)}",
            soft_wrap=True,
            markup=False,
        )


def _pulled(pack: dict[str, Any]) -> str:
    """What is here of a pack from a cloud."""
    head = "with" if pack["head_here"] else "without"
    return f"pulled from {pack['pulled_from']}; here are {pack['layers_here']} layers, {head} the head"


def rm(
    model: Annotated[str, typer.Argument(help="The model to remove.", metavar="MODEL")],
    json: JsonFlag = False,
) -> None:
    """Remove a model's files and packs from the cache."""
    from isthmus.splitter.store import remove

    removed = [str(path) for path in remove(model)]
    if json:
        print_json({"model": model, "removed": removed})
    else:
        for path in removed:
            out.print(f"removed {path}", soft_wrap=True, markup=False)

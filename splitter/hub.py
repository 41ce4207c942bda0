"""Fetches a safetensors checkpoint from a Hugging Face repository, every file checked against its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from isthmus.protocol.errors import ConfigError, ModelFileError, NotFoundError, UnsupportedModelError
from isthmus.splitter.atomic import file_errors
from isthmus.splitter.download import Progress
from isthmus.splitter.safetensors_reader import read_json
from isthmus.splitter.spec import ModelSpec
from isthmus.splitter.store import write_atomically

# Configuration first: a model we can't run is refused before its gigabytes are fetched.
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
MARKER = "pulled.json"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of the repository: git's hash for small files, sha256 for large (LFS) ones; size in bytes."""

    name: str
    size: int
    blob_id: str
    sha256: str | None

    def matches(self, path: Path) -> bool:
        """Whether `path` has exactly this contents."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        digest = (
            hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        )
        with file_errors(str(path)), path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest() == (self.sha256 or self.blob_id)


def fetch_from_hub(
    repo_id: str,
    revision: str,
    folder: Path,
    *,
    progress: Progress | None = None,
    endpoint: str | None = None,
) -> Path:
    """Puts the checkpoint into `folder` and returns it; what is there already and right is kept.

    Call with the folder's lock held. Raises `NotFoundError` (no such repository or revision),
    `ConfigError` (gated, needs a token), `UnsupportedModelError` (no safetensors, or a model we can't
    run), `ModelFileError` (`download_failed`, `checksum_mismatch`, `disk_full`).
    """
    import huggingface_hub

    with _hub_errors(repo_id, revision):
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(
            repo_id, revision=revision, files_metadata=True
        )
    files = _choose(repo_id, [_hub_file(sibling) for sibling in info.siblings or []])
    total, done = sum(file.size for file in files) or 1, 0
    label = f"downloading {repo_id}"
    for file in files:
        path = folder / file.name
        if not file.matches(path):
            with file_errors(str(path)), _hub_errors(repo_id, revision):
                huggingface_hub.hf_hub_download(
                    repo_id,
                    file.name,
                    revision=info.sha,
                    local_dir=folder,
                    endpoint=endpoint,
                    tqdm_class=_bar(progress, label, done, total),
                )
            if not file.matches(path):
                path.unlink(missing_ok=True)
                raise ModelFileError(
                    f"{repo_id}/{file.name}: contents do not match the hash the hub gives for {info.sha}",
                    code="checksum_mismatch",
                    hint="run the command again",
                )
        done += file.size
        if progress:
            progress(label, done / total)
        if file.name == "config.json":
            ModelSpec.from_hf(read_json(path))
    marker = {
        "repo_id": repo_id,
        "revision": revision,
        "commit": info.sha,
        "sha256": _tree_hash(files),
        "files": {file.name: file.size for file in files},
    }
    with file_errors(str(folder / MARKER)):
        write_atomically(folder / MARKER, json.dumps(marker, indent=1).encode())
    return folder


def finished_pull(folder: Path) -> dict[str, Any] | None:
    """What `fetch_from_hub` wrote about a complete `folder`, or None where files are missing."""
    if not (folder / MARKER).is_file():
        return None
    marker = dict(read_json(folder / MARKER))
    sizes = marker.get("files") or {}
    whole = all((folder / name).is_file() and (folder / name).stat().st_size == sizes[name] for name in sizes)
    return marker if sizes and whole else None


def _hub_file(sibling: Any) -> HubFile:
    return HubFile(
        name=sibling.rfilename,
        size=int(sibling.size or 0),
        blob_id=sibling.blob_id or "",
        sha256=sibling.lfs["sha256"] if sibling.lfs else None,
    )


def _choose(repo_id: str, files: list[HubFile]) -> list[HubFile]:
    """The checkpoint's files, configuration first; other formats and folders of the repository are left."""
    by_name = {file.name: file for file in files}
    chosen = [by_name[name] for name in _SMALL_FILES if name in by_name]
    if _INDEX in by_name:
        chosen.append(by_name[_INDEX])
    patterns = _WEIGHTS[1:] if _INDEX in by_name else _WEIGHTS[:1]
    weights = sorted(name for name in by_name if any(fnmatch(name, pattern) for pattern in patterns))
    if "config.json" not in by_name or not weights:
        raise UnsupportedModelError(
            f"{repo_id} has no config.json with model.safetensors",
            hint="only safetensors repositories can be pulled; a .gguf file is named by its path on disk",
        )
    if "tokenizer.json" not in by_name:
        raise UnsupportedModelError(
            f"{repo_id} has no tokenizer.json", hint="older tokeniser formats are not supported"
        )
    return [*chosen, *(by_name[name] for name in weights)]


def _tree_hash(files: list[HubFile]) -> str:
    lines = sorted(f"{file.sha256 or file.blob_id}  {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _bar(progress: Progress | None, label: str, done: int, total: int) -> Any:
    """A stand-in for the hub library's progress bar that reports bytes to us and draws nothing."""
    from huggingface_hub.utils.tqdm import tqdm

    base: Any = tqdm

    class Silent(base):  # type: ignore[misc]  # the library's class is untyped
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self._seen = int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self._seen += int(n or 0)
            if progress:
                progress(label, min(1.0, (done + self._seen) / total))

    return Silent


@contextmanager
def _hub_errors(repo_id: str, revision: str) -> Iterator[None]:
    """The hub library's exceptions as ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{repo_id} is gated", code="gated_model", hint="accept its licence on the hub, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"{repo_id} has no revision {revision!r}") from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # the library's word for "no network"
            raise _unreachable(repo_id, error) from error
        raise NotFoundError(
            f"no repository {repo_id} on the hub", hint="private ones need HF_TOKEN; see also: isthmus list"
        ) from error
    except errors.HFValidationError as error:
        raise NotFoundError(f"{repo_id!r} is no repository name") from error
    except errors.HfHubHTTPError as error:
        # Mirrors answer with bare statuses where the hub itself says which of its errors it means.
        if error.response.status_code == 404:
            raise NotFoundError(f"no repository {repo_id} at revision {revision!r}") from error
        raise _unreachable(repo_id, error) from error
    except ConnectionError as error:
        raise _unreachable(repo_id, error) from error
    except OSError:
        raise  # the disk's, not the hub's: `file_errors` names it
    except Exception as error:
        # The library lets its HTTP client's exceptions through; which client that is depends on its version.
        raise _unreachable(repo_id, error) from error


def _unreachable(repo_id: str, error: Exception) -> ModelFileError:
    first_line = str(error).strip().partition("\n")[0]
    return ModelFileError(
        f"cannot download {repo_id}: {first_line}",
        code="download_failed",
        hint="check the network (HF_ENDPOINT names a mirror) and run the command again: it resumes",
    )

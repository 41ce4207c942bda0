"""fetched.json: which blocks of a pack that is pulled from a cloud are on this device so far.

A pack without that file was built here and is whole. The file stays when the last block has come: it tells
where the pack is from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isthmus.protocol.errors import ModelFileError
from isthmus.splitter.atomic import file_errors
from isthmus.splitter.manifest import Sha256
from isthmus.splitter.store import FETCHED_FILE, write_atomically

_MAX_BYTES = 1 << 20


class Fetched(BaseModel):
    """`source`: the cloud that the pack was first pulled from. `blocks`: their bytes in weights.bin, by
    name; listed once they were found unaltered."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    manifest_sha256: Sha256
    source: str
    blocks: dict[str, Annotated[int, Field(ge=0)]] = {}


def read_fetched(root: Path) -> Fetched | None:
    """The record in the pack `root`; None where there is none. ModelFileError (`bad_pack`) where it is
    damaged."""
    path = root / FETCHED_FILE
    if not path.is_file():
        return None
    with file_errors(str(path)), path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        return Fetched.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ModelFileError(
            f"{path}: {first['msg']}", code="bad_pack", hint="remove the pack's folder and pull it again"
        ) from error


def write_fetched(root: Path, fetched: Fetched) -> None:
    """Replaces the record. Raises what `file_errors` does."""
    with file_errors(str(root / FETCHED_FILE)):
        write_atomically(root / FETCHED_FILE, fetched.model_dump_json(indent=1).encode() + b"\n")

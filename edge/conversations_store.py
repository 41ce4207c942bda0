"""The conversations of the web chat: one SQLite file on this device, read and written off the event loop."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any, Final, TypeVar

from isthmus.protocol.errors import IsthmusError, NotFoundError

MAX_CONVERSATIONS: Final = 1000
"""Of one API key's label. Beyond, a new one is refused: none is dropped that somebody may want."""
# A writer of another process on the same file has so long to finish.
_BUSY_S: Final = 5.0

# What is overwritten or deleted is zeroed in the file, and the log beside it is emptied after a deletion.
_SETUP: Final = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA secure_delete = ON;
CREATE TABLE IF NOT EXISTS conversations (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, title TEXT NOT NULL, created REAL NOT NULL,
    updated REAL NOT NULL, num_messages INTEGER NOT NULL, messages TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_tenant ON conversations (tenant, updated);
"""
_SUMMARY: Final = "id, title, created, updated, num_messages"

T = TypeVar("T")


class StorageError(IsthmusError):
    """The file cannot be read or written. The chat itself does not need it."""

    default_code = "storage_failed"


class StorageFullError(StorageError):
    default_code = "storage_full"
    http_status = 507


class StorageBusyError(StorageError):
    default_code = "storage_busy"
    http_status = 503


class TooManyConversationsError(IsthmusError):
    default_code = "too_many_conversations"
    http_status = 409


@dataclass(frozen=True)
class Summary:
    """A conversation without its messages. `created`, `updated` (its messages): Unix time in seconds."""

    id: str
    title: str
    created: float
    updated: float
    num_messages: int

    def to_dict(self) -> dict[str, Any]:
        """As the API shows it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Conversation(Summary):
    """`messages`: objects as they were put."""

    messages: list[dict[str, Any]]


class ConversationStore:
    """Conversations in the file at `path`, each of one tenant (an API key's label), who sees no other's.

    The file is made, readable by its owner only, when the first request needs it. Every method may raise
    StorageError (or a kind of it) where the file cannot be used, and is tried anew the next time.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time) -> None:
        self.path = path
        self._clock = clock
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="isthmus-conversations")
        self._file: sqlite3.Connection | None = None

    async def aclose(self) -> None:
        """Finish what was begun and close the file."""
        self._worker.submit(self._close)
        await asyncio.to_thread(self._worker.shutdown)

    async def summaries(self, tenant: str) -> list[Summary]:
        """Newest first."""

        def run(file: sqlite3.Connection) -> list[Summary]:
            order = "ORDER BY updated DESC, created DESC, id"
            rows = file.execute(f"SELECT {_SUMMARY} FROM conversations WHERE tenant = ? {order}", (tenant,))
            return [Summary(*row) for row in rows]

        return await self._do(run)

    async def create(self, tenant: str, title: str) -> Conversation:
        """A new, empty one. TooManyConversationsError."""
        now = self._clock()
        new = Conversation(uuid.uuid4().hex, title, now, now, 0, [])

        def run(file: sqlite3.Connection) -> Conversation:
            (held,) = file.execute(
                "SELECT count(*) FROM conversations WHERE tenant = ?", (tenant,)
            ).fetchone()
            if held >= MAX_CONVERSATIONS:
                raise TooManyConversationsError(
                    f"{held} conversations are kept, at most {MAX_CONVERSATIONS} can be",
                    hint="delete some of them",
                )
            values = (new.id, tenant, title, now, now, 0, "[]")
            file.execute("INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            return new

        return await self._do(run)

    async def get(self, tenant: str, key: str) -> Conversation:
        """NotFoundError where the tenant has none of this id."""

        def run(file: sqlite3.Connection) -> Conversation:
            what = f"SELECT {_SUMMARY}, messages FROM conversations WHERE tenant = ? AND id = ?"
            found = file.execute(what, (tenant, key)).fetchone()
            if found is None:
                raise _unknown(key)
            return Conversation(*(*found[:-1], json.loads(found[-1])))

        return await self._do(run)

    async def rename(self, tenant: str, key: str, title: str) -> Summary:
        """NotFoundError."""
        return await self._change(tenant, key, "title = ?", title)

    async def put(self, tenant: str, key: str, messages: list[dict[str, Any]]) -> Summary:
        """`messages`, JSON values, instead of those there were. NotFoundError."""
        what = "messages = ?, num_messages = ?, updated = ?"
        return await self._change(tenant, key, what, json.dumps(messages), len(messages), self._clock())

    async def delete(self, tenant: str, key: str) -> None:
        """It is gone from the file, too. NotFoundError."""

        def run(file: sqlite3.Connection) -> None:
            gone = file.execute("DELETE FROM conversations WHERE tenant = ? AND id = ?", (tenant, key))
            if not gone.rowcount:
                raise _unknown(key)
            file.execute("PRAGMA wal_checkpoint(TRUNCATE)")

        await self._do(run)

    async def delete_all(self, tenant: str) -> None:
        """As `delete`, of all that the tenant has."""

        def run(file: sqlite3.Connection) -> None:
            file.execute("DELETE FROM conversations WHERE tenant = ?", (tenant,))
            file.execute("PRAGMA wal_checkpoint(TRUNCATE)")

        await self._do(run)

    # ---- in the worker ---------------------------------------------------------------------------

    async def _change(self, tenant: str, key: str, what: str, *values: object) -> Summary:
        def run(file: sqlite3.Connection) -> Summary:
            where = f"WHERE tenant = ? AND id = ? RETURNING {_SUMMARY}"
            changed = file.execute(f"UPDATE conversations SET {what} {where}", (*values, tenant, key))
            rows = changed.fetchall()  # to its end: only then the change is made
            if not rows:
                raise _unknown(key)
            return Summary(*rows[0])

        return await self._do(run)

    async def _do(self, run: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._guarded, run)

    def _guarded(self, run: Callable[[sqlite3.Connection], T]) -> T:
        try:
            if self._file is None:
                self._file = _open(self.path)
            return run(self._file)
        except (sqlite3.Error, OSError) as error:
            self._close()  # whatever is wrong with it, the next request begins anew
            raise _typed(self.path, error) from error

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # SQLite makes its own files with this mode, too
    os.close(handle)
    # Each statement is a transaction of its own.
    file = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
    try:
        file.executescript(_SETUP)
    except sqlite3.Error:
        file.close()
        raise
    return file


def _unknown(key: str) -> NotFoundError:
    return NotFoundError(
        f"there is no conversation {key!r}",
        code="unknown_conversation",
        hint="GET /v1/isthmus/conversations lists those there are",
    )


def _typed(path: Path, error: sqlite3.Error | OSError) -> StorageError:
    """What went wrong, by SQLite's primary result codes (sqlite.org/rescode.html) or the system's."""
    code = error.errno if isinstance(error, OSError) else getattr(error, "sqlite_errorcode", 0) & 0xFF
    told = (error.strerror if isinstance(error, OSError) else None) or str(error)
    message = f"the conversations in {path} cannot be read or written: {told}"
    if code in ((errno.ENOSPC, errno.EDQUOT) if isinstance(error, OSError) else (sqlite3.SQLITE_FULL,)):
        return StorageFullError(message, hint="free some space on this device, or delete conversations")
    if isinstance(error, sqlite3.Error) and code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StorageBusyError(message, hint="another process holds the file; try again")
    return StorageError(
        message, hint="set ISTHMUS_DATA to a folder you may write, or the setting conversations to off"
    )

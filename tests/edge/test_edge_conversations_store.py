"""The file of conversations: who sees what, what deletion leaves, and what a bad file or disk does."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge import conversations_store
from isthmus.edge.conversations_store import (
    ConversationStore,
    StorageBusyError,
    StorageError,
    StorageFullError,
    TooManyConversationsError,
)
from isthmus.protocol.errors import NotFoundError

ALICE, BOB = "alice", "bob"


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text} for text in texts]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ConversationStore]:
    """Not made yet; its clock goes on by a second each time it is read."""
    ticks = itertools.count(1000.0)
    store = ConversationStore(tmp_path / "data" / "conversations.db", clock=lambda: next(ticks))
    yield store
    await store.aclose()


async def test_what_was_put_is_there_for_the_next_process(store: ConversationStore) -> None:
    made = await store.create(ALICE, "Trains")
    messages = said("Grüße 🚂\0", "{'\"}")
    messages.append({"role": "assistant", "content": "", "isthmus": {"split": 3}})
    changed = await store.put(ALICE, made.id, messages)
    assert (changed.num_messages, changed.created, changed.updated) == (3, 1000, 1001)
    again = ConversationStore(store.path)
    found = await again.get(ALICE, made.id)
    assert found.messages == messages
    assert (found.title, found.num_messages, found.updated) == ("Trains", 3, 1001)
    await again.aclose()


async def test_the_newest_words_come_first(store: ConversationStore) -> None:
    first, second, third = [await store.create(ALICE, title) for title in ("a", "b", "c")]
    await store.put(ALICE, first.id, said("hello"))
    await store.rename(ALICE, second.id, "B")  # no new words
    assert [one.title for one in await store.summaries(ALICE)] == ["a", "c", "B"]
    assert len({first.id, second.id, third.id}) == 3
    assert all(len(one.id) == 32 for one in (first, second, third))


async def test_nobody_sees_or_changes_anothers(store: ConversationStore) -> None:
    mine = await store.create(ALICE, "mine")
    await store.put(ALICE, mine.id, said("secret"))
    assert await store.summaries(BOB) == []
    for attempt in (
        store.get(BOB, mine.id),
        store.rename(BOB, mine.id, "his"),
        store.put(BOB, mine.id, said("his")),
        store.delete(BOB, mine.id),
    ):
        with pytest.raises(NotFoundError) as caught:
            await attempt
        assert caught.value.code == "unknown_conversation"
    await store.delete_all(BOB)
    assert (await store.get(ALICE, mine.id)).messages == said("secret")


@pytest.mark.parametrize("everything", [False, True])
async def test_what_is_deleted_is_in_no_file(store: ConversationStore, everything: bool) -> None:
    marks = [b"its-title", b"first-version-of-it", b"second-version-of-it"]
    doomed = await store.create(ALICE, marks[0].decode())
    for mark in marks[1:]:
        await store.put(ALICE, doomed.id, said(mark.decode() * 500))
    kept = await store.create(BOB, "stays")

    def held() -> bytes:
        return b"".join(file.read_bytes() for file in store.path.parent.iterdir())

    assert all(mark in held() for mark in marks)
    await (store.delete_all(ALICE) if everything else store.delete(ALICE, doomed.id))
    assert [mark for mark in marks if mark in held()] == []
    assert await store.summaries(ALICE) == []
    assert [one.id for one in await store.summaries(BOB)] == [kept.id]
    with pytest.raises(NotFoundError):
        await store.get(ALICE, doomed.id)


async def test_only_its_owner_may_read_the_file(store: ConversationStore) -> None:
    assert not store.path.parent.exists()  # nothing is made before it is needed
    await store.create(ALICE, "mine")
    assert store.path.parent.stat().st_mode & 0o777 == 0o700
    modes = {file.name: file.stat().st_mode & 0o777 for file in store.path.parent.iterdir()}
    assert modes["conversations.db"] == 0o600
    assert set(modes.values()) == {0o600}, modes


async def test_beyond_the_bound_a_new_one_is_refused_and_none_is_lost(
    store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations_store, "MAX_CONVERSATIONS", 2)
    for title in "ab":
        await store.create(ALICE, title)
    with pytest.raises(TooManyConversationsError, match="2 conversations are kept, at most 2"):
        await store.create(ALICE, "c")
    await store.create(BOB, "his bound is his own")
    assert {one.title for one in await store.summaries(ALICE)} == {"a", "b"}


async def test_many_at_once_lose_nothing(store: ConversationStore) -> None:
    made = await asyncio.gather(*(store.create(ALICE, str(i)) for i in range(20)))
    await asyncio.gather(*(store.put(ALICE, one.id, said(one.title)) for one in made))
    for one in made:
        assert (await store.get(ALICE, one.id)).messages == said(one.title)


# ---- trouble -----------------------------------------------------------------------------------------


async def test_a_file_that_is_none_is_told_and_tried_again(store: ConversationStore) -> None:
    store.path.parent.mkdir()
    store.path.write_bytes(b"this is no database" * 100)
    for _ in range(2):
        with pytest.raises(StorageError, match="not a database") as caught:
            await store.create(ALICE, "x")
        assert (caught.value.code, caught.value.http_status) == ("storage_failed", 500)
        assert str(store.path) in caught.value.message
    store.path.unlink()
    await store.create(ALICE, "x")


async def test_a_folder_that_cannot_be_made_is_told(store: ConversationStore) -> None:
    store.path.parent.write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="File exists") as caught:
        await store.summaries(ALICE)
    assert "ISTHMUS_DATA" in caught.value.hint


async def test_a_full_disk_refuses_what_is_new_and_keeps_what_is_old(store: ConversationStore) -> None:
    made = await store.create(ALICE, "old")
    await store.put(ALICE, made.id, said("short"))
    # SQLite's own bound on the file: what it does then is what it does on a full disk.
    await store._do(lambda file: file.execute("PRAGMA max_page_count = 1").fetchall())
    with pytest.raises(StorageFullError) as caught:
        await store.put(ALICE, made.id, said("x" * 100_000))
    assert (caught.value.code, caught.value.http_status) == ("storage_full", 507)
    assert (await store.get(ALICE, made.id)).messages == said("short")


async def test_a_file_that_another_process_holds_is_told(
    store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations_store, "_BUSY_S", 0.05)
    await store.create(ALICE, "before")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageBusyError) as caught:
        await store.create(ALICE, "x")
    assert (caught.value.code, caught.value.http_status) == ("storage_busy", 503)
    assert len(await store.summaries(ALICE)) == 1  # reading goes on
    other.close()
    await store.create(ALICE, "x")

"""The web chat when something is missing: the cloud in mid-answer, the API key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.processes import Service, serve
from tests.web.chat_page import STORY
from tests.web.conftest import OpenChat, environment
from tests.web.looks import look

pytestmark = [pytest.mark.browser, pytest.mark.processes, pytest.mark.model]

KEY = "kestrel-7f3a9c51d2e84b60"


# Of module scope, so that the pages, closed with their test, never see their agent go.
@pytest.fixture(scope="module")
def doomed() -> Iterator[Service]:
    """A cloud to be killed."""
    with serve("cloud", "--port", "0", "--precision", "bf16") as service:
        yield service


@pytest.fixture(scope="module")
def its_edge(doomed: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An agent with no other cloud than `doomed`, that keeps no conversations."""
    env = environment(tmp_path_factory.mktemp("data")) | {"ISTHMUS_CONVERSATIONS": "off"}
    with serve("edge", "--port", "0", "--cloud", doomed.url, env=env) as service:
        yield service


@pytest.fixture(scope="module")
def locked_edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An agent that serves who has KEY."""
    root = tmp_path_factory.mktemp("data")
    keys = root / "keys"
    keys.write_text(f"kim:{KEY}\n")
    keys.chmod(0o600)
    with serve("edge", "--port", "0", "--serve-key-file", str(keys), env=environment(root)) as service:
        yield service


def letters(text: str) -> str:
    """What half-written Markdown and the whole have in common."""
    return "".join(sign for sign in text if sign.isalpha())


def test_a_lost_cloud_is_told_and_the_answer_goes_on_here(
    open_chat: OpenChat, doomed: Service, its_edge: Service
) -> None:
    chat = open_chat(its_edge, reduced_motion="reduce")
    chat.choose("split", split=4, max_tokens=60)
    chat.ask(STORY)
    chat.see_growth(times=2)
    expect(chat.part("banner")).to_be_hidden()

    doomed.kill()
    begun = letters(chat.answer.inner_text())
    expect(chat.part("banner")).to_be_visible()
    expect(chat.part("banner")).to_contain_text("The cloud was lost")
    chat.finish()
    whole = letters(chat.answer.inner_text())
    assert whole.startswith(begun)
    assert len(whole) > len(begun)
    expect(chat.badge).to_contain_text("local")
    expect(chat.part("banner")).to_be_visible()
    expect(chat.part("banner")).to_contain_text("this device went on")
    expect(chat.part("conversation")).to_have_count(1)
    expect(chat.page.get_by_text("keeps no conversations")).to_be_visible()
    assert look(chat.page, "lost-1280-light") == []


def test_an_agent_with_keys_asks_for_one(open_chat: OpenChat, locked_edge: Service) -> None:
    chat = open_chat(locked_edge, reduced_motion="reduce")
    chat.watch.expect("status of 401")
    dialog = chat.part("key-dialog")
    expect(dialog).to_be_visible()
    assert look(chat.page, "key-1280-light") == []
    dialog.locator("input").fill("a-wrong-key-of-some-length")
    chat.page.keyboard.press("Enter")
    expect(dialog).to_be_visible()
    dialog.locator("input").fill(KEY)
    chat.page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()

    chat.choose("local", max_tokens=8)
    chat.ask("hello")
    chat.finish()
    expect(chat.badge).to_be_visible()
    stored = chat.page.evaluate("JSON.stringify({...localStorage}) + document.cookie + location.href")
    assert KEY not in stored
    chat.page.reload()
    expect(chat.messages("user")).to_contain_text("hello")
    expect(dialog).to_be_hidden()

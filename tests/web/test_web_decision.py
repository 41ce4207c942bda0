"""The decision behind an answer, and the page without a mouse."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.processes import Service
from tests.web.chat_page import STORY, Chat
from tests.web.conftest import OpenChat

pytestmark = [pytest.mark.browser, pytest.mark.processes, pytest.mark.model]

MOST_TABS = 60


def focus_of(chat: Chat) -> str | None:
    """The test id of the element that has the focus, or of what it is a part of."""
    name: str | None = chat.page.evaluate("document.activeElement.closest('[data-testid]')?.dataset.testid")
    return name


def background(chat: Chat) -> str:
    """The colour of the page."""
    colour: str = chat.page.evaluate("getComputedStyle(document.querySelector('header')).backgroundColor")
    return colour


def tab_to(chat: Chat, name: str) -> None:
    """Presses Tab until the element with the test id `name` has the focus, as one without a mouse does."""
    for _ in range(MOST_TABS):
        if focus_of(chat) == name:
            return
        chat.page.keyboard.press("Tab")
    raise AssertionError(f"{name} is not reached with {MOST_TABS} tabs")


def test_the_badge_opens_the_table_of_all_candidates(open_chat: OpenChat, no_conversations: Service) -> None:
    chat = open_chat(no_conversations)
    chat.choose("auto", max_tokens=6)
    chat.ask("Name a tree.")
    chat.finish()
    chat.badge.click()
    dialog = chat.part("decision")
    expect(dialog).to_be_visible()
    rows = dialog.locator("tbody tr")
    expect(rows.filter(has_text="local")).not_to_have_count(0)
    expect(rows.filter(has_text="offload")).not_to_have_count(0)
    assert rows.filter(has_text="split").count() > 10
    chat.page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_everything_is_done_by_keyboard(open_chat: OpenChat, no_conversations: Service) -> None:
    chat = open_chat(no_conversations)
    keyboard = chat.page.keyboard
    chat.choose("local")
    tab_to(chat, "composer")
    keyboard.type("I live by the sea.")
    keyboard.press("Shift+Enter")
    keyboard.type(STORY)
    expect(chat.messages("user")).to_have_count(0)
    keyboard.press("Enter")
    expect(chat.messages("user")).to_contain_text(STORY)
    chat.see_growth(times=2)
    keyboard.press("Escape")
    chat.finish()

    tab_to(chat, "badge")
    keyboard.press("Enter")
    expect(chat.part("decision")).to_be_visible()
    for _ in range(12):  # the focus stays in the dialog, or leaves the page for the browser's own controls
        keyboard.press("Tab")
        place = (
            "document.activeElement === document.body || document.activeElement.closest('dialog') !== null"
        )
        assert chat.page.evaluate(place)
    keyboard.press("Escape")
    expect(chat.part("decision")).to_be_hidden()
    assert focus_of(chat) == "badge"

    tab_to(chat, "new-conversation")
    keyboard.press("Enter")
    expect(chat.messages("user")).to_have_count(0)
    tab_to(chat, "conversation")
    keyboard.press("Enter")
    expect(chat.messages("user")).to_have_count(1)

    tab_to(chat, "theme")
    light = background(chat)
    keyboard.press("Enter")
    assert background(chat) != light
    chat.page.reload()
    assert background(chat) != light

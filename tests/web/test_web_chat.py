"""The web chat in a browser: asking, stopping, choosing a route, coming back, deleting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tests.processes import Service
from tests.web.chat_page import STORY
from tests.web.conftest import OpenChat
from tests.web.looks import keep_picture

pytestmark = [pytest.mark.browser, pytest.mark.processes, pytest.mark.model]

LAYERS = 30
CONVERSATIONS = "/v1/isthmus/conversations"


def get(service: Service, path: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(service.http + path).raise_for_status().json()
    return answer


def stats(service: Service) -> dict[str, Any]:
    return get(service, "/v1/stats")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Fails if it does not come true in 10 s."""
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def wait_until_idle(cloud: Service, edge: Service) -> None:
    """Waits until the cloud has no session and the edge no request; pages go with sessions."""
    wait_until(lambda: stats(cloud)["sessions"] + stats(edge)["running"] == 0, "the request goes on")
    there = stats(cloud)
    assert (there["running"], there["waiting"], there["pages_used"]) == (0, 0, 0)


def test_an_answer_streams_and_is_stopped_in_both_places(
    open_chat: OpenChat, cloud: Service, no_conversations: Service
) -> None:
    edge = no_conversations
    drawn_before = stats(cloud)["tokens_sampled_total"]
    chat = open_chat(edge)
    expect(chat.page).to_have_title("Isthmus")
    chat.choose("split", split=4)
    chat.ask(STORY)
    chat.see_growth(times=3)
    assert chat.places() == {"edge": 1 + 4, "cloud": LAYERS - 4 + 1}  # embedding here, head there
    expect(chat.page.locator('[data-layer][data-lit="true"]')).not_to_have_count(0)
    expect(chat.part("link-chart")).to_contain_text("ms")
    keep_picture(chat.page, "streaming-1280-light")
    busy = stats(cloud)
    assert (busy["sessions"], busy["running"]) == (1, 1)
    assert busy["pages_used"] > 0
    chat.part("stop").click()
    chat.finish()
    said = chat.answer.inner_text()
    wait_until_idle(cloud, edge)
    assert chat.answer.inner_text() == said

    # Offloaded, the cloud draws on without being asked for each token.
    chat.choose("offload")
    chat.part("retry").click()
    chat.see_growth(times=3)
    assert chat.places() == {"cloud": LAYERS + 2}
    assert stats(cloud)["running"] == 1
    chat.page.keyboard.press("Escape")
    chat.finish()
    wait_until_idle(cloud, edge)
    assert stats(cloud)["tokens_sampled_total"] - drawn_before < 1500
    expect(chat.messages("user")).to_have_count(1)
    expect(chat.messages("assistant")).to_have_count(1)


def test_the_badge_names_the_route_that_was_chosen(open_chat: OpenChat, no_conversations: Service) -> None:
    chat = open_chat(no_conversations)
    for route, split in (("local", None), ("split", 12), ("offload", None)):
        chat.choose(route, split=split, max_tokens=6)
        chat.ask("Name a colour.")
        chat.finish()
        expect(chat.badge).to_contain_text(route, ignore_case=True)
        if split is not None:
            expect(chat.badge).to_contain_text(str(split))


def test_a_refusal_is_told_where_the_answer_would_be(open_chat: OpenChat, no_conversations: Service) -> None:
    chat = open_chat(no_conversations)
    chat.watch.expect("status of 4")
    chat.choose("offload", max_tokens=6)
    chat.part("privacy").select_option("local-only")
    chat.part("composer").fill("Name a colour.")
    chat.part("send").click()
    expect(chat.part("error")).to_be_visible()
    expect(chat.part("error")).to_contain_text("local-only")
    chat.part("privacy").select_option("any")
    chat.part("retry").click()
    expect(chat.badge).to_contain_text("offload")
    expect(chat.part("error")).to_have_count(0)


def test_a_conversation_outlives_the_page_until_it_is_deleted(
    open_chat: OpenChat, no_conversations: Service
) -> None:
    chat = open_chat(no_conversations)
    chat.choose("local", max_tokens=8)
    chat.ask("Name a river.")
    chat.finish()
    expect(chat.badge).to_be_visible()
    said = chat.answer.inner_text()

    edge = no_conversations

    def is_kept() -> bool:
        (kept,) = get(edge, CONVERSATIONS)["data"]
        return bool(kept["num_messages"] == 2)

    wait_until(is_kept, "the answer is not kept")
    chat.page.reload()
    expect(chat.messages("user")).to_contain_text("Name a river.")
    expect(chat.answer).to_have_text(said)
    expect(chat.badge).to_contain_text("local")
    expect(chat.part("conversation")).to_have_count(1)
    chat.part("conversation").dblclick()
    chat.part("conversation").locator("input").fill("Rivers")
    chat.page.keyboard.press("Enter")
    wait_until(lambda: get(edge, CONVERSATIONS)["data"][0]["title"] == "Rivers", "it is not renamed")

    other = open_chat(edge)  # a fresh profile: it comes from the agent, not from the browser
    expect(other.part("conversation")).to_contain_text("Rivers")
    other.part("conversation").click()
    expect(other.answer).to_have_text(said)

    other.part("new-conversation").click()
    expect(other.messages("user")).to_have_count(0)

    chat.part("conversation").hover()  # what deletes it may show only then
    chat.part("delete-conversation").first.click()
    chat.part("confirm-dialog").get_by_test_id("confirm").click()
    expect(chat.part("conversation")).to_have_count(0)
    expect(chat.messages("user")).to_have_count(0)
    assert get(edge, CONVERSATIONS) == {"enabled": True, "data": []}

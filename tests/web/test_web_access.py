"""The web chat for everyone: axe-core's rules, narrow screens, both themes; the pictures CI keeps."""

from __future__ import annotations

import httpx
import pytest
from playwright.sync_api import expect

from tests.processes import Service
from tests.web.conftest import OpenChat
from tests.web.conversations import keep
from tests.web.looks import look

pytestmark = [pytest.mark.browser, pytest.mark.processes, pytest.mark.model]

WIDE = f"""\
A line of code that is wider than any telephone:

```python
{"number = number + 1; " * 20}
```

| {" | ".join(f"column {i}" for i in range(12))} |
|{"---|" * 12}
| {" | ".join("a long cell" for _ in range(12))} |

{"unbreakable" * 30} and https://example.org/{"path/" * 40}

1. One
   - Two **bold** and `{"code" * 40}`

> A quotation.
"""


@pytest.fixture(scope="module")
def answered(edge: Service) -> str:
    """A conversation with a real answer in a split, kept with its decision as the page keeps it."""
    question = {"role": "user", "content": "What is an isthmus?"}
    asked = {
        "messages": [question],
        "max_tokens": 60,
        "temperature": 0,
        "isthmus": {"route": "split", "split": 12, "explain": True},
    }
    reply = httpx.post(f"{edge.http}/v1/chat/completions", json=asked, timeout=60).raise_for_status().json()
    answer = {"role": "assistant", "content": reply["choices"][0]["message"]["content"]}
    return keep(edge, "What is an isthmus?", question, {**answer, "isthmus": reply["isthmus"]})


@pytest.fixture(scope="module")
def wide(edge: Service) -> str:
    """A conversation of things that are wider than a telephone."""
    return keep(edge, "w" * 80, *({"role": role, "content": WIDE} for role in ("user", "assistant")))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_state_is_accessible(
    open_chat: OpenChat, edge: Service, answered: str, wide: str, width: int, dark: bool
) -> None:
    kind = f"{width}-{'dark' if dark else 'light'}"
    chat = open_chat(edge, width=width, dark=dark, reduced_motion="reduce")
    expect(chat.part("composer")).to_be_visible()
    found = look(chat.page, f"empty-{kind}")

    chat.page.goto(f"{edge.http}/#{answered}")
    expect(chat.badge).to_be_visible()
    found += look(chat.page, f"answer-{kind}")
    chat.badge.click()
    expect(chat.part("decision")).to_be_visible()
    found += look(chat.page, f"decision-{kind}")
    chat.page.keyboard.press("Escape")

    chat.page.goto(f"{edge.http}/#{wide}")
    expect(chat.answer.locator("table")).to_be_visible()
    found += look(chat.page, f"wide-{kind}")
    if chat.part("settings").is_visible():
        chat.part("settings").click()
        expect(chat.part("route")).to_be_visible()
        found += look(chat.page, f"settings-{kind}")
        chat.page.keyboard.press("Escape")
        expect(chat.part("route")).to_be_hidden()
    if chat.part("open-conversations").is_visible():
        chat.part("open-conversations").click()
        title = chat.part("conversation").filter(has_text="What is an isthmus?")
        expect(title).to_be_visible()
        found += look(chat.page, f"conversations-{kind}")
        title.click()
        expect(chat.badge).to_be_in_viewport()
        expect(chat.part("conversations")).to_be_hidden()
    assert not found, "\n".join(found)

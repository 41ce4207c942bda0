"""What a model or a person may have written is shown, and never run or fetched."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.processes import Service
from tests.web.conftest import OpenChat
from tests.web.conversations import keep

pytestmark = [pytest.mark.browser, pytest.mark.processes, pytest.mark.model]

RUN = "window.hacked=(window.hacked||0)+1"
AWAY = "https://evil.example"
HOSTILE = f"""\
**bold** and `code`, then

<script>{RUN}</script>
<img src=x onerror="{RUN}"> <svg onload="{RUN}"><use href="{AWAY}/a.svg#a"></use></svg>
<details open ontoggle="{RUN}">details</details> <input autofocus onfocus="{RUN}">
<iframe src="{AWAY}" srcdoc="<script>parent.{RUN}</script>"></iframe> <object data="{AWAY}/o"></object>
<embed src="{AWAY}/e"> <video src="{AWAY}/v" poster="{AWAY}/p"></video> <audio src="{AWAY}/a"></audio>
<link rel="stylesheet" href="{AWAY}/s.css"> <style>@import "{AWAY}/i.css"; body {{ display: none }}</style>
<meta http-equiv="refresh" content="0;url={AWAY}"> <base href="{AWAY}/">
<form action="{AWAY}"><button formaction="javascript:{RUN}" id="composer">press</button></form>
<a href="javascript:{RUN}" ping="{AWAY}/ping">one</a> <a href="data:text/html,<script>{RUN}</script>">two</a>
<p style="background: url({AWAY}/b.png)" onclick="{RUN}">three</p>
<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror={RUN}&gt;">

![picture]({AWAY}/p.png) ![picture](x"onerror="{RUN}) [four](javascript:{RUN}) [five](vbscript:{RUN})
[six](JaVaScRiPt:{RUN}) [seven](&#106;avascript:{RUN}) <javascript:{RUN}> [right]({AWAY}/page "title")

```html"onload="{RUN}
<script>{RUN}</script>
```
"""
# All that could run or fetch something, in what the page made of the messages.
FORBIDDEN = """messages => [...messages.querySelectorAll("*")].filter(element =>
  ["script", "img", "iframe", "object", "embed", "video", "audio", "link", "style", "meta", "base", "form"]
    .includes(element.localName)
  || element.getAttributeNames().some(name => name.startsWith("on") || name === "ping" || name === "srcdoc")
  || ["href", "xlink:href", "action", "formaction", "src"].some(name =>
       element.hasAttribute(name) && !/^(https?:|mailto:|#)/.test(element.getAttribute(name)))
).map(element => element.outerHTML)"""


def test_hostile_text_is_shown_but_never_run(open_chat: OpenChat, no_conversations: Service) -> None:
    said = [{"role": role, "content": HOSTILE} for role in ("user", "assistant")]
    title = f'<img src=x onerror="{RUN}">'
    kept = keep(no_conversations, title, *said)
    chat = open_chat(no_conversations, f"/#{kept}")
    chat.part("conversation").click()
    expect(chat.answer.locator("strong").first).to_have_text("bold")
    expect(chat.part("conversation")).to_contain_text(title)
    expect(chat.answer.locator("pre").last).to_contain_text(f"<script>{RUN}</script>")
    link = chat.answer.get_by_role("link", name="right")
    assert link.get_attribute("href") == f"{AWAY}/page"
    assert link.get_attribute("target") == "_blank"
    assert "noopener" in (link.get_attribute("rel") or "")
    assert chat.part("messages").evaluate(FORBIDDEN) == []
    for name in ("one", "two", "three", "four", "five", "six", "seven"):
        for element in chat.answer.get_by_text(name, exact=True).all():
            element.click()
    expect(chat.part("composer")).to_be_visible()
    assert chat.page.evaluate("window.hacked") is None
    assert chat.page.url.startswith(chat.service.http)
    assert len(chat.page.context.pages) == 1

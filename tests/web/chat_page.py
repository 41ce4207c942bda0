"""The chat page as a person finds it: what is on it, by its test ids, and what one does there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from playwright.sync_api import Locator, Page, expect

from tests.processes import Service
from tests.web.browser import Watch

# Drawn greedily, the real model goes on about it for more than 900 tokens.
STORY = "Tell me a long story about a lighthouse."


@dataclass(frozen=True)
class Chat:
    """One page of `service`, open in a browser."""

    page: Page
    service: Service
    watch: Watch

    def part(self, name: str) -> Locator:
        """The element with the test id `name`."""
        return self.page.get_by_test_id(name)

    def messages(self, role: str) -> Locator:
        """The messages of `role`: user or assistant."""
        return self.page.locator(f'[data-testid="message"][data-role="{role}"]')

    @property
    def answer(self) -> Locator:
        """The text of the last answer, without what stands around it."""
        return self.messages("assistant").last.locator(".text")

    @property
    def badge(self) -> Locator:
        """What the last answer says of its way."""
        return self.messages("assistant").last.get_by_test_id("badge")

    def places(self) -> dict[str, int]:
        """How many cells of the layer map lie at each place."""
        cells = self.part("layer-map").locator("[data-layer]")
        return dict(Counter(cells.evaluate_all("cells => cells.map(cell => cell.dataset.place)")))

    def choose(self, route: str, *, split: int | None = None, max_tokens: int = 1500) -> None:
        """Sets the controls of the page; drawn greedily, so that an answer is as long as it was before."""
        self.part("route").select_option(route)
        if split is not None:
            self.part("split").fill(str(split))
        self.part("max-tokens").fill(str(max_tokens))
        self.part("temperature").fill("0")

    def ask(self, text: str) -> None:
        """Sends `text` and waits until its answer has begun."""
        num_answers = self.messages("assistant").count()
        self.part("composer").fill(text)
        self.part("send").click()
        expect(self.messages("assistant")).to_have_count(num_answers + 1)
        expect(self.answer).not_to_be_empty()

    def finish(self) -> None:
        """Waits until no answer is under way."""
        expect(self.part("stop")).to_be_hidden()

    def see_growth(self, times: int = 3) -> None:
        """Waits until the answer has grown `times` times."""
        for _ in range(times):
            expect(self.answer).not_to_have_text(self.answer.inner_text())

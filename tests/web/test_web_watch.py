"""What the other tests here rely on is seen: a page that does wrong is found out."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser

from tests.web.browser import Watch
from tests.web.looks import faults

pytestmark = pytest.mark.browser


MISDEEDS = """() => {
  console.error("a fault");
  console.warn("a doubt");
  setTimeout(() => { throw new Error("a slip") });
  return fetch("https://example.org/").catch(() => {});
}"""


def test_a_page_that_does_wrong_is_found_out(chromium: Browser) -> None:
    with chromium.new_context() as context:
        watch = Watch(context, "127.0.0.1:1")
        page = context.new_page()
        page.route("http://127.0.0.1:1/", lambda route: route.fulfill(body="<p>here</p>"))
        page.goto("http://127.0.0.1:1/")
        watch.check()
        page.evaluate(MISDEEDS)
        with pytest.raises(AssertionError) as told:
            watch.check()
        for wrong in ("error: a fault", "warning: a doubt", "thrown: a slip", "another host: example.org"):
            assert wrong in str(told.value)

        watch.expect("a doubt")
        watch.expect("a hope")
        with pytest.raises(AssertionError) as told:
            watch.check()
        assert "a doubt" not in str(told.value)
        assert "never logged: a hope" in str(told.value)


def test_axe_finds_a_serious_fault(chromium: Browser) -> None:
    with chromium.new_context() as context:
        page = context.new_page()
        page.set_content("<html lang=en><title>T</title><main><h1>T</h1><p>Well.</p></main>")
        assert faults(page) == []
        page.set_content("<html lang=en><title>T</title><main><h1>T</h1><input type=text></main>")
        assert [fault.split(":")[0] for fault in faults(page)] == ["label"]

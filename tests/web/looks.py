"""How a page looks to those who see it and to those who don't: pictures, and axe-core's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

PICTURES = Path(__file__).parents[2] / "build" / "screenshots"


def faults(page: Page) -> list[str]:
    """What axe-core calls serious or critical on the page as it stands, each with its elements."""
    found: list[dict[str, Any]] = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {[node['html'] for node in one['nodes']]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def keep_picture(page: Page, name: str) -> None:
    """What is seen of the page now, as a file that CI keeps."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")


def look(page: Page, name: str) -> list[str]:
    """Keeps a picture of the page; what is wrong with it: axe-core's faults, something to scroll sideways."""
    keep_picture(page, name)
    found = [f"{name}: {fault}" for fault in faults(page)]
    wanted, given = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    return [*found, *([f"{name}: {wanted} px wide on {given}"] if wanted > given else [])]

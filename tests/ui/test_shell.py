"""What every page has: navigation, languages, light and dark, at every width."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from crepa_trainer.reporting.words import JAPANESE
from crepa_trainer.ui.pages import PAGES
from playwright.sync_api import Page, expect
from web_pages import DESKTOP, PHONE, Server


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_every_page_is_reached_by_the_navigation_and_fits(
    server: Server, visit: Callable[..., Page], size: tuple[int, int]
) -> None:
    page = visit(server.address, size=size)
    for each in PAGES:
        link = page.locator(".q-drawer").get_by_text(each.title, exact=True)
        if not link.is_visible():
            page.get_by_role("button", name="Menu").click()
        link.click()
        expect(page.get_by_role("heading", level=1)).to_have_text(each.title)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= size[0]


def test_language_and_darkness_are_remembered(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(server.address)
    page.get_by_role("button", name="日本語").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(JAPANESE["Home"])
    page.get_by_role("button", name=JAPANESE["Dark"]).click()
    expect(page.locator("body.body--dark")).to_be_attached()
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text(JAPANESE["Home"])
    page.wait_for_function("document.documentElement.lang == 'ja'")


def test_every_page_has_its_name_in_each_language() -> None:
    assert [each.title for each in PAGES if each.title not in JAPANESE] == []

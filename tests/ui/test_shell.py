"""What every page has: navigation, languages, light and dark, at every width."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import crepa_trainer
import pytest
from crepa_trainer.reporting.words import JAPANESE, translator
from crepa_trainer.ui.pages import PAGES
from playwright.sync_api import Page, expect
from web_pages import DESKTOP, PHONE, Server


@pytest.mark.parametrize(("size", "language"), [(DESKTOP, "en"), (PHONE, "ja")])
def test_every_page_is_reached_by_the_navigation_and_fits(
    server: Server, visit: Callable[..., Page], size: tuple[int, int], language: str
) -> None:
    page, words = visit(server.address, size=size, language=language), translator(language)
    for each in PAGES:
        link = page.locator(".q-drawer").get_by_text(words(each.title), exact=True)
        if not link.is_visible():
            page.get_by_role("button", name=words("Menu")).click()
        link.click()
        expect(page.get_by_role("heading", level=1)).to_have_text(words(each.title))
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


def test_whatever_the_pages_say_has_its_words_in_japanese() -> None:
    folder = Path(crepa_trainer.__file__).parent
    said = set()
    for source in [*folder.glob("ui/**/*.py"), *folder.glob("reporting/*.html"), folder / "reporting" / "report.py"]:
        said |= set(re.findall(r"""words\("([^"]+)"\)""", source.read_text()))
    assert len(said) > 40
    assert sorted(said - JAPANESE.keys()) == []


def test_a_run_imports_nothing_of_the_page() -> None:
    code = (
        "import sys, crepa_trainer.run, crepa_trainer.control, crepa_trainer.reporting.report;"
        "print([name for name in sys.modules if name.split('.')[0] in ('nicegui', 'fastapi') or '.ui' in name])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"

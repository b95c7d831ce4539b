"""A report in a browser, from disk: it draws, complains of nothing and asks nobody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from crepa_trainer.reporting.report import write_report
from playwright.sync_api import Page, expect
from run_folders import make_run
from web_pages import DESKTOP, PHONE


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_a_report_opens_from_disk(tmp_path: Path, visit: Callable[..., Page], size: tuple[int, int]) -> None:
    runs = [make_run(tmp_path / "with"), make_run(tmp_path / "without", crepa_enabled=False)]
    write_report(runs, tmp_path / "report.html")
    page = visit((tmp_path / "report.html").as_uri(), size=size)
    expect(page.locator("#plot-7 .main-svg").first).to_be_visible()
    expect(page.locator("#look-0 .main-svg").first).to_be_visible()
    expect(page.get_by_role("heading", name="a <b>cat</b>")).to_be_visible()
    expect(page.get_by_role("cell", name="crepa_enabled")).to_be_visible()
    assert page.evaluate("document.querySelector('video').readyState") >= 0
    page.wait_for_function("document.querySelector('video').videoWidth == 48")
    assert page.title() != "x"
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]

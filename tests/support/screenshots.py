"""Pictures of the web page for docs/ui.md: python tests/support/screenshots.py RUNS [--folder FOLDER].

RUNS: a folder with a file of settings `demo.json` and two runs of it, `demo` and `demo-without`.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from web_pages import CHROMIUM, QUIET, page_server

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
# By name of the picture: the address, what is there when the page is drawn, and what is shown.
PAGES = {
    "new-run": ("new?file=demo.json", "text=These settings can be used", "text=Training → Loss functions"),
    "plan": ("plan?file=demo.json", "text=extra memory", None),
    "clips": ("clips?file=demo.json", "img[src^='/thumbnail']", None),
    "runs": ("runs", "text=demo-without", None),
    "watch": ("watch?run=demo", ".js-line", None),
    "compare": ("compare?run=demo&run=demo-without", ".js-line", None),
}
SIZE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


def save(page: Page, name: str) -> None:
    """Few colors: they are pictures of text and lines."""
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    width = min(shot.width, 1000)
    shot = shot.resize((width, round(shot.height * width / shot.width)), Image.Resampling.LANCZOS)
    shot.quantize(96, dither=Image.Dither.NONE).save(PICTURES / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with page_server(given.runs, folder=given.folder) as served, sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", *(f"--{name}" for name in QUIET)]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        for name, (address, ready, top) in PAGES.items():
            for phone in (False, True) if name == "new-run" else (False,):
                context = browser.new_context(viewport=PHONE if phone else SIZE)  # type: ignore[arg-type]
                cookies = {"crepa_language": "ja", "crepa_dark": "1"} if phone else {}
                context.add_cookies(
                    [{"name": key, "value": value, "url": served.address} for key, value in cookies.items()]
                )
                page = context.new_page()
                page.goto(served.address + address)
                page.wait_for_function("window.did_handshake === true")
                if not phone:
                    page.locator(ready).first.wait_for(timeout=120_000)
                    page.wait_for_function("[...document.images].every(image => image.complete)")
                    if top:
                        page.locator(top).first.scroll_into_view_if_needed()
                        page.locator(top).first.evaluate(
                            "each => window.scrollBy(0, each.getBoundingClientRect().top - 80)"
                        )
                page.wait_for_timeout(2500)
                save(page, f"{name}-phone" if phone else name)
                context.close()
        browser.close()


if __name__ == "__main__":
    main()

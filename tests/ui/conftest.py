"""A real server of the page and a real browser; a page that complains or calls out fails its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright
from web_pages import CHROMIUM, DESKTOP, QUIET, Server, page_server

# A first import of torch and diffusers lies between a click and what it does.
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for a module's tests, over a folder of runs that is empty at first."""
    with page_server(tmp_path_factory.mktemp("runs")) as served:
        yield served


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", *(f"--{name}" for name in QUIET)]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """visit(address, size=DESKTOP, language="en", dark=False) opens a page in a browser of its own.

    At the end of the test no page may have logged an error or asked anybody but its own server.
    """
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_page(address: str, *, size: tuple[int, int] = DESKTOP, language: str = "en", dark: bool = False) -> Page:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        contexts.append(context)
        origin = "/".join(address.split("/")[:3])
        if origin.startswith("http"):
            cookies = {"crepa_language": language, "crepa_dark": "1" if dark else "0"}
            context.add_cookies([{"name": name, "value": value, "url": origin} for name, value in cookies.items()])
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def asked(request: Request) -> None:
            if not request.url.startswith((origin, "data:", "blob:", "ws" + origin.removeprefix("http"))):
                complaints.append(f"asked {request.url}")

        page.on("request", asked)
        page.goto(address)
        if origin.startswith("http") and "/files/" not in address:
            # Drawn: what is counted or asked by a script does not wait for it.
            page.wait_for_function("window.did_handshake === true")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints

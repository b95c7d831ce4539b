"""What every page has: navigation, language, light and dark, and the record that its author builds on."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from nicegui import ui
from starlette.datastructures import QueryParams
from starlette.requests import Request

from ..reporting.words import LANGUAGES, translator
from .guard import Folders
from .phrases import phrase

_LANGUAGE, _DARK = "crepa_language", "crepa_dark"
_NARROW = 1023  # pixels up to which the navigation lies over the page
_STYLE = """
body { overflow-wrap: anywhere; }
.modebar:focus-within, .modebar:focus-within .modebar-group { opacity: 1 !important; transition: none !important; }
/* Of what is important the first layer wins: Quasar, in a later one, has its controls without a ring. */
@layer base {
  :focus-visible, .q-field:has(:focus-visible) .q-field__control {
    outline: 2px solid var(--q-primary) !important; outline-offset: 2px;
  }
  .q-field :focus-visible { outline: none !important; }
  .q-header :focus-visible { outline-color: white !important; }
}
.q-drawer a { text-decoration: none; }
"""


@dataclass(frozen=True)
class View:
    """One visit of one page.

    folders: what may be opened and written; every path that comes from the browser goes through it.
    words: English to the visitor's language; every visible text goes through it.
    query: the address's parameters, untrusted.
    """

    folders: Folders
    words: Callable[[str], str]
    language: str
    dark: bool
    query: QueryParams

    def phrase(self, text: str) -> str:
        """What the package says, in the visitor's language where its words are fixed."""
        return phrase(text, self.language)

    def problem(self, text: str) -> None:
        """Says what went wrong: at the bottom of the page, and to screen readers."""
        ui.notify(self.phrase(text), type="negative", multi_line=True, close_button=self.words("Close"), timeout=0)

    def done(self, text: str) -> None:
        """Says what was done."""
        ui.notify(self.phrase(text), type="positive")

    def choose(self, label: str, names: Sequence[str], key: str) -> str | None:
        """A list of names, of which the one chosen is the parameter `key` of the page's address; that one, if any."""
        name = self.query.get(key, "")
        chosen = ui.select(list(names), label=label, value=name if name in names else None)
        # Only what comes behind the ? changes: the page is drawn anew.
        chosen.classes("min-w-64").on_value_change(lambda event: ui.navigate.to(f"?{key}={quote(event.value)}"))
        return name if name in names else None

    def file(self, path: Any) -> str:
        """The address of a file of the runs' folder; ValueError outside it."""
        inside = self.folders.inside_runs(path)
        return "/files/" + quote(inside.relative_to(self.folders.runs.resolve()).as_posix())


@dataclass(frozen=True)
class Page:
    """A page in the navigation. `build` fills it, with NiceGUI's elements, for each visit anew."""

    path: str
    title: str
    icon: str
    build: Callable[[View], Awaitable[None] | None]


def add_pages(pages: Sequence[Page], folders: Folders) -> None:
    """Makes each page known to NiceGUI at its path."""
    for page in pages:
        _add(page, pages, folders)


def _add(page: Page, pages: Sequence[Page], folders: Folders) -> None:
    @ui.page(page.path, title=f"{page.title} · crepa-train")
    async def _visit(request: Request) -> None:
        language = request.cookies.get(_LANGUAGE, "")
        language = language if language in LANGUAGES else "en"
        dark = request.cookies.get(_DARK) == "1"
        view = View(folders, translator(language), language, dark, request.query_params)
        ui.add_css(_STYLE)
        ui.dark_mode(dark)
        # White on it, and it on white, can be read.
        ui.colors(primary="#42a5f5" if dark else "#1565c0")
        ui.run_javascript(f"document.documentElement.lang = '{language}'")
        _frame(page, pages, view)
        with ui.column().classes("w-full max-w-screen-xl mx-auto p-2 sm:p-4 gap-4"):
            ui.label(view.words(page.title)).classes("text-h5").props("role=heading aria-level=1")
            made = page.build(view)
            if inspect.isawaitable(made):
                await made


def _frame(page: Page, pages: Sequence[Page], view: View) -> None:
    words = view.words
    # show-if-above alone: left to itself the drawer asks the browser, and complains where that is slow.
    drawer = ui.left_drawer(value=False).props(f"show-if-above breakpoint={_NARROW} width=220 bordered")
    # Over the page it takes the keyboard, and gives it back.
    drawer.on("keydown.escape", drawer.hide)
    for event, target in (("show", ".q-drawer a"), ("hide", "header button")):
        drawer.on(event, js_handler=f"() => innerWidth <= {_NARROW} && document.querySelector('{target}').focus()")
    with drawer, ui.list().classes("w-full"):
        for each in pages:
            here = each is page
            with ui.link(target=each.path).classes("w-full"), ui.item().classes("text-primary" if here else ""):
                with ui.item_section().props("avatar"):
                    ui.icon(each.icon)
                with ui.item_section():
                    ui.label(words(each.title)).props("aria-current=page" if here else "")
    with ui.header().classes("items-center gap-2 py-1 bg-[#1565c0]"):
        _button("menu", words("Menu"), drawer.toggle)
        ui.link("crepa-train", "/").classes("text-white text-h6 no-underline")
        ui.space()
        for code, name in LANGUAGES.items():
            if code != view.language:
                ui.button(name, on_click=lambda code=code: _remember(_LANGUAGE, code)).props("flat no-caps color=white")
        icon: Literal["light_mode", "dark_mode"] = "light_mode" if view.dark else "dark_mode"
        name = words("Light") if view.dark else words("Dark")
        _button(icon, name, lambda: _remember(_DARK, "0" if view.dark else "1"))


def _button(icon: str, name: str, on_click: Callable[[], Any]) -> None:
    ui.button(icon=icon, on_click=on_click).props(f'flat round color=white aria-label="{name}"').tooltip(name)


def _remember(cookie: str, value: str) -> None:
    year = 365 * 24 * 3600
    ui.run_javascript(f"document.cookie = '{cookie}={value}; path=/; max-age={year}; SameSite=Strict'")
    ui.run_javascript("location.reload()")

"""A visitor without a mouse: keys alone, what has the focus, and whether one sees and hears what it is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from playwright.sync_api import Page

# What a mouse could use, as far as it is there to be seen; number: by which the walk knows it again.
_CONTROLS = """() => {
  const found = [];
  const wanted = 'a[href], button, input, textarea, select, summary, video[controls], [contenteditable=true], ' +
    '[role=button], [role=slider], [role=switch], [role=checkbox], [role=combobox], [role=option], [role=tab], ' +
    '[role=link], [role=menuitem], [tabindex]:not([tabindex="-1"])';
  window.walked = window.walked || 0;
  for (const each of document.querySelectorAll(wanted)) {
    const box = each.getBoundingClientRect(), style = getComputedStyle(each);
    const seen = box.width > 0 && box.height > 0 && style.visibility != 'hidden' && each.checkVisibility();
    if (!seen || each.disabled || each.closest('[aria-hidden=true], [inert]') || each.type == 'hidden') continue;
    if (!each.dataset.walk) each.dataset.walk = String(++window.walked);
    found.push({number: each.dataset.walk, html: each.outerHTML.slice(0, 200),
      // Within another that has the keyboard for it.
      within: !!each.parentElement.closest('[data-walk]') || each.tabIndex < 0});
  }
  return found;
}"""
_FOCUSED = """() => {
  const each = document.activeElement;
  if (!each || each === document.body) return null;
  // A field draws the ring of what is typed into it, and stands for a list's input, which is not seen itself.
  const field = each.closest('.q-field')?.querySelector('.q-field__control');
  const ring = [each, field].filter(Boolean).map(of => getComputedStyle(of)).some(
    of => of.outlineStyle != 'none' && parseFloat(of.outlineWidth) >= 2 && !of.outlineColor.endsWith(', 0)'));
  const shown = field || each, box = shown.getBoundingClientRect();
  const x = box.left + box.width / 2, y = box.top + box.height / 2;
  const seen = shown.checkVisibility({opacityProperty: true, visibilityProperty: true});
  return {number: each.dataset.walk || '', html: each.outerHTML.slice(0, 200), ring,
    seen: seen && x >= 0 && y >= 0 && x <= innerWidth && y <= innerHeight};
}"""


@dataclass(frozen=True)
class Stop:
    """Where Tab came to. number: of the control; name, role: as a screen reader has them."""

    number: str
    name: str
    role: str
    ring: bool
    seen: bool
    html: str


class Keyboard:
    def __init__(self, page: Page) -> None:
        self.page = page
        self._browser = page.context.new_cdp_session(page)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def focused(self) -> Stop | None:
        """What has the keyboard, None where nothing does."""
        found = self.page.evaluate(_FOCUSED)
        if found is None:
            return None
        element = self._browser.send("Runtime.evaluate", {"expression": "document.activeElement"})
        tree = self._browser.send(
            "Accessibility.getPartialAXTree", {"objectId": element["result"]["objectId"], "fetchRelatives": False}
        )
        node = tree["nodes"][0]
        name, role = (str(node.get(part, {}).get("value", "")) for part in ("name", "role"))
        return Stop(name=name.strip(), role=role, **found)

    def controls(self) -> dict[str, str]:
        """By number what can be used by a mouse now, beside what lies within something else that can."""
        found = self.page.evaluate(_CONTROLS)
        return {each["number"]: each["html"] for each in found if not each["within"]}

    def walk(self, most: int = 300) -> list[Stop]:
        """Tab from the beginning of the page to its end, which a trap would not let it reach."""
        stops: list[Stop] = []
        while (stop := self._tab()) is not None and (not stops or stop.number != stops[0].number):
            stops.append(stop)
            assert len(stops) < most, f"Tab goes round: {[each.name for each in stops[-8:]]}"
        return stops

    def _tab(self) -> Stop | None:
        self.press("Tab")
        return self.focused()

    def tab_to(self, name: str | re.Pattern[str], most: int = 300) -> Stop:
        """Tab on to the control of a name, round the page's end where need be."""
        said = []
        for _ in range(most):
            stop = self._tab()
            said.append(stop.name if stop else None)
            if stop and (name.search(stop.name) if isinstance(name, re.Pattern) else stop.name.lower() == name.lower()):
                return stop
        raise AssertionError(f"{name} is not reached by Tab, which came to {dict.fromkeys(said)}")

    def choose(self, label: str, option: str) -> None:
        """Tab to a list, opens it and goes down to one of its options."""
        while self.tab_to(label).role != "combobox":  # a link may have its name
            pass
        self.press("Enter")
        wanted = self.page.get_by_role("option", name=option, exact=True)
        wanted.wait_for()
        number = self.page.get_by_role("option").all_inner_texts().index(option)
        self.press("Home", *["ArrowDown"] * number, "Enter")

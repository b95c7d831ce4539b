"""The page without a mouse, in a real browser: every control is reached, seen and named, and does what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crepa_trainer.control import is_running
from crepa_trainer.reporting.words import JAPANESE
from keyboard import Keyboard
from PIL import Image
from playwright.sync_api import Page, expect
from run_folders import make_run, run_settings
from videos import moving_square, write_video
from web_pages import DESKTOP, PHONE, SECONDS, Server, end_runs, page_server, wait

ADDRESSES = {
    "home": "",
    "new": "new",
    "plan": "plan?file=good.json",
    "clips": "clips?file=good.json",
    "runs": "runs",
    "watch": "watch?run=seen",
    "compare": "compare?run=seen&run=other",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("first", "second"):
        write_video(folder / f"{name}.mp4", moving_square(9, 48, 80))
        (folder / f"{name}.txt").write_text("a red square")
    return folder


@pytest.fixture(scope="module")
def server(data: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Over two runs that are over, one of them with two looks, a report and a checkpoint, and a file of settings."""
    runs = tmp_path_factory.mktemp("runs")
    seen = make_run(runs / "seen")
    later = {"clip": "later.mp4 [0:9]", "matrix": [[0.1, 0.2], [0.3, 0.4]]}
    (seen / "looks" / "step-00000020.json").write_text(json.dumps(later))
    Image.new("RGB", (60, 40), "red").save(seen / "looks" / "step-00000020.png")
    (seen / "report.html").write_text("<p>report")
    (seen / "checkpoints" / "step-00000020").mkdir(parents=True)
    make_run(runs / "other", crepa_enabled=False)
    given = run_settings(models, data, max_train_steps=100_000, cache=str(runs / "cache"))
    sampled = {"validation_prompts": ["a blue square"], "validation_every": 0, "validation_steps": 1}
    (runs / "good.json").write_text(json.dumps({**given, **sampled, "output": str(runs / "mine")}))
    (runs / "short.json").write_text(json.dumps({**given, "max_train_steps": 2, "output": str(runs / "short")}))
    with page_server(runs, "--folder", str(data), folder=models) as served:
        yield served
    end_runs(runs)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "language", "dark"), [(DESKTOP, "en", False), (PHONE, "ja", True)])
@pytest.mark.parametrize("name", ADDRESSES)
def test_tab_comes_to_every_control_which_has_a_ring_and_a_name(
    server: Server, visit: Callable[..., Page], name: str, size: tuple[int, int], language: str, dark: bool
) -> None:
    page = visit(server.address + ADDRESSES[name], size=size, language=language, dark=dark)
    ready = {
        "plan": "dl",
        "clips": "button[aria-label*='second.mp4']",
        "watch": ".plot-container",
        "compare": ".plot-container",
    }
    if name in ready:
        page.locator(ready[name]).last.wait_for(timeout=SECONDS * 1000)  # a plan is made by a process
        page.wait_for_load_state("networkidle")
    keyboard = Keyboard(page)
    controls = keyboard.controls()
    stops = keyboard.walk()
    assert len(controls) > 4
    reached = {stop.number for stop in stops}
    assert [html for number, html in controls.items() if number not in reached] == []
    assert [stop.html for stop in stops if not (stop.name and stop.role != "generic")] == []
    assert [stop.html for stop in stops if not (stop.ring and stop.seen)] == []
    # And back.
    keyboard.press("Shift+Tab")
    assert keyboard.focused() is not None


def test_the_navigation_of_a_phone_and_its_language_and_darkness(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(server.address, size=PHONE)
    keyboard = Keyboard(page)
    keyboard.tab_to("Menu")
    keyboard.press("Enter")
    page.wait_for_function("document.activeElement.closest('.q-drawer')")
    keyboard.press("Escape")
    page.wait_for_function("document.activeElement.ariaLabel == 'Menu'")
    keyboard.press("Enter")
    page.wait_for_function("document.activeElement.closest('.q-drawer')")
    keyboard.tab_to("Clips")
    keyboard.press("Enter")
    page.wait_for_url("**/clips")
    expect(page.get_by_role("heading", level=1)).to_have_text("Clips")
    page.wait_for_load_state("networkidle")
    keyboard.tab_to("Dark")
    keyboard.press("Space")
    expect(page.locator("body.body--dark")).to_be_attached()
    page.wait_for_load_state("networkidle")
    keyboard.tab_to("日本語")
    keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text(JAPANESE["Clips"])


@pytest.mark.slow
def test_a_plan_is_chosen(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}plan")
    keyboard = Keyboard(page)
    keyboard.choose("Settings file", "good.json")
    page.wait_for_url("**/plan?file=good.json")
    expect(page.get_by_text("2 clips of 2 videos")).to_be_visible(timeout=SECONDS * 1000)
    keyboard.tab_to("To the runs")
    keyboard.press("Enter")
    page.wait_for_url("**/runs?file=good.json")


def test_a_caption_is_edited_and_saved(server: Server, data: Path, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}clips?file=good.json")
    expect(page.get_by_label("Caption: second.mp4", exact=True)).to_be_visible()
    keyboard = Keyboard(page)
    keyboard.tab_to("Caption: second.mp4")
    keyboard.press("Control+A")
    page.keyboard.type("a green square")
    keyboard.tab_to("Save: second.mp4")
    keyboard.press("Space")
    expect(page.get_by_text("Saved", exact=True)).to_be_visible()
    assert (data / "second.txt").read_text() == "a green square\n"


def test_the_lightbox_goes_on_and_back_and_gives_the_keyboard_back(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}compare?run=seen&run=other")
    expect(page.get_by_role("button", name=re.compile("Show: seen, step 10"))).to_be_visible()
    keyboard = Keyboard(page)
    stop = keyboard.tab_to(re.compile("Show: other, step 20"))
    keyboard.press("Enter")
    box, text = page.get_by_role("dialog"), page.get_by_role("dialog").get_by_role("status")
    expect(text).to_have_text(re.compile(r"^other · step 20 .* 2 / 4$"))
    page.wait_for_function("document.querySelector('video')?.videoWidth == 48")
    keyboard.press("ArrowRight")
    expect(text).to_have_text(re.compile(r"^seen · step 10 .* 3 / 4$"))
    keyboard.press("ArrowRight", "ArrowRight")
    expect(text).to_have_text(re.compile(r"^other · step 10 .* 4 / 4$"))
    keyboard.tab_to("Previous")
    keyboard.press("Enter")
    expect(text).to_have_text(re.compile(r"^seen · step 10 .* 3 / 4$"))
    page.wait_for_function("document.querySelector('video')?.videoWidth == 48")
    # While it is open nothing behind it has the keyboard.
    for _ in range(8):
        keyboard.press("Tab")
        page.wait_for_function("document.activeElement.matches('body, [role=dialog] *')")
    keyboard.tab_to("Next")
    keyboard.press("Enter")
    expect(text).to_have_text(re.compile(r"4 / 4$"))
    keyboard.tab_to("Close")
    keyboard.press("Enter")
    expect(box).to_be_hidden()
    again = keyboard.focused()
    assert again is not None
    assert again.name == stop.name
    keyboard.press("Enter")
    expect(box).to_be_visible()
    keyboard.press("Escape")
    expect(box).to_be_hidden()


def test_looks_curves_and_smoothing(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}watch?run=seen")
    expect(page.get_by_text("step 20 · later.mp4 [0:9]")).to_be_visible()
    keyboard = Keyboard(page)
    keyboard.tab_to("Hours")
    keyboard.press("Space")
    expect(page.locator(".xtitle").first).to_have_text("hours")
    keyboard.tab_to("Smoothing")
    keyboard.press(*["ArrowRight"] * 5)
    expect(page.locator(".js-plotly-plot").first.locator(".js-line")).to_have_count(2)
    keyboard.tab_to("Which look")
    keyboard.press("ArrowLeft")
    expect(page.get_by_text("step 10 · ")).to_be_visible()
    keyboard.press("ArrowRight")
    expect(page.get_by_text("step 20 · ")).to_be_visible()


@pytest.mark.slow
def test_a_run_is_started_steered_stopped_exported_and_resumed(server: Server, visit: Callable[..., Page]) -> None:
    page, output = visit(f"{server.address}runs"), server.runs / "mine"
    keyboard = Keyboard(page)

    def press(name: str) -> None:
        expect(page.get_by_role("button", name=name, exact=True)).to_be_visible(timeout=SECONDS * 1000)
        keyboard.tab_to(name)
        keyboard.press("Enter")

    keyboard.choose("Settings file", "good.json")
    keyboard.tab_to("Wait for its turn")
    keyboard.press("Space")
    expect(page.get_by_role("checkbox")).not_to_be_checked()
    press("Start")
    press("Save now: mine")
    wait(lambda: list(output.glob("checkpoints/step-*")))
    press("Sample now: mine")
    wait(lambda: list(output.glob("validation/*/samples.json")))
    press("Stop: mine")
    wait(lambda: not is_running(output))
    press("Export: mine")
    wait(lambda: list(output.glob("exported/*/*.safetensors")))
    press("Log: mine")
    expect(page.get_by_role("dialog")).to_be_visible()
    keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    press("Resume: mine")
    wait(lambda: is_running(output))
    press("Stop: mine")
    wait(lambda: not is_running(output))


@pytest.mark.slow
def test_runs_are_chosen_and_a_pair_is_made(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}compare?run=seen")
    keyboard = Keyboard(page)
    expect(page.get_by_role("cell", name="crepa_enabled")).to_be_hidden()
    keyboard.choose("Runs", "other")
    expect(page.get_by_role("cell", name="crepa_enabled")).to_be_visible()
    keyboard.press("Escape")
    keyboard.choose("Settings file", "short.json")
    keyboard.tab_to("Start it with and without CREPA")
    keyboard.press("Enter")
    names = [f"short-{which}" for which in ("with", "without")]
    wait(lambda: all((server.runs / f"{name}.json").exists() for name in names))
    wait(lambda: all((server.runs / name / "report.html").exists() for name in names))

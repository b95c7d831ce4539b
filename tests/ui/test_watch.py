"""Watching a run and comparing runs in a browser: what was logged, sampled and looked at."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crepa_trainer.reporting.runs import RunFolder
from crepa_trainer.ui.form import check, read_json_text
from crepa_trainer.ui.guard import Folders
from crepa_trainer.ui.starting import make_pair
from PIL import Image
from playwright.sync_api import Page, expect
from run_folders import make_run, run_settings
from videos import moving_square, write_video
from web_pages import PHONE, Server, page_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Over one run with looks at two steps, the second with a picture of its patches."""
    runs = tmp_path_factory.mktemp("runs")
    looks = make_run(runs / "seen") / "looks"
    later = {"clip": "later.mp4 [0:9]", "matrix": [[0.1, 0.2], [0.3, 0.4]]}
    (looks / "step-00000020.json").write_text(json.dumps(later))
    Image.new("RGB", (60, 40), "red").save(looks / "step-00000020.png")
    with page_server(runs) as served:
        yield served


def test_matrices_over_time_by_the_keyboard(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}watch?run=seen")
    expect(page.get_by_text("step 20 · later.mp4 [0:9]")).to_be_visible()
    # The dotted diagonal lies over the matrix.
    expect(page.locator(".heatmaplayer image, .heatmaplayer .hm").first).to_be_attached()
    patches = page.locator("img[src*='looks/step-00000020.png']")
    expect(patches).to_be_visible()
    patches.scroll_into_view_if_needed()  # before that it is not asked for
    page.wait_for_function("document.querySelector(\"img[src*='looks']\").naturalWidth == 60")
    page.get_by_role("slider", name="Which look").focus()
    page.keyboard.press("ArrowLeft")
    # What is in a file is text, whatever it looks like.
    expect(page.get_by_text("step 10 · </script><script>document.title='x'</script>")).to_be_visible()
    expect(patches).to_be_hidden()


def test_curves_over_steps_or_hours_and_smoothed(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}watch?run=seen")
    axis = page.locator(".xtitle").first
    expect(axis).to_have_text("step")
    page.get_by_role("button", name="Hours").click()
    expect(axis).to_have_text("hours")
    lines = page.locator(".js-plotly-plot").first.locator(".js-line")  # a legend of one would have one too
    expect(lines).to_have_count(1)
    page.get_by_role("slider", name="Smoothing").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    # Behind it, thin, the values themselves.
    expect(lines).to_have_count(2)


def test_a_sample_is_seen_large_and_let_go_by_the_keyboard(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}watch?run=seen", size=PHONE)
    expect(page.get_by_role("heading", name="a <b>cat</b>")).to_be_visible()
    shown = page.get_by_role("button", name=re.compile("Show: seen"))
    expect(shown).to_have_count(2)
    shown.first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('video')?.videoWidth == 48")
    expect(page.get_by_text("seen · step 20 · seed 3 · a <b>cat</b> · 1 / 2")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("video")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]


GIVEN = {
    "model": "owner/wan",
    "data": "videos",
    "resolutions": [[64, 112]],
    "frame_counts": [17],
    "preset": "t2v",
    "crepa_enabled": True,
    "crepa_block_index": 8,
    "crepa_lambda": 0.25,
    "irepa_enabled": True,
    "max_train_steps": 100,
    "seed": 3,
}


def test_a_pair_differs_in_crepa_alone_and_shares_what_is_encoded(tmp_path: Path) -> None:
    given = {**GIVEN, "output": str(tmp_path / "run")}
    (tmp_path / "mine.json").write_text(json.dumps(given))
    names = make_pair(Folders(tmp_path), "mine.json")
    assert names == ("mine-with.json", "mine-without.json")
    ours, others = (read_json_text((tmp_path / name).read_text()) for name in names)
    assert ours == {**given, "output": f"{tmp_path}/run-with", "cache": f"{tmp_path}/run-cache"}
    expected = {
        "model",
        "data",
        "resolutions",
        "frame_counts",
        "max_train_steps",
        "seed",
        "cache",
        "output",
        "crepa_enabled",
    }
    assert others.keys() == expected
    assert (others["cache"], others["crepa_enabled"]) == (ours["cache"], False)
    assert others["output"] != ours["output"]
    assert [check(values).is_usable for values in (ours, others)] == [True, True]
    with pytest.raises(ValueError, match=r"mine-with\.json is there already"):
        make_pair(Folders(tmp_path), "mine.json")


@pytest.mark.slow
def test_one_click_trains_with_crepa_and_without_it(models: Path, tmp_path: Path, visit: Callable[..., Page]) -> None:
    videos, runs = tmp_path / "videos", tmp_path / "runs"
    for folder in (videos, runs):
        folder.mkdir()
    write_video(videos / "a.mp4", moving_square(9, 48, 80))
    (videos / "a.txt").write_text("a red square")
    given = run_settings(models, videos, output=str(runs / "mine"), max_train_steps=2)
    (runs / "mine.json").write_text(json.dumps(given))
    with page_server(runs, "--folder", str(videos), folder=models) as server:
        page = visit(f"{server.address}compare")
        page.get_by_label("Settings file", exact=True).click()
        page.get_by_role("option", name="mine.json").click()
        page.get_by_role("button", name="Start it with and without CREPA").click()
        expect(page.get_by_text("mine-with.json · mine-without.json was started")).to_be_visible()
        folders = [runs / f"mine-{which}" for which in ("with", "without")]
        end = time.monotonic() + 180
        while any(RunFolder(folder).state().phase != "done" for folder in folders):
            assert time.monotonic() < end
            time.sleep(0.2)
        page.goto(f"{server.address}compare?run=mine-with&run=mine-without")
        expect(page.get_by_role("cell", name="crepa_enabled")).to_be_visible()
        expect(page.locator(".legendtext").get_by_text("mine-without", exact=True).first).to_be_visible()
        page.context.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crepa_enabled": False}, "CREPA is not on in it"),
        ({"crepa_enabled": None, "preset": None}, "CREPA is not on in it"),
        ({"output": None}, "output: null is no folder"),
    ],
)
def test_a_file_of_which_there_is_no_pair_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({**GIVEN, "output": str(tmp_path / "run"), **changes}))
    with pytest.raises(ValueError, match=message):
        make_pair(Folders(tmp_path), "mine.json")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]

"""The plan as a page, and the clips with their captions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect
from run_folders import run_settings
from test_guard import ask
from tiny import CHANNELS
from videos import moving_square, write_video
from web_pages import SECONDS, Server, page_server


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos to train on, one that is too short, and one that is none."""
    folder = tmp_path_factory.mktemp("data")
    for name, frames, height in (("a <i>b", 9, 48), ("tall", 9, 160), ("short", 2, 48)):
        write_video(folder / f"{name}.mp4", moving_square(frames, height, 80))
        (folder / f"{name}.txt").write_text("a red square")
    return folder


@pytest.fixture(scope="module")
def server(data: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    runs = tmp_path_factory.mktemp("runs")
    settings = run_settings(models, data, output=str(runs / "first"), max_train_steps=10)
    (runs / "good.json").write_text(json.dumps(settings))
    (runs / "wrong.json").write_text(json.dumps({**settings, "crepa_block_index": 77}))
    (runs / "outside.json").write_text(json.dumps({**settings, "data": str(runs.parent)}))
    with page_server(runs, "--folder", str(data), folder=models) as served:
        yield served


def test_the_plan_names_what_it_passes_over_and_crops(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}plan?file=good.json")
    expect(page.get_by_text("2 clips of 2 videos, 1 skipped")).to_be_visible(timeout=SECONDS * 1000)
    expect(page.get_by_text("short.mp4 (2 frames, the shortest clip needs 5)")).to_be_visible()
    expect(page.get_by_text(re.compile("tall.mp4 loses 67% of its picture"))).to_be_visible()
    expect(page.get_by_text(re.compile("extra memory"))).to_be_visible()
    # fp32 latents of two frames of 4 x 6 and two frames of 32 x 48 pixels for each of two clips.
    size = 2 * (4 * CHANNELS * 2 * 4 * 6 + 2 * 3 * 32 * 48)
    expect(page.get_by_text(f"{size / 1024:.3g} KiB in")).to_be_visible()
    page.get_by_role("button", name="To the runs").click()
    page.wait_for_url("**/runs?file=good.json")


@pytest.mark.parametrize(
    ("name", "language", "said"),
    [
        ("wrong", "en", "valid are 0 to"),
        ("outside", "en", "outside the folders that this page was started with"),
        ("outside", "ja", "このページに許されたフォルダー"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(
    server: Server, visit: Callable[..., Page], name: str, language: str, said: str
) -> None:
    page = visit(f"{server.address}plan?file={name}.json", language=language)
    expect(page.get_by_role("alert").get_by_text(said)).to_be_visible(timeout=SECONDS * 1000)


def test_captions_are_edited_in_place(server: Server, data: Path, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}clips?file=good.json")
    expect(page.get_by_text("9 frames of 48x80, 25 fps → 5 frames of 32x48")).to_be_visible()
    expect(page.get_by_text("2 frames, the shortest clip needs 5")).to_be_visible()
    page.wait_for_function("[...document.images].filter(image => image.naturalWidth == 320).length == 3")
    caption = page.get_by_label("Caption: tall.mp4", exact=True)
    caption.fill("a blue square, 青い四角")
    page.get_by_role("button", name="Save: tall.mp4").click()
    expect(page.get_by_text("Saved", exact=True)).to_be_visible()
    assert (data / "tall.txt").read_text() == "a blue square, 青い四角\n"
    assert sorted(path.name for path in data.iterdir() if path.name.startswith("tall")) == ["tall.mp4", "tall.txt"]
    caption.fill("  ")
    page.get_by_role("button", name="Save: tall.mp4").click()
    expect(page.get_by_text("a caption must not be empty")).to_be_visible()
    assert "青い四角" in (data / "tall.txt").read_text()


def test_a_folder_outside_is_not_shown(server: Server, data: Path, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}clips?file=outside.json")
    expect(page.get_by_role("alert").get_by_text("outside the folders")).to_be_visible()
    secret = write_video(server.runs.parent / "secret.mp4", moving_square(3))
    for path in (secret, data / "tall.txt", data / ".." / secret.name, "x" * 5000, "/dev/zero"):
        assert ask(server.address, f"/thumbnail?path={quote(str(path))}")[0] == 404
    assert ask(server.address, f"/thumbnail?path={quote(str(data / 'tall.mp4'))}")[2].startswith(b"\x89PNG")

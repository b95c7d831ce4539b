"""Runs in a browser: started, watched, steered, killed and found again, as processes that need no page."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crepa_trainer.control import is_running
from crepa_trainer.ui.guard import Folders
from crepa_trainer.ui.starting import resume_run
from playwright.sync_api import Page, expect
from run_folders import make_run, run_settings
from videos import moving_square, write_video
from web_pages import SECONDS, Server, end_runs, page_server, wait


@pytest.fixture(scope="module")
def settings(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run that would go on for hours."""
    folder = tmp_path_factory.mktemp("data")
    write_video(folder / "a.mp4", moving_square(9, 48, 80))
    (folder / "a.txt").write_text("a red square")
    sampled = {"validation_prompts": ["a blue square"], "validation_every": 0, "validation_steps": 1}
    return run_settings(models, folder, max_train_steps=100_000, matrix_every=5, **sampled)


@pytest.fixture(scope="module")
def server(settings: dict[str, Any], models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    runs = tmp_path_factory.mktemp("runs")
    for name in ("live", "outside"):
        output = runs / name if name == "live" else runs.parent / name
        (runs / f"{name}.json").write_text(
            json.dumps({**settings, "output": str(output), "cache": str(runs / "cache")})
        )
    with page_server(runs, "--folder", settings["data"], folder=models) as served:
        yield served
    end_runs(runs)


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def test_a_run_from_its_start_to_its_end(server: Server, visit: Callable[..., Page]) -> None:
    output = server.runs / "live"
    page = visit(f"{server.address}runs")
    choose(page, "Settings file", "live.json")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("training", exact=True)).to_be_visible(timeout=SECONDS * 1000)
    expect(page.get_by_text(re.compile(r"\d+ / 100000"))).to_be_visible()
    page.get_by_role("button", name="Save now: live").click()
    wait(lambda: list(output.glob("checkpoints/step-*")))
    page.get_by_role("button", name="Sample now: live").click()
    wait(lambda: list(output.glob("validation/*/samples.json")))

    # Two pages at once; in the second its curves move, and its samples are there.
    other = visit(f"{server.address}watch?run=live")
    expect(other.get_by_role("heading", name="Diffusion loss")).to_be_visible()
    line = other.locator(".js-line").first
    before = line.get_attribute("d")
    other.wait_for_function("before => document.querySelector('.js-line').getAttribute('d') !== before", arg=before)
    other.get_by_role("button", name=re.compile("Show: live")).first.click()
    other.wait_for_function("document.querySelector('video')?.videoWidth == 48")
    other.keyboard.press("Escape")
    # Started twice it is refused.
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("a run is under way there")).to_be_visible()

    page.get_by_role("button", name="Stop: live").click()
    expect(page.get_by_text("stopped", exact=True)).to_be_visible(timeout=SECONDS * 1000)
    wait(lambda: not is_running(output))
    page.get_by_role("button", name="Export: live").click()
    wait(lambda: list(output.glob("exported/*/*.safetensors")))
    page.get_by_role("button", name="Resume: live").click()
    wait(lambda: is_running(output))
    expect(page.get_by_text("training", exact=True)).to_be_visible(timeout=SECONDS * 1000)
    os.kill(int((output / ".run.lock").read_text().split()[1]), signal.SIGKILL)
    expect(page.get_by_text("killed", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Resume: live")).to_be_visible()


@pytest.mark.slow
def test_a_run_outlives_its_page_and_a_new_page_finds_it(
    server: Server, settings: dict[str, Any], models: Path, tmp_path: Path, visit: Callable[..., Page]
) -> None:
    output = tmp_path / "runs" / "alone"
    output.parent.mkdir()
    (output.parent / "alone.json").write_text(json.dumps({**settings, "output": str(output)}))
    options = ("--folder", settings["data"])
    with page_server(output.parent, *options, folder=models) as served:
        page = visit(f"{served.address}runs?file=alone.json")
        page.get_by_role("button", name="Start", exact=True).click()
        wait(lambda: is_running(output))
        page.context.close()
        served.process.kill()
    with page_server(output.parent, *options, folder=models) as served:
        page = visit(f"{served.address}runs")
        expect(page.get_by_text("training", exact=True)).to_be_visible(timeout=SECONDS * 1000)
        page.get_by_role("button", name="Stop: alone").click()
        expect(page.get_by_text("stopped", exact=True)).to_be_visible(timeout=SECONDS * 1000)
        page.context.close()


def test_a_run_outside_the_pages_folders_is_not_started(server: Server, visit: Callable[..., Page]) -> None:
    page = visit(f"{server.address}runs?file=outside.json")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("outside the folders that this page was started with")).to_be_visible()
    assert not (server.runs.parent / "outside").exists()


def test_two_runs_are_compared(server: Server, visit: Callable[..., Page]) -> None:
    make_run(server.runs / "with")
    make_run(server.runs / "without", crepa_enabled=False)
    page = visit(f"{server.address}compare?run=with&run=without")
    expect(page.get_by_role("cell", name="crepa_enabled")).to_be_visible()
    expect(page.get_by_role("heading", name="Diffusion loss")).to_be_visible()
    expect(page.locator(".legendtext").get_by_text("with", exact=True).first).to_be_visible()
    expect(page.get_by_role("button", name=re.compile("Show: with.*step 20"))).to_have_count(2)
    # What a run says of itself is text.
    assert page.locator("b", has_text="cat").count() == 0


def test_folders_of_every_kind_are_listed_within_a_second(server: Server, visit: Callable[..., Page]) -> None:
    make_run(server.runs / "long", 50_000)
    damaged = make_run(server.runs / "damaged")
    for name in ("status.json", "settings.json", "metrics.jsonl", "run.json"):
        (damaged / name).write_text('{"half')
    page = visit(f"{server.address}watch?run=long")
    expect(page.get_by_role("heading", name="Memory")).to_be_visible()
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        page.goto(f"{server.address}watch?run=long")
        expect(page.get_by_role("heading", name="Memory")).to_be_visible()
        seconds.append(time.monotonic() - began)
    # On an idle machine 0.6 s; other tests may be at work.
    assert min(seconds) < 3
    page.goto(f"{server.address}runs")
    expect(page.get_by_role("link", name="damaged")).to_be_visible()
    page.goto(f"{server.address}watch?run=damaged")
    expect(page.get_by_text("Nothing was logged.")).to_be_visible()


def relative_run(folder: Path, settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Settings of a run in `folder` as one gives them there."""
    links = {"models": Path(settings["model"]).parent, "videos": Path(settings["data"])}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    places = {"model": "models/wan", "crepa_encoder": "models/dinov2", "data": "videos", "output": "runs/one"}
    return {**settings, "matrix_every": 0, **places, **changes}


def test_a_run_with_relative_paths_is_known_by_the_folder_it_was_started_in(
    settings: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    output = make_run(tmp_path / "runs" / "one", **relative_run(tmp_path, settings, data="elsewhere"))
    folders = Folders(tmp_path / "runs", [models, Path(settings["data"])])
    # Of one that does not say where, the paths are taken from here on.
    with pytest.raises(ValueError, match="elsewhere: outside the folders"):
        resume_run(folders, output, queued=False)
    about = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**about, "folder": str(tmp_path)}))
    with pytest.raises(ValueError, match=f"^{tmp_path}/elsewhere: outside the folders"):
        resume_run(folders, output, queued=False)
    assert not (output / "run.log").exists()


@pytest.mark.slow
def test_a_run_with_relative_paths_is_resumed_from_elsewhere(
    settings: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    given = relative_run(tmp_path, settings, max_train_steps=2)
    (tmp_path / "one.json").write_text(json.dumps(given))
    command = [sys.executable, "-m", "crepa_trainer", "run", "--config", "one.json"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
    output = tmp_path / "runs" / "one"
    assert json.loads((output / "settings.json").read_text())["data"] == "videos"
    resume_run(Folders(tmp_path / "runs", [models, Path(settings["data"])]), output, queued=True)
    wait(lambda: "report in" in (output / "run.log").read_text())
    wait(lambda: not is_running(output))
    log = (output / "run.log").read_text()
    assert f"going on from {output}/checkpoints/step-00000002" in log, log
    assert json.loads((output / "status.json").read_text())["phase"] == "done"
    # Once more: the run that was resumed is known where it was resumed from.
    resume_run(Folders(tmp_path / "runs", [models, Path(settings["data"])]), output, queued=False)
    wait(lambda: (output / "run.log").read_text().count("report in") == 2)

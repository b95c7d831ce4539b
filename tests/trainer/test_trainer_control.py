"""Runs that are watched and steered through the files in their folders, as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from crepa_trainer.cli import main
from crepa_trainer.control import QUEUE, RunControl, ask, is_running, places, turn
from crepa_trainer.reporting.trackers import read_metrics
from processes import begin, run
from run_folders import run_settings
from videos import moving_square, write_video

SECONDS = 180


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioned video, and settings of a run on it that would go on for hours."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "a.mp4", moving_square(9, 48, 80))
    (folder / "videos" / "a.txt").write_text("a red square")
    settings = run_settings(
        models,
        folder / "videos",
        cache=str(folder / "cache"),
        max_train_steps=100_000,
        checkpoints_kept=10,
        validation_prompts=["a blue square"],
        validation_every=0,
        validation_steps=1,
    )
    (folder / "long.json").write_text(json.dumps(settings))
    return folder


def command(words: Sequence[str]) -> None:
    sys.exit(main(words))


@pytest.fixture
def started(folder: Path) -> Iterator[Callable[..., Path]]:
    """started(name, *options) begins a run whose folder has a log, and waits for nothing; all are killed at the end."""
    processes: list[BaseProcess] = []

    def start(name: str, *options: str) -> Path:
        output = folder / name
        output.mkdir()
        words = ["run", "--config", str(folder / "long.json"), "--output", str(output), *options]
        processes.append(begin(command, words, log=output / "run.log"))
        return output

    yield start
    for process in processes:
        process.kill()
        process.join()


def wait(ready: Callable[[], Any], output: Path) -> None:
    end = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < end, (output / "run.log").read_text()
        time.sleep(0.1)


def status(output: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((output / "status.json").read_text())
    except FileNotFoundError:
        return {"phase": None}
    return found


def test_a_run_saves_samples_and_stops_when_it_is_asked(
    folder: Path, started: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = started("asked")
    wait(lambda: status(output)["phase"] == "training", output)
    assert is_running(output)
    assert main(["control", str(output), "save"]) == 0
    assert "a checkpoint after the step that it is at" in capsys.readouterr().out
    wait(lambda: list((output / "checkpoints").glob("step-*")), output)
    ask(output, "sample")
    wait(lambda: list((output / "validation").glob("*/samples.json")), output)
    (sampled,) = (output / "validation").glob("*/samples.json")
    assert json.loads(sampled.read_text()) == [
        {
            "file": "prompt-0.mp4",
            "strip": "prompt-0.png",
            "prompt": "a blue square",
            "seed": 0,
            "steps": 1,
            "guidance": 5.0,
            "size": [5, 32, 48],
        }
    ]
    assert (sampled.parent / "prompt-0.mp4").is_file()
    ask(output, "stop")
    wait(lambda: not is_running(output), output)
    ended = status(output)
    assert ended["phase"] == "stopped"
    assert ended["step"] == max(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").iterdir())
    assert not list((output / "control").iterdir())

    about = json.loads((output / "run.json").read_text())
    assert (about["family"], about["processes"], about["total"]) == ("wan", 1, 100_000)
    given = json.loads((output / "settings.json").read_text())
    assert given == json.loads((folder / "long.json").read_text()) | {"output": str(output)}
    for row in read_metrics(output / "metrics.jsonl"):
        assert row["seconds"] > 0
        assert row["memory"] > 2**26
        total = row["grad_norm_model"] ** 2 + row["grad_norm_projector"] ** 2
        assert total == pytest.approx(row["grad_norm"] ** 2, rel=1e-4)

    log = output / "run.log"
    # The last line comes after the lock is let go.
    wait(lambda: "stopped by SIGTERM" in log.read_text(), output)
    for line in ("checkpoint written", "1 clip sampled into"):
        assert line in log.read_text()
    # It goes on from its own file.
    with pytest.raises(ValueError, match="no run is under way there"):
        ask(output, "save")
    done = ended["step"]
    words = ["run", "--config", str(output / "settings.json"), "--resume", "latest", "--max_train_steps", str(done + 1)]
    ended_again = run(command, words, timeout=SECONDS)
    assert ended_again.returncode == 0, ended_again.stderr
    assert status(output)["phase"] == "done"
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl")] == list(range(done + 1))


@pytest.mark.slow
def test_two_processes_do_what_is_asked_at_the_same_step(folder: Path) -> None:
    output = folder / "two"
    words = ["-m", "crepa_trainer", "run", "--config", str(folder / "long.json"), "--output", str(output)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    output.mkdir()
    with (output / "run.log").open("wb") as log:
        process = subprocess.Popen(launch, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait(lambda: status(output)["phase"] == "training", output)
            ask(output, "save")
            ask(output, "sample")
            wait(lambda: list((output / "checkpoints").glob("step-*")), output)
            wait(lambda: list((output / "validation").glob("*/samples.json")), output)
            at = status(output)["step"]
            wait(lambda: status(output)["step"] > at, output)
            ask(output, "stop")
            assert process.wait(SECONDS) != 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert status(output)["phase"] == "stopped"
    assert "Traceback" not in (output / "run.log").read_text().split("stopped by")[0]


def test_runs_of_a_queue_take_turns_and_a_killed_one_loses_its_place(
    folder: Path, started: Callable[..., Path]
) -> None:
    queue = ("--queue", str(folder))
    first = started("first", *queue)
    wait(lambda: status(first)["phase"] == "training", first)
    second, third = started("second", *queue), None
    wait(lambda: status(second)["phase"] == "waiting", second)
    assert status(second)["detail"] == "1 before it"
    assert is_running(second)
    third = started("third", *queue)
    wait(lambda: status(third).get("detail") == "2 before it", third)
    assert len(places(folder)) == 3
    ask(second, "stop")
    wait(lambda: status(second)["phase"] == "stopped", second)
    wait(lambda: status(third).get("detail") == "1 before it", third)
    holder = int((first / ".run.lock").read_text().split()[1])
    os.kill(holder, signal.SIGKILL)
    wait(lambda: status(third)["phase"] == "training", third)
    # Nobody said that the first one ended; its lock did.
    assert status(first)["phase"] == "training"
    assert not is_running(first)


def test_settings_that_cannot_be_used_leave_no_trace_but_for_who_looks(
    folder: Path, started: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["run", "--config", str(folder / "long.json"), "--output", str(tmp_path / "run")]
    assert main([*words, "--resolutions", "[[33, 48]]"]) == 2
    assert not (tmp_path / "run").exists()
    output = started("wrong", "--resolutions", "[[33, 48]]")
    wait(lambda: status(output)["phase"] == "failed", output)
    assert "resolution 33x48" in status(output)["error"]


@pytest.mark.parametrize("what", ["nowhere", "empty", "ended"])
def test_nobody_is_asked_where_no_run_is(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    if what != "nowhere":
        (tmp_path / what).mkdir()
    if what == "ended":
        (tmp_path / what / "status.json").write_text("{}")
    assert main(["control", str(tmp_path / what), "save"]) == 2
    said = "no run is under way there" if what == "ended" else "is no run's output folder"
    assert said in capsys.readouterr().err
    assert not (tmp_path / what / "control").exists()


def test_what_was_asked_of_an_earlier_run_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "save").touch()
    with RunControl(tmp_path, 3) as control:
        time.sleep(1.2)
        assert control.take() == set()
        (tmp_path / "control" / "sample").touch()
        time.sleep(1.2)
        assert control.take() == {"sample"}
        assert control.take() == set()


def test_a_queue_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / QUEUE).write_text("a file")
    with pytest.raises(ValueError, match="--queue"), turn(tmp_path, lambda before: None):
        pass

"""SIGINT and SIGTERM: the step ends, a checkpoint is written, and the run goes on from it as if it had not stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crepa_trainer.checkpoint import FOLDER
from crepa_trainer.reporting.trackers import read_metrics
from crepa_trainer.stopping import stop_kept
from processes import environment
from training_runs import TinyClips, command, tiny_config, tiny_settings, train
from videos import moving_square, write_video

SECONDS = 240


def started(words: list[str]) -> subprocess.Popen[str]:
    """In a session of its own, so that all of its processes can be sent a signal, as a terminal does."""
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait(ready: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def steps_logged(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return len(read_metrics(metrics)) if metrics.exists() else 0


def checkpoints(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (output / FOLDER).glob("step-*"))


@pytest.mark.parametrize(
    ("number", "processes", "workers"),
    [
        pytest.param(signal.SIGINT, 1, 0, marks=pytest.mark.slow),
        (signal.SIGTERM, 1, 2),
        pytest.param(signal.SIGTERM, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_a_signal_stopped_goes_on(
    models: Path, tmp_path: Path, number: signal.Signals, processes: int, workers: int
) -> None:
    config = tiny_config(models)
    settings = tiny_settings(models, tmp_path / "run", max_train_steps=100_000, workers=workers, ema_decay=0.5)
    process = started(command(settings, config, processes=processes))
    try:
        wait(lambda: steps_logged(tmp_path / "run") >= 2, process)
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    (done,) = checkpoints(tmp_path / "run")
    # Everything of the steps up to there is logged.
    assert steps_logged(tmp_path / "run") == done
    if processes == 1:
        assert process.returncode == 128 + number
        assert "Traceback" not in said
        assert not (tmp_path / "run" / "trained").exists()
        longer = {"max_train_steps": done + 2, "workers": 0}
        rows = train(settings.model_copy(update={**longer, "resume": "latest"}), config)
        assert rows == train(settings.model_copy(update={**longer, "output": tmp_path / "whole"}), config, TinyClips())


@pytest.mark.slow
def test_a_demo_that_a_signal_stopped_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", moving_square(33))
    demo = ["demo", "--data", str(tmp_path / "videos"), "--output", str(tmp_path / "demo"), "--steps", "100000"]
    process = started([sys.executable, "-m", "crepa_trainer", *demo])
    try:
        wait(lambda: steps_logged(tmp_path / "demo") >= 1, process)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert "SIGINT: stopping after this step, with a checkpoint; once more stops at once\n" in printed
    assert said.splitlines()[-1] == "crepa-train: stopped by SIGINT: the demo begins anew when it is started again"


def test_the_second_signal_stops_at_once() -> None:
    code = """
import os, signal
from crepa_trainer.stopping import stop_kept
with stop_kept() as asked:
    os.kill(os.getpid(), signal.SIGINT)
    print(asked.number, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still there", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "2\n")


def test_what_will_come_of_a_signal_is_said_at_once() -> None:
    said: list[str] = []
    with stop_kept(said.append) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        end = time.monotonic() + SECONDS
        while not said and time.monotonic() < end:
            time.sleep(0.001)
    assert asked.number == signal.SIGINT
    assert said == ["SIGINT: stopping after this step, with a checkpoint; once more stops at once"]


def test_handlers_are_as_they_were_after_a_run(models: Path, tmp_path: Path) -> None:
    def handler(*_: Any) -> None:
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        train(tiny_settings(models, tmp_path / "run", max_train_steps=1), tiny_config(models))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_before_it_trains_is_one_line(tmp_path: Path, number: signal.Signals) -> None:
    # A pipe for a file of settings, which nobody writes to, keeps it waiting.
    os.mkfifo(tmp_path / "run.json")
    code = (
        "import sys, crepa_trainer.settings, crepa_trainer.cli as cli; print('ready', flush=True);"
        f"sys.exit(cli.main(['run', '--config', {str(tmp_path / 'run.json')!r}]))"
    )
    process = started([sys.executable, "-c", code])
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)
        process.send_signal(number)
        _, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    (line,) = said.splitlines()
    assert line.startswith(f"crepa-train: stopped by {number.name}: go on with --resume latest")

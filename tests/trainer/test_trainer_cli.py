"""`crepa-train`: what is imported when, one line for a user's error, and started as a module."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crepa_trainer.cli import main
from crepa_trainer.data.shares import Share
from crepa_trainer.reporting.progress import training_progress
from crepa_trainer.terminal import plain
from processes import run
from rich.console import Console
from run_folders import run_settings
from tiny_pipelines import save_tiny_wan_pipeline
from videos import captioned_squares, moving_square, write_video


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=False)


def imported(code: str) -> set[str]:
    done = python("-c", f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_command_imports_what_it_needs_and_no_more() -> None:
    assert not imported("import crepa_trainer.cli") & {"torch", "pydantic", "rich", "numpy"}
    wrong = "from crepa_trainer.cli import main\nassert main(['run', '--max_train_steps', '0']) == 2"
    assert not imported(wrong) & {"diffusers", "transformers", "accelerate", "peft", "av", "matplotlib"}


def call_it(words: list[str]) -> None:
    """What a program does that has loggers of its own."""

    def state() -> list[Any]:
        loggers = [logging.getLogger(name) for name in (None, "crepa_kernels", "crepa_trainer")]
        return [(logger.level, logger.handlers[:]) for logger in loggers]

    before = state()
    assert main(words) == 2
    assert state() == before, state()


@pytest.mark.parametrize("debug", [False, True])
def test_a_program_that_calls_it_has_its_logging_back(debug: bool) -> None:
    done = run(call_it, ["run", "--max_train_steps", "0", *(["--debug"] if debug else [])])
    assert done.returncode == 0, done.stderr
    assert ("Traceback" in done.stdout) == debug


def test_it_starts_as_a_module_for_launchers(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model": "nowhere", "data": "videos", "output": "out", "max_train_steps": 1}))
    done = python("-m", "crepa_trainer", "run", "--config", str(file))
    assert done.returncode == 2
    assert done.stderr.strip() == "crepa-train: error: model = nowhere: no such folder, and not a hub id (owner/name)"


@pytest.mark.slow
def test_a_run_says_nothing_that_is_of_the_libraries_that_it_imports(models: Path, tmp_path: Path) -> None:
    data = captioned_squares(tmp_path / "videos", 1)
    words = [
        f"--{key}={json.dumps(value)}" for key, value in run_settings(models, data, mixed_precision="bf16").items()
    ]
    words += ["--output", str(tmp_path / "run"), "--max_train_steps", "1", "--base_precision", "int8"]
    done = python("-m", "crepa_trainer", "run", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search("WARNING|Warning|Loading", done.stdout), done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": ', '{file}: not JSON: Expecting value: line 1 column 11 (char 10): {{"model":'),
        ('{"seed": 1, "seed": 2}', "{file}: each key may appear once; repeated: seed"),
        (
            '{"model": "wan", "data": "d", "output": "o", "max_train_step": 1, "crepa_lambda": -1}',
            "{file}: 3 settings are wrong: max_train_step = 1: unknown key; did you mean max_train_steps?; "
            "max_train_steps: optimiser steps; must be an integer >= 1, required; "
            "crepa_lambda = -1: weight of the loss; must be a number >= 0",
        ),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    assert main(["run", "--config", str(file)]) == 2
    assert capsys.readouterr().err == f"crepa-train: error: {message.format(file=file)}\n"


def test_a_missing_file_and_a_wrong_word_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", "no/such.json"]) == 2
    assert capsys.readouterr().err == "crepa-train: error: no/such.json: no such file\n"
    words = ["--model", "wan", "--data", "d", "--output", "o", "--max_train_steps", "1"]
    assert main(["run", *words, "--learnign_rate", "1"]) == 2
    expected = "crepa-train: error: the command line: --learnign_rate: unknown option; did you mean --learning_rate?\n"
    assert capsys.readouterr().err == expected


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*words: str) -> str:
        assert main(["run", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("crepa-train: error: ")

    needed = {"model": "a/b", "data": "d", "output": str(tmp_path / "run"), "max_train_steps": 1}
    (tmp_path / "config.json").write_text(json.dumps(needed))
    assert error("--config", f"{tmp_path}/confg.json") == (
        f"{tmp_path}/confg.json: no such file; did you mean {tmp_path}/config.json?"
    )
    assert error("--config", str(tmp_path)) == f"{tmp_path}: is a folder, not a file of settings"
    (tmp_path / "config.yaml").write_text("model: a/b\ndata: [d\noutput: o\n")
    assert error("--config", f"{tmp_path}/config.yaml") == (
        f"{tmp_path}/config.yaml: not YAML: while parsing a flow sequence, expected ',' or ']', but got ':': "
        "line 3 column 7: output: o"
    )
    given = ("--config", f"{tmp_path}/config.json")
    assert 'optimizer = "AdamV": of torch, or' in error(*given, "--optimizer", "AdamV")
    assert error(*given, "--caption_dropout", "0.1").endswith(
        "--caption_dropout: unknown key; captions are not dropped"
    )
    for plan in ([], ["--plan"], ["--json"]):
        told = error(*given, "--resume", "lastest", *plan)
        assert told == "resume = lastest: no such folder; did you mean latest?"
    for place in (tmp_path / "config.json" / "run", tmp_path / "config.json"):
        assert error(*given, "--output", str(place)) == f"output = {place}: {tmp_path}/config.json is not a folder"


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["run", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        text = capsys.readouterr().out
        assert ("--crepa_lambda" in text) == (len(words) == 2)
        assert ("--lora_rank" in text) == (words[0] == "run")
        assert ("--steps N" in text) == (words[0] == "demo")
        # The demo's own teacher, not the one of a run.
        assert ('(default: "efficientnet_lite0")' in " ".join(text.split())) == (words == ["demo", "--help"])


@pytest.mark.parametrize("word", ["0", "-1", "ten", "1.5"])
def test_a_number_that_is_none_is_named(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--steps", word])
    assert f"argument --steps: must be an integer of at least 1, got {word}" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 99, 100, 120])
def test_what_is_said_of_a_step_fits_into_a_terminal(width: int) -> None:
    """With the longest numbers that are usual."""
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=True, color_system=None)
    with training_progress(console, 20_000, 12_344) as show:
        show(12_344, {"loss": 1.401, "flow_loss": 1.352, "crepa_similarity": -0.064, "crepa_weight": 0.5})
    losses = "loss 1.401  flow 1.352  similarity -0.064  weight 0.500"
    lines = written.getvalue().replace("\r", "\n").splitlines()
    assert any(re.search(rf"12345/20000 [-0-9:]+ {losses}$", line.strip()) for line in lines)
    assert not any("…" in line for line in lines)


def test_step_and_time_left_are_in_view_whatever_is_said_beside_them() -> None:
    written = io.StringIO()
    console = Console(file=written, width=80, force_terminal=True, color_system=None)
    with training_progress(console, 20_000, 12_344) as show:
        values = dict.fromkeys(
            ("loss", "flow_loss", "crepa_similarity", "crepa_weight", "layersync_similarity"), -123.456
        )
        show(12_344, values)
    lines = written.getvalue().replace("\r", "\n").splitlines()
    assert any(re.search(r"12345/20000 [-0-9:]+ loss -123.456 .*…$", line.strip()) for line in lines)


WILD = "a\x1b[31m\nb\u202ec\x9b2J"
PLAIN = r"a\x1b[31m\nb\u202ec\x9b2J"


def print_the_plan(words: list[str]) -> None:
    assert main(words) == 0


def test_a_name_cannot_act_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan, a log line and errors of a folder whose names hold escape sequences and bidi marks."""
    data = tmp_path / "data"
    data.mkdir()
    save_tiny_wan_pipeline(tmp_path / "wan")
    for name, frames in ((f"{WILD}.mp4", 9), (f"{WILD} short.mp4", 3)):
        write_video(tmp_path / "a.mp4", moving_square(frames, 32, 48)).rename(data / name)
        (data / name).with_suffix(".txt").write_text("a square")
    words = ["run", "--model", str(tmp_path / "wan"), "--data", str(data), "--output", str(tmp_path / "out")]
    words += ["--resolutions", "[[96, 144]]", "--frame_counts", "[9]", "--max_train_steps", "1", "--plan"]
    done = run(print_the_plan, words)
    assert done.returncode == 0, done.stderr
    plan = done.stdout
    assert f"{PLAIN}.mp4 3 times" in plan  # enlarged, in the plan's table
    assert plan.count(PLAIN) == 2
    assert f"{PLAIN} short.mp4 (3 frames, the shortest clip needs 9)" in " ".join(plan.split())
    both = f"{WILD} short.mp4", f"{WILD}.mp4"
    share = next(share for share in (Share(n, 64) for n in range(1, 65)) if [*map(share.has, both)] == [True, False])
    done = run(print_the_plan, ["cache", *words[1:-1], f"--shard={share}"])
    logged = " ".join(done.stdout.split())
    assert f"skipped {data}/{PLAIN} short.mp4: 3 frames, the shortest clip needs 9" in logged
    assert "1 of 1 video skipped" in logged
    (data / f"{WILD}.txt").unlink()
    assert main(words) == 2
    missing = capsys.readouterr().err
    assert r"a\x1b[31m b\u202ec\x9b2J.txt is missing" in missing
    with pytest.raises(SystemExit):
        main(["export", "nowhere", "--dtype", "\x1b[31m"])
    unknown = capsys.readouterr().err
    assert r"\x1b[31m" in unknown
    for text in (plan, logged, missing, unknown):
        assert not set("\x1b\x9b\u202e") & set(text)


def test_what_is_read_from_left_to_right_stays_as_it_is() -> None:
    for text in ("a square", "日本", "עברית", "👩\u200d🚀", "é", "[red]", "a\\b"):
        assert plain(text) == text
    assert plain("\udcff") == r"\udcff"  # a byte that is no UTF-8
    assert plain("a\r\nb\u2028", "\n") == "a\\r\nb\\u2028"

"""One run at a time in each output folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from crepa_trainer.folders import LOCK_FILE, one_run_in
from processes import environment

HOLD = """
import pathlib, sys
from crepa_trainer.folders import one_run_in
with one_run_in(pathlib.Path(sys.argv[1])):
    print("has it", flush=True)
    sys.stdin.read()
"""


def test_the_second_run_stops_with_the_firsts_number_until_that_is_gone(tmp_path: Path) -> None:
    output, pipe = tmp_path / "run", subprocess.PIPE
    words = [sys.executable, "-c", HOLD, str(output)]
    first = subprocess.Popen(words, env=environment(), stdin=pipe, stdout=pipe, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "has it\n"
        says = rf"output = {output}: process {first.pid} of .* is running there; wait"
        with pytest.raises(ValueError, match=says), one_run_in(output):
            pass
        assert (output / LOCK_FILE).exists()
    finally:
        first.kill()
        first.communicate()
    # A killed one leaves its file, which holds nobody.
    with one_run_in(output):
        assert (output / LOCK_FILE).read_text()
    assert not (output / LOCK_FILE).exists()


def test_a_run_that_came_to_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with one_run_in(tmp_path / "a" / "run"):
        pass
    assert not (tmp_path / "a" / "run").exists()
    with one_run_in(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["metrics.jsonl"]

"""The hour on a GPU as a script: its parts run in order, within their time, whatever becomes of each."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benches.gpu import hour
from benches.gpu.hour import AGAIN, PASSED, TESTS, Hour, Part, main, parts_for, summary

ROOT = Path(__file__).parents[2]
CARD = {"gpu": True, "hip": False, "torch": "2.11.0", "name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}


def part(name: str, *programs: str, seconds: float = 60, **fields: Any) -> Part:
    return Part(name, "nothing", seconds, [["-c", program] for program in programs], **fields)


def outcomes(at: Hour) -> dict[str, str]:
    return {name: found["outcome"] for name, found in at.outcomes.items()}


def alive(pid: int) -> bool:
    """Not ended, and no zombie either."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_part_that_fails_or_is_missing_does_not_stop_the_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    at = Hour(tmp_path, 60)
    at.run(part("first", "print('one')", "raise SystemExit(3)", "print('never')"))
    at.run(part("second", missing="no such tool"))
    at.run(part("third", "import os; print(os.environ['MARK'])", environment={"MARK": "three"}, makes="a.json"))
    assert outcomes(at) == {"first": "failed: exit status 3", "second": "left out: no such tool", "third": PASSED}
    assert json.loads((tmp_path / "hour.json").read_text()) == at.outcomes
    assert (tmp_path / "hour.log").read_text().split() == ["==", "first", "one", "==", "third", "three"]
    assert "never" not in capfd.readouterr().out
    assert [line.split()[:2] for line in summary(at.outcomes).splitlines()] == [
        ["part", "outcome"], ["first", "failed:"], ["second", "left"], ["third", PASSED],
    ]  # fmt: skip
    assert "hour.log, a.json" in summary(at.outcomes)


@pytest.mark.slow
def test_a_part_out_of_time_is_ended_with_all_that_it_began(tmp_path: Path) -> None:
    """A process that does not listen, in the middle of its output, and its own child."""
    pids = tmp_path / "pids"
    program = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
print("half a line", end="", flush=True)
time.sleep(600)
"""
    at = Hour(tmp_path, 120)
    at.run(part("stuck", program, seconds=4))
    at.run(part("next", "print('next')"))
    assert outcomes(at) == {"stuck": "out of time", "next": PASSED}
    assert 4 <= at.outcomes["stuck"]["seconds"] < 30
    assert not any(alive(int(pid)) for pid in pids.read_text().split())


def test_no_part_begins_when_the_time_of_all_is_up(tmp_path: Path) -> None:
    at = Hour(tmp_path, 0)
    at.run(part("late", "print('late')"))
    assert outcomes(at) == {"late": "left out: no time was left"}
    assert not (tmp_path / "hour.log").exists()


@pytest.mark.parametrize(
    ("ending", "restarts", "outcome", "runs"),
    [
        (f"raise SystemExit({AGAIN})", True, PASSED, 3),
        ("os.kill(os.getpid(), 11)", True, PASSED, 3),
        (f"raise SystemExit({AGAIN})", False, f"failed: exit status {AGAIN}", 1),
        ("raise SystemExit(1)", True, "failed: exit status 1", 1),
    ],
)
def test_a_command_that_lost_the_device_is_started_again(
    ending: str, restarts: bool, outcome: str, runs: int, tmp_path: Path
) -> None:
    log = tmp_path / "runs"
    program = f"""
import os, sys
with open({str(log)!r}, "a") as file: file.write(" ".join(sys.argv[1:]) + ";")
if open({str(log)!r}).read().count(";") < 3: {ending}
"""
    at = Hour(tmp_path, 60)
    at.run(part("table", program, restarts=restarts))
    assert outcomes(at) == {"table": outcome}
    assert log.read_text() == ";" + "--again;" * (runs - 1)


def test_a_command_that_always_crashes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hour, "STARTS", 3)
    at = Hour(tmp_path, 60)
    at.run(part("table", "import os; print('again', flush=True); os.kill(os.getpid(), 11)", restarts=True))
    assert outcomes(at) == {"table": "failed: exit status -11"}
    assert (tmp_path / "hour.log").read_text().count("again") == 3


def test_what_a_signal_ends_leaves_nothing_behind(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from benches.gpu import hour
at = hour.Hour(Path(sys.argv[1]), 60)
hour._end_on_a_signal(at.end)
at.run(hour.Part("long", "nothing", 60, [["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]]))
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline().startswith("== long")
    pid = int(child.stdout.readline())
    assert alive(pid)
    child.terminate()
    assert child.wait(30) == 128 + signal.SIGTERM
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)


def test_passed_parts_are_left_out_when_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    program = f"open({str(ran)!r}, 'a').write('{{}};')"

    def parts(facts: Any, out: Path, dry: bool) -> list[Part]:
        second = program.format("b") + ("" if ran.exists() and "a" in ran.read_text()[1:] else "; raise SystemExit(2)")
        return [part("build", program.format("a")), part("gate", second)]

    monkeypatch.setattr(hour, "parts_for", parts)
    monkeypatch.setattr(hour, "probe", lambda: CARD)
    monkeypatch.setattr(hour, "_end_on_a_signal", lambda end: None)
    assert main(["--out", str(tmp_path)]) == 1
    assert ran.read_text() == "a;b;"
    assert main(["--out", str(tmp_path), "--resume"]) == 1
    assert ran.read_text() == "a;b;b;"
    assert main(["--out", str(tmp_path), "--only", "build", "--resume"]) == 0
    assert ran.read_text() == "a;b;b;"
    assert main(["--out", str(tmp_path), "--only", "build"]) == 0
    assert ran.read_text() == "a;b;b;a;"


def test_the_order_and_what_each_part_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hour.shutil, "which", lambda name: f"/bin/{name}")
    parts = {each.name: each for each in parts_for(CARD, Path("/out"), dry=False)}
    assert list(parts) == [
        "build", "gate", "tests", "table", "choices", "resample", "memcheck", "racecheck", "initcheck",
    ]  # fmt: skip
    assert parts["build"].environment == {"CREPA_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    for name in ("memcheck", "racecheck", "initcheck"):
        assert parts[name].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        assert parts[name].before[:3] == ("compute-sanitizer", "--tool", name)
    assert all(each.seconds < 600 for each in parts.values())
    (tests,) = parts["tests"].commands
    assert tests[tests.index("-m", 2) + 1] == "gpu and not slow"
    amd = {each.name: each for each in parts_for({"gpu": True, "hip": True, "capability": "9.4"}, Path("/out"), False)}
    assert amd["build"].environment == {"CREPA_KERNELS_CUDA": "0"}


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hour.shutil, "which", lambda name: None)
    monkeypatch.setattr(hour.importlib.util, "find_spec", lambda module: None)
    parts = {each.name: each for each in parts_for(CARD, Path("/out"), dry=False)}
    assert parts["memcheck"].missing == "compute-sanitizer is not installed"
    assert parts["tests"].missing == "pytest is not installed"
    assert "-n" not in parts["tests"].commands[0]


def test_every_file_with_tests_for_a_gpu_is_run_or_needs_more_than_torch() -> None:
    marked = re.compile(r"mark\.gpu\b|\bon_each_device\b|\bon_a_gpu\b")
    tests = (ROOT / "tests").rglob("test_*.py")
    files = {path.relative_to(ROOT).as_posix() for path in tests if marked.search(path.read_text())}
    # Its models are diffusers'.
    assert files - {"tests/benches/test_bench_hour.py", "tests/regularizer/test_host_waits.py"} == set(TESTS)


def test_the_python_of_the_hour_runs_without_a_gpu(tmp_path: Path) -> None:
    """The tests are collected, and a case of the gate runs as under the memory checkers."""
    command = [sys.executable, "-m", "benches.gpu.hour", "--dry", "--out", str(tmp_path)]
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--only", "build", "tests", "racecheck"],
        cwd=ROOT, env=kept | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "hour.json").read_text())
    assert {name: each["outcome"] for name, each in found.items()} == {
        "build": "left out: a dry run takes what is built", "tests": PASSED, "racecheck": PASSED,
    }  # fmt: skip
    log = (tmp_path / "hour.log").read_text()
    assert "dry: bfloat16, D 32, E 16: 1 cases" in log
    # What is chosen for a GPU is there by its id; what adds nothing there is not.
    assert "test_errors_are_those_of_eager_arithmetic_in_the_same_type[seed19-cuda]" in log
    assert "seed20-cuda" not in log
    several = re.findall(r"test_several_tiles\[(\w+)-torch.(\w+)-\w+-cuda\]", log)
    types = ("float32", "bfloat16", "float16")
    assert set(several) == {("odd", "bfloat16"), *((name, kind) for name in ("even", "long") for kind in types)}
    assert re.findall(r"test_shards_of_the_tokens_add_up\[.*-cuda\]", log) == [
        "test_shards_of_the_tokens_add_up[plain-triton-torch.bfloat16-cuda]"
    ]
    assert "-cpu]" not in log

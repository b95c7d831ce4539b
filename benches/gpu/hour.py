"""All that a first hour on a GPU should do, in order: ``make gpu-check`` and ``make bench-gpu`` are parts of it.

    python -m benches.gpu.hour [--only build gate ...] [--seconds 3600] [--out build/gpu] [--resume]

Each part runs in processes of its own within its own time limit, and the next one begins whatever became of it. What
they print goes to OUT/hour.log as well, what became of them to OUT/hour.json. It needs no make and no git; without a
checkout CREPA_COMMIT names the commit. ``--resume`` leaves out the parts that OUT/hour.json has as passed.

``--dry`` runs the same Python without a GPU on tiny shapes, launching and measuring nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benches.gpu.measure import ROOT, commit
from benches.gpu.results import write_whole

AGAIN = 75  # what ``python -m benches.gpu`` exits with where it wants a new process
STARTS = 30  # of one command at most: what crashes before it measures anything would be started for ever
PASSED = "passed"
# The test files with tests for a GPU that need neither diffusers nor pydantic.
TESTS = [
    f"tests/{folder}/test_{name}.py"
    for folder, names in {
        "loss": (
            "triton",
            "triton_operators",
            "triton_products",
            "triton_resampled",
            "autocast",
            "triton_relational",
            "relational_autograd",
        ),
        "ops": ("extension_cuda", "layer_norm_resample_options", "resample_gather"),
        "regularizer": ("host_copy", "schedule_state"),
    }.items()
    for name in names
]
# Prints what the parts have to know of the machine; a process of its own, so that this one holds nothing of the card.
_PROBE = """
import json, torch
found = {"gpu": torch.cuda.is_available(), "hip": torch.version.hip is not None, "torch": torch.__version__}
if found["gpu"]:
    found |= {"name": torch.cuda.get_device_name(), "capability": "{}.{}".format(*torch.cuda.get_device_capability())}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Part:
    """One part of the hour.

    Attributes:
        name: as in ``--only``.
        needs: what it takes, in words.
        seconds: how long it may take.
        commands: arguments of Python; they run one after the other until one fails.
        before: a program and its options in front of Python.
        environment: variables beside those of this process.
        missing: why it cannot run here, or None.
        restarts: the command may end with exit status 75 or by a crash, and goes on when it is started with --again.
        makes: files in OUT.
    """

    name: str
    needs: str
    seconds: float
    commands: list[list[str]]
    before: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None
    restarts: bool = False
    makes: str = ""


def parts_for(facts: dict[str, Any], out: Path, dry: bool) -> list[Part]:
    """In the order of the hour. Limits are for 16 cores and an H100."""
    suite, mark = ["-m", "benches.gpu"], ["--dry"] if dry else []
    here = ["--out", str(out), *mark]
    build = {"CREPA_KERNELS_CUDA": "0" if facts["hip"] or dry else "1"}
    if "capability" in facts and not facts["hip"]:
        build["TORCH_CUDA_ARCH_LIST"] = facts["capability"]
    pytest = None if _found("pytest") else "pytest is not installed"
    workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"] if _found("xdist") and not dry else []
    # pytest's options of pyproject.toml name a plugin that may not be there.
    tests = ["-m", "pytest", "-q", "-o", "addopts=--strict-markers", "-m", "gpu and not slow", *workers, *TESTS]
    sanitizer = None if dry or shutil.which("compute-sanitizer") else "compute-sanitizer is not installed"
    # Through the caching allocator an access outside a tensor is one inside another.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sanitized(tool: str, needs: str, seconds: float, *options: str, only_ours: bool = False) -> Part:
        before = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        # The names of Triton's kernels and of the extension's end so; the vendors' libraries are not looked at.
        before += ["--kernel-regex", "kns=_kernel"] if only_ours else []
        command = [*suite, "--gate", *options, *here]
        return Part(tool, needs, seconds, [command], () if dry else tuple(before), uncached, sanitizer)

    one = ("--cases", "equal", "--widths", "1001x77", "--types", "bfloat16")
    return [
        Part("build", "nvcc, a C++ compiler, setuptools", 240, [["setup.py", "-q", "build_ext", "--inplace"]],
             environment=build, missing="a dry run takes what is built" if dry else None),
        Part("gate", "1 GB of the card; about 140 kernels are compiled", 300, [[*suite, "--gate", *here]],
             makes="gate-*.json"),
        Part("tests", "pytest; pytest-xdist if it is there", 420, [[*tests, "--collect-only"] if dry else tests],
             missing=pytest),
        Part("table", "up to 40 GB of the card; a C compiler for torch.compile", 560,
             [[*suite, "--seconds", "{seconds}", *here]], restarts=True, makes="gpu-*.json"),
        Part("choices", "8 GB of the card; about 60 kernels are compiled", 480,
             [["-m", "benches.gpu.choices", "--seconds", "{seconds}", *here]],
             restarts=True, makes="choices-*.json"),
        Part("resample", "the extension", 240,
             [["-m", "benches.bench_resample", "--help"]] if dry else
             [["-m", "benches.bench_resample", "--device", "cuda", "--out", str(out / "resample-gpu.json")]],
             makes="resample-gpu.json"),
        sanitized("memcheck", "compute-sanitizer", 540, "--widths", "1001x77", "1536x384", "--types", "bfloat16"),
        sanitized("racecheck", "compute-sanitizer", 240, *one, only_ours=True),
        sanitized("initcheck", "compute-sanitizer", 240, *one, only_ours=True),
    ]  # fmt: skip


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class Hour:
    """Runs parts, one after the other, and keeps their outcomes."""

    def __init__(self, out: Path, seconds: float):
        self.out, self.deadline = out, time.monotonic() + seconds
        self.path = out / "hour.json"
        self.outcomes: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self._child: subprocess.Popen[str] | None = None

    def run(self, part: Part) -> None:
        begun, limit = time.monotonic(), min(part.seconds, self.deadline - time.monotonic())
        outcome = f"left out: {part.missing}" if part.missing else "left out: no time was left"
        if not part.missing and limit > 0:
            print(f"== {part.name}: needs {part.needs}; {limit:.0f} s at most", flush=True)
            with (self.out / "hour.log").open("a") as log:
                log.write(f"== {part.name}\n")
                outcome = self._commands(part, begun + limit, log)
        self.outcomes[part.name] = {
            "outcome": outcome, "seconds": round(time.monotonic() - begun, 1), "commit": commit(),
            "output": ", ".join(["hour.log", *([part.makes] if part.makes else [])]),
        }  # fmt: skip
        write_whole(self.path, json.dumps(self.outcomes, indent=1) + "\n")
        print(f"== {part.name}: {outcome}", flush=True)

    def _commands(self, part: Part, deadline: float, log: TextIO) -> str:
        for command in part.commands:
            status, starts = self._start(part, command, deadline, log), 1
            while part.restarts and starts < STARTS and status is not None and (status == AGAIN or status < 0):
                status, starts = self._start(part, [*command, "--again"], deadline, log), starts + 1
            if status is None:
                return "out of time"
            if status != 0:
                return f"failed: exit status {status}"
        return PASSED

    def _start(self, part: Part, command: list[str], deadline: float, log: TextIO) -> int | None:
        left = deadline - time.monotonic()
        # What has a limit of its own ends before it is ended.
        words = [word.replace("{seconds}", f"{max(1.0, left - 15):.0f}") for word in command]
        return self._run([*part.before, sys.executable, *words], part.environment, left, log)

    def _run(self, line: list[str], environment: dict[str, str], seconds: float, log: TextIO) -> int | None:
        """The exit status; None if the command and all that it had begun were ended after ``seconds``."""
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # A process group of its own, in this session: it can be ended with all that it began.
        child = subprocess.Popen(
            line, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", preexec_fn=os.setpgrp,
        )  # fmt: skip
        self._child = child
        copying = threading.Thread(target=_copy, args=(child.stdout, log), daemon=True)
        copying.start()
        try:
            return child.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end()
            copying.join(5)

    def end(self) -> None:
        """Ends what is left of the running command: politely, then not."""
        child, self._child = self._child, None
        if child is None:
            return
        for sign, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(child.pid, sign)
            except ProcessLookupError:
                return
            until = time.monotonic() + patience
            while time.monotonic() < until and _alive(child):
                time.sleep(0.05)


def _alive(child: subprocess.Popen[str]) -> bool:
    """Whether any process of the child's group is left."""
    child.poll()
    try:
        os.killpg(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _copy(source: Any, log: TextIO) -> None:
    for line in source:
        sys.stdout.write(line)
        sys.stdout.flush()
        log.write(line)
        log.flush()


def summary(outcomes: dict[str, dict[str, Any]]) -> str:
    rows = [("part", "outcome", "seconds", "output")]
    rows += [(name, found["outcome"], f"{found['seconds']:.1f}", found["output"]) for name, found in outcomes.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def probe() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    names = [part.name for part in parts_for({"hip": False}, Path(), dry=False)]
    parser = argparse.ArgumentParser(
        prog="python -m benches.gpu.hour", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=3600, help="for all parts together")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of logs and results")
    parser.add_argument("--resume", action="store_true", help="leave out what already passed")
    parser.add_argument("--dry", action="store_true", help="without a GPU: tiny shapes, nothing launched or measured")
    parsed = parser.parse_args(arguments)
    facts = probe()
    if not facts["gpu"] and not parsed.dry:
        print("no CUDA or ROCm GPU was found, so nothing can be launched or measured", file=sys.stderr)
        return 1
    out = parsed.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    hour = Hour(out, parsed.seconds)
    _end_on_a_signal(hour.end)
    print(f"{facts.get('name', 'no GPU')}, torch {facts['torch']}, commit {commit()}; output in {out}", flush=True)
    chosen = [part for part in parts_for(facts, out, parsed.dry) if part.name in (parsed.only or names)]
    for part in chosen:
        if not (parsed.resume and hour.outcomes.get(part.name, {}).get("outcome") == PASSED):
            hour.run(part)
    print(summary(hour.outcomes))
    outcomes = [hour.outcomes[part.name]["outcome"] for part in chosen]
    return 0 if all(each == PASSED or each.startswith("left out: ") for each in outcomes) else 1


def _end_on_a_signal(end: Callable[[], None]) -> None:
    def stop(number: int, _: Any) -> None:
        end()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)


if __name__ == "__main__":
    sys.exit(main())

"""Real faults of real libraries: a Python of its own, whose Triton compiles and has a driver to load."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

RUN = """
import logging, sys
import torch
torch.cuda.is_available = lambda: True  # by which Triton takes its CUDA driver
from crepa_kernels.backends.triton import self_check
self_check.why_not_triton_for = lambda device, dtype: None
{before}
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
from cases import simple
case = simple(teacher_grid=(3, 4))
def run(backend, case=case):
    output, gradients = case.run(case.tensors(torch.float32), backend)
    return [output.loss.detach(), *gradients.values()]
for given in (case, case, simple(teacher_grid=(3, 4), hidden_size=24)):
    for one, other in zip(run("auto", given), run("torch", given)):
        assert torch.equal(one, other)
print("went on")
"""


def elsewhere(tmp_path: Path, before: str = "", **environment: str) -> list[str]:
    root = Path(__file__).parents[2]
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "CC", "CXX")}
    kept |= {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests" / "support"), kept.get("PYTHONPATH", "")])}
    kept |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUN).format(before=before)],
        capture_output=True, text=True, timeout=300, env=kept | environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines.pop() == "went on"
    return lines


no_libcuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")


@no_libcuda
def test_a_machine_without_a_c_compiler(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "libcuda.so.1").touch()
    (line,) = elsewhere(tmp_path, PATH=str(tmp_path / "bin"), TRITON_LIBCUDA_PATH=str(tmp_path))
    assert line.startswith("WARNING")
    assert "RuntimeError: Failed to find C compiler" in line


@no_libcuda
def test_a_machine_without_a_libcuda(tmp_path: Path) -> None:
    (line,) = elsewhere(tmp_path)
    assert line.startswith("WARNING")
    assert "libcuda" in line


def test_a_triton_that_is_too_old(tmp_path: Path) -> None:
    """Triton had no ``knobs`` before 3.4."""
    (line,) = elsewhere(tmp_path, before="import triton; del triton.knobs")
    assert line.startswith("WARNING")
    assert "AttributeError: module 'triton' has no attribute 'knobs'" in line

"""setup.py: which halves of the extension are built, and what it says of those that are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NO_COMPILER = "no-such-compiler"
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="there is no C++ compiler"
)


def setup(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {name: value for name, value in os.environ.items() if name != "CREPA_KERNELS_CUDA"}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=ROOT,
        env={**ours, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_nothing_is_built_and_it_says_so(tmp_path: Path) -> None:
    done = setup("build_ext", "-b", str(tmp_path), "-t", str(tmp_path), CXX=NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert f"no C++ compiler ('{NO_COMPILER}' was not found): installing without the extension" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_what_does_not_compile_is_left_out_and_said(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$1" in --version | -dump*) exec c++ "$@" ;; esac\nexit 1\n')
    compiler.chmod(0o755)
    done = setup("build_ext", "-b", str(tmp_path), "-t", str(tmp_path), CXX=str(compiler), CREPA_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "crepa_kernels._cpu did not compile, installing without it" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("wanted", "compiler", "message"),
    [
        ("1", NO_COMPILER, f"CREPA_KERNELS_CUDA=1 needs a C++ compiler, and '{NO_COMPILER}' was not found"),
        ("2", "c++", "CREPA_KERNELS_CUDA must be 0, 1 or auto, got '2'"),
    ],
)
def test_what_cannot_be_built_as_asked_is_an_error(wanted: str, compiler: str, message: str) -> None:
    done = setup("--version", CREPA_KERNELS_CUDA=wanted, CXX=compiler)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].endswith(message)


@needs_compiler
def test_why_the_cuda_half_is_left_out() -> None:
    assert "without the CUDA half: CREPA_KERNELS_CUDA is 0" in setup("--version", CREPA_KERNELS_CUDA="0").stderr
    nowhere = {"CUDA_HOME": "/nowhere", "CREPA_KERNELS_CUDA": "auto"}
    assert "without the CUDA half: nvcc was not found" in setup("--version", **nowhere).stderr
    if torch.version.cuda is None and shutil.which("nvcc") is not None:
        assert "without the CUDA half: torch is built without CUDA" in setup("--version").stderr

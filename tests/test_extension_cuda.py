"""The CUDA kernels compiled ahead of time, without a GPU: they fit their registers and move 16 bytes at a time."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from resampling import ODD, assert_exact_numbers, pair_id

from crepa_kernels.grid import Grid
from crepa_kernels.ops import has_extension

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
FILES = ["resample.cu", "layer_norm.cu"]
ARCHITECTURES = ["90"] + [pytest.param(name, marks=pytest.mark.slow) for name in ("80", "86", "89", "100", "120")]
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_file = pytest.mark.parametrize("file", FILES)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubin")


@cache
def compiled(file: str, architecture: str, folder: Path) -> tuple[Path, str]:
    """The binary of one architecture, and what the assembler says of each kernel."""
    binary = folder / f"{file}.{architecture}.cubin"
    target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command = ["nvcc", "-std=c++17", "-O3", "-cubin", "-Xptxas=-v", *target, str(SOURCES / file), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return binary, done.stderr


@cache
def disassembler() -> str | None:
    """cuobjdump of the toolkit, or Triton's own."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(location) / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
            return str(path)
    return None


@needs_nvcc
@each_architecture
@each_file
def test_no_kernel_spills(file: str, architecture: str, folder: Path) -> None:
    _, report = compiled(file, architecture, folder)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= 8
    assert set(spills) == {("0", "0")}, report


@needs_nvcc
@each_architecture
@each_file
def test_bf16_kernels_move_16_bytes_at_a_time(file: str, architecture: str, folder: Path) -> None:
    if disassembler() is None:
        pytest.skip("cuobjdump is neither on the PATH nor in an installed Triton")
    binary, _ = compiled(file, architecture, folder)
    done = subprocess.run([str(disassembler()), "-sass", str(binary)], capture_output=True, text=True, check=True)
    kernels = {
        part.split("\n", 1)[0]: part for part in done.stdout.split("Function : ")[1:] if "13__nv_bfloat16Li8E" in part
    }
    assert kernels
    for name, code in kernels.items():
        # What is not bf16 may be narrower: a token's mean and 1/std, in fp32, and whether its frame is in the loss.
        assert re.search(r"\bLDG\.E\.128", code), name
        assert re.search(r"\bSTG\.E(\.EF)?\.128", code), name
        narrow = re.findall(r"\b(?:LDG|STG)\.E\.(?:EF\.)?[US]16\b.*", code)
        assert not narrow, f"{name}: {narrow}"


@needs_nvcc
@pytest.mark.slow
def test_the_cuda_half_builds_where_torch_has_no_cuda(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp")]
    environment = {**os.environ, "CREPA_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "lib" / "crepa_kernels").glob("_cuda*"))


@pytest.mark.gpu
@pytest.mark.parametrize("antialias", [True, False], ids=["antialias", "plain"])
@pytest.mark.parametrize("channels", [7, 1536, 5120, 8200], ids="C{}".format)
@pytest.mark.parametrize("pair", [((30, 52), (37, 37)), ((30, 52), (16, 16)), ((45, 80), (16, 16)), *ODD], ids=pair_id)
def test_a_gpu_gives_the_same_numbers(pair: tuple[Grid, Grid], channels: int, antialias: bool) -> None:
    if not has_extension("cuda"):
        pytest.skip("the CUDA half of the extension is not built")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert_exact_numbers(torch.ops.crepa_kernels, pair, channels, antialias, dtype, "cuda")

"""The CUDA half without a GPU: its kernels fit their registers and move 16 bytes at a time; which cards it is for."""

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
from crepa_kernels.ops import extension, has_extension

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FILES = ["resample.cu", "layer_norm.cu"]
ARCHITECTURES = ["90"] + [pytest.param(name, marks=pytest.mark.slow) for name in ("75", "80", "86", "89", "100", "120")]
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
    root = Path(__file__).parents[2]
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp")]
    environment = {**os.environ, "CREPA_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (binary,) = (tmp_path / "lib" / "crepa_kernels").glob("_cuda*")
    assert sorted(extension.built_for(binary)[0]) == ["compute_90", "sm_90"]  # torch says in which order
    if disassembler() is not None:
        listed = [str(disassembler()), "--list-elf", "--list-ptx", str(binary)]
        contents = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
        assert set(re.findall(r"sm_\d+[af]?", contents)) == {"sm_90"}
        assert "ptx" in contents


BUILT = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]
FOR = f"it was built for {' '.join(BUILT[:-1])}"


@pytest.mark.parametrize(
    ("target", "runs", "does_not"),
    [
        ("sm_75", [(7, 5)], [(7, 0), (8, 0)]),
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (8, 7), (9, 0)]),
        ("sm_87", [(8, 7)], [(8, 6), (8, 9)]),
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("compute_80", [(8, 0), (8, 7), (9, 0), (12, 1)], [(7, 5)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("compute_100f", [(10, 0), (10, 3)], [(12, 0)]),
    ],
)
def test_which_cards_code_runs_on(target: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    assert [extension.runs_on(target, card) for card in (*runs, *does_not)] == [True] * len(runs) + [False] * len(
        does_not
    )


@pytest.mark.parametrize(
    ("cards", "cuda", "driver", "reason"),
    [
        ([], 13000, 13000, None),
        ([(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)], 13000, 13000, None),
        ([(13, 0)], 13000, 13010, None),
        ([(7, 0)], 13000, 13000, f"it was built for {' '.join(BUILT)}, not for a GPU of compute capability 7.0"),
        (
            [(7, 0), (9, 0)],
            12080,
            13000,
            f"it was built for {' '.join(BUILT)}, not for a GPU of compute capability 7.0",
        ),
        # An older driver of the same CUDA runs machine code and does not know this PTX.
        ([(9, 0)], 13010, 13000, None),
        ([(13, 0)], 13010, 13000, f"{FOR}, not for a GPU of compute capability 13.0"),
        ([(9, 0)], 13000, 12080, "it was built by CUDA 13, and the GPU's driver is of CUDA 12"),
    ],
)
def test_why_a_binary_does_not_run_on_the_cards(
    cards: list[tuple[int, int]], cuda: int, driver: int, reason: str | None
) -> None:
    assert extension.why_not_on(BUILT, cuda, cards, driver) == reason


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, int]]:
    """A torch with CUDA 13.0, on a machine with the cards that a test adds, and a binary that the linker refuses."""
    here: list[tuple[int, int]] = []
    (tmp_path / "_cuda.abi3.so").write_bytes(b"\0crepa_kernels built for sm_90+compute_90 by CUDA 13000\0")
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    monkeypatch.setattr(extension, "missing", {"cuda": extension.NOT_ASKED})
    monkeypatch.setattr(extension, "driver_version", lambda: 13000)
    monkeypatch.delenv("CREPA_KERNELS_EXTENSION", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(here))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: here[index])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_120"])
    return here


def test_the_cuda_half_is_not_loaded_for_a_card_it_was_not_built_for(
    cards: list[tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    cards += [(9, 0), (8, 0)]
    extension.register_for_cards()
    assert not has_extension("cuda")
    extension.log_fallback.cache_clear()
    with caplog.at_level("INFO", logger="crepa_kernels"):
        extension.log_fallback("cuda")
        extension.log_fallback("cuda")
    (said,) = caplog.messages
    assert said.endswith("it was built for sm_90 compute_90, not for a GPU of compute capability 8.0")
    extension.log_fallback.cache_clear()


def test_a_card_that_torch_cannot_use_does_not_count(cards: list[tuple[int, int]]) -> None:
    cards += [(9, 0), (6, 1)]
    extension.register_for_cards()
    # So it was loaded, or would have been.
    assert "_cuda.abi3.so does not load" in extension.why_no_extension("cuda")


def test_whatever_the_question_raises_is_the_reason(cards: list[tuple[int, int]], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def fail(index: int) -> tuple[int, int]:
        raise RuntimeError("device is lost")

    cards += [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    extension.register_for_cards()
    assert extension.why_no_extension("cuda") == "the GPUs cannot be asked: device is lost"
    (tmp_path / "_cuda.abi3.so").write_bytes(b"nothing")
    extension.register_for_cards()
    assert "it does not say for which GPUs it was built" in extension.why_no_extension("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("antialias", [True, False], ids=["antialias", "plain"])
@pytest.mark.parametrize("channels", [7, 1536, 5120, 8200], ids="C{}".format)
@pytest.mark.parametrize("pair", [((30, 52), (37, 37)), ((30, 52), (16, 16)), ((45, 80), (16, 16)), *ODD], ids=pair_id)
def test_a_gpu_gives_the_same_numbers(pair: tuple[Grid, Grid], channels: int, antialias: bool) -> None:
    if not has_extension("cuda"):
        pytest.skip("the CUDA half of the extension is not built")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert_exact_numbers(torch.ops.crepa_kernels, pair, channels, antialias, dtype, "cuda")

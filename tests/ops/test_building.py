"""setup.py: which halves of the extension are built, and what it says of those that are not."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import processes
import pytest
import torch

ROOT = Path(__file__).parents[2]
NO_COMPILER = "no-such-compiler"
OURS = ("CREPA_KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="there is no C++ compiler"
)


def setup(
    *command: str, root: Path = ROOT, cuda: str | None = None, hip: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """setup.py of ``root``, run with a torch that says it is built with CUDA ``cuda`` or ROCm ``hip`` where given."""
    return processes.run(_setup, root, command, cuda, hip, environment, without=OURS)


def _setup(root: Path, command: Sequence[str], cuda: str | None, hip: str | None, given: Mapping[str, str]) -> None:
    os.chdir(root)
    os.environ.update(given)
    sys.argv = ["setup.py", "-q", *command]
    torch.version.cuda, torch.version.hip = cuda or torch.version.cuda, hip or torch.version.hip
    # It looks for a toolkit when it is imported.
    assert "torch.utils.cpp_extension" not in sys.modules
    runpy.run_path("setup.py", run_name="__main__")


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def toolkit(folder: Path, release: str, architectures: str = "75 80 86 89 90") -> Path:
    """A CUDA toolkit whose nvcc says what a real one says of itself, keeps its arguments, and compiles to nothing."""
    listed = "".join(f"echo compute_{number};" for number in architectures.split())
    executable(
        folder / "bin" / "nvcc",
        f"""case "$1" in
          --version) echo "Cuda compilation tools, release {release}, V{release}.99"; exit ;;
          --list-gpu-arch) {listed} exit ;;
        esac
        echo "$@" >> {folder}/compiled
        while [ "$1" != -o ]; do shift; done
        exec c++ -x c++ -c /dev/null -o "$2" """,
    )
    (folder / "lib").mkdir()
    subprocess.run(["ar", "rc", folder / "lib" / "libcudart_static.a"], check=True)
    return folder


def only_asked(folder: Path, version: str = "") -> str:
    """A C++ compiler that links, compiles nothing and is of a given version, else of its own."""
    says = f"-dump*) echo {version}; exit ;;" if version else ""
    script = f"""case "$1" in {says} --version | -dump*) exec c++ "$@" ;; esac
    case " $* " in *" -shared "*) exec c++ "$@" ;; esac
    exit 1"""
    return str(executable(folder / "g++", script))


def test_without_a_compiler_nothing_is_built_and_it_says_so(tmp_path: Path) -> None:
    done = setup("build_ext", "-b", str(tmp_path), "-t", str(tmp_path), CXX=NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert f"no C++ compiler ('{NO_COMPILER}' was not found): installing without the extension" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_what_does_not_compile_is_left_out_and_said(tmp_path: Path) -> None:
    compiler = only_asked(tmp_path)
    done = setup("build_ext", "-b", str(tmp_path), "-t", str(tmp_path), CXX=compiler, CREPA_KERNELS_CUDA="0")
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


@needs_compiler
@pytest.mark.parametrize(
    ("release", "cuda", "hip", "reason"),
    [
        (
            "12.4",
            "13.0",
            None,
            "nvcc is CUDA 12.4, torch is built with CUDA 13.0: their major versions must be the same",
        ),
        (
            "13.0",
            "12.8",
            None,
            "nvcc is CUDA 13.0, torch is built with CUDA 12.8: their major versions must be the same",
        ),
        ("13.0", None, "7.1.25424", "torch is built for ROCm"),
    ],
    ids=["older", "newer", "rocm"],
)
def test_a_toolkit_of_another_kind_than_torchs(
    tmp_path: Path, release: str, cuda: str | None, hip: str | None, reason: str
) -> None:
    home = str(toolkit(tmp_path / "cuda", release))
    asked = setup("--version", cuda=cuda, hip=hip, CUDA_HOME=home, CREPA_KERNELS_CUDA="1")
    assert asked.returncode != 0
    last = asked.stderr.strip().splitlines()[-1]
    assert "CREPA_KERNELS_CUDA is 1, and the CUDA half cannot be built: " in last
    assert reason in last
    left_out = setup("build_ext", "-b", f"{tmp_path}/lib", "-t", f"{tmp_path}/temp", cuda=cuda, hip=hip, CUDA_HOME=home,
                     CXX=only_asked(tmp_path))  # fmt: skip
    assert left_out.returncode == 0, left_out.stderr
    assert len(re.findall("without the CUDA half: .*", left_out.stderr)) == 1
    assert reason in left_out.stderr or hip


@needs_compiler
def test_nvcc_that_is_not_there_or_does_not_run(tmp_path: Path) -> None:
    assert setup("--version", CUDA_HOME="/nowhere", CREPA_KERNELS_CUDA="1").returncode != 0
    executable(tmp_path / "bin" / "nvcc", "echo 'libgone.so: cannot open shared object file' >&2; exit 127")
    done = setup("--version", cuda="13.0", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search("without the CUDA half: .*/bin/nvcc --version failed: libgone.so: cannot open", done.stderr)


@needs_compiler
def test_a_compiler_that_nvcc_does_not_take_costs_the_cuda_half_alone(tmp_path: Path) -> None:
    home = str(toolkit(tmp_path / "cuda", "13.0"))
    compiler = only_asked(tmp_path, version="99.1.0")
    done = setup(
        "build_ext", "-b", f"{tmp_path}/lib", "-t", f"{tmp_path}/temp", cuda="13.0", CUDA_HOME=home, CXX=compiler
    )
    assert done.returncode == 0, done.stderr
    assert "crepa_kernels._cuda cannot be built, installing without it" in done.stderr
    assert "crepa_kernels._cpu did not compile" in done.stderr


def test_torch_that_finds_no_libraries_and_a_compiler_of_no_name(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    given = {**os.environ, "PYTHONPATH": str(tmp_path), "CXX": ""}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "libcudart.so.13: cannot open shared object file" in done.stderr


def options_of(log: Path) -> list[str]:
    lines = log.read_text().splitlines()
    assert len(lines) == 3
    return sorted(set(re.findall(r"-gencode=\S+|-DCREPA_ARCHITECTURES=\S+", lines[0])))


@needs_compiler
@pytest.mark.parametrize(
    ("release", "knows", "asked", "targets"),
    [
        # As CUDA 12.4 and 13.0 list them.
        ("12.4", "50 52 53 60 61 62 70 72 75 80 86 87 89 90", "", "75 80 86 89 90 90+"),
        ("13.0", "75 80 86 87 88 89 90 100 110 103 120 121", "", "75 80 86 89 90 100 120 120+"),
        ("13.0", "75 80 86 87 88 89 90 100 110 103 120 121", "8.6;9.0a+PTX", "86 90a 90a+"),
    ],
    ids=["12.4", "13.0", "TORCH_CUDA_ARCH_LIST"],
)
def test_the_cuda_half_is_for_what_nvcc_knows_and_brings_libtorch(
    tmp_path: Path, release: str, knows: str, asked: str, targets: str
) -> None:
    # torch adds no architecture where another option has "arch" in it, such as this folder.
    root = tmp_path / "research"
    root.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name in ("csrc", "crepa_kernels", "python"):
        (root / name).symlink_to(ROOT / name)
    home = toolkit(tmp_path / "cuda", release, knows)
    done = setup("build_ext", "-b", f"{root}/lib", "-t", f"{root}/temp", root=root, cuda=release, CUDA_HOME=str(home),
                 CXX=only_asked(tmp_path), TORCH_CUDA_ARCH_LIST=asked)  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = [f"compute_{t[:-1]}" if t.endswith("+") else f"sm_{t}" for t in targets.split()]
    flags = [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in names]
    built = options_of(home / "compiled")
    (mark,) = (option for option in built if option.startswith("-D"))
    assert sorted(built) == sorted([*flags, mark])
    assert sorted(mark.split("=")[1].split("+")) == sorted(names)
    # Not torch_cuda, which a torch without CUDA does not have: libtorch, of every torch, brings it.
    (library,) = (root / "lib" / "crepa_kernels").glob("_cuda*")
    header = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", header)
    assert "libtorch.so" in needed
    assert "libtorch_cuda.so" not in needed


@needs_compiler
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.stem)
def test_the_sources_are_of_the_standard_that_older_torch_compiles(source: Path) -> None:
    """torch 2.10 and 2.11 ask for C++17, this one for C++20."""
    from torch.utils.cpp_extension import include_paths

    folders = [f"-I{folder}" for folder in (ROOT / "csrc", *include_paths(), sysconfig.get_paths()["include"])]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", "-w", target, *folders, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

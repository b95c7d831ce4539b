"""Builds the extension beside CUDA builds of torch and runs there what needs no GPU (``make cuda-builds``).

    python tests/cuda_builds ENVIRONMENT ...

Each is a virtual environment with torch, setuptools and ninja; the sources are copied to build/cuda-builds, so that
builds do not meet. The CUDA half takes a toolkit of the major version of torch's CUDA: of CUDA_HOMES (folders with ":"
between), CUDA_HOME and /usr/local/cuda*. Where there is none, setup.py must leave the half out in one line, the source
must compile with that torch's headers all the same, and the half that another environment built must load there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "crepa_kernels", "python", "benches", "tests")
# What the Python of each environment runs in its copy of the sources; a step that fails exits with another status.
# The second is what a GPU would be given, with launches recorded instead of carried out.
STEPS = {
    "loads, registers": ["tests/cuda_builds/loads.py"],
    "GPU script, dry": ["-m", "benches.gpu.hour", "--dry", "--only", "gate", "table", "choices", "--out", "build/dry"],
}
FACTS = "import torch, importlib.metadata as m; print(torch.__version__, torch.version.cuda, m.version('triton'))"
INCLUDES = "from torch.utils.cpp_extension import include_paths as p; print(*(f'-I{each}' for each in p()))"


class Toolkit(NamedTuple):
    folder: Path
    release: str  # "13.0"


class Build(NamedTuple):
    python: Path
    root: Path  # the copy of the sources
    torch: str
    cuda: str
    triton: str


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """What it prints, or SystemExit with it."""
    ours = {name: value for name, value in os.environ.items() if name not in ("CREPA_KERNELS_CUDA", "CUDA_PATH")}
    ours |= {"PYTHONPATH": f"{cwd}:{cwd / 'python'}", **environment}
    done = subprocess.run(
        command, cwd=cwd, env=ours, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed in {cwd}:\n{done.stdout}")
    return done.stdout


def toolkits() -> Iterator[Toolkit]:
    named = [*os.environ.get("CUDA_HOMES", "").split(":"), os.environ.get("CUDA_HOME", "")]
    for folder in [*(Path(name) for name in named if name), *sorted(Path("/usr/local").glob("cuda*"))]:
        if (folder / "bin" / "nvcc").exists():
            says = run([folder / "bin" / "nvcc", "--version"], ROOT)
            if found := re.search(r"release (\d+\.\d+)", says):
                yield Toolkit(folder, found.group(1))


def copied(environment: Path) -> Build:
    root = ROOT / "build" / "cuda-builds" / environment.name
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name in COPIED:
        source, ignored = ROOT / name, shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(source, root / name, ignore=ignored) if source.is_dir() else shutil.copy(source, root)
    python = environment.absolute() / "bin" / "python"
    return Build(python, root, *run([python, "-c", FACTS], root).splitlines()[-1].split())


def built(build: Build, toolkit: Toolkit) -> None:
    setup = [build.python, "setup.py", "-q", "build_ext", "--inplace"]
    run(setup, build.root, CREPA_KERNELS_CUDA="1", CUDA_HOME=str(toolkit.folder))


def built_without(build: Build, other: Toolkit, like: Build) -> None:
    """No toolkit fits: what setup.py does with another one's, and the CUDA half of ``like``."""
    setup = [build.python, "setup.py", "-q", "build_ext", "--inplace"]
    said = re.findall(r".*without the CUDA half: .*", run(setup, build.root, CUDA_HOME=str(other.folder)))
    if len(said) != 1 or "major versions must be the same" not in said[0]:
        raise SystemExit(f"setup.py said {said} of {other}, torch {build.torch}")
    print(f"torch {build.torch}: {said[0]}", flush=True)
    nvcc = other.folder / "bin" / "nvcc"
    compile_only = [nvcc, "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = run([build.python, "-c", INCLUDES], build.root).splitlines()[-1].split()
    run([*compile_only, *includes, "-c", "csrc/cuda/operators.cu", "-o", "build/operators.o"], build.root)
    (half,) = (like.root / "crepa_kernels").glob("_cuda*.so")
    shutil.copy(half, build.root / "crepa_kernels")


def main(environments: list[str]) -> None:
    found = list(toolkits())
    if not found:
        raise SystemExit("no nvcc in CUDA_HOMES, CUDA_HOME or /usr/local/cuda*")
    builds = [copied(Path(name)) for name in environments]
    fits = {
        build: next((it for it in found if it.release.split(".")[0] == build.cuda.split(".")[0]), None)
        for build in builds
    }
    table = [("torch", "CUDA", "nvcc", "Triton", "built", *STEPS, "seconds")]
    donor: Build | None = None
    # Those that build the CUDA half first: the others take it from the last of them.
    for build in sorted(builds, key=lambda each: fits[each] is None):
        start, toolkit = time.perf_counter(), fits[build]
        if toolkit is not None:
            built(build, toolkit)
            donor, halves, nvcc = build, "cpu, cuda", toolkit.release
        elif donor is not None:
            built_without(build, found[0], donor)
            halves, nvcc = f"cpu (cuda of {donor.torch})", "-"
        else:
            raise SystemExit(f"none of {[it.release for it in found]} is of the CUDA of any torch here")
        for command in STEPS.values():
            run([build.python, *command], build.root)
        seconds = f"{time.perf_counter() - start:.0f}"
        table.append((build.torch, build.cuda, nvcc, build.triton, halves, *("yes" for _ in STEPS), seconds))
        print(f"torch {build.torch}: done in {seconds} s", flush=True)
    # One binary for every torch: each environment runs the first steps on the others' builds as well.
    for build in builds:
        for other in builds:
            if other is not build:
                run([build.python, *STEPS["loads, registers"]], other.root)
    for row in table:
        print(*(cell.ljust(max(len(each[i]) for each in table)) for i, cell in enumerate(row)), sep="  ")
    print("every build loads and registers beside every torch above")


if __name__ == "__main__":
    main(sys.argv[1:])

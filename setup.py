"""Builds the C++/CUDA extension where a compiler is there; the package installs and works without it.

CREPA_KERNELS_CUDA in the environment says what becomes of the CUDA half: ``auto`` (the default) builds it where nvcc
and a CUDA build of torch are found, ``1`` builds it or fails, ``0`` leaves it out. TORCH_CUDA_ARCH_LIST chooses the
architectures. The halves use LibTorch's stable ABI and no Python API: one binary serves torch >= 2.10 and every Python.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

# Compute capabilities x 10; PTX of the newest is for cards that come later.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
TORCH_2_10 = "-DTORCH_TARGET_VERSION=0x020a000000000000"
ROOT = Path(__file__).resolve().parent
OPTIMISE = ["-O3", "-g0", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}=.", TORCH_2_10]
NVCC = ["-O3", "--threads=2", "-DUSE_CUDA", f"-Xcompiler=-fvisibility=hidden,-ffile-prefix-map={ROOT}=."]
CPU_SOURCES = [
    f"csrc/cpu/{name}.cpp"
    for name in ("operators", "alignment_operators", "dispatch", "kernels_generic", "kernels_avx2", "kernels_avx512")
]
CUDA_SOURCES = ["csrc/cuda/operators.cu", "csrc/cuda/resample.cu", "csrc/cuda/layer_norm.cu"]


def say(message: str) -> None:
    print(f"crepa-kernels: {message}", file=sys.stderr)


def find_toolkit() -> Path | None:
    """The CUDA toolkit's own folder: nvcc on the PATH may be a script or a link in a folder of another kind."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name])
    if (nvcc := shutil.which("nvcc")) is None:
        default = Path("/usr/local/cuda")
        return default if (default / "bin" / "nvcc").exists() else None
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr + plan.stdout, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def ask(nvcc: Path, option: str) -> str:
    done = subprocess.run([nvcc, option], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"{nvcc} {option} failed: {last}")
    return done.stdout


def cards(torch: Any) -> set[int]:
    """The compute capabilities x 10 of the GPUs of this machine."""
    try:
        found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    except Exception as error:
        say(f"compiling without asking this machine's GPUs: {error}")
        return set()
    return {10 * major + minor for major, minor in found}


def gencode(nvcc: Path, torch: Any, cpp_extension: Any) -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST or, without it, for what it knows of the above and this machine's cards.

    They are not left to torch, which adds none where any other option has "arch" in it, a path for example.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return cpp_extension._get_cuda_arch_flags()
    known = {int(number) for number in re.findall(r"^compute_(\d+)$", ask(nvcc, "--list-gpu-arch"), re.MULTILINE)}
    numbers = sorted(known & {*ARCHITECTURES, *cards(torch)})
    if not numbers:
        raise RuntimeError(f"{nvcc} knows none of the architectures {ARCHITECTURES}")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def cuda_half(wanted: str, toolkit: Path | None, torch: Any, cpp_extension: Any) -> Any:
    """The CUDA half, or RuntimeError with the reason why it cannot be built."""
    nvcc = toolkit / "bin" / "nvcc" if toolkit else None
    if nvcc is None or not nvcc.exists():
        raise RuntimeError("nvcc was not found" + (f" in {toolkit}" if toolkit else ""))
    if wanted == "auto" and torch.version.cuda is None:
        raise RuntimeError("torch is built without CUDA (CREPA_KERNELS_CUDA=1 builds the CUDA half all the same)")
    if torch.version.hip is not None:
        raise RuntimeError("torch is built for ROCm")
    release = re.search(r"release (\d+)\.\d+", ask(nvcc, "--version"))
    if release and torch.version.cuda and release.group(1) != torch.version.cuda.split(".")[0]:
        raise RuntimeError(
            f"{nvcc} is CUDA {release.group().split()[1]}, torch is built with CUDA {torch.version.cuda}: their major "
            "versions must be the same (set CUDA_HOME to such a toolkit)"
        )
    architectures = gencode(nvcc, torch, cpp_extension)
    targets = [target for flag in architectures for target in re.findall(r",code=(\w+)", flag)]
    # A torch without CUDA looks for no toolkit, and compiles for one all the same.
    cpp_extension.CUDA_HOME = str(toolkit)
    return cpp_extension.CppExtension(
        "crepa_kernels._cuda",
        CUDA_SOURCES,
        include_dirs=[f"{toolkit}/include"],
        library_dirs=[f"{toolkit}/lib64", f"{toolkit}/lib"],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        # libtorch brings libtorch_cuda, where the current stream is asked for. The linker leaves out a library none of
        # whose own symbols are used, and reads this option for the libraries behind it only.
        extra_link_args=["-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"],
        extra_compile_args={
            "cxx": OPTIMISE,
            # nvcc splits a macro's value at commas.
            "nvcc": [*NVCC, *architectures, f"-DCREPA_ARCHITECTURES={'+'.join(targets)}", TORCH_2_10],
        },
        py_limited_api=True,
        optional=wanted != "1",
    )


def extensions() -> dict[str, Any]:
    wanted = os.environ.get("CREPA_KERNELS_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"CREPA_KERNELS_CUDA must be 0, 1 or auto, got {wanted!r}")
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        if wanted == "1":
            raise RuntimeError(f"CREPA_KERNELS_CUDA=1 needs a C++ compiler, and {compiler!r} was not found")
        say(f"no C++ compiler ({compiler!r} was not found): installing without the extension, PyTorch does its work")
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    # torch that does not find its own libraries raises OSError, ValueError and others.
    except Exception as error:
        if wanted == "1":
            raise
        say(
            f"torch is not there to build against ({error}; use --no-build-isolation): installing without the extension"
        )
        return {}

    halves = [
        CppExtension(
            "crepa_kernels._cpu",
            CPU_SOURCES,
            extra_compile_args=[*OPTIMISE, "-fopenmp-simd", "-ffp-contract=fast", "-Wno-unknown-pragmas"],
            py_limited_api=True,
            optional=wanted != "1",
        )
    ]
    try:
        if wanted == "0":
            raise RuntimeError("CREPA_KERNELS_CUDA is 0")
        halves.append(cuda_half(wanted, find_toolkit(), torch, cpp_extension))
    except Exception as error:
        if wanted == "1":
            raise RuntimeError(f"CREPA_KERNELS_CUDA is 1, and the CUDA half cannot be built: {error}") from error
        say(f"without the CUDA half: {error}")

    class BuildWhatCompiles(BuildExtension):
        """An extension that does not compile is left out, unless its half was asked for."""

        def build_extensions(self) -> None:
            # Before it builds anything torch compares compilers, and for a .cu file nvcc, with its own.
            try:
                super().build_extensions()
            except Exception as error:
                if wanted == "1":
                    raise
                say(f"{self.extensions[-1].name} cannot be built, installing without it: {error}")
                self.extensions = self.extensions[:-1]
                if self.extensions:
                    self.build_extensions()

        def build_extension(self, ext: Any) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                if wanted == "1":
                    raise
                say(f"{ext.name} did not compile, installing without it: {error}")

    return {"ext_modules": halves, "cmdclass": {"build_ext": BuildWhatCompiles}}


setup(**extensions(), options={"bdist_wheel": {"py_limited_api": "cp310"}})

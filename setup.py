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

ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
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


def why_no_cuda(wanted: str, torch_cuda: str | None, toolkit: Path | None) -> str | None:
    """Why the CUDA half is left out; None if it is built."""
    if wanted == "0":
        return "CREPA_KERNELS_CUDA is 0"
    if toolkit is None or not (toolkit / "bin" / "nvcc").exists():
        return "nvcc was not found"
    if wanted == "auto" and torch_cuda is None:
        return "torch is built without CUDA (CREPA_KERNELS_CUDA=1 builds the CUDA half all the same)"
    return None


def extensions() -> dict[str, Any]:
    wanted = os.environ.get("CREPA_KERNELS_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"CREPA_KERNELS_CUDA must be 0, 1 or auto, got {wanted!r}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        if wanted == "1":
            raise RuntimeError(f"CREPA_KERNELS_CUDA=1 needs a C++ compiler, and {compiler!r} was not found")
        say(f"no C++ compiler ({compiler!r} was not found): installing without the extension, PyTorch does its work")
        return {}
    toolkit = find_toolkit()
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    try:
        import torch
        from torch.utils import cpp_extension
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
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
    reason = why_no_cuda(wanted, torch.version.cuda, toolkit)
    if reason is None:
        assert toolkit is not None  # for the type checker: without one there is a reason
        # A torch without CUDA looks for no toolkit, and compiles for one all the same.
        cpp_extension.CUDA_HOME = str(toolkit)
        halves.append(
            CppExtension(
                "crepa_kernels._cuda",
                CUDA_SOURCES,
                include_dirs=[str(toolkit / "include")],
                library_dirs=[str(toolkit / name) for name in ("lib64", "lib")],
                libraries=["cudart_static", "rt", "dl", "pthread"],
                # libtorch brings libtorch_cuda, where the current stream is asked for.
                extra_link_args=["-Wl,--no-as-needed"],
                extra_compile_args={
                    "cxx": OPTIMISE,
                    "nvcc": [*NVCC, TORCH_2_10],
                },
                py_limited_api=True,
                optional=wanted != "1",
            )
        )
    else:
        say(f"without the CUDA half: {reason}")

    class BuildWhatCompiles(BuildExtension):
        """An extension that does not compile is left out, unless its half was asked for."""

        def build_extension(self, ext: Any) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                if wanted == "1":
                    raise
                say(f"{ext.name} did not compile, installing without it: {error}")

    return {"ext_modules": halves, "cmdclass": {"build_ext": BuildWhatCompiles}}


setup(**extensions(), options={"bdist_wheel": {"py_limited_api": "cp310"}})

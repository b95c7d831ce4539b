"""Compiles csrc/cuda with a C++ compiler and loads it, so that its kernels run on CPU tensors, thread by thread."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
OPERATORS = [
    "resample_tokens",
    "resample_tokens_adjoint",
    "layer_norm_resample",
    "layer_norm_resample_backward_out",
]
_libraries: list[torch.library.Library] = []
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
FLAGS += ["-U_FORTIFY_SOURCE", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# What C++ cannot say, and where memory comes from.
REWRITTEN = {
    r"(\w+(?:<[^;{}]*>)?)\s*<<<(.*?)>>>\((.*?)\);": r"::cuda_on_cpu::launch(\2, [=] { \1(\3); });",
    r"__launch_bounds__\((\w+), \d+\) (\w+)\(([^)]*)\) \{": r"\2(\3) { ::cuda_on_cpu::at_most(\1);",
    r"extern __shared__ (\w+) (\w+)\[\];": r"\1* \2 = static_cast<\1*>(::cuda_on_cpu::dynamic_shared());",
    r"__shared__ (\w+) (\w+)((?:\[\w+\])+);": (
        r"auto& \2 = *static_cast<\1(*)\3>(::cuda_on_cpu::static_shared(__LINE__, sizeof(\1\3)));"
    ),
    r"(\w+)(?:\.|->)mutable_data_ptr\(\)": r"::cuda_on_cpu::lent(\1, true)",
    r"(\w+)(?:\.|->)const_data_ptr\(\)": r"::cuda_on_cpu::lent(\1, false)",
    r"torch::stable::accelerator::DeviceGuard": "::cuda_on_cpu::DeviceGuard",
    r"aoti_torch_get_current_cuda_stream": "::cuda_on_cpu::current_stream",
    r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\);": "",
}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


def as_cpp(source: str, library: str) -> str:
    for pattern, replacement in REWRITTEN.items():
        source = re.sub(pattern, replacement, source, flags=re.DOTALL)
    return source.replace("(crepa_kernels, CUDA, ", f"({library}, CPU, ")


def build(sources: list[Path], folder: Path, name: str) -> Path:
    """A library of kernels (.cu, whose loads and stores are checked) and of what else is given."""
    folder.mkdir(parents=True, exist_ok=True)
    running, objects = [], []
    for source in (*sources, HERE / "block.cpp", HERE / "memory.cpp"):
        code, checked = source, []
        if source.suffix == ".cu":
            code = folder / f"{source.stem}.cpp"
            code.write_text(as_cpp(source.read_text(), name))
            checked = ["-fsanitize=thread"] if "__global__" in source.read_text() else []
        objects.append(str(folder / f"{source.stem}.o"))
        places = [f"-I{path}" for path in (HERE, source.parent, *include_paths())]
        running.append(
            subprocess.Popen([str(compiler()), *FLAGS, *checked, *places, "-c", str(code), "-o", objects[-1]])
        )
    if sum(each.wait() for each in running):
        raise RuntimeError("the kernels do not compile")
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    library = folder / f"{name}.so"
    subprocess.run([str(compiler()), "-shared", *objects, *libraries, "-o", str(library)], check=True)
    return library


def load(folder: Path, name: str = "cuda_on_cpu", csrc: Path = CSRC) -> Any:
    """``torch.ops.<name>``: the operators of csrc/cuda for CPU tensors.

    They raise RuntimeError where a thread reads or writes what it may not, or what another may be writing, and where
    threads wait for others that do not come.
    """
    built = build([csrc / "cuda" / f"{file}.cu" for file in ("layer_norm", "operators", "resample")], folder, name)
    library = torch.library.Library(name, "DEF")
    _libraries.append(library)
    for operator in OPERATORS:
        schema = getattr(torch.ops.crepa_kernels, operator).default._schema
        library.define(str(schema).removeprefix("crepa_kernels::"))
    torch.ops.load_library(str(built))
    return getattr(torch.ops, name)

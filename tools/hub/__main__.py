"""Writes the losses as a kernel for Hugging Face's hub: what ``kernel-builder`` builds, and ``kernels`` loads.

    python -m tools.hub FOLDER [--repo-id OWNER/NAME] [--build cpu cuda rocm]

The sources under ``torch-ext/`` are the package's own, those that the four functions need. One file differs: it takes
the operators' namespace from the build (``_ops.add_op_namespace_prefix``), so that builds do not clash. ``--build``
also writes what ``kernel-builder`` makes of them, without Nix, for ``kernels.get_local_kernel(Path(FOLDER))``.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from crepa_kernels import __version__

PACKAGE = Path(__file__).resolve().parents[2] / "crepa_kernels"
CARD = Path(__file__).with_name("CARD.md")
NAME = "crepa-kernels"
VERSION = 0  # of the kernel: the hub's convention while the package is a beta
LICENSE = "Apache-2.0"
BACKENDS = ("cpu", "cuda", "rocm")

FUNCTIONS = {"grid": ["resample_tokens"], "loss": ["crepa_loss", "relational_loss", "similarity_matrix"]}
DATA = "backends/triton/tiles/*.json"
NAMESPACE = Path("ops/namespace.py")
FROM_THE_BUILD = '''"""The operators' namespace, this build's own."""

from .._ops import add_op_namespace_prefix, ops

__all__ = ["add_op_namespace_prefix", "ops"]
'''
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[general.hub]
repo-id = "{{repo_id}}"

[torch-noarch]
pyext = ["json", "py"]
"""
FLAKE = """{
  description = "Losses of crepa-kernels";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""
OPS = '''"""The operators' namespace of this build."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name):
    return f"{id}::{{op_name}}"
'''


def sources() -> list[Path]:
    """The package's files that ``FUNCTIONS`` need, relative to it, and the tiles that were measured."""
    found: set[Path] = set()
    todo = [Path(f"{module}.py") for module in FUNCTIONS]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _imported(path)
    return sorted([*found, *(path.relative_to(PACKAGE) for path in PACKAGE.glob(DATA))])


def _imported(path: Path) -> Iterator[Path]:
    """Files of ``path``'s relative imports, in functions and for type checkers too, and of the packages around it."""
    yield from (folder / "__init__.py" for folder in list(path.parents)[:-1])
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            named = (base, *(base / alias.name for alias in node.names))
            files = (file for one in named for file in (one.parent / f"{one.name}.py", one / "__init__.py"))
            yield from (file for file in files if file != Path("__init__.py") and (PACKAGE / file).is_file())


def write_sources(folder: Path) -> None:
    """The Python package of the kernel."""
    for path in sources():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / path, target)
    (folder / NAMESPACE).write_text(FROM_THE_BUILD)
    names = sorted(name for of_module in FUNCTIONS.values() for name in of_module)
    lines = ['"""Losses that align hidden states of a diffusion transformer with an encoder\'s features."""', ""]
    lines += [f"from .{module} import {', '.join(functions)}" for module, functions in FUNCTIONS.items()]
    lines += ["", f"__all__ = {json.dumps(names)}"]
    (folder / "__init__.py").write_text("\n".join(lines) + "\n")


def write_tree(folder: Path, repo_id: str) -> None:
    """What ``kernel-builder`` takes."""
    write_sources(folder / "torch-ext" / NAME.replace("-", "_"))
    (folder / "build.toml").write_text(BUILD.format(repo_id=repo_id))
    (folder / "flake.nix").write_text(FLAKE)
    (folder / "CARD.md").write_text(CARD.read_text().format(repo_id=repo_id, version=VERSION, package=__version__))


def write_build(folder: Path, backend: str) -> Path:
    """What ``kernels`` loads: ``folder/build/torch-<backend>``, under a name that no other build has."""
    variant = folder / "build" / f"torch-{backend}"
    write_sources(variant)
    name = f"_{NAME.replace('-', '_')}_{backend}_{secrets.token_hex(4)}"
    (variant / "_ops.py").write_text(OPS.format(id=name))
    files = {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "id": name, "name": NAME, "version": VERSION, "license": LICENSE, "python-depends": [],
        "backend": {"type": backend}, "digest": {"algorithm": "sha256", "files": files},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.hub", description="The losses as a kernel for the hub")
    parser.add_argument("folder", type=Path, help="new or empty")
    parser.add_argument("--repo-id", default=f"{NAME}/{NAME}", help="where it is to be uploaded")
    parser.add_argument("--build", nargs="+", choices=BACKENDS, default=[], help="also without Nix, for these")
    options = parser.parse_args(arguments)
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"folder must be new or empty, {options.folder} is not")
    write_tree(options.folder, options.repo_id)
    for backend in options.build:
        write_build(options.folder, backend)


if __name__ == "__main__":
    main()

"""Python runs this at its start: SimpleTuner's CREPA is changed once something imports it, and nothing before."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


class _AfterImport(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "simpletuner.helpers.training.crepa":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_apply(module: ModuleType) -> None:
                from crepa_kernels.integrations.simpletuner import apply

                run(module)
                apply(os.environ["CREPA_SIMPLETUNER"])  # type: ignore[arg-type]

            spec.loader.exec_module = run_and_apply  # type: ignore[method-assign]
        return spec


def _run_the_next() -> None:
    """The ``sitecustomize`` that this one stands before."""
    others = [entry for entry in sys.path if Path(entry).resolve() != HERE]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("CREPA_SIMPLETUNER"):
    sys.meta_path.insert(0, _AfterImport())
_run_the_next()

"""Who imports whom in the two packages, read from the sources and not from what runs.

python tests/support/house.py      prints the rooms, a circle and the arrows against a wall
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"crepa_kernels": ROOT / "crepa_kernels", "crepa_trainer": ROOT / "python" / "crepa_trainer"}
MOST_ROOMS = 20

_LOSS = ("loss", "inputs", "output", "projector", "grid", "frames", "neighbours", "reduction", "backends", "ops")
_STEP = tuple(f"crepa_kernels.{wing}" for wing in ("regularizer", "teachers", "models", "config"))
_OTHERS = "crepa_kernels.integrations"
# What lies behind the wall from each module or package: the loss needs torch alone, a model knows no trainer,
# and what is known of other people's trainers uses what they could call.
WALLS: Mapping[str, tuple[str, ...]] = {
    **{f"crepa_kernels.{room}": (*_STEP, _OTHERS, "crepa_trainer") for room in _LOSS},
    **dict.fromkeys((*_STEP, "crepa_kernels.info", "crepa_kernels.tune", "crepa_trainer"), (_OTHERS,)),
    "crepa_kernels.models": ("crepa_kernels.regularizer", "crepa_kernels.teachers", "crepa_kernels.config", _OTHERS),
    _OTHERS: ("crepa_kernels.backends", "crepa_kernels.ops", "crepa_kernels.inputs"),
    "crepa_kernels": ("crepa_trainer",),
    "crepa_trainer.families": (
        *(f"crepa_trainer.{room}" for room in ("settings", "run", "step", "state", "data", "reporting", "checkpoint")),
    ),
}


def _sources() -> Iterator[tuple[str, Path]]:
    for name, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([name, *(part for part in parts if part != "__init__")]), path


def _targets(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = module.split(".")[: -(node.level - is_package) or None] if node.level else []
        source = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{source}.{alias.name}" for alias in node.names)


@cache
def imports() -> dict[str, set[str]]:
    """Of each module, those of the two packages that it imports: also where only a type checker or a call does."""
    sources = dict(_sources())
    found: dict[str, set[str]] = {}
    for module, path in sources.items():
        tree = ast.walk(ast.parse(path.read_text()))
        targets = {target for node in tree for target in _targets(node, module, path.name == "__init__.py")}
        # A name of a module, or of something in it.
        named = {target if target in sources else target.rpartition(".")[0] for target in targets}
        found[module] = (named & sources.keys()) - {module}
    return found


def outside() -> set[str]:
    """The packages that neither Python nor this house brings, of all imports in the two."""
    roots = {
        target.split(".")[0]
        for module, path in _sources()
        for node in ast.walk(ast.parse(path.read_text()))
        for target in _targets(node, module, path.name == "__init__.py")
    }
    return roots - sys.stdlib_module_names - PACKAGES.keys()


def _is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("__")


def private_names() -> set[str]:
    """What the two packages keep to themselves: functions, classes, variables and attributes that begin with ``_``."""
    names: set[str] = set()
    for node in (node for _, path in _sources() for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return {name for name in names if _is_private(name)}


def pinned(source: str, private: Collection[str]) -> list[str]:
    """Which of the ``private`` names a test's source imports, reads off an object other than its own, or patches."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found += [] if own else [node.attr]
        elif isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            found += parts if all(map(str.isidentifier, parts)) else []
    return sorted(name for name in found if name in private)


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """One circle of imports, however far around, its first module again at its end; empty where there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def against_the_walls(arrows: Mapping[str, set[str]]) -> list[str]:
    def inside(module: str, room: str) -> bool:
        return module == room or module.startswith(f"{room}.")

    return sorted(
        f"{module} -> {target}"
        for module, targets in arrows.items()
        for target in targets
        for room, behind in WALLS.items()
        if inside(module, room) and any(inside(target, other) for other in behind)
    )


def deepest_way(function: Callable[[], object]) -> list[str]:
    """The most files of ``crepa_kernels`` that lie on one way from its first call in ``function`` to a last one."""
    ways: list[list[str]] = [[]]
    folder = str(PACKAGES["crepa_kernels"])

    def called(frame: FrameType | None, event: str, _: object) -> None:
        if event != "call" or not (frame and frame.f_code.co_filename.startswith(folder)):
            return
        files: dict[str, None] = {}
        while frame:
            if frame.f_code.co_filename.startswith(folder):
                files[frame.f_code.co_filename] = None
            frame = frame.f_back
        ways[0] = max(ways[0], list(files)[::-1], key=len)

    sys.setprofile(called)
    try:
        function()
    finally:
        sys.setprofile(None)
    return ways[0]


def rooms() -> list[str]:
    """The files and folders at the top of ``crepa_kernels``, its face aside."""
    entries = PACKAGES["crepa_kernels"].iterdir()
    return sorted(
        e.name for e in entries if (e.suffix == ".py" and e.stem != "__init__") or (e / "__init__.py").exists()
    )


if __name__ == "__main__":
    found = imports()
    print(f"{len(rooms())} rooms: {' '.join(rooms())}")
    print(f"{sum(map(len, found.values()))} arrows between {len(found)} modules")
    print("circle:", " -> ".join(circle(found)) or "none")
    print("against a wall:", *(against_the_walls(found) or ["none"]), sep="\n  ")

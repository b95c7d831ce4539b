"""The kernel for Hugging Face's hub: its rules, and that it loads beside the package and beside itself."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels import Metadata, get_local_kernel
from torch import nn

import crepa_kernels
from tools.hub.__main__ import BACKENDS, main

FUNCTIONS = ["crepa_loss", "relational_loss", "resample_tokens", "similarity_matrix"]
REGISTER = {"impl", "register_fake", "register_autograd", "register_kernel", "custom_op", "define", "Library"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("hub") for _ in range(2)]
    for folder, backends in zip(folders, (BACKENDS, ("cpu",)), strict=True):
        main([str(folder), "--repo-id", "someone/crepa", "--build", *backends])
    return folders


@pytest.fixture(scope="module")
def kernels(trees: list[Path]) -> list[ModuleType]:
    return [get_local_kernel(folder, backend="cpu") for folder in trees]


@pytest.fixture(scope="module")
def nodes(trees: list[Path]) -> list[tuple[str, ast.AST]]:
    """Of the sources and of the build for a CPU."""
    files = [path for part in ("torch-ext", "build/torch-cpu") for path in sorted((trees[0] / part).rglob("*.py"))]
    return [(path.name, node) for path in files for node in ast.walk(ast.parse(path.read_text()))]


def test_the_tree_is_what_the_builder_takes(trees: list[Path]) -> None:
    folder = trees[0]
    package = folder / "torch-ext" / "crepa_kernels"
    assert {path.name for path in folder.iterdir()} == {"CARD.md", "build", "build.toml", "flake.nix", "torch-ext"}
    assert [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".json")] == []
    assert not (package / "_ops.py").exists()  # the builder writes it
    builder = pytest.importorskip("kernels._rust", reason="kernels before 0.17 has no parser of build.toml")
    build = builder.Build.open(folder)
    assert [str(backend).lower().rpartition(".")[2] for backend in build.general.backends] == list(BACKENDS)
    toml = (folder / "build.toml").read_text()
    assert all(line in toml for line in ("edition = 5", '"someone/crepa"', "[torch-noarch]", '"json", "py"'))
    card = (folder / "CARD.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\n")
    assert 'get_kernel("someone/crepa", version=0' in card
    assert all(f"`{name}`" in card for name in FUNCTIONS)


def test_the_card_s_example_runs(trees: list[Path], kernels: list[ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.get_kernel", lambda *_, **__: kernels[0])
    example = (trees[0] / "CARD.md").read_text().split("```python\n")[1].split("```")[0]
    assert example.count("1536") == 3
    found: dict[str, Any] = {}
    exec(example.replace("1536", "16").replace("768", "8"), found)
    assert found["hidden_states"].grad is not None


def test_nothing_is_imported_but_python_torch_and_triton(nodes: list[tuple[str, ast.AST]]) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for name, node in nodes:
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots = {str(node.module).split(".")[0]}
        else:
            continue
        assert roots <= allowed, name


def test_every_operator_is_in_the_build_s_namespace(nodes: list[tuple[str, ast.AST]]) -> None:
    registered = 0
    for name, node in nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.ops."):
            assert not ast.unparse(node).startswith("torch.ops.crepa"), name
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.library.{one}" for one in REGISTER}:
            assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr), name
            registered += 1
    assert registered > 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_build_says_what_is_in_it(trees: list[Path], backend: str) -> None:
    variant = trees[0] / "build" / f"torch-{backend}"
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert (str(metadata.name), metadata.version, metadata.license) == ("crepa-kernels", 0, "Apache-2.0")
    assert metadata.id.startswith(f"_crepa_kernels_{backend}_")
    pytest.importorskip("kernels._rust", reason="kernels before 0.17 does not look at digests")
    validate = pytest.importorskip("kernels.validate")
    for validator in (*validate.default_metadata_validators(), validate.ArchValidator()):
        validator.validate_metadata(metadata=metadata, variant=variant.name)
    digest: Any = metadata.digest
    digest.validate(type(digest).hash_variant(digest.algorithm, variant))
    (variant / "grid.py").write_text((variant / "grid.py").read_text() + "\n")
    with pytest.raises(Exception, match=r"grid\.py"):
        digest.validate(type(digest).hash_variant(digest.algorithm, variant))


def test_two_builds_and_the_package_have_operators_of_their_own(kernels: list[ModuleType]) -> None:
    namespaces = ["crepa_kernels", *(kernel.__name__ for kernel in kernels)]
    assert len(set(namespaces)) == 3
    tokens = torch.randn(6, 4)
    one, *others = (getattr(torch.ops, name).resample_tokens(tokens, [2, 3], [1, 2], True) for name in namespaces)
    torch.testing.assert_close(others, [one] * 2)
    torch.library.opcheck(getattr(torch.ops, namespaces[1]).resample_tokens.default, (tokens, [2, 3], [1, 2], True))
    assert all(sorted(kernel.__all__) == FUNCTIONS for kernel in kernels)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_build_computes_what_the_package_does(kernels: list[ModuleType], backend: str) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    projector = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).to(device)
    h = torch.randn(1, 3, 12, 16, device=device).requires_grad_()
    y = torch.randn(1, 3, 20, 8, device=device)
    grids: dict[str, Any] = {"student_grid": (3, 4), "teacher_grid": (4, 5)}

    def everything(module: Any) -> list[torch.Tensor]:
        crepa = module.crepa_loss(h, y, projector, **grids, backend=backend, distance=2, tau=2.0)
        relational = module.relational_loss(h, y, projector, **grids, backend=backend, margin=0.05)
        gradients = torch.autograd.grad(crepa.loss + relational, [h, *projector.parameters()])
        matrix = module.similarity_matrix(h, y, projector, **grids)
        return [*crepa, relational, *gradients, matrix, module.resample_tokens(y, (4, 5), (3, 4))]

    expected = everything(crepa_kernels)
    for kernel in kernels:
        torch.testing.assert_close(everything(kernel), expected)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "folder must be new or empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]

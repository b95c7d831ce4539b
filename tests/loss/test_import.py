"""The loss needs torch alone, and nothing that takes time."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

# What `pip install torch` brings, and numpy is not of it. torch imports some of these at the first use of an operator.
PROLOGUE = '''
import sys, time, warnings
warnings.simplefilter("ignore")

class Without:
    """A finder of modules that finds none of the refused ones: as if they were not installed."""
    def __init__(self, finder, refuses):
        self.finder, self.refuses = finder, refuses
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if self.refuses(name.split(".")[0]) else self.finder.find_spec(name, path, target)

def refuse(refuses):
    sys.meta_path[:] = [Without(finder, refuses) for finder in sys.meta_path]

if not NUMPY:
    refuse(lambda root: root == "numpy")
import torch
requirements = {"filelock", "typing_extensions", "setuptools", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
                "fsspec", "_distutils_hack"}
allowed = {name.split(".")[0] for name in sys.modules} | set(sys.stdlib_module_names) | requirements | {"crepa_kernels"}
refuse(lambda root: root not in allowed and not root.startswith("_sysconfigdata"))
before = time.perf_counter()
import crepa_kernels
seconds = time.perf_counter() - before
'''


def run(code: str, numpy: bool = True) -> str:
    """What ``code`` prints in a Python of its own, after ``import crepa_kernels`` with nothing else to be had."""
    script = f"NUMPY = {numpy}\n" + PROLOGUE + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_quick_beyond_torch() -> None:
    """Under a second; 0.04 measured."""
    assert min(float(run("print(seconds)")) for _ in range(2)) < 1


@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "no-numpy"])
def test_the_loss_runs_with_torch_alone(numpy: bool) -> None:
    """Both backends, masks and an index included; and torch itself does not require numpy."""
    code = """
    assert ("numpy" in sys.modules) == NUMPY
    mask = torch.tensor([[True, True, False]])
    torch.manual_seed(0)
    h = torch.randn(1, 3, 6, 8, requires_grad=True)
    for backend in crepa_kernels.available_backends():
        for align in ("student", "teacher", "pool"):
            out = crepa_kernels.crepa_loss(
                h, torch.randn(1, 4, 4, 5), crepa_kernels.CrepaProjector(8, 5), student_grid=(2, 3),
                teacher_grid=(2, 2), spatial_align=align, frame_index=[0, 1, 3], frame_mask=mask, teacher_mask=mask,
                backend=backend,
            )
            out.loss.backward()
            assert out.loss.isfinite() and h.grad.isfinite().all()
    print(*crepa_kernels.available_backends())
    """
    assert run(code, numpy) == "reference torch"


def test_nothing_but_torch_is_imported() -> None:
    heavy = "pydantic diffusers transformers accelerate peft av safetensors triton matplotlib PIL"
    found = run(f"import crepa_kernels.loss; print(*[name for name in {heavy!r}.split() if name in sys.modules])")
    assert found == ""


def test_public_names_are_listed_and_lazy_ones_exist() -> None:
    import crepa_kernels

    for name in crepa_kernels.__all__:
        assert getattr(crepa_kernels, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        crepa_kernels.no_such_name  # noqa: B018


def test_the_operators_are_registered_by_the_import() -> None:
    assert run("print(torch.ops.crepa_kernels.resample_tokens(torch.ones(4, 1), [2, 2], [1, 1], True).item())") == "1.0"

"""Path and tile choices, and the two commands that show and measure them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crepa_kernels.backends.triton import tiles
from crepa_kernels.backends.triton.tiles import ProductTile, device_slug, fit, forced, heuristic, nearest, write_entries
from crepa_kernels.shapes import SHAPE_CLASSES

ROOT = Path(__file__).parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m command`` where no GPU is visible and, unless asked for, no interpreter."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    variables = kept | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run([sys.executable, "-m", *command], env=variables, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("kibibytes", [48, 64, 99, 163, 227])
@pytest.mark.parametrize("element_size", [2, 4])
def test_the_heuristic_respects_shared_memory(kibibytes: int, element_size: int) -> None:
    for shape in SHAPE_CLASSES:
        choice = heuristic(shape.hidden_size, shape.feature_size, element_size, kibibytes * 1024)
        assert isinstance(choice.dx, ProductTile)
        for product in (choice.dx, choice.one_pass):
            assert product.shared_memory(element_size) <= kibibytes * 1024
            assert min(product.m, product.n, product.k) >= 16


@pytest.mark.parametrize(
    ("capability", "hip", "vendor"),
    [((8, 0), False, False), ((9, 0), False, False), ((10, 0), False, True), ((12, 0), False, True),
     ((9, 4), True, False), ((11, 0), True, False)],
)  # fmt: skip
def test_dx_is_the_vendors_product_from_compute_capability_10_on(
    capability: tuple[int, int], hip: bool, vendor: bool
) -> None:
    """AMD's numbers are others."""
    choice = heuristic(5120, 1536, 2, 227 * 1024, hip, capability)
    assert (choice.dx == tiles.VENDOR) is vendor


def test_a_tile_loses_stages_before_it_loses_size() -> None:
    tile = ProductTile(128, 128, 64, 8, 4)
    assert fit(tile, 2, 128 * 1024) == tile
    assert fit(tile, 2, 100 * 1024) == ProductTile(128, 128, 64, 8, 3)
    assert fit(tile, 2, 48 * 1024) == ProductTile(128, 128, 32, 8, 2)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100"),
        ("NVIDIA GeForce RTX 4090", "nvidia-rtx-4090"),
        ("AMD Instinct MI300X", "amd-instinct-mi300x"),
    ],
)
def test_device_files_are_named_by_the_model(name: str, slug: str) -> None:
    assert device_slug(name) == slug


def test_written_choices_are_found_by_the_nearest_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {width: heuristic(width, 1536, 2, 99 * 1024) for width in (1536, 5120)}
    choices[5120] = tiles.replace(choices[5120], training="one_pass", dx=tiles.VENDOR)
    entries = [
        {"hidden_size": width, "feature_size": 1536, "dtype": "bfloat16", "choice": choice.to_dict()}
        for width, choice in choices.items()
    ]
    monkeypatch.setenv("CREPA_TILES", str(tmp_path))
    write_entries(tmp_path / "some-gpu.json", "Some GPU", "a test", entries)
    try:
        assert nearest("some-gpu", 2048, 1024, torch.bfloat16) == choices[1536]
        assert nearest("some-gpu", 4096, 4096, torch.bfloat16) == choices[5120]
        assert nearest("some-gpu", 4096, 4096, torch.float32) is None
        assert nearest("another-gpu", 4096, 4096, torch.bfloat16) is None
    finally:
        tiles.device_entries.cache_clear()


def test_a_forced_choice_holds_inside_only() -> None:
    choice = heuristic(64, 64, 4, 99 * 1024)
    with forced(choice):
        assert tiles.choose(torch.device("cpu"), 64, 64, torch.float32) is choice
    assert tiles.choose(torch.device("cpu"), 64, 64, torch.float32) is not choice


def test_info_names_versions_and_why_a_backend_is_off() -> None:
    done = run("crepa_kernels.info")
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    assert "triton: off: no CUDA or ROCm GPU was found" in done.stdout
    if torch.version.cuda is None:
        assert "\n  cuda: off: torch is built without CUDA\n" in done.stdout
    assert "self-check\n  not run: triton is off\n" in done.stdout
    assert done.stdout.endswith("tiles (bfloat16)\n  none: triton is off\n")
    overridden = run("crepa_kernels.info", CREPA_BACKEND="reference")
    assert "CREPA_BACKEND=reference overrides what calls ask for" in overridden.stdout
    interpreted = run("crepa_kernels.info", TRITON_INTERPRET="1")
    assert "triton: on" in interpreted.stdout
    assert "self-check\n  cpu: the kernels agree with 'torch' (bfloat16, widths 32 and 16" in interpreted.stdout
    assert "wan-14b-480p: Choice(training='split'" in interpreted.stdout


@pytest.mark.every(3)
@pytest.mark.parametrize("module", ["crepa_kernels.tune", "benches.gpu", "benches.gpu.choices", "benches.gpu.hour"])
def test_what_needs_a_gpu_stops_with_one_line(module: str) -> None:
    done = run(module)
    assert done.returncode == 1
    assert "no CUDA or ROCm GPU was found" in done.stderr
    assert len(done.stderr.splitlines()) == 1

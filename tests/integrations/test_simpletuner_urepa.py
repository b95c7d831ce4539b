"""SimpleTuner's published U-REPA with our losses in it, against its own."""

from __future__ import annotations

import copy
import logging
import random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from crepa_kernels.integrations import simpletuner

LOGS = [
    "urepa_loss", "urepa_alignment_loss", "urepa_manifold_loss", "urepa_similarity", "urepa_weight", "urepa_cutoff",
]  # fmt: skip
Grid = tuple[int, int]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Which of our losses was called, and with what."""
    seen: list[tuple[str, dict[str, Any]]] = []
    for name in ("crepa_loss", "relational_loss"):
        own = getattr(simpletuner, name)

        def recorded(*inputs: Any, own: Any = own, name: str = name, **options: Any) -> Any:
            seen.append((name, options))
            return own(*inputs, **options)

        monkeypatch.setattr(simpletuner, name, recorded)
    return seen


def regularizer(theirs: ModuleType, features: torch.Tensor, hidden_size: int = 8, **configuration: Any) -> Any:
    """A ``UrepaRegularizer`` whose encoder answers ``features``; ``encoded`` counts how often."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    config = SimpleNamespace(urepa_enabled=True, **configuration)
    made = theirs.UrepaRegularizer(config, accelerator, hidden_size, max_train_steps=100)
    made.projector = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, features.shape[-1]))
    made.encoded = 0

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        made.encoded += 1
        return features

    made._decode_latents = lambda latents, vae: vae(latents)
    made._encode_pixels = encode
    return made


def images(grid: Grid, batch: int = 2, hidden_size: int = 8) -> dict[str, Any]:
    h = torch.randn(batch, hidden_size, *grid) * 2 + 1
    return {"hidden_states": h, "latents": torch.randn(batch, 4, *grid), "vae": nn.Identity(), "step": 0}


def drawn(theirs: ModuleType, seed: int) -> tuple[Any, dict[str, Any]]:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, hidden_size = draw.randint(1, 2), 8 * draw.randint(1, 3)
    grid = draw.choice([(1, 1), (2, 2), (3, 3), (4, 4), (2, 3), (3, 2), (2, 8), (5, 3)])
    configuration = draw.choice(
        [
            {},
            {"urepa_lambda": 2.0, "urepa_manifold_weight": 0.5},
            {"urepa_scheduler": "cosine", "urepa_decay_steps": 80, "urepa_lambda_end": 0.1},
            {"urepa_warmup_steps": 10},
            {"urepa_cutoff_step": 20},
            {"urepa_similarity_threshold": draw.choice([-5.0, 5.0])},
            {"urepa_similarity_threshold": 0.0, "urepa_threshold_mode": "recoverable"},
        ]
    )
    features = torch.randn(batch, draw.choice([1, 4, 6, 9, 12, 15, 16, 25]), 12)
    urepa = regularizer(theirs, features, hidden_size, **configuration)
    urepa.enabled = draw.random() > 0.05
    if draw.random() < 0.05:
        urepa.base_weight = 0.0
    return urepa, {**images(grid, batch, hidden_size), "step": draw.choice([0, 1, 15, 40, 90])}


def called(urepa: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor | None, Any, list[torch.Tensor]]:
    """Loss, logs and gradients of one call."""
    h = arguments["hidden_states"].clone().requires_grad_()
    loss, logs = urepa.compute_loss(**{**arguments, "hidden_states": h})
    return loss, logs, [] if loss is None else list(torch.autograd.grad(loss, [h, *urepa.projector.parameters()]))


def test_a_line_is_what_simpletuner_computes(theirs: ModuleType, calls: list[Any]) -> None:
    ran = 0
    for seed in range(150):
        urepa, arguments = drawn(theirs, seed)
        ours = copy.deepcopy(urepa)
        ours._encode_pixels = urepa._encode_pixels
        simpletuner.restore()
        expected, expected_logs, expected_gradients = called(urepa, arguments)
        simpletuner.apply(spatial="line")
        before = len(calls)
        loss, logs, gradients = called(ours, arguments)
        assert (len(calls) > before) == bool(ours.enabled and ours.base_weight), seed
        ran += expected is not None
        assert (logs is None, loss is None) == (expected_logs is None, expected is None), seed
        if logs is not None:
            assert list(logs) == list(expected_logs) == LOGS
            assert [type(value) for value in logs.values()] == [type(value) for value in expected_logs.values()]
            assert logs == pytest.approx(expected_logs, rel=5e-5, abs=5e-5), seed
        if expected is not None:
            torch.testing.assert_close(loss, expected, rtol=5e-5, atol=5e-5)
        for ours_, theirs_ in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours_, theirs_, rtol=5e-5, atol=5e-5 * max(1.0, float(theirs_.abs().max())))
    assert ran > 75


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_states_differ_by_their_rounding(theirs: ModuleType, weights: torch.dtype) -> None:
    urepa = regularizer(theirs, torch.randn(2, 9, 12))
    urepa.projector.to(weights)
    arguments = {**images((4, 4)), "hidden_states": torch.randn(2, 8, 4, 4).bfloat16()}
    expected, expected_logs, expected_gradients = called(urepa, arguments)
    simpletuner.apply(spatial="line")
    loss, logs, gradients = called(urepa, arguments)
    eps = torch.finfo(torch.bfloat16).eps
    assert logs == pytest.approx(expected_logs, rel=eps, abs=eps)
    assert loss is not None
    assert loss.dtype == expected.dtype  # type: ignore[union-attr]
    for ours, own in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == own.dtype
        assert (ours - own).float().norm() <= 4 * eps * own.float().norm()


@pytest.mark.parametrize(("spatial", "student", "teacher"), [("grid", (2, 8), (3, 3)), ("line", (4, 4), (3, 3))])
def test_a_grid_is_the_states_own(
    theirs: ModuleType, calls: list[tuple[str, dict[str, Any]]], spatial: Any, student: Grid, teacher: Grid
) -> None:
    simpletuner.apply(spatial)
    assert called(regularizer(theirs, torch.randn(2, 9, 12)), images((2, 8)))[0] is not None
    assert [name for name, _ in calls] == ["crepa_loss", "relational_loss"]
    for _, options in calls:
        assert (options["student_grid"], options["teacher_grid"]) == (student, teacher)
        assert options["spatial_align"] == "smaller"
        assert options.get("antialias", True) == (spatial == "grid")


def test_patches_on_no_square_are_compared_as_a_line_and_said_once(
    theirs: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    urepa, arguments = regularizer(theirs, torch.randn(2, 11, 12)), images((2, 8))
    expected = called(urepa, arguments)[0]
    simpletuner.apply("grid")
    with caplog.at_level(logging.WARNING):
        losses = [called(urepa, arguments)[0] for _ in range(2)]
    torch.testing.assert_close(losses, [expected] * 2, rtol=5e-5, atol=5e-5)
    assert ["11 are no square" in record.message for record in caplog.records] == [True]


def test_nothing_is_encoded_while_the_weight_is_0(theirs: ModuleType, calls: list[Any]) -> None:
    urepa = regularizer(theirs, torch.randn(2, 9, 12), urepa_cutoff_step=20)
    simpletuner.apply("grid")
    loss, logs = urepa.compute_loss(**{**images((3, 3)), "step": 30})
    assert loss is None
    assert logs == {name: (name == "urepa_cutoff") for name in LOGS if name != "urepa_similarity"}
    assert (urepa.encoded, calls) == (0, [])


def test_the_host_reads_once(theirs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    urepa, arguments, read = regularizer(theirs, torch.randn(2, 9, 12)), images((3, 3)), []
    simpletuner.apply("grid")
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, own=own, name=name: (read.append(name), own(tensor))[1])
    urepa.compute_loss(**arguments)
    assert read == ["tolist"]


@pytest.mark.parametrize("missing", ["hidden_states", "latents", "vae", "projector", "axes"])
def test_what_is_missing_is_their_error(theirs: ModuleType, missing: str) -> None:
    urepa, arguments = regularizer(theirs, torch.randn(2, 9, 12)), images((3, 3))
    if missing == "projector":
        urepa.projector = None
    else:
        arguments |= {"hidden_states": torch.randn(2, 9, 8)} if missing == "axes" else {missing: None}
    with pytest.raises((ValueError, RuntimeError), match=r"U-REPA") as own:
        urepa.compute_loss(**arguments)
    simpletuner.apply("grid")
    with pytest.raises(type(own.value), match=r"U-REPA") as ours:
        urepa.compute_loss(**arguments)
    assert str(ours.value) == str(own.value)


def test_irepa_is_their_own_and_said_once(
    theirs: ModuleType, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    urepa = regularizer(theirs, torch.randn(2, 9, 12))
    urepa.irepa_enabled, urepa.projector = True, theirs.SpatialConvProjector(8, 12)
    expected = called(urepa, images((3, 3)))[1].keys()
    simpletuner.apply("grid")
    with caplog.at_level(logging.WARNING):
        assert all(urepa.compute_loss(**images((3, 3)))[1].keys() == expected for _ in range(2))
    assert [r.message for r in caplog.records] == [
        "this loss is SimpleTuner's own: its projector is a convolution (irepa_enabled)"
    ]
    assert calls == []


def test_restored_is_the_method_that_was_there(theirs: ModuleType) -> None:
    own = theirs.UrepaRegularizer.compute_loss
    simpletuner.apply("grid")
    assert theirs.UrepaRegularizer.compute_loss is not own
    simpletuner.restore()
    assert theirs.UrepaRegularizer.compute_loss is own


def test_without_u_repa_crepa_is_taken_over(
    theirs: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(theirs, "UrepaRegularizer")
    own = theirs.CrepaRegularizer.compute_loss
    with caplog.at_level(logging.WARNING):
        simpletuner.apply("grid")
    assert theirs.CrepaRegularizer.compute_loss is not own
    assert ["U-REPA is SimpleTuner's own" in record.message for record in caplog.records] == [True]

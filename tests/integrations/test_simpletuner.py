"""SimpleTuner's published regularizer with our loss in it, against its own."""

from __future__ import annotations

import copy
import logging
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from benches.measure import kept_bytes
from benches.peers import Inputs, position_error, simpletuner_peers
from benches.simpletuner import give_features, regularizer
from crepa_kernels.integrations import simpletuner

LOGS = [
    "crepa_loss", "crepa_alignment_score", "crepa_similarity_self", "crepa_weight", "crepa_cutoff",
    "crepa_alignment_score_ema",
]  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What our loss was called with."""
    seen: list[dict[str, Any]] = []

    def recorded(*inputs: torch.Tensor, **options: Any) -> Any:
        seen.append({"shapes": [tuple(each.shape) for each in inputs[:2]], **options})
        return loss(*inputs, **options)

    loss = simpletuner.crepa_loss
    monkeypatch.setattr(simpletuner, "crepa_loss", recorded)
    return seen


def projector_of(hidden_size: int, feature_size: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, feature_size))


def drawn(theirs: ModuleType, seed: int) -> tuple[Any, dict[str, Any]]:
    """A regularizer and the arguments of one call: its options, its modes, counts of frames and tokens."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, frames, hidden_size, feature_size = draw.randint(1, 2), draw.randint(1, 5), 8 * draw.randint(1, 3), 12
    tokens = draw.choice([1, 4, 6, 9, 12, 16, 25, 30])
    teacher_frames = draw.choice([frames, frames, draw.randint(1, 6)])
    teacher_tokens = draw.choice([tokens, 1, 4, 9, 10, 16, 20, 25])
    three_axes, image = draw.random() < 0.2, draw.random() < 0.2
    configuration: dict[str, Any] = {"crepa_lambda": draw.choice([0.5, 1.0, 0.05])}
    configuration |= draw.choice(
        [
            {},
            {"crepa_scheduler": "cosine", "crepa_decay_steps": 80, "crepa_lambda_end": 0.1},
            {"crepa_warmup_steps": 10},
            {"crepa_cutoff_step": 20},
            {"crepa_similarity_threshold": draw.choice([-5.0, 0.2, 5.0])},
            {"crepa_similarity_threshold": 0.0, "crepa_threshold_mode": "recoverable"},
        ]
    )
    crepa = regularizer(
        theirs,
        projector_of(hidden_size, feature_size),
        hidden_size,
        configuration,
        distance=draw.randint(0, 6),
        tau=draw.choice([0.5, 1.0, 3.0]),
        cumulative_neighbors=draw.random() < 0.5,
        normalize_by_frames=draw.random() < 0.5,
        normalize_neighbour_sum=draw.random() < 0.5,
        spatial_align=draw.random() < 0.8,
        mode=theirs.CrepaMode.IMAGE if image else theirs.CrepaMode.VIDEO,
    )
    if draw.random() < 0.05:
        crepa.enabled = False
    if draw.random() < 0.05:
        crepa.base_weight = 0.0
    shape = (batch, tokens if image else frames) if three_axes else (batch, frames, tokens)
    inner = draw.random() < 0.5
    y = torch.randn(batch, 1 if image and three_axes else teacher_frames, teacher_tokens, feature_size)
    if inner:
        crepa.use_backbone_features = True
    else:
        give_features(crepa, y.shape[1], lambda video: y[:, video[0, :, 0, 0, 0].long()])
    return crepa, {
        "hidden_states": torch.randn(*shape, hidden_size) * 2 + 1,
        "latents": torch.randn(batch, 4, frames, 10, 12),
        "vae": nn.Identity(),
        "frame_features": y if inner else None,
        "step": draw.choice([0, 1, 15, 40, 90]),
    }


def called(crepa: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor | None, Any, list[torch.Tensor]]:
    """Loss, logs and gradients of one call."""
    h = arguments["hidden_states"].clone().requires_grad_()
    loss, logs = crepa.compute_loss(**{**arguments, "hidden_states": h})
    asked = [h, *crepa.projector.parameters()]
    return loss, logs, [] if loss is None else list(torch.autograd.grad(loss, asked))


@pytest.mark.usefixtures("one_thread")
def test_a_line_is_what_simpletuner_computes(theirs: ModuleType, calls: list[dict[str, Any]]) -> None:
    ran = 0
    for seed in range(300):
        crepa, arguments = drawn(theirs, seed)
        ours = copy.deepcopy(crepa)
        simpletuner.restore()
        expected, expected_logs, expected_gradients = called(crepa, arguments)
        simpletuner.apply(spatial="line")
        before = len(calls)
        loss, logs, gradients = called(ours, arguments)
        assert len(calls) - before == bool(ours.enabled and ours.base_weight), seed
        ran += len(calls) - before
        assert (logs is None) == (expected_logs is None), seed
        if logs is not None:
            assert list(logs) == list(expected_logs) == LOGS
            assert [type(value) for value in logs.values()] == [type(value) for value in expected_logs.values()]
            assert logs == pytest.approx(expected_logs, rel=5e-5, abs=5e-5), seed
        torch.testing.assert_close(loss, expected, rtol=5e-5, atol=5e-5) if expected is not None else None
        assert (loss is None) == (expected is None), seed
        for ours_, theirs_ in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours_, theirs_, rtol=5e-5, atol=5e-5 * max(1.0, float(theirs_.abs().max())))
    assert ran > 200


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_states_differ_by_their_rounding(theirs: ModuleType, weights: torch.dtype) -> None:
    crepa = regularizer(theirs, projector_of(32, 24).to(weights), 32)
    arguments = {
        "hidden_states": torch.randn(1, 3, 30, 32).bfloat16(), "latents": torch.randn(1, 4, 3, 10, 12),
        "frame_features": torch.randn(1, 3, 16, 24),
    }  # fmt: skip
    expected, expected_logs, expected_gradients = called(crepa, arguments)
    simpletuner.apply(spatial="line")
    loss, logs, gradients = called(crepa, arguments)
    eps = torch.finfo(torch.bfloat16).eps
    assert logs == pytest.approx(expected_logs, rel=eps, abs=eps)
    torch.testing.assert_close(loss.float(), expected.float(), rtol=eps, atol=eps)
    for ours, own in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == own.dtype
        assert (ours - own).float().norm() <= 4 * eps * own.float().norm()


def test_restored_is_the_method_that_was_there(theirs: ModuleType) -> None:
    own = theirs.CrepaRegularizer.compute_loss
    simpletuner.apply("line")
    simpletuner.apply("grid")
    assert theirs.CrepaRegularizer.compute_loss is not own
    simpletuner.restore()
    assert theirs.CrepaRegularizer.compute_loss is own


def test_another_interface_is_refused() -> None:
    class Other:
        def compute_loss(self, hidden_states: torch.Tensor, latents: torch.Tensor) -> None: ...

    with pytest.raises(RuntimeError, match=r"Other.compute_loss must take .* vae, frame_features, step missing"):
        simpletuner.apply("grid", Other)
    with pytest.raises(ValueError, match="spatial must be one of grid, line, got 'square'"):
        simpletuner.apply("square", Other)  # type: ignore[arg-type]
    for wrong in (Other(), "CrepaRegularizer"):
        with pytest.raises(RuntimeError, match=f"regularizer must be SimpleTuner's class, got {type(wrong).__name__}"):
            simpletuner.apply("grid", wrong)  # type: ignore[arg-type]


def test_a_class_that_inherits_the_method_inherits_it_again() -> None:
    class Theirs:
        def compute_loss(
            self, hidden_states: Any, latents: Any, vae: Any = None, *, frame_features: Any, step: int
        ) -> None:
            pass

    class Mine(Theirs): ...

    own = Theirs.compute_loss
    for cls in (Theirs, Mine):
        simpletuner.apply(regularizer=cls)
    simpletuner.restore()
    assert Theirs.compute_loss is Mine.compute_loss is own
    assert "compute_loss" not in vars(Mine)


def test_what_cannot_be_taken_over_is_their_own_and_said_once(
    theirs: ModuleType, calls: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    projector = nn.Sequential(nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 6))
    crepa = regularizer(theirs, projector, 8)
    arguments = {
        "hidden_states": torch.randn(1, 3, 6, 8), "latents": torch.randn(1, 4, 3, 4, 6),
        "frame_features": torch.randn(1, 3, 6, 6),
    }  # fmt: skip
    expected = called(crepa, arguments)
    simpletuner.apply("grid")
    with caplog.at_level(logging.WARNING):
        assert called(crepa, arguments)[0] == called(crepa, arguments)[0] == expected[0]
    assert [r.message for r in caplog.records] == [
        "this loss is SimpleTuner's own: its projector is no Sequential of LayerNorm and Linear but of LayerNorm, "
        "SiLU, Linear"
    ]
    assert calls == []


def test_a_third_of_the_bytes_is_kept_for_the_backward_pass(theirs: ModuleType, folder: Path) -> None:
    inputs = Inputs.of(frames=2)
    peers = simpletuner_peers(inputs, folder).values()
    own, line, grid = (kept_bytes(peer.forward, inputs.leaves) for peer in peers)
    assert max(line, grid) <= 0.35 * own


def test_the_host_reads_once(theirs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    crepa, read = regularizer(theirs, projector_of(8, 6), 8), []
    simpletuner.apply("grid")
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, own=own, name=name: (read.append(name), own(tensor))[1])
    crepa.compute_loss(**{**a_clip(), "frame_features": torch.randn(1, 3, 30 * 52, 6)})
    assert read == ["tolist"]


@pytest.mark.parametrize("missing", ["hidden_states", "latents", "vae"])
def test_what_is_missing_is_their_error(theirs: ModuleType, missing: str) -> None:
    crepa = regularizer(theirs, projector_of(8, 6), 8, uses_internal_teacher_features=False)
    arguments = {**a_clip(), missing: None}
    with pytest.raises(ValueError, match=r"CREPA") as own:
        crepa.compute_loss(**arguments)
    simpletuner.apply("grid")
    with pytest.raises(ValueError, match=r"CREPA") as ours:
        crepa.compute_loss(**arguments)
    assert str(ours.value) == str(own.value)


def a_clip(frames: int = 3, pixel_frames: int = 9) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, frames, 30 * 52, 8), "latents": torch.randn(1, 16, frames, 60, 104),
        "vae": nn.Identity(), "step": 0,
    }  # fmt: skip


def encoder(seen: list[Any], tokens: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def encode(video: torch.Tensor) -> torch.Tensor:
        seen.append(video[0, :, 0, 0, 0].tolist())
        return torch.randn(*video.shape[:2], tokens, 6)

    return encode


def test_a_grid_compares_tokens_at_one_place_of_the_frames_that_are_needed(
    theirs: ModuleType, calls: list[dict[str, Any]]
) -> None:
    crepa, encoded = regularizer(theirs, projector_of(8, 6), 8), []
    give_features(crepa, 9, encoder(encoded, 37 * 37))
    simpletuner.apply("grid")
    for states in (a_clip(), {**a_clip(), "hidden_states": torch.randn(1, 3 * 30 * 52, 8)}):
        loss, logs, _ = called(crepa, states)
        assert loss.isfinite()
        assert list(logs) == LOGS
    assert encoded == [[0, 4, 8]] * 2
    for call in calls:
        assert call["shapes"] == [(1, 3, 1560, 8), (1, 3, 1369, 6)]
        assert (call["student_grid"], call["teacher_grid"]) == ((30, 52), (37, 37))
        assert (call["spatial_align"], call.get("antialias", True)) == ("smaller", True)
    assert max(position_error({"antialias": True, **calls[0]}, (30, 52), (37, 37))) < 0.002


def test_a_line_compares_tokens_a_third_of_a_frame_apart(theirs: ModuleType, calls: list[dict[str, Any]]) -> None:
    crepa = regularizer(theirs, projector_of(8, 6), 8)
    simpletuner.apply("line")
    called(crepa, {**a_clip(), "frame_features": torch.randn(1, 3, 37 * 37, 6)})
    assert max(position_error({"antialias": True, **calls[0]}, (30, 52), (37, 37))) == pytest.approx(0.33, abs=0.01)


@pytest.mark.parametrize(("shape", "said"), [((1, 3, 77), "unclear"), ((1, 3 * 77), "each token is taken for a frame")])
def test_an_unclear_grid_is_compared_as_a_line_and_said_once(
    theirs: ModuleType, caplog: pytest.LogCaptureFixture, shape: tuple[int, ...], said: str
) -> None:
    crepa = regularizer(theirs, projector_of(8, 6), 8)
    arguments = {**a_clip(), "hidden_states": torch.randn(*shape, 8), "frame_features": torch.randn(1, 3, 1560, 6)}
    expected = called(crepa, arguments)[0]
    simpletuner.apply("grid")
    with caplog.at_level(logging.WARNING):
        losses = [called(crepa, arguments)[0] for _ in range(2)]
    torch.testing.assert_close(losses, [expected] * 2, rtol=5e-5, atol=5e-5)
    assert [said in record.message for record in caplog.records] == [True]


def test_nothing_is_decoded_while_the_weight_is_0(theirs: ModuleType, calls: list[dict[str, Any]]) -> None:
    crepa, encoded = regularizer(theirs, projector_of(8, 6), 8, {"crepa_cutoff_step": 20}), []
    give_features(crepa, 9, encoder(encoded, 16))
    simpletuner.apply("grid")
    assert crepa.compute_loss(**{**a_clip(), "step": 30}) == (
        None,
        {"crepa_loss": 0.0, "crepa_weight": 0.0, "crepa_cutoff": True},
    )
    assert (encoded, calls) == ([], [])


def test_a_threshold_that_can_be_recovered_goes_on_being_measured(theirs: ModuleType) -> None:
    options = {"crepa_similarity_threshold": -5.0, "crepa_threshold_mode": "recoverable"}
    crepa, encoded = regularizer(theirs, projector_of(8, 6), 8, options), []
    give_features(crepa, 9, encoder(encoded, 16))
    simpletuner.apply("grid")
    for step in range(2):
        loss, logs = crepa.compute_loss(**{**a_clip(), "step": step})
        assert loss is None
        assert list(logs) == LOGS
    assert len(encoded) == 2


def test_after_a_permanent_cutoff_nothing_is_measured(theirs: ModuleType) -> None:
    crepa, encoded = regularizer(theirs, projector_of(8, 6), 8, {"crepa_similarity_threshold": -5.0}), []
    give_features(crepa, 9, encoder(encoded, 16))
    simpletuner.apply("grid")
    measured = [list(crepa.compute_loss(**{**a_clip(), "step": step})[1]) for step in range(2)]
    assert measured[0] == LOGS
    assert set(LOGS) - set(measured[1]) == {"crepa_alignment_score", "crepa_similarity_self"}
    assert len(encoded) == 1


@pytest.mark.parametrize(
    ("tokens", "latents", "grid"),
    [
        (1560, (60, 104), (30, 52)),
        (384, (16, 24), (16, 24)),
        (30 * 53, (60, 106), (30, 53)),
        (23 * 40, (45, 80), (23, 40)),  # padded
        (22 * 40, (45, 80), (22, 40)),  # cut
        (77, (60, 104), None),
    ],
)
def test_the_grid_is_read_from_the_latents(tokens: int, latents: tuple[int, int], grid: object) -> None:
    assert simpletuner.token_grid(tokens, latents) == grid


def test_a_command_finds_it_applied(theirs: ModuleType) -> None:
    folder = Path(theirs.__spec__.origin).parents[3]
    body = f"""
import sys
from pathlib import Path
assert not {{"torch", "simpletuner"}} & sys.modules.keys()  # a Python that trains nothing loses no time
from benches.simpletuner import module
crepa = module(Path({str(folder)!r})).CrepaRegularizer
print(crepa.compute_loss.__globals__["__name__"])
"""
    start = [sys.executable, "-m", "crepa_kernels.integrations.simpletuner", "--spatial", "line", "--"]
    ran = subprocess.run([*start, sys.executable, "-c", body], capture_output=True, text=True, timeout=300)
    assert (ran.stdout, ran.returncode) == ("crepa_kernels.integrations.simpletuner\n", 0), ran.stderr


def test_the_page_says_what_to_type(theirs: ModuleType) -> None:
    page = (Path(__file__).parents[2] / "docs" / "other-trainers.md").read_text()
    own = theirs.CrepaRegularizer.compute_loss
    (section,) = re.findall(r"^## SimpleTuner\n((?:(?!^## ).*\n)*)", page, flags=re.MULTILINE)
    for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
        exec(block, {})
    assert theirs.CrepaRegularizer.compute_loss is not own

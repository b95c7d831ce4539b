"""The baselines beside crepa_similarity: that the best constant predictor is one, and the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.alignment import best_constants
from crepa_trainer.data.sampler import MicroBatch, Position, collate
from crepa_trainer.demo.evaluation import Evaluator, linearly_readable, shuffle_patches
from crepa_trainer.families import TrainingFamily
from crepa_trainer.run import make_accelerator
from crepa_trainer.state import make_state
from crepa_trainer.step import training_step
from training_runs import TinyClips, save_models, tiny_config, tiny_settings

from crepa_kernels import CrepaConfig, CrepaProjector, crepa_loss
from crepa_kernels.regularizer.aligning import Sides

E = 6


def features(student_grid: tuple[int, int], teacher_grid: tuple[int, int]) -> Sides:
    generator = torch.Generator().manual_seed(0)
    counts = [grid[0] * grid[1] for grid in (student_grid, teacher_grid)]
    hidden = torch.randn(3, 5, counts[0], 8, generator=generator)
    teacher = torch.randn(3, 5, counts[1], E, generator=generator) + torch.linspace(-1, 2, E)
    return Sides(hidden, teacher, student_grid, teacher_grid, CrepaProjector(8, E))


def similarity_of_constant(given: Sides, vector: torch.Tensor, config: CrepaConfig, **masks: torch.Tensor) -> float:
    """By the loss itself, of a projector that says `vector` whatever it sees."""
    projector = CrepaProjector(8, E)
    with torch.no_grad():
        projector[1].weight.zero_()
        projector[1].bias.copy_(vector)
    output = crepa_loss(
        given.hidden_states,
        given.teacher_features,
        projector,
        student_grid=given.student_grid,
        teacher_grid=given.teacher_grid,
        **masks,
        **config.loss_options(),
    )
    return float(output.similarity)


@pytest.mark.parametrize("grids", [((2, 3), (2, 3)), ((2, 3), (4, 4))], ids=["equal grids", "teacher resampled"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"crepa_adjacent_distance": 0},
        {"crepa_adjacent_distance": 3, "crepa_cumulative_neighbors": True, "crepa_adjacent_tau": 2.0},
        {"crepa_adjacent_distance": 9},
    ],
    ids=["default", "no neighbours", "cumulative", "distance past the clip"],
)
def test_no_constant_scores_higher_than_the_best_one(settings: dict, grids: tuple) -> None:
    config = CrepaConfig.from_dict(settings)
    given = features(*grids)
    best = best_constants(given, config).mean(0)
    score = similarity_of_constant(given, best, config)
    # fp32 sums of a few hundred cosines.
    assert score == pytest.approx(float(best.norm()), abs=1e-6)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.1, 1.0, 10.0):
        other = best / best.norm() + scale * torch.randn(E, generator=generator)
        assert similarity_of_constant(given, other, config) < score


def test_frames_that_are_masked_are_not_in_the_best_constant() -> None:
    config = CrepaConfig.from_dict({"crepa_adjacent_distance": 2, "crepa_cumulative_neighbors": True})
    given = features((2, 3), (2, 3))
    in_loss = torch.tensor([[False, True, True, True, True], [True] * 5, [True, True, True, False, False]])
    exists = torch.tensor([[True] * 5, [True] * 5, [True, True, True, False, False]])
    best = best_constants(given, config, in_loss, exists).mean(0)
    score = similarity_of_constant(given, best, config, frame_mask=in_loss, teacher_mask=exists)
    assert score == pytest.approx(float(best.norm()), abs=1e-6)
    assert score > similarity_of_constant(
        given, best_constants(given, config).mean(0), config, frame_mask=in_loss, teacher_mask=exists
    )


def test_knowing_the_position_is_never_worse() -> None:
    constants = best_constants(features((2, 3), (2, 3)), CrepaConfig())
    assert constants.norm(dim=-1).mean() >= constants.mean(0).norm()


def test_position_constants_are_the_mean_teacher_of_their_position() -> None:
    """Without neighbours and with one direction a position, each is that direction with norm 1."""
    directions = torch.nn.functional.normalize(torch.randn(6, E, generator=torch.Generator().manual_seed(2)), dim=-1)
    teacher = (3.0 * directions).expand(2, 4, 6, E)
    given = Sides(torch.zeros(2, 4, 6, 8), teacher, (2, 3), (2, 3), CrepaProjector(8, E))
    torch.testing.assert_close(best_constants(given, CrepaConfig()), directions)


def test_what_a_linear_map_of_the_states_says_is_readable_and_what_is_unrelated_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(8, 5, 12, 16, generator=generator)
    teacher = torch.nn.functional.layer_norm(states, (16,)) @ torch.randn(16, E, generator=generator)
    # The ridge takes a little of it.
    assert linearly_readable(states, teacher) > 0.99
    assert linearly_readable(3.0 * states, 0.1 * teacher) == pytest.approx(linearly_readable(states, teacher), abs=1e-4)
    other = torch.randn(8, 5, 12, E, generator=generator)
    # 240 tokens in other clips, of random directions in E = 6.
    assert abs(linearly_readable(states, other)) < 0.1


def test_shuffling_moves_patches_within_their_frame_only() -> None:
    teacher = features((2, 3), (3, 4)).teacher_features
    shuffled = shuffle_patches(teacher, seed=3)
    assert (shuffled != teacher).any()
    torch.testing.assert_close(shuffled.sort(dim=2).values, teacher.sort(dim=2).values, rtol=0, atol=0)
    torch.testing.assert_close(shuffled, shuffle_patches(teacher, seed=3), rtol=0, atol=0)
    orders = {tuple(frame[:, 0].argsort().tolist()) for frame in shuffled.flatten(0, 1) - 0.0}
    assert len(orders) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"crepa_encoder_image_size": 28, "crepa_frame_map": "mean"},
        {"crepa_feature_source": "backbone", "crepa_teacher_block_index": 2},
        {"crepa_encoder_image_size": 28, "irepa_enabled": True},
    ],
    ids=["encoder", "backbone", "iREPA"],
)
def test_what_is_measured_is_what_a_step_sees(tmp_path: Path, settings: dict[str, Any]) -> None:
    models = save_models(tmp_path)
    config = tiny_config(models, **settings)
    run = tiny_settings(models, tmp_path / "run")
    family, clips = TrainingFamily.of(run.model), TinyClips(1, 0, pixels=True)
    state = make_state(make_accelerator(run), family, run, config)
    given: Any = clips
    evaluator = Evaluator(config, family, given, time=0.3, seed=7)
    features = evaluator.features(state)
    measured, matrix = evaluator.alignment(features), evaluator.matrix(features)  # the step changes the projector
    item = collate([clips[0]])
    pixels = {} if "crepa_feature_source" in settings else {"pixels": item.pop("pixels")}
    noise = torch.randn(item["latents"].shape, generator=torch.Generator().manual_seed(7))
    batch = MicroBatch(item, pixels, noise, torch.tensor([0.3]))
    logs = training_step(state, family, batch, Position(0, 0, 0), look=True)
    assert measured.similarity == pytest.approx(float(logs["crepa_similarity"]), abs=1e-6)
    torch.testing.assert_close(matrix[0], logs["look"].matrix)
    assert float(logs["look"].constant) == pytest.approx(measured.constant, abs=1e-6)

"""What 8 bits cost a kept teacher: errors of features, of CREPA's loss and of its gradient.

python -m benches.teacher_cache

Features are of DINOv2's shape: normal channels beside a few whose values are tens of times as large, in every token, as
the published models have them. Not those of a real video.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from crepa_kernels import CrepaProjector, TeacherFeatures, crepa_loss
from crepa_kernels.teachers.cache import packed, unpacked

WIDTHS = {"ViT-S": 384, "ViT-B": 768, "ViT-L": 1024, "ViT-g": 1536}
OUTLIERS = 4  # channels


class Errors(NamedTuple):
    """`cosine`: 1 - cosine of a token and what is kept of it, mean and worst; `loss`: difference of CREPA's loss;
    `gradient`: of the hidden states, by its norm.
    """

    cosine: float
    worst: float
    loss: float
    gradient: float


def features_of(width: int, outlier: float, frames: int = 5, grid: tuple[int, int] = (16, 16)) -> TeacherFeatures:
    """Features (1, T, N, E) with `OUTLIERS` channels of magnitude `outlier`."""
    generator = torch.Generator().manual_seed(width)
    made = torch.randn(1, frames, grid[0] * grid[1], width, generator=generator)
    made[..., :OUTLIERS] = outlier * (1 + 0.1 * made[..., :OUTLIERS])
    return TeacherFeatures(made, grid)


def errors(made: TeacherFeatures, hidden_size: int = 128) -> Errors:
    """Of 8 bits, for a student that has learned something of these features."""
    kept = unpacked(packed(made, "int8"))["features"]
    cosine = 1 - F.cosine_similarity(made.features.double(), kept.double(), dim=-1)
    generator, width = torch.Generator().manual_seed(1), made.features.shape[-1]
    mixed = torch.randn(width, hidden_size, generator=generator) / width**0.5
    hidden = made.features @ mixed + torch.randn(*made.features.shape[:-1], hidden_size, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        projector = CrepaProjector(hidden_size, width)
    found = []
    for features in (made.features, kept):
        states = hidden.clone().requires_grad_()
        loss = crepa_loss(states, features, projector, student_grid=made.grid, teacher_grid=made.grid).loss
        (gradient,) = torch.autograd.grad(loss, states)
        found.append((loss.item(), gradient))
    (loss, gradient), (other, changed) = found
    return Errors(
        cosine.mean().item(),
        cosine.max().item(),
        abs(loss - other),
        ((gradient - changed).norm() / gradient.norm()).item(),
    )


if __name__ == "__main__":
    print("| teacher | outliers | 1 - cosine, mean | worst | loss | gradient |\n|---|---|---|---|---|---|")
    for name, width in WIDTHS.items():
        for outlier in (1.0, 10.0, 40.0):
            numbers = " | ".join(f"{each:.1e}" for each in errors(features_of(width, outlier)))
            print(f"| {name} | {outlier:g} | {numbers} |")

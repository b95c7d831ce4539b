"""The PNG files of a run: curves over steps, the similarity matrix, patches beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

BLUE, ORANGE, GREEN, GREY = "#1f77b4", "#d95f02", "#2ca02c", "#777777"

plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


@dataclass(frozen=True)
class PatchFeatures:
    """One clip at the latent frames, teacher and student on one grid, for looking at."""

    name: str
    pixels: Tensor | None  # (T, 3, H, W) uint8, the pixel frame that each latent frame is aligned with; None: unknown
    frame_numbers: Sequence[int]  # (T,), those frames' numbers in the clip
    teacher: Tensor  # (T, h, w, E)
    student: Tensor  # (T, h, w, E), projected


def plot_training(rows: Sequence[dict[str, float]], path: Path, *, rival: float | None) -> None:
    """Losses, training similarity and weight over optimiser steps.

    rows: one dict of logged values a step. rival: `crepa_similarity` of the best constant for each position.
    """
    figure, axes = plt.subplots(3, 1, figsize=(8, 8.5), sharex=True, layout="constrained")
    _curve(axes[0], rows, "flow_loss", BLUE, "flow matching")
    _curve(axes[0], rows, "crepa_loss", GREEN, "CREPA")
    _curve(axes[0], rows, "loss", ORANGE, "their sum")
    axes[0].set_ylabel("loss")
    _curve(axes[1], rows, "crepa_similarity", BLUE, "this step's clips, random noise level")
    if rival is not None:
        label = f"best constant for each position, {rival:.3f}"
        axes[1].axhline(rival, color=GREY, linestyle="--", label=label)
    axes[1].set_ylabel("crepa_similarity\n(mean cosine)")
    _curve(axes[2], rows, "crepa_weight", BLUE, "crepa_weight", smooth=False)
    axes[2].set(ylabel="crepa_weight", xlabel="optimiser step")
    axes[2].set_ylim(bottom=0)
    weights = [row["crepa_weight"] for row in rows if "crepa_weight" in row]
    if weights and weights[-1] < max(weights):
        said = (
            "CREPA's part of the sum above is -weight x alignment score:\nas the weight falls, the sum rises of itself"
        )
        axes[2].annotate(said, (0.99, 0.95), xycoords="axes fraction", ha="right", va="top", color=GREY)
    for axis in axes:
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0] and axis is not axes[2]:
            axis.legend(frameon=False)
    axes[0].margins(y=0.2)
    axes[0].legend(frameon=False, ncols=3, loc="upper right")
    axes[0].set_title("Training (thin: each step; thick: running median)")
    _save(figure, path)


def _curve(
    axis: Any, rows: Sequence[dict[str, float]], key: str, color: str, label: str, *, smooth: bool = True
) -> None:
    points = [(step, row[key]) for step, row in enumerate(rows) if key in row]
    if not points:
        return
    steps, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if not smooth:
        axis.plot(steps, values, color=color, label=label)
        return
    half = max(1, len(values) // 30)
    middle = [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    axis.plot(steps, values, color=color, linewidth=0.6, alpha=0.4)
    axis.plot(steps, middle, color=color, linewidth=2, label=label)


def plot_similarity_matrices(matrices: dict[str, Tensor], path: Path) -> None:
    """The figure of `similarity_figure` as a file."""
    _save(similarity_figure(matrices), path)


def similarity_figure(matrices: dict[str, Tensor]) -> Figure:
    """s[f, k], student frame f against teacher frame k, (T, S) for each title, on one colour scale."""
    columns = len(matrices)
    figure, axes = plt.subplots(1, columns, figsize=(1 + 4 * columns, 4.8), layout="constrained", squeeze=False)
    low = min(float(matrix.min()) for matrix in matrices.values())
    high = max(float(matrix.max()) for matrix in matrices.values())
    image = None
    for axis, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
        image = axis.imshow(matrix.float().cpu().numpy(), vmin=low, vmax=high, cmap="viridis")
        axis.set(title=title, xlabel="teacher frame k", xticks=range(matrix.shape[1]))
        axis.set_yticks(range(matrix.shape[0]))
        # Where a frame meets itself: in white under black, seen on every color.
        corners = [-0.5, min(matrix.shape) - 0.5]
        axis.plot(corners, corners, color="white", linewidth=2.0)
        axis.plot(corners, corners, color="black", linewidth=1.0, linestyle=(0, (1, 2)))
        axis.spines[:].set_visible(False)
    axes[0][0].set_ylabel("student frame f")
    figure.colorbar(image, ax=axes[0].tolist(), label="s[f, k], mean cosine over patches", shrink=0.75)
    figure.suptitle("Student against teacher, latent frame by latent frame (dotted: the same frame)")
    return figure


def plot_patches(clips: Sequence[PatchFeatures], path: Path, frames_per_clip: int = 3) -> None:
    """Frames where they are known, and below them teacher and student in the same PCA colours, and their cosine.

    One basis for all: the three first principal components of the unit teacher features. Student features are
    shown in the teacher's basis, so equal colours mean equal features.
    """
    teacher = [F.normalize(clip.teacher.float().cpu(), dim=-1) for clip in clips]
    student = [F.normalize(clip.student.float().cpu(), dim=-1) for clip in clips]
    with_video = all(clip.pixels is not None for clip in clips)
    colors = _PcaColours(torch.cat([features.flatten(0, 2) for features in teacher]))
    columns: list[tuple[str, list[Any]]] = []
    for clip, y, p in zip(clips, teacher, student, strict=True):
        last = len(y) - 1
        for f in sorted({round(i * last / max(1, frames_per_clip - 1)) for i in range(frames_per_clip)}):
            pictures = [colors(y[f]), colors(p[f]), (y[f] * p[f]).sum(-1).numpy()]
            if with_video and clip.pixels is not None:
                pictures = [clip.pixels[f].permute(1, 2, 0).cpu().numpy(), *pictures]
            columns.append((f"{clip.name}\nframe {clip.frame_numbers[f]}", pictures))
    height, width = columns[0][1][0].shape[:2]
    labels = ["video"] * with_video + ["teacher,\nPCA colours", "student,\nsame colours", "cosine"]
    cosines = len(labels) - 1
    size = (1.9 + 2.1 * len(columns), 0.6 + len(labels) * 2.15 * height / width)
    figure, axes = plt.subplots(len(labels), len(columns), figsize=size, layout="constrained", squeeze=False)
    image = None
    for column, (title, pictures) in enumerate(columns):
        axes[0][column].set_title(title, fontsize=8)
        for row, picture in enumerate(pictures):
            axis = axes[row][column]
            # Every picture spans the same frame, so a patch lies where its pixels are.
            scale: dict[str, Any] = {"vmin": -1, "vmax": 1, "cmap": "RdBu_r"} if row == cosines else {}
            shown = axis.imshow(picture, extent=(0, width, height, 0), interpolation="nearest", **scale)
            image = shown if row == cosines else image
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if column == 0:
                axis.set_ylabel(labels[row], rotation=0, ha="right", va="center")
    figure.colorbar(image, ax=axes[cosines].tolist(), fraction=0.02, pad=0.01, shrink=0.9)
    figure.get_layout_engine().set(h_pad=0.02, hspace=0.02)
    _save(figure, path)


class _PcaColours:
    """Three principal components of features (n, E) as RGB in [0, 1]; the 2nd to 98th percentile fill the range."""

    def __init__(self, features: Tensor) -> None:
        self.mean = features.mean(0)
        self.basis = torch.linalg.svd(features - self.mean, full_matrices=False).Vh[:3]
        scores = (features - self.mean) @ self.basis.T
        self.low, self.high = scores.quantile(0.02, dim=0), scores.quantile(0.98, dim=0)

    def __call__(self, features: Tensor) -> np.ndarray:
        scores = (features - self.mean) @ self.basis.T
        return ((scores - self.low) / (self.high - self.low)).clamp(0, 1).numpy()


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def figure_pixels(figure: Figure) -> np.ndarray:
    """What a figure shows, (H, W, 3) uint8; it is closed."""
    canvas: Any = figure.canvas
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return pixels

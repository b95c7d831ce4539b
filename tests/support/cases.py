"""Drawn configurations of the loss: ``draw(seed)`` is the same case on every machine."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from crepa_kernels import CrepaOutput, CrepaProjector, crepa_loss

GRADIENTS = ("h", "gamma", "beta", "weight", "bias")
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
# What is drawn too rarely to leave to chance goes round in a fixed order.
MODES = [(align, antialias) for align in ("student", "teacher", "smaller", "pool") for antialias in (True, False)]


@dataclass(frozen=True)
class Case:
    """One call of the loss: shapes, options, how its inputs lie in memory and how they are filled."""

    seed: int
    batch: int
    frames: int
    teacher_frames: int
    student_grid: tuple[int, int]
    teacher_grid: tuple[int, int]
    hidden_size: int
    feature_size: int
    distance: int
    tau: float
    cumulative: bool
    normalize_neighbour_sum: bool
    normalize_by_frames: bool
    spatial_align: str
    antialias: bool
    frame_index: Any
    frame_mask: torch.Tensor | None
    teacher_mask: torch.Tensor | None
    affine: str  # LayerNorm: "both", "scale" or "none"
    linear_bias: bool
    eps: float
    mean: float
    std: float
    zero_rows: bool
    tiny: bool  # the projection's rows are below the norm's floor, and not zero
    garbage: bool  # what the masks leave out holds NaN
    layout: str
    teacher_layout: str
    full_precision_weights: bool
    required: tuple[str, ...]
    absent: bool = False  # no projector: h is p, and the widths are one
    flattened: bool = False  # h is given as (B, T P, D)

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
        """h, y, gamma, beta, weight, bias in ``dtype`` (the weights in fp32 or wider if ``full_precision_weights``)."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        d, e = self.hidden_size, self.feature_size
        h = normal(self.batch, self.frames, math.prod(self.student_grid), d)
        if d > 1:  # each token's own mean / std is the drawn one
            h = (h - h.mean(dim=-1, keepdim=True)) / h.std(dim=-1, correction=0, keepdim=True)
        h = (h + self.mean * normal(*h.shape[:3], 1).sign()) * self.std
        y = normal(self.batch, self.teacher_frames, math.prod(self.teacher_grid), e)
        if self.zero_rows:
            for rows, moved in ((h, "student"), (y, "teacher")):
                # Where a side is resampled, only frames: a token all of whose taps are zero would be a unit row or a
                # zero row as a weight of exactly 0 is rounded to 1e-9 or not.
                axes = 2 if self.resampled == moved else 3
                rows[torch.rand(rows.shape[:axes], generator=generator) < 0.2] = 0
            y[torch.rand(y.shape[:2], generator=generator) < 0.1] *= 1e-14  # below the floor of 1e-12, but not zero
        if self.garbage and self.layout == self.teacher_layout == "contiguous":
            exists, counted = self.existing, self.counted
            h[~counted] = torch.nan
            if self.frame_index is None:
                y[~exists] = torch.nan
        weights_type = torch.promote_types(dtype, torch.float32) if self.full_precision_weights else dtype
        if self.absent:
            h = h * (1e-14 if self.tiny else 1)
            weights = dict.fromkeys(GRADIENTS[1:])
            return {"h": laid_out(h.to(dtype), self.layout), "y": laid_out(y.to(dtype), self.teacher_layout), **weights}
        weights = {
            "gamma": 1 + 0.5 * normal(d) if self.affine != "none" else None,
            "beta": 0.5 * normal(d) if self.affine == "both" else None,
            "weight": normal(e, d) / math.sqrt(d) * (1e-14 if self.tiny else 1),
            "bias": 0.3 * normal(e) if self.linear_bias else None,
        }
        return {
            "h": laid_out(h.to(dtype), self.layout),
            "y": laid_out(y.to(dtype), self.teacher_layout),
            **{name: None if value is None else value.to(weights_type) for name, value in weights.items()},
        }

    @property
    def existing(self) -> torch.Tensor:
        """(B, T) bool, teacher frames that exist."""
        everything = torch.ones(self.batch, self.frames, dtype=torch.bool)
        return everything if self.teacher_mask is None else self.teacher_mask

    @property
    def counted(self) -> torch.Tensor:
        """(B, T) bool, student frames in the loss: those whose own teacher frame exists."""
        return self.existing if self.frame_mask is None else self.existing & self.frame_mask

    @property
    def resampled(self) -> str | None:
        """The side that bilinear resampling moves to the other's grid."""
        if self.student_grid == self.teacher_grid or self.spatial_align == "pool":
            return None
        larger = math.prod(self.student_grid) > math.prod(self.teacher_grid)
        return {"student": "teacher", "teacher": "student", "smaller": "student" if larger else "teacher"}[
            self.spatial_align
        ]

    def projector(self, tensors: dict[str, torch.Tensor | None]) -> nn.Sequential | None:
        """A ``CrepaProjector`` where it can be one, else the plain Sequential of the two layers, or None."""
        if self.absent:
            return None
        if self.affine == "both" and self.linear_bias:
            projector: nn.Sequential = CrepaProjector(self.hidden_size, self.feature_size)
            projector[0].eps = self.eps
        else:
            norm = nn.LayerNorm(self.hidden_size, self.eps, self.affine != "none", self.affine == "both")
            projector = nn.Sequential(norm, nn.Linear(self.hidden_size, self.feature_size, self.linear_bias))
        for layer, parameter, name in (
            (0, "weight", "gamma"), (0, "bias", "beta"), (1, "weight", "weight"), (1, "bias", "bias"),
        ):  # fmt: skip
            if tensors[name] is not None:
                required = name in self.required
                setattr(projector[layer], parameter, nn.Parameter(tensors[name].clone(), requires_grad=required))
        return projector

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``crepa_loss``."""
        return {
            "student_grid": self.student_grid,
            "teacher_grid": self.teacher_grid,
            "distance": self.distance,
            "tau": self.tau,
            "cumulative": self.cumulative,
            "normalize_neighbour_sum": self.normalize_neighbour_sum,
            "normalize_by_frames": self.normalize_by_frames,
            "spatial_align": self.spatial_align,
            "antialias": self.antialias,
            "frame_index": self.frame_index,
            "frame_mask": self.frame_mask,
            "teacher_mask": self.teacher_mask,
        }

    def leaves(self, tensors: dict[str, torch.Tensor | None], projector: nn.Sequential | None) -> dict[str, Any]:
        """What the case's gradients are of, by name: h as it is given, and the projector's parameters."""
        h = tensors["h"].flatten(1, 2) if self.flattened else tensors["h"]
        leaves = {"h": h.detach().requires_grad_("h" in self.required)}
        if projector is not None:
            norm, linear = projector
            leaves |= {"gamma": norm.weight, "beta": norm.bias, "weight": linear.weight, "bias": linear.bias}
        return leaves

    def gradients(self, loss: torch.Tensor, leaves: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Of the leaves that ask for one; h's is of the shape that h has in ``tensors``."""
        wanted = [name for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad]
        found = torch.autograd.grad(loss, [leaves[name] for name in wanted]) if wanted else ()
        assert all(grad.shape == leaves[name].shape for name, grad in zip(wanted, found, strict=True))
        shapes = {"h": (self.batch, self.frames, math.prod(self.student_grid), self.hidden_size)}
        return {
            name: grad.view(shapes.get(name, grad.shape)) if self.flattened else grad
            for name, grad in zip(wanted, found, strict=True)
        }

    def run(
        self, tensors: dict[str, torch.Tensor | None], backend: str, **options: Any
    ) -> tuple[CrepaOutput, dict[str, torch.Tensor]]:
        """The loss and the gradients that the case asks for, by the name of the input."""
        projector = self.projector(tensors)
        leaves = self.leaves(tensors, projector)
        output = crepa_loss(leaves["h"], tensors["y"], projector, backend=backend, **options, **self.options)
        return output, self.gradients(output.loss, leaves)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``tensor`` in memory as transposed or sliced out of more; "expanded" repeats the first frame."""
    if layout == "transposed":
        return tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if layout == "sliced":
        wide = torch.full((*tensor.shape[:2], tensor.shape[2] + 2, 2 * tensor.shape[3]), torch.nan, dtype=tensor.dtype)
        view = wide[:, :, 1:-1, ::2]
        return view.copy_(tensor)
    if layout == "expanded":
        return tensor[:, :1].contiguous().expand_as(tensor)
    return tensor


def _mask(random_: random.Random, batch: int, frames: int, kind: str) -> torch.Tensor | None:
    if kind == "all":
        return None
    if kind == "none":
        return torch.zeros(batch, frames, dtype=torch.bool)
    if kind == "padding":
        lengths = torch.tensor([random_.randint(0, frames) for _ in range(batch)])
        return torch.arange(frames)[None, :] < lengths[:, None]
    return torch.tensor([[random_.random() < 0.7 for _ in range(frames)] for _ in range(batch)])


def draw(seed: int) -> Case:
    """The configuration of ``seed``; shapes are small and mostly odd, every third axis or so has size 1."""
    rng = random.Random(seed)
    side = lambda: rng.choice([1, 1, 2, 3, 4, 5, 7])  # noqa: E731
    width = lambda: rng.choice([1, 2, 3, 3, 5, 5, 8, 8, 13, 13, 16, 24, 33, 40])  # noqa: E731
    batch, frames = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5, 6])
    spatial_align, antialias = MODES[seed % len(MODES)]
    student_grid = (side(), side())
    teacher_grid = student_grid if rng.random() < 0.2 else (side(), side())
    teacher_frames, frame_index = frames, None
    if rng.random() < 0.4:
        teacher_frames = rng.randint(1, 7)
        index = [[rng.randrange(teacher_frames) for _ in range(frames)] for _ in range(batch)]
        frame_index = rng.choice([index[0], torch.tensor(index[0]), torch.tensor(index, dtype=torch.int32)])
    kinds = ["all"] * 10 + ["padding"] * 4 + ["holes"] * 4 + ["none"]
    hidden_size = width()
    affine = rng.choice(["both", "both", "scale", "none"])
    # LayerNorm makes 0 of one number and +-1 of two. Without an offset p is then 0, or cancels to 0 where tokens are
    # averaged, and every rounding makes another unit row of it: there is no right answer.
    linear_bias = hidden_size <= 2 or rng.random() < 0.7
    tiny = hidden_size > 2 and seed % 15 == 13
    if tiny:
        affine, linear_bias = rng.choice(["scale", "none"]), False
    required = GRADIENTS if rng.random() < 0.5 else tuple(name for name in GRADIENTS if rng.random() < 0.5)
    case = Case(
        seed=seed,
        batch=batch,
        frames=frames,
        teacher_frames=teacher_frames,
        student_grid=student_grid,
        teacher_grid=teacher_grid,
        hidden_size=hidden_size,
        feature_size=width(),
        distance=rng.choice([0, 1, 1, 2, 3, frames - 1, frames + 2]),
        tau=rng.choice([0.3, 1.0, 2.5]),
        cumulative=(seed // len(MODES)) % 2 == 1,
        normalize_neighbour_sum=rng.random() < 0.5,
        normalize_by_frames=rng.random() < 0.6,
        spatial_align=spatial_align,
        antialias=antialias,
        frame_index=frame_index,
        frame_mask=_mask(rng, batch, frames, rng.choice(kinds)),
        teacher_mask=_mask(rng, batch, frames, rng.choice(kinds)),
        affine=affine,
        linear_bias=linear_bias,
        eps=rng.choice([1e-5, 1e-6]),
        mean=rng.choice([0.0, 0.0, 1.0, 10.0, 100.0]),
        std=rng.choice([0.003, 1.0, 1.0, 20.0]),
        zero_rows=rng.random() < 0.3,
        tiny=tiny,
        garbage=rng.random() < 0.5,
        layout=rng.choice((*LAYOUTS, "contiguous", "contiguous")),
        teacher_layout=rng.choice((*LAYOUTS, "contiguous", "contiguous")),
        full_precision_weights=rng.random() < 0.5,
        required=required,
        flattened=rng.random() < 0.3,
    )
    if rng.random() < 0.25:
        case = replace(case, absent=True, hidden_size=case.feature_size, affine="none", linear_bias=False)
    return case


def simple(**changes: Any) -> Case:
    """A plain case to change one thing of: 2 clips of 4 frames, 3x4 student tokens, 2x3 teacher tokens."""
    plain = Case(
        seed=0, batch=2, frames=4, teacher_frames=4, student_grid=(3, 4), teacher_grid=(2, 3), hidden_size=16,
        feature_size=8, distance=1, tau=1.0, cumulative=False, normalize_neighbour_sum=False,
        normalize_by_frames=True, spatial_align="student", antialias=True, frame_index=None, frame_mask=None,
        teacher_mask=None, affine="both", linear_bias=True, eps=1e-5, mean=0.0, std=1.0, zero_rows=False,
        tiny=False, garbage=False,
        layout="contiguous", teacher_layout="contiguous", full_precision_weights=False, required=GRADIENTS,
    )  # fmt: skip
    return replace(plain, **changes)

"""SimpleTuner's CREPA and U-REPA (4.10 and later) with this package's losses.

    python -m crepa_kernels.integrations.simpletuner [--spatial grid|line] -- simpletuner train ...

or, before its training begins, ``apply(spatial="grid")``. One method is replaced, ``compute_loss`` of
``CrepaRegularizer`` and of ``UrepaRegularizer``; their configuration, schedule, logs and return values stay. What
cannot be taken over goes to the method that was there, and the reason is logged once. ``restore()`` undoes it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import nn

from .. import crepa_loss, relational_loss

Spatial = Literal["grid", "line"]
Grid = tuple[int, int]
Result = tuple[torch.Tensor | None, dict[str, Any] | None]

MODULE = "simpletuner.helpers.training.crepa"
AT_START = Path(__file__).parent / "at_start"
_TAKES = ("hidden_states", "latents", "vae", "frame_features", "step")
_UREPA_TAKES = ("hidden_states", "latents", "vae", "step")
_UREPA_HAS = ("_project_hidden_states", "_decode_latents", "_encode_pixels")

logger = logging.getLogger(__name__)
# By class: what is called, and what stood in the class itself, None where it inherits.
_replaced: dict[type, tuple[Callable[..., Result], Any]] = {}


def apply(spatial: Spatial = "grid", regularizer: type | None = None) -> None:
    """Replaces ``compute_loss`` of SimpleTuner's ``CrepaRegularizer`` and ``UrepaRegularizer``, also in instances.

    Args:
        spatial: ``"grid"`` compares tokens at the same place of the frame: the student's grid from the latents' height
            and width and its token count (U-REPA's is known), an encoder's the square of its count, both resampled to
            the smaller with a filter as wide as an axis shrinks; nothing is computed while the schedule's weight is 0.
            ``"line"`` is SimpleTuner's own arithmetic: token rows that are no two squares are resampled as one line.
        regularizer: the class; None imports SimpleTuner's two.

    Raises:
        ValueError: for another ``spatial``.
        RuntimeError: if SimpleTuner is not installed, or ``regularizer`` is no class or has another interface.
    """
    if spatial not in get_args(Spatial):
        raise ValueError(f"spatial must be one of {', '.join(get_args(Spatial))}, got {spatial!r}")
    if regularizer is not None:
        return _take_over(regularizer, spatial)
    module = _simpletuner()
    _take_over(module.CrepaRegularizer, spatial)
    try:
        _take_over(module.UrepaRegularizer, spatial)
    except (AttributeError, RuntimeError) as error:
        _say_once(f"U-REPA is SimpleTuner's own: {error}")


def _take_over(cls: type, spatial: Spatial) -> None:
    if not isinstance(cls, type):
        raise RuntimeError(f"regularizer must be SimpleTuner's class, got {type(cls).__name__}")
    urepa = all(hasattr(cls, name) for name in _UREPA_HAS)
    takes, replacement = (_UREPA_TAKES, _urepa) if urepa else (_TAKES, _crepa)
    original, own = _replaced.get(cls) or (getattr(cls, "compute_loss", None), vars(cls).get("compute_loss"))
    taken = list(inspect.signature(original).parameters) if callable(original) else []
    if missing := [name for name in takes if name not in taken]:
        raise RuntimeError(f"{cls.__name__}.compute_loss must take {', '.join(takes)}; {', '.join(missing)} missing")
    assert original is not None  # for the type checker: it takes the names
    _replaced[cls] = original, own
    cls.compute_loss = replacement(original, spatial)  # type: ignore[attr-defined]


def restore() -> None:
    """Gives every class that ``apply`` changed its own ``compute_loss`` back."""
    while _replaced:
        cls, (_, own) = _replaced.popitem()
        if own is None:
            del cls.compute_loss  # type: ignore[attr-defined]
        else:
            cls.compute_loss = own  # type: ignore[attr-defined]


def _simpletuner() -> ModuleType:
    try:
        module = importlib.import_module(MODULE)
        module.CrepaRegularizer  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"no CrepaRegularizer in {MODULE}, of SimpleTuner 4.10 and later: {error}") from error
    return module


def _crepa(original: Callable[..., Result], spatial: Spatial) -> Callable[..., Result]:
    @wraps(original)
    def compute_loss(
        self: Any,
        hidden_states: torch.Tensor | None,
        latents: torch.Tensor | None,
        vae: nn.Module | None = None,
        *,
        frame_features: torch.Tensor | None = None,
        step: int = 0,
    ) -> Result:
        def theirs(reason: str = "") -> Result:
            if reason:
                _say_once(f"this loss is SimpleTuner's own: {reason}")
            return original(self, hidden_states, latents, vae, frame_features=frame_features, step=step)

        inner = self.uses_internal_teacher_features
        needed: Any = frame_features if inner else latents
        blind = not inner and vae is None and not getattr(self, "use_tae", False)
        if not self.enabled or not self.base_weight or hidden_states is None or needed is None or blind:
            return theirs()
        if reason := _why_not(self, hidden_states):
            return theirs(reason)
        if spatial == "grid" and _rests(self.scheduler, step):
            return None, _logs(self.scheduler, 0.0)
        h, places = _by_frames(self, hidden_states, latents if spatial == "grid" else None)
        y = needed if inner else _encoded(self, needed, vae, h.shape[1])
        y = y[:, None] if y.dim() == 3 else y
        if (h.shape[0], self.projector[1].out_features) != (y.shape[0], y.shape[-1]):
            return theirs(f"projections of {tuple(h.shape)} do not fit features of {tuple(y.shape)}")
        h, y = _same_frames(h, y), _same_frames(y, h)
        near = self.distance > 0 and self.tau > 0
        output = crepa_loss(
            h,
            y.to(h.device),
            self.projector,
            **_alignment(self, h, y, places),
            distance=int(self.distance) if near else 0,
            tau=float(self.tau) if near else 1.0,
            cumulative=bool(self.cumulative_neighbors),
            normalize_neighbour_sum=bool(self.normalize_neighbour_sum),
            normalize_by_frames=bool(self.normalize_by_frames),
        )
        # One wait of the host for all three.
        read = torch.stack([output.loss.detach(), output.alignment_score, output.self_similarity])
        loss, score, own = read.tolist()
        weight = self.scheduler.get_weight(step, similarity=score)
        logs = _logs(self.scheduler, weight, loss, score, own)
        return (output.loss * weight if weight else None), logs

    return compute_loss


def _urepa(original: Callable[..., Result], spatial: Spatial) -> Callable[..., Result]:
    @wraps(original)
    def compute_loss(
        self: Any,
        hidden_states: torch.Tensor | None,
        latents: torch.Tensor | None,
        vae: nn.Module | None = None,
        *,
        step: int = 0,
    ) -> Result:
        def theirs(reason: str = "") -> Result:
            if reason:
                _say_once(f"this loss is SimpleTuner's own: {reason}")
            return original(self, hidden_states, latents, vae, step=step)

        missing = any(each is None for each in (hidden_states, latents, vae, self.projector))
        if not self.enabled or not self.base_weight or missing or hidden_states.dim() != 4:  # type: ignore[union-attr]
            return theirs()
        if getattr(self, "irepa_enabled", False):
            return theirs("its projector is a convolution (irepa_enabled)")
        rests = _rests(self.scheduler, step)
        if spatial == "grid" and rests:
            return None, _urepa_logs(0.0)
        h = hidden_states
        assert h is not None  # for the type checker: it is not missing
        p = self._project_hidden_states(h)
        with torch.no_grad():
            y = self._encode_pixels(self._decode_latents(latents, vae)).to(p.device)
        if y.dim() != 3 or (p.shape[0], p.shape[-1]) != (y.shape[0], y.shape[-1]):
            return theirs(f"projections of {tuple(p.shape)} do not fit features of {tuple(y.shape)}")
        grids: Any = {"student_grid": (h.shape[-2], h.shape[-1]), "teacher_grid": _square(y.shape[1])}
        if spatial == "line" or grids["teacher_grid"] is None:
            if spatial == "grid":
                _say_once(f"patches are compared as SimpleTuner does (spatial='line'): {y.shape[1]} are no square")
            grids = _as_theirs(p.shape[1], y.shape[1])
        sides = p[:, None], y[:, None], None
        output = crepa_loss(*sides, **grids, spatial_align="smaller", distance=0)
        manifold = output.loss.new_zeros(())
        if not rests:
            manifold = relational_loss(*sides, **grids, spatial_align="smaller", pairs="frame")
        # One wait of the host for all.
        aligned, related, similarity = torch.stack(
            [output.loss.detach(), manifold.detach(), output.similarity]
        ).tolist()
        weight = self.scheduler.get_weight(step, similarity=similarity)
        if not weight:
            return None, _urepa_logs(weight, similarity)
        loss = (output.loss + self.manifold_weight * manifold) * weight
        total = (aligned + self.manifold_weight * related) * weight
        return loss, _urepa_logs(weight, similarity, total, aligned, related)

    return compute_loss


def _urepa_logs(
    weight: float, similarity: float | None = None, loss: float = 0.0, aligned: float = 0.0, manifold: float = 0.0
) -> dict[str, Any]:
    logs = {"urepa_loss": loss, "urepa_alignment_loss": aligned, "urepa_manifold_loss": manifold}
    measured = {} if similarity is None else {"urepa_similarity": similarity}
    return {**logs, **measured, "urepa_weight": weight, "urepa_cutoff": weight == 0}


def _why_not(crepa: Any, hidden_states: torch.Tensor) -> str:
    """Why ``crepa_loss`` cannot take this over; empty where it can."""
    if getattr(crepa, "irepa_enabled", False):
        return "its projector is a convolution (irepa_enabled)"
    parts = [type(part) for part in crepa.projector] if isinstance(crepa.projector, nn.Sequential) else []
    if parts != [nn.LayerNorm, nn.Linear]:
        found = ", ".join(part.__name__ for part in parts) or type(crepa.projector).__name__
        return f"its projector is no Sequential of LayerNorm and Linear but of {found}"
    if hidden_states.dim() not in (3, 4):
        return f"hidden states of shape {tuple(hidden_states.shape)}"
    return ""


def _rests(scheduler: Any, step: int) -> bool:
    """Whether the weight is 0 whatever the similarity is: one that a threshold waits for must go on being measured."""
    without_threshold = getattr(scheduler, "similarity_threshold", 0.0) is None
    for_good = getattr(scheduler, "threshold_mode", "") == "permanent" and scheduler.is_cutoff()
    return (without_threshold or for_good) and not scheduler.get_weight(step)


def _logs(scheduler: Any, weight: float, loss: float = 0.0, *similarities: float) -> dict[str, Any]:
    measured = dict(zip(("crepa_alignment_score", "crepa_similarity_self"), similarities, strict=bool(similarities)))
    logs = {"crepa_loss": loss * weight, **measured, "crepa_weight": weight, "crepa_cutoff": weight == 0}
    ema = scheduler.get_similarity_ema()
    return logs if ema is None else {**logs, "crepa_alignment_score_ema": ema}


def _by_frames(
    crepa: Any, hidden_states: torch.Tensor, latents: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, T, P, D), and the latents that tell the tokens' places: None where they were None or do not tell.

    Of three axes an image's are (B, P, D), a video's (B, T, D) or, with latents, all tokens of the clip.
    """
    if hidden_states.dim() == 4:
        return hidden_states, latents
    if crepa.mode.name == "IMAGE":
        return hidden_states[:, None], latents
    if latents is not None and latents.dim() == 5:
        tokens, frames = hidden_states.shape[1], latents.shape[2]
        if tokens % frames == 0 and token_grid(tokens // frames, latents.shape) is not None:
            return hidden_states.unflatten(1, (frames, -1)), latents
        _say_once(
            f"each token is taken for a frame, as SimpleTuner does: {tokens} tokens lie on no grid of latents of "
            f"{tuple(latents.shape[-3:])}"
        )
    return hidden_states[:, :, None], None


@torch.no_grad()
def _encoded(crepa: Any, latents: torch.Tensor, vae: nn.Module | None, frames: int) -> torch.Tensor:
    """The encoder's features (B, S, N, E) of no more than the ``frames`` that are compared."""
    video = crepa._decode_latents_unified(latents, vae)
    # An encoder with its own preprocessing may look at neighbours in time.
    if video.dim() == 5 and not getattr(crepa.encoder, "preprocesses_frames", False):
        video = _spread_frames(video, frames)
    return crepa._encode_frames(video)


def _spread_frames(tensor: torch.Tensor, frames: int) -> torch.Tensor:
    """``frames`` of more frames (B, n, ...), evenly from the first to the last, as SimpleTuner takes them."""
    if tensor.shape[1] <= frames:
        return tensor
    index = torch.linspace(0, tensor.shape[1] - 1, frames, device=tensor.device).long()
    return tensor.index_select(1, index)


def _same_frames(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return _spread_frames(tensor, other.shape[1])


def token_grid(tokens: int, latent_shape: Sequence[int]) -> Grid | None:
    """(height, width) of a frame's ``tokens`` where they are square patches of latents (..., H, W); None if unclear."""
    height, width = latent_shape[-2:]
    sizes = range(1, max(height, width) + 1)
    cut = {(height // size, width // size) for size in sizes}
    padded = {(-(-height // size), -(-width // size)) for size in sizes}
    found = {grid for grid in cut | padded if math.prod(grid) == tokens}
    return found.pop() if len(found) == 1 else None


def _alignment(crepa: Any, h: torch.Tensor, y: torch.Tensor, latents: torch.Tensor | None) -> dict[str, Any]:
    """The grids, and how they meet: by place where ``latents`` are given and the grids are known, else theirs."""
    student, teacher = h.shape[2], y.shape[2]
    if not crepa.spatial_align:
        return {"student_grid": (1, student), "teacher_grid": (1, teacher), "spatial_align": "pool"}
    squares = _square(student), _square(teacher)
    if latents is not None:
        inner = crepa.uses_internal_teacher_features
        grids = token_grid(student, latents.shape), token_grid(teacher, latents.shape) if inner else squares[1]
        if None not in grids:
            return {"student_grid": grids[0], "teacher_grid": grids[1], "spatial_align": "smaller"}
        _say_once(
            f"tokens are compared as SimpleTuner does (spatial='line'): the grids of {student} tokens against "
            f"{teacher} are unclear from latents of {tuple(latents.shape[-2:])}"
        )
    return {**_as_theirs(student, teacher), "spatial_align": "smaller"}


def _as_theirs(student: int, teacher: int) -> dict[str, Any]:
    """Squares where both counts are square numbers, else lines, with a filter of four points."""
    squares = _square(student), _square(teacher)
    grids = ((1, student), (1, teacher)) if None in squares else squares
    return {"student_grid": grids[0], "teacher_grid": grids[1], "antialias": False}


def _square(tokens: int) -> Grid | None:
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


@cache
def _say_once(text: str) -> None:
    logger.warning(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Becomes the command after ``--``; it and every Python that it starts have the loss replaced."""
    parser = argparse.ArgumentParser(prog="python -m crepa_kernels.integrations.simpletuner", description=__doc__)
    parser.add_argument("--spatial", choices=get_args(Spatial), default="grid")
    parser.add_argument("command", nargs="+", help="-- simpletuner train ...")
    parsed = parser.parse_args(arguments)
    path = os.pathsep.join([str(AT_START), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execvpe(
        parsed.command[0], parsed.command, {**os.environ, "PYTHONPATH": path, "CREPA_SIMPLETUNER": parsed.spatial}
    )


if __name__ == "__main__":
    main()

"""Losses whose tokens lie on several ranks, against those of one process: test_context_shards.py compares them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import Case, simple

from crepa_kernels import crepa_loss, relational_loss
from crepa_kernels.ops.relation import TILE as TILES
from crepa_kernels.transfer import ContextShard

# 30 tokens, cut after the 15th, or after the 10th and the 20th: never between frames of 6.
CLIP: dict[str, Any] = {"frames": 5, "teacher_frames": 5, "student_grid": (2, 3), "teacher_grid": (3, 4)}
# The second clip has no frame in the loss, and the third but the first two, which the last rank has nothing of.
MASKS = {
    "batch": 3,
    "frame_mask": torch.tensor([[False, True, True, False, True], [False] * 5, [True, True, False, False, False]]),
    "teacher_mask": torch.tensor([[True, True, True, True, False], [True] * 5, [True, True, True, False, False]]),
}
CREPA: dict[str, dict[str, Any]] = {
    "adjacent": {},
    "adjacent-far": {"distance": 3, "normalize_neighbour_sum": True, "normalize_by_frames": False},
    "cumulative": {"cumulative": True, "distance": 2},
    "cumulative-far": {"cumulative": True, "distance": 9, "teacher_grid": (2, 3)},
    "masks": {**MASKS, "cumulative": True, "distance": 2},
    "masks-adjacent": {**MASKS, "distance": 4, "teacher_grid": (2, 3)},
    "index": {"teacher_frames": 3, "frame_index": [0, 0, 1, 2, 2], "distance": 2},
    "given": {"absent": True, "affine": "none", "linear_bias": False, "hidden_size": 8},
}
RELATIONAL: dict[str, dict[str, Any]] = {
    "all": {},
    "frame": {"pairs": "frame"},
    "cross": {"pairs": "cross"},
    "neighbours": {"pairs": "neighbours", "distance": 2, "tau": 2.0},
    "margin": {"margin": 0.1},
    "margin-neighbours": {"margin": 0.05, "pairs": "neighbours", "distance": 1},
}
# With fewer features than tokens a frame the squares are taken by features, else by tokens.
WIDTHS = {"by-features": 2, "by-tokens": 24}
WAYS = (("reference", torch.float64), ("torch", torch.float32), ("torch", torch.float64))
# Of several tiles each rank has some.
TILE = 50


def calls() -> dict[str, tuple[Case, dict[str, Any], str, torch.dtype]]:
    """By name: the case, the options of ``relational_loss`` ({} is ``crepa_loss``), backend and type."""
    found: dict[str, tuple[Case, dict[str, Any], str, torch.dtype]] = {}
    for backend, dtype in WAYS:
        kind = f"{backend}-{str(dtype).removeprefix('torch.')}"
        for name, changes in CREPA.items():
            found[f"crepa-{name}-{kind}"] = simple(**{**CLIP, **changes}), {}, backend, dtype
        for (name, options), (way, width), masks in product(RELATIONAL.items(), WIDTHS.items(), ({}, MASKS)):
            case = simple(**{**CLIP, **masks, "feature_size": width})
            label = f"relational-{name}-{way}{'-masks' if masks else ''}-{kind}"
            found[label] = case, {"pairs": "all", **options}, backend, dtype
    return found


def run(
    case: Case, relation: dict[str, Any], backend: str, dtype: torch.dtype, shard: ContextShard | None = None
) -> dict[str, torch.Tensor]:
    """Loss, metrics and gradients of a call: of this rank's tokens alone where there is a ``shard``."""
    tensors, extra = case.tensors(dtype), dict[str, Any]()
    y = tensors["y"]
    if shard is not None:
        tensors["h"] = tensors["h"].flatten(1, 2)[:, shard.start : shard.stop]
        extra = {"token_range": shard.token_range}
        if case.frame_index is None:
            reach = min(case.distance, case.frames - 1) if not relation else 0
            first, last = shard.start // 6 - reach, -(-shard.stop // 6) + reach
            # What no token of the range is compared with is not read.
            y[:, : max(first, 0)], y[:, last:] = torch.nan, torch.nan
    projector = case.projector(tensors)
    leaves = {name: leaf for name, leaf in case.leaves(tensors, projector).items() if leaf is not None}
    options = case.options
    if relation:
        of_both = ("student_grid", "teacher_grid", "spatial_align", "antialias", "frame_mask", "teacher_mask")
        options = {name: options[name] for name in of_both} | relation
        extra |= {} if shard is None else {"context_group": shard.group}
        loss = relational_loss(leaves["h"], y, projector, backend=backend, **options, **extra)
        found = {"loss": loss.detach()}
    else:
        output = crepa_loss(leaves["h"], y, projector, backend=backend, **options, **extra)
        loss, found = output.loss, {name: value.detach() for name, value in output._asdict().items()}
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    gradients["h"] = gradients["h"].reshape(case.batch, -1, gradients["h"].shape[-1])
    return found | {f"d {name}": gradient for name, gradient in gradients.items()}


def together(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of all ranks: the gradients of their tokens side by side, everything else added up."""
    names = parts[0].keys()
    return {
        name: torch.cat([part[name] for part in parts], dim=1) if name == "d h" else sum(part[name] for part in parts)
        for name in names
    }  # type: ignore[misc]


def losses(folder: Path) -> None:
    """In each of several processes: writes RANK.pt with what it has of every call."""
    torch.set_num_threads(1)
    TILES["cpu"] = TILE
    dist.init_process_group("gloo")
    shard = ContextShard.of(dist.group.WORLD, 30)
    torch.save({name: run(*call, shard) for name, call in calls().items()}, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()

"""Training steps whose sequence lies on several ranks: test_context_parallel.py compares them with one process.

diffusers' own context parallelism, with Ulysses' exchange over gloo, and a module that cuts its tokens by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from tiny import clip_pixels, tiny_dinov2, tiny_wan, wan_inputs
from tiny_families import FAMILIES
from torch import nn

from crepa_kernels import CrepaRegularizer, LayerSync

FEATURES = 8
CONFIG = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_lambda": 0.5}
RELATIONAL = {"crepa_relational_weight": 0.7}
CUMULATIVE = {"crepa_cumulative_neighbors": True, "crepa_adjacent_distance": 2}


class OwnSequence(nn.Module):
    """Takes tokens (B, T, P, D) of whole clips and works on this rank's: 35 are cut unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(32, 32)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        tokens, ranks = video.flatten(1, 2), dist.get_world_size() if dist.is_initialized() else 1
        return self.block(tokens.tensor_split(ranks, 1)[dist.get_rank() if ranks > 1 else 0])


@dataclass(frozen=True)
class Step:
    """``make(ranks)`` builds the model; ``inputs(ranks)`` are its forward's arguments; ``given(frames)`` loss's."""

    make: Callable[[int], Any]
    inputs: Callable[[int], dict[str, Any]]
    settings: dict[str, Any]
    given: Callable[[int], dict[str, Any]] = lambda frames: {"features": features(frames)}
    options: dict[str, Any] = field(default_factory=dict)
    own: bool = False


def features(frames: int, grid: tuple[int, int] = (2, 3), width: int = FEATURES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, frames, *grid, width, generator=generator)


def masks(frames: int) -> dict[str, torch.Tensor]:
    """The second clip ends a frame early, and the first one's first frame is given to the model."""
    frame_mask, teacher_mask = torch.ones(2, 2, frames, dtype=torch.bool)
    frame_mask[0, 0], teacher_mask[1, -1] = False, False
    return {"frame_mask": frame_mask, "teacher_mask": teacher_mask}


def _frames(ranks: int) -> int:
    """Frames of 6 tokens whose sequence is cut within one: 9 and 9 of 18, or 8 of 24."""
    return 3 if ranks == 2 else 4


def _wan(ranks: int) -> Any:
    return tiny_wan(num_attention_heads=ranks, attention_head_dim=24 if ranks == 2 else 12)


def _wan_inputs(ranks: int) -> dict[str, Any]:
    return wan_inputs(2, frames=_frames(ranks))


def _wan_step(settings: dict[str, Any], given: Callable[[int], dict[str, Any]] | None = None) -> Step:
    return Step(_wan, _wan_inputs, settings, *([] if given is None else [given]))


def _family(name: str, tokens: Callable[[dict[str, Any]], dict[str, Any]]) -> Step:
    tiny = FAMILIES[name]
    # The settings of a family of images: one frame, cut within it.
    return Step(
        lambda _: tiny.make(),
        lambda _: tokens(tiny.inputs(2, model=tiny.make())),
        RELATIONAL,
        lambda frames: {"features": features(tiny.frames, tiny.grid)[:, : tiny.frames].squeeze(1)},
    )


def _text_like_video(inputs: dict[str, Any]) -> dict[str, Any]:
    """LTX's text is cut as well. diffusers' backward pass takes it for as long as the video, and has no masks."""
    text = inputs["encoder_hidden_states"].repeat(1, 15, 1)[:, : inputs["hidden_states"].shape[1]]
    return {**inputs, "encoder_hidden_states": text, "encoder_attention_mask": None}


def _even_text(inputs: dict[str, Any]) -> dict[str, Any]:
    cut = {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :4], "txt_ids": inputs["txt_ids"][:4]}
    return {**inputs, **cut}


STEPS: dict[str, Step] = {
    "adjacent": _wan_step({**RELATIONAL, "crepa_similarity_threshold": 0.99}),
    "cumulative-masks": _wan_step(
        {**RELATIONAL, **CUMULATIVE}, lambda t: {"features": features(t, (3, 4)), **masks(t)}
    ),
    "margin": _wan_step({**RELATIONAL, "crepa_relational_margin": 0.05, "crepa_relational_pairs": "neighbours"}),
    "pixels": _wan_step({"crepa_adjacent_distance": 0}, lambda t: {"pixels": clip_pixels(2, 4 * t - 3)}),
    "pixels-mean": _wan_step({"crepa_frame_map": "mean"}, lambda t: {"pixels": clip_pixels(2, 4 * t - 3)}),
    "backbone": _wan_step({"crepa_use_backbone_features": True, "crepa_teacher_block_index": 2}, lambda _: {}),
    "irepa": _wan_step({**RELATIONAL, "irepa_enabled": True}),
    "teacher-grid": _wan_step({"crepa_spatial_align": "teacher"}, lambda t: {"features": features(t, (3, 4))}),
    "own": Step(
        lambda _: OwnSequence(),
        lambda _: {"video": torch.randn(2, 5, 7, 32, generator=torch.Generator().manual_seed(1))},
        {**RELATIONAL, "crepa_block_index": 0},
        lambda _: {"features": features(5, (1, 7))},
        {"block": "block", "hidden_size": 32, "layout": lambda arguments: (5, 1, 7)},
        own=True,
    ),
}
OF_TWO: dict[str, Step] = {
    "ltxvideo": _family("ltxvideo", _text_like_video),
    "flux": _family("flux", _even_text),
}


def steps(ranks: int) -> dict[str, Step]:
    return STEPS | (OF_TWO if ranks == 2 else {})


def run(step: Step, ranks: int, *, parallel: bool) -> dict[str, Any]:
    """One training step: loss, logs, the gradients of all parameters, and what similarity_matrix gives."""
    torch.manual_seed(0)
    model = step.make(ranks)
    options = {**step.options, **({"context_group": dist.group.WORLD} if parallel and step.own else {})}
    encoder = tiny_dinov2() if "pixels" in step.given(2) else None
    size = None if encoder is not None or "crepa_use_backbone_features" in step.settings else FEATURES
    torch.manual_seed(1)
    crepa = CrepaRegularizer(
        {**CONFIG, **step.settings, "crepa_encoder_image_size": 28},
        model,
        encoder=encoder,
        feature_size=size,
        **options,
    )
    sync = None
    if not step.own:
        sync = LayerSync({"layersync_enabled": True, "layersync_student_block": 0, "layersync_teacher_block": 2}, model)
    if parallel and not step.own:
        # It counts the machine's accelerators, and takes a CPU for none.
        with mock.patch.object(torch.accelerator, "device_count", return_value=1):
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    model.train()
    inputs = step.inputs(ranks) if step.own else {**step.inputs(ranks), "return_dict": False}
    output = model(**inputs)
    prediction = output if isinstance(output, torch.Tensor) else output[0]
    given = step.given(_frames(ranks))
    aux, logs = crepa.loss(step=0, **given)
    encoded = crepa.frames_encoded
    # What a rank has a part of is a sum, and what each has whole is gathered: as gradients, both add up.
    main = prediction.square().sum() if step.own else prediction.square().mean()
    of_sync, logs_of_sync = (torch.zeros(()), {}) if sync is None else sync.loss()
    matrix = crepa.similarity_matrix(**given)
    (main + aux + of_sync).backward()
    numbers = {name: float(value) for name, value in {**logs, **logs_of_sync}.items()}
    return {
        "loss": aux.detach() + of_sync.detach(),
        "logs": numbers,
        "matrix": matrix,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "schedule": crepa.state_dict()["schedule"],
        "encoded": encoded,
    }


def uncut(ranks: int) -> str:
    """What is said where a group is given and nothing is cut over it."""
    transformer = _wan(ranks)
    crepa = CrepaRegularizer(CONFIG, transformer, feature_size=FEATURES, context_group=dist.group.WORLD)
    transformer(**_wan_inputs(ranks))
    try:
        crepa.loss(step=0, features=features(_frames(ranks)))
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """In each of several processes: writes RANK.pt with what it has of every step, and of a model that is not cut."""
    torch.set_num_threads(1)
    tiny_dinov2()  # of several ranks transformers has the first one alone save it
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    found = {name: run(step, ranks, parallel=True) for name, step in steps(ranks).items()}
    torch.save({**found, "uncut": uncut(ranks)}, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()

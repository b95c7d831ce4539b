"""A LoRA by the names of the original checkpoints, as ComfyUI looks for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .families import TrainingFamily

PREFIX = "diffusion_model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # also of diffusers, whose converters of some families read no others


def comfyui_lora(family: TrainingFamily, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a LoRA of `family` by ComfyUI's names: lora_A (r, in), lora_B (out, r) and alpha () of each layer.

    lora: NAME.lora_A.weight and NAME.lora_B.weight of each layer of the diffusers model, of scale 1 (alpha = r). Layers
    that are parts of one in the original, and have one input, become its LoRA, of the sum of their ranks: lora_A is
    stacked, lora_B is block-diagonal with rows of 0 for a part that has no LoRA. So it adds exactly the same.

    Raises:
        ValueError: as `original_layers`.
    """
    found: dict[str, Tensor] = {}
    for name, parts in original_layers(family, (key.removesuffix(DOWN) for key in lora if key.endswith(DOWN))).items():
        given = [part for part in parts if part + DOWN in lora]
        down, up = lora[given[0] + DOWN], lora[given[0] + UP]
        if len(parts) > 1:
            down = torch.cat([lora[part + DOWN] for part in given])
            none = up.new_zeros
            up = torch.block_diag(
                *(lora[part + UP] if part in given else none(family.original_rows(part), 0) for part in parts)
            )
        found[f"{PREFIX}{name}{DOWN}"], found[f"{PREFIX}{name}{UP}"] = down.contiguous(), up.contiguous()
        found[f"{PREFIX}{name}.alpha"] = torch.tensor(float(len(down)))
    return found


def original_layers(family: TrainingFamily, layers: Iterable[str]) -> dict[str, list[str]]:
    """The original names of layers of the diffusers model, each with all the layers that are its parts, in order.

    ValueError for a family, or a layer, of which no original name is known.
    """
    table = family.original_names
    if table is None:
        known = ", ".join(name for name, each in family.known.items() if each.original_names is not None)
        raise ValueError(
            f"ComfyUI's names for the layers of {family.name} are not known, those of {known} are: take the format "
            "diffusers"
        )
    patterns = [(re.compile(re.escape(ours).replace(r"\*", "(.+)")), theirs) for ours, theirs in table.items()]
    found: dict[str, list[str]] = {}
    for layer in layers:
        matches = ((pattern.fullmatch(layer), theirs) for pattern, theirs in patterns)
        match, original = next(((match, theirs) for match, theirs in matches if match), (None, ""))
        if match is None:
            raise ValueError(
                f"ComfyUI's name for {layer} of {family.name} is not known: leave it out of lora_targets, or take the "
                "format diffusers"
            )
        filled = "".join(match.groups())  # there is one * at most
        found[original.replace("*", filled)] = [
            ours.replace("*", filled) for ours, theirs in table.items() if theirs == original
        ]
    return found

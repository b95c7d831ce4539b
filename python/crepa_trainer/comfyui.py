"""A LoRA, LoHa or LoKr by the names of the original checkpoints, as ComfyUI looks for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from .adapters import adapter_layers

if TYPE_CHECKING:
    from torch import Tensor

    from .adapters import Adapter
    from .families import TrainingFamily

PREFIX = "diffusion_model."
ALPHA = ".alpha"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # also of diffusers, whose converters of some families read no others


def comfyui_lora(family: TrainingFamily, weights: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The weights of an adapter of `family` by ComfyUI's names, and alpha () of each layer.

    weights: of each layer of the diffusers model by peft's names. Layers that are parts of one in the original, and
    have one input, become its adapter, of the sum of their ranks: a LoRA's lora_A is stacked, lora_B is block-diagonal
    with rows of 0 for a part that has none, and so are the two pairs of a LoHa. So it adds exactly the same.

    Raises:
        ValueError: as `check_layers`.
    """
    found: dict[str, Tensor] = {}
    layers = adapter_layers(weights)
    check_layers(family, adapter, layers)
    for name, parts in original_layers(family, layers).items():
        given = {part: _of_layer(weights, part) for part in parts if part in layers}
        rows = {part: family.original_rows(part) for part in parts} if len(parts) > 1 else {}
        if adapter.kind == "lokr":
            [only] = given.values()
            added = _lokr(only, adapter)
        else:
            pairs = [(DOWN, UP)] if adapter.is_lora else [(".hada_w1_b", ".hada_w1_a"), (".hada_w2_b", ".hada_w2_a")]
            added = {key: tensor for pair in pairs for key, tensor in _stacked(given, rows, *pair).items()}
            rank = len(added[pairs[0][0]])
            added[ALPHA] = torch.tensor(float(adapter.scale * rank))  # its scale is alpha / rank
        found |= {f"{PREFIX}{name}{key}": tensor for key, tensor in added.items()}
    return found


def _of_layer(weights: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    return {name.removeprefix(layer): each for name, each in weights.items() if name.startswith(f"{layer}.")}


def _stacked(
    given: Mapping[str, Mapping[str, Tensor]], rows: Mapping[str, int], down: str, up: str
) -> dict[str, Tensor]:
    """One pair of matrices for a layer of several parts, whose product is that of each part below that of the last."""
    if not rows:
        [only] = given.values()
        return {down: only[down], up: only[up]}
    none = next(iter(given.values()))[up].new_zeros
    ups = (given[part][up] if part in given else none(number, 0) for part, number in rows.items())
    return {down: torch.cat([each[down] for each in given.values()]), up: torch.block_diag(*ups)}


def _lokr(weights: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """With the scale in the second factor: alpha counts there only where one of the factors is a product."""
    second = next(name for name in (".lokr_w2", ".lokr_w2_a") if name in weights)
    product = next((weights[name] for name in (".lokr_w2_b", ".lokr_w1_b") if name in weights), None)
    alpha = torch.tensor(float(adapter.rank if product is None else len(product)))
    return {**weights, second: weights[second] * adapter.scale, ALPHA: alpha}


def check_layers(family: TrainingFamily, adapter: Adapter, layers: Iterable[str]) -> None:
    """ValueError for an adapter that ComfyUI reads otherwise, and as `original_layers`."""
    if adapter.kind == "dora":
        raise ValueError(
            "ComfyUI divides a DoRA's magnitudes by other norms than it was trained with: take the format diffusers"
        )
    given = original_layers(family, layers)
    several = next((name for name, parts in given.items() if len(parts) > 1), None)
    if adapter.kind == "lokr" and several is not None:
        raise ValueError(
            f"{several} is one layer in ComfyUI, and the LoKr of its parts are no LoKr of it: leave them out of "
            "lora_targets, or take the format peft"
        )


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

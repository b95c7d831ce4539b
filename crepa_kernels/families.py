"""Model families: one row for each diffusers transformer class that CREPA can be attached to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .grid import Grid
from .teachers.latents import decode_wan


@dataclass(frozen=True)
class TokenLayout:
    """How one forward's video tokens lie: ``frames`` x ``grid`` in raster order.

    Attributes:
        frames: T, token frames of the clip (latent frames / ``patch``).
        grid: (height, width) of one frame's tokens.
        patch: latent frames of one token frame, the transformer's temporal patch.
        latent_shape: (frames, height, width) of the latents.
    """

    frames: int
    grid: Grid
    patch: int
    latent_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Family:
    """What CREPA must know of a transformer class.

    Attributes:
        name: the family's name in tables and messages.
        transformer: the diffusers class.
        vae: the diffusers class of its VAE.
        block_lists: attributes that hold the blocks, in the order in which they run.
        after_blocks: top-level attributes whose weights come into play after the last block.
        hidden_size: D, from the transformer's config.
        input_shape: (frames, height, width) of the latents from a forward's positional and keyword arguments.
        patch_size: (frames, height, width) of one token in latents, from the transformer's config.
        decode: ``(vae, latents (B, C, T, H, W)) -> pixels (B, P, 3, H, W)`` in [0, 1], as the pipeline does it.
    """

    name: str
    transformer: str
    vae: str
    block_lists: tuple[str, ...]
    after_blocks: tuple[str, ...]
    hidden_size: Callable[[Any], int]
    input_shape: Callable[[tuple[Any, ...], Mapping[str, Any]], tuple[int, int, int]]
    patch_size: Callable[[Any], tuple[int, int, int]]
    decode: Callable[[nn.Module, torch.Tensor], torch.Tensor]

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The transformer's blocks in the order in which they run."""
        return [block for name in self.block_lists for block in getattr(transformer, name)]

    def block(self, transformer: nn.Module, index: int, key: str) -> nn.Module:
        """Block ``index``; a ValueError names ``key`` and the valid range."""
        blocks = self.blocks(transformer)
        if not 0 <= index < len(blocks):
            raise ValueError(
                f"{key} = {index}: this {self.transformer} has {len(blocks)} blocks, valid are 0 to {len(blocks) - 1}"
            )
        return blocks[index]

    def layout(self, transformer: nn.Module, latent_shape: Sequence[int]) -> TokenLayout:
        """The token layout of a forward whose latents were (frames, height, width)."""
        patch = self.patch_size(transformer.config)
        frames, height, width = latent_shape
        grid = (height // patch[1], width // patch[2])
        return TokenLayout(frames // patch[0], grid, patch[0], (frames, height, width))


def _wan_input_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
    _, _, frames, height, width = (args[0] if args else kwargs["hidden_states"]).shape
    return frames, height, width


def _heads_times_size(config: Any) -> int:
    return int(config.num_attention_heads * config.attention_head_dim)


def _patch_size(config: Any) -> tuple[int, int, int]:
    frames, height, width = config.patch_size
    return frames, height, width


# Named functions, so that a model with hooks that hold its row can still be pickled.
_FAMILIES = (
    Family(
        name="wan",
        transformer="WanTransformer3DModel",
        vae="AutoencoderKLWan",
        block_lists=("blocks",),
        after_blocks=("norm_out", "proj_out", "scale_shift_table"),
        hidden_size=_heads_times_size,
        input_shape=_wan_input_shape,
        patch_size=_patch_size,
        decode=decode_wan,
    ),
)


def supported_families() -> tuple[str, ...]:
    """Names of the model families that CREPA can be attached to."""
    return tuple(family.name for family in _FAMILIES)


def family_of(transformer: nn.Module) -> Family:
    """The family of a diffusers transformer, by its class or a base class of it.

    Raises:
        ValueError: for any other class; the message lists the supported ones.
    """
    # By name, so that diffusers is imported by those who have a model from it and by nobody else.
    names = {base.__name__ for base in type(transformer).__mro__}
    for family in _FAMILIES:
        if family.transformer in names:
            return family
    known = ", ".join(f"{family.name} ({family.transformer})" for family in _FAMILIES)
    raise ValueError(f"{type(transformer).__name__} is not a supported transformer; supported families: {known}")

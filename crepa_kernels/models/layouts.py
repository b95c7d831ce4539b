"""How one forward's video or image tokens lie: frames, grid and order, from the arguments of its forward."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist

from ..grid import Grid, as_sizes
from ..transfer import ContextShard
from .image_ids import IMAGE_IDS, ReadIds

# What a forward was called with, by the names of its parameters; of a tensor its shape, of image ids what they say.
Arguments = Mapping[str, Any]

# The shape of the captured block's output, beside these.
OUTPUT = "the block's output"

# Side of the squares in which Kandinsky's sparse attention takes a frame's tokens.
SPARSE_TILE = 8


@dataclass(frozen=True)
class TokenLayout:
    """How one forward's video tokens lie: ``frames`` x ``grid`` in raster order. An image is a clip of one frame.

    Attributes:
        frames: T, token frames of the clip (latent frames / ``patch``, rounded up).
        grid: (height, width) of one frame's tokens.
        patch: latent frames of one token frame, the transformer's temporal patch.
        latent_shape: (frames, height, width) of the latents; with ``patch`` > 1 the frames that pad their count at
            the front are in it until ``of_latents`` or ``of_pixels`` says how many there are without.
        tile: the tokens of a frame come by squares of ``tile`` x ``tile`` tokens, each in raster order, and the
            squares in raster order; 1: raster order of the whole frame.
        temporal_ratio: pixel frames of one latent frame, where the transformer's config says it.
        sequence: tokens of the forward's ``hidden_states``, where others than the image's own may be among them.
        start: place of the image's first token in that sequence.
        shard: of the tokens, those that blocks return on this rank; None: all.
    """

    frames: int
    grid: Grid
    patch: int
    latent_shape: tuple[int, int, int]
    tile: int = 1
    temporal_ratio: int | None = None
    sequence: int | None = None
    start: int = 0
    shard: ContextShard | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the clip."""
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def held(self) -> int:
        """Tokens of the clip that this rank has."""
        return self.tokens if self.shard is None else self.shard.stop - self.shard.start

    def over(self, group: dist.ProcessGroup) -> TokenLayout:
        """The layout of a forward whose tokens lie on the ranks of ``group``, each of which has a run of them.

        Raises:
            ValueError: where a run of the model's sequence is no run of the clip's raster order.
        """
        if self.tile > 1 or self.sequence not in (None, self.tokens):
            what = "tokens come by tiles" if self.tile > 1 else "reference images are among the tokens"
            raise ValueError(f"context parallelism is not supported where {what}: a rank has no run of the clip's own")
        return replace(self, shard=ContextShard.of(group, self.tokens))

    @property
    def front_padding(self) -> int:
        """Latent frames that the first token frame lacks of ``patch``."""
        return self.frames * self.patch - self.latent_shape[0]

    def own(self, output: torch.Tensor) -> torch.Tensor:
        """The image's own tokens (B, ``held``, D) of a block's output, without text in front and references.

        Those of a UNet's map (B, D, height, width) are its places.
        """
        if output.dim() == 4:
            output = output.flatten(2).transpose(1, 2)
        if self.sequence is None or output.dim() != 3:
            return output
        sequence = self.sequence if self.shard is None else self.held
        start = output.shape[1] - sequence + self.start
        return output[:, start : start + self.held]

    def by_frame(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, ``tokens``, D) in the transformer's order -> (B, T, P, D), each frame in raster order.

        Those of a ``shard`` stay as they are.
        """
        if self.shard is not None:
            return tokens
        frames = tokens.unflatten(1, (self.frames, -1))
        if self.tile == 1:
            return frames
        rows, columns = (size // self.tile for size in self.grid)
        tiles = frames.unflatten(2, (rows, columns, self.tile, self.tile))
        return tiles.transpose(3, 4).flatten(2, 5)

    def of_latents(self, latent_frames: int) -> TokenLayout:
        """The layout of a clip that had ``latent_frames`` before they were padded at the front; else this one."""
        if not 0 <= self.frames * self.patch - latent_frames < self.patch:
            return self
        return replace(self, latent_shape=(latent_frames, *self.latent_shape[1:]))

    def of_pixels(self, pixel_frames: int) -> TokenLayout:
        """The layout of a clip of ``pixel_frames``, without latents that pad its front; else this one."""
        if self.patch == 1 or self.temporal_ratio is None:
            return self
        return self.of_latents(1 + -(-(pixel_frames - 1) // self.temporal_ratio))


# The layout of a forward, from the transformer's config and the arguments.
LayoutRule = Callable[[Any, Arguments], TokenLayout]


def patch_size(config: Any) -> tuple[int, int, int]:
    """(frames, height, width) of one token in latents, from a transformer's config."""
    if isinstance(config.patch_size, int):
        return getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size
    frames, height, width = config.patch_size
    return frames, height, width


def raster_layout(config: Any, latent_shape: Sequence[int]) -> TokenLayout:
    """The layout of latents (frames, height, width), in raster order."""
    frames, height, width = latent_shape
    patch = patch_size(config)
    grid = (height // patch[1], width // patch[2])
    ratio = getattr(config, "temporal_compression_ratio", None)
    return TokenLayout(-(-frames // patch[0]), grid, patch[0], (frames, height, width), temporal_ratio=ratio)


def _sizes(arguments: Arguments, axes: str) -> tuple[int, int, int]:
    """Latent frames (1 of an image), height and width of ``hidden_states``; a letter for each of its axes."""
    shape = arguments["hidden_states"]
    if not isinstance(shape, tuple) or len(shape) != len(axes):
        raise ValueError(
            f"the transformer's forward was called without hidden_states ({', '.join(axes)}), so CREPA does not know "
            f"where its tokens lie: {'none were given' if shape is None else f'got {shape}'}"
        )
    frames, height, width = (shape[axes.index(axis)] if axis in axes else 1 for axis in "THW")
    return frames, height, width


def channels_second(config: Any, arguments: Arguments) -> TokenLayout:
    """Of latents (B, C, T, H, W)."""
    return raster_layout(config, _sizes(arguments, "BCTHW"))


def channels_third(config: Any, arguments: Arguments) -> TokenLayout:
    """Of latents (B, T, C, H, W)."""
    return raster_layout(config, _sizes(arguments, "BTCHW"))


def channels_last(config: Any, arguments: Arguments) -> TokenLayout:
    """Of latents (B, T, H, W, C), whose tokens come by tiles where sparse attention is asked for."""
    layout = raster_layout(config, _sizes(arguments, "BTHWC"))
    sparse = arguments["sparse_params"]
    return replace(layout, tile=SPARSE_TILE) if sparse is not None and sparse["to_fractal"] else layout


def packed(config: Any, arguments: Arguments) -> TokenLayout:
    """Of tokens (B, T x H x W, C), whose ``num_frames``, ``height`` and ``width`` are arguments of their own.

    Raises:
        ValueError: when one of them was not given as an integer.
    """
    names = ("num_frames", "height", "width")
    missing = [name for name in names if not isinstance(arguments[name], SupportsIndex)]
    if missing:
        raise ValueError(
            f"the transformer's forward was called without an integer {', '.join(missing)}: CREPA needs num_frames=, "
            "height= and width= (of the latents) to know which token of a packed clip lies where"
        )
    frames, height, width = (operator.index(arguments[name]) for name in names)
    patch = patch_size(config)
    latent_shape = (frames * patch[0], height * patch[1], width * patch[2])
    return TokenLayout(frames, (height, width), patch[0], latent_shape)


def image(config: Any, arguments: Arguments) -> TokenLayout:
    """Of an image's latents (B, C, H, W)."""
    return raster_layout(config, _sizes(arguments, "BCHW"))


# Latents on a side of a token, where packing puts squares of them into its channels before the forward.
PACKED = 2


def image_by_ids(config: Any, arguments: Arguments) -> TokenLayout:
    """Of an image's tokens (B, N, C), packed, whose ``img_ids`` say where each lies."""
    return _by_ids(arguments, PACKED)


def patches_by_ids(config: Any, arguments: Arguments) -> TokenLayout:
    """Of an image's latents (B, C, H, W), flattened to tokens (B, H x W, C), whose ``img_ids`` say where each lies."""
    return _by_ids(arguments, 1)


def _by_ids(arguments: Arguments, side: int) -> TokenLayout:
    # Where references are encoded for a cache they stand before the image, else after it.
    first = arguments.get("num_ref_tokens") if arguments.get("kv_cache_mode") == "extract" else 0
    ids = arguments[IMAGE_IDS]
    if not isinstance(ids, ReadIds):
        raise ValueError(
            f"the transformer's forward was called without {IMAGE_IDS}: CREPA does not know where its tokens lie"
        )
    return _of_sequence(arguments, ids.grid(int(first or 0)), side, int(first or 0))


def image_by_shapes(config: Any, arguments: Arguments) -> TokenLayout:
    """Of an image's tokens (B, N, C), packed, whose ``img_shapes`` begin with its own (1, height, width) in tokens.

    Raises:
        ValueError: without them, for images of several sizes in a batch, for layers of an image, or for a clip.
    """
    shapes = arguments["img_shapes"]
    if not shapes or getattr(config, "use_layer3d_rope", False):
        what = "images in layers are not supported" if shapes else "without them CREPA does not know where tokens lie"
        raise ValueError(f"img_shapes = {shapes}: {what}")
    # As the model reads them: a list for each sample, of the image and its references.
    own = {tuple(each[0] if isinstance(each, list) else each) for each in shapes}
    if len(own) != 1 or len(shape := next(iter(own))) != 3 or shape[0] != 1:
        raise ValueError(
            f"img_shapes = {shapes}: every sample must begin with its image's (1, height, width) in tokens, the same "
            "for the whole batch"
        )
    return _of_sequence(arguments, (int(shape[1]), int(shape[2])), PACKED)


def _of_sequence(arguments: Arguments, grid: Grid, side: int, start: int = 0) -> TokenLayout:
    shape = arguments["hidden_states"]
    if not isinstance(shape, tuple) or len(shape) != 3 or shape[1] < start + grid[0] * grid[1]:
        raise ValueError(
            f"the transformer's forward was called with hidden_states of shape {shape}, expected (B, N, C) with at "
            f"least the {grid[0]} x {grid[1]} tokens of the image"
        )
    latent_shape = (1, side * grid[0], side * grid[1])
    return TokenLayout(1, grid, 1, latent_shape, sequence=shape[1], start=start)


def feature_map(config: Any, arguments: Arguments) -> TokenLayout:
    """Of a UNet's map (B, D, h, w) at some depth, which has a grid of its own, for latents (B, C, H, W)."""
    *_, height, width = arguments[OUTPUT]
    *_, rows, columns = arguments["sample"]
    return TokenLayout(1, (height, width), 1, (1, rows, columns))


def given(rule: Callable[[Arguments], TokenLayout | Sequence[int]], config: Any, arguments: Arguments) -> TokenLayout:
    """As a caller's rule says, (frames, height, width) in tokens or a layout of its own."""
    said = rule(arguments)
    if isinstance(said, TokenLayout):
        return said
    frames, height, width = as_sizes(said, "what layout returns, where it is no TokenLayout,")
    return TokenLayout(frames, (height, width), 1, (frames, height, width))


def tokens_of_any(output: Any) -> torch.Tensor:
    """(B, tokens, D) of a block that returns tokens on any axes between batch and width, or first in a tuple."""
    tokens: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return tokens.flatten(1, -2) if tokens.dim() > 3 else tokens


def whole_output(output: Any) -> torch.Tensor:
    """Video or image tokens of a block that returns them alone, or after the text in one tensor."""
    return output


def first_of_pair(output: Any) -> torch.Tensor:
    """Video tokens of a block that returns (video, text)."""
    return output[0]


def second_of_pair(output: Any) -> torch.Tensor:
    """Image tokens of a block that returns (text, image); of one that returns one tensor, all of it."""
    return output[1] if isinstance(output, tuple) else output

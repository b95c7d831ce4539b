"""Model families: one row for each diffusers transformer class that CREPA can be attached to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from . import layouts
from .image_ids import IMAGE_IDS
from .layouts import Arguments, LayoutRule, TokenLayout

_AFTER_BLOCKS = ("norm_out", "proj_out", "scale_shift_table")


def _heads_times_size(config: Any) -> int:
    return int(config.num_attention_heads * config.attention_head_dim)


def _never(config: Any) -> bool:
    return False


@dataclass(frozen=True)
class Family:
    """What CREPA must know of a transformer class; what most families have is the default.

    Attributes:
        name: the family's name in tables and messages.
        transformer: the diffusers class.
        vaes: the diffusers classes of its VAE that can be decoded, the usual one first.
        block_lists: attributes that hold the blocks, in the order in which they run; dotted for those of a part.
        after_blocks: top-level attributes whose weights come into play after the last block.
        block_index: the recommended block to align.
        hidden_size: D, from the transformer's config.
        arguments: parameters of the transformer's forward that say how its tokens lie; None for all.
        token_layout: the layout of a forward, from the transformer's config and these arguments.
        video_tokens: (B, tokens, D) from what a block returns; of an image with text in front where both are in one.
        temporal_factors: pixel frames of a latent frame after the first, for each of its VAEs.
        first_frame_is_clean: whether image-to-video training of a transformer with this config gives it the first
            frame's own tokens without noise (True), or the image by other ways (False).
        any_pixel_frames: whether T latent frames are made of (T - 1)c + 1 to Tc pixel frames; else of the first number
            alone.
        images: whether it makes images, which are clips of one frame here.
        knows_order: whether the blocks are all that run, in their order: what comes after the aligned one is known.
        model: what the class is called in messages.
    """

    name: str
    transformer: str
    vaes: tuple[str, ...]
    block_lists: tuple[str, ...]
    first_frame_is_clean: Callable[[Any], bool] = _never
    after_blocks: tuple[str, ...] = _AFTER_BLOCKS
    block_index: int = 8
    hidden_size: Callable[[Any], int] = _heads_times_size
    arguments: tuple[str, ...] | None = ("hidden_states",)
    token_layout: LayoutRule = layouts.channels_second
    video_tokens: Callable[[Any], torch.Tensor] = layouts.whole_output
    temporal_factors: tuple[int, ...] = (4,)
    any_pixel_frames: bool = False
    images: bool = False
    model: str = "transformer"
    knows_order: bool = True

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The transformer's blocks in the order in which they run."""
        found = [attrgetter(name)(transformer) for name in self.block_lists]
        return [block for each in found for block in (each if isinstance(each, nn.ModuleList) else [each])]

    def called(self, index: int) -> str:
        """What block ``index`` is called in messages."""
        return f"block {index}" if self.model == "transformer" else self.block_lists[index]

    def block(self, transformer: nn.Module, index: int, key: str) -> nn.Module:
        """Block ``index``; a ValueError names ``key`` and the valid range."""
        blocks = self.blocks(transformer)
        if not 0 <= index < len(blocks):
            raise ValueError(
                f"{key} = {index}: this {self.transformer} has {len(blocks)} blocks, valid are 0 to {len(blocks) - 1}"
            )
        return blocks[index]

    def pixel_frames(self, latent_frames: int, factor: int) -> range:
        """Numbers of pixel frames that are ``latent_frames``, ``factor`` to each after the first."""
        first = 1 + factor * (latent_frames - 1)
        return range(first, factor * latent_frames + 1 if self.any_pixel_frames else first + 1)

    def forward_parameters(self, transformer: nn.Module) -> tuple[str, ...]:
        """Names of the parameters of the diffusers class's forward, whatever wraps or overrides it here."""
        stock: Any = next(base for base in type(transformer).__mro__ if base.__name__ == self.transformer)
        return tuple(inspect.signature(stock.forward).parameters)[1:]


# What `register_family` was given, by name.
REGISTERED: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Makes a transformer class known in this process, as if it were a row of the table: ``CrepaRegularizer`` then
    takes it without ``block``, ``hidden_size`` and ``layout``. A second one of the name takes the place of the first.

    Raises:
        ValueError: for what is no ``Family``, the name or the class of a row of the table, or no blocks.
    """
    if not isinstance(family, Family):
        raise ValueError(f"register_family takes a Family, got {type(family).__name__}")
    for row in (*FAMILIES, UNET):
        if family.name == row.name or family.transformer == row.transformer:
            raise ValueError(f"{family.name} ({family.transformer}) is {row.name} ({row.transformer}), which is known")
    if not family.name or not family.transformer or not family.block_lists:
        raise ValueError(f"a family needs a name, a transformer class and block_lists, got {family}")
    REGISTERED[family.name] = family


def family_for(
    transformer: nn.Module,
    block: nn.Module | str,
    hidden_size: int,
    layout: Callable[[Arguments], TokenLayout | Sequence[int]],
) -> Family:
    """The row of a transformer that is in no table, for this one module; see ``CrepaRegularizer``.

    Raises:
        ValueError: for a block that is not in it, a width that is no positive integer, or a layout that cannot be
            called with the arguments.
    """
    if not isinstance(transformer, nn.Module):
        raise ValueError(f"block= is of a module, got {type(transformer).__name__}")
    if isinstance(block, nn.Module):
        name = next((name for name, each in transformer.named_modules() if each is block), None)
        if name is None or name == "":
            raise ValueError(f"block: this {type(block).__name__} is no part of the {type(transformer).__name__}")
    else:
        name = str(block)
        try:
            transformer.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"block = {name!r}: {error}") from error
    if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 1:
        raise ValueError(
            f"hidden_size must be the width D of the block's tokens, a positive integer, got {hidden_size!r}"
        )
    if not callable(layout):
        raise ValueError(
            "layout must be a callable from the forward's arguments (tensors as their shapes) to (frames, height, "
            f"width) in tokens, got {layout!r}"
        )
    blocks = transformer.get_submodule(name)
    several = isinstance(blocks, nn.ModuleList)
    return Family(
        name=type(transformer).__name__,
        transformer=type(transformer).__name__,
        vaes=(),
        block_lists=(name,),
        after_blocks=(),
        # About a third of the way, as the rows of the table are.
        block_index=len(blocks) // 3 if isinstance(blocks, nn.ModuleList) else 0,
        hidden_size=partial(_given, hidden_size),
        arguments=None,
        token_layout=partial(layouts.given, layout),
        video_tokens=layouts.tokens_of_any,
        temporal_factors=(),
        knows_order=several,
    )


def _given(value: int, config: Any) -> int:
    return value


def known_families() -> tuple[Family, ...]:
    """The table's rows, and those that were registered."""
    return (*FAMILIES, *REGISTERED.values())


def _no_extra_channels(config: Any) -> bool:
    # Wan 2.2 5B. The others have the image in channels beside the noisy latents'.
    return bool(config.in_channels == config.out_channels)


def _replaces_tokens(config: Any) -> bool:
    return bool(config.image_condition_type == "token_replace")


def _always(config: Any) -> bool:
    return True


def _last_width(config: Any) -> int:
    return int(config.block_out_channels[-1])


_BY_IDS = ("hidden_states", IMAGE_IDS)
# What most families of images have.
_image = partial(
    Family,
    block_lists=("transformer_blocks",),
    after_blocks=("norm_out", "proj_out"),
    token_layout=layouts.image,
    video_tokens=layouts.second_of_pair,
    temporal_factors=(1,),
    images=True,
)

# Named functions, so that a model with hooks that hold its row can still be pickled.
FAMILIES = (
    Family(
        name="wan",
        transformer="WanTransformer3DModel",
        vaes=("AutoencoderKLWan",),
        block_lists=("blocks",),
        first_frame_is_clean=_no_extra_channels,
    ),
    Family(
        name="ltxvideo",
        transformer="LTXVideoTransformer3DModel",
        vaes=("AutoencoderKLLTXVideo",),
        block_lists=("transformer_blocks",),
        arguments=("num_frames", "height", "width"),
        token_layout=layouts.packed,
        temporal_factors=(8,),
        first_frame_is_clean=_always,
    ),
    Family(
        name="sanavideo",
        transformer="SanaVideoTransformer3DModel",
        vaes=("AutoencoderKLWan", "AutoencoderKLLTX2Video"),
        block_lists=("transformer_blocks",),
        block_index=10,
        temporal_factors=(4, 8),
        first_frame_is_clean=_always,
    ),
    Family(
        name="kandinsky5_video",
        transformer="Kandinsky5Transformer3DModel",
        vaes=("AutoencoderKLHunyuanVideo",),
        block_lists=("visual_transformer_blocks",),
        after_blocks=("out_layer",),
        hidden_size=attrgetter("model_dim"),
        arguments=("hidden_states", "sparse_params"),
        token_layout=layouts.channels_last,
        # Its extra channels say which frame is clean and hold no image.
        first_frame_is_clean=_always,
    ),
    Family(
        name="cogvideox",
        transformer="CogVideoXTransformer3DModel",
        vaes=("AutoencoderKLCogVideoX",),
        block_lists=("transformer_blocks",),
        after_blocks=("norm_final", "norm_out", "proj_out"),
        token_layout=layouts.channels_third,
        video_tokens=layouts.first_of_pair,
        first_frame_is_clean=_never,
        any_pixel_frames=True,
    ),
    Family(
        name="hunyuan_video",
        transformer="HunyuanVideoTransformer3DModel",
        vaes=("AutoencoderKLHunyuanVideo",),
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        after_blocks=("norm_out", "proj_out"),
        block_index=10,
        video_tokens=layouts.first_of_pair,
        first_frame_is_clean=_replaces_tokens,
    ),
    _image(
        name="flux",
        transformer="FluxTransformer2DModel",
        vaes=("AutoencoderKL",),
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        arguments=_BY_IDS,
        token_layout=layouts.image_by_ids,
    ),
    _image(
        name="flux2",
        transformer="Flux2Transformer2DModel",
        vaes=("AutoencoderKLFlux2",),
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        arguments=(*_BY_IDS, "kv_cache_mode", "num_ref_tokens"),
        token_layout=layouts.patches_by_ids,
    ),
    _image(
        name="sd3",
        transformer="SD3Transformer2DModel",
        vaes=("AutoencoderKL",),
    ),
    _image(
        name="qwen_image",
        transformer="QwenImageTransformer2DModel",
        vaes=("AutoencoderKLQwenImage",),
        arguments=("hidden_states", "img_shapes"),
        token_layout=layouts.image_by_shapes,
        temporal_factors=(4,),
    ),
    _image(
        name="chroma",
        transformer="ChromaTransformer2DModel",
        vaes=("AutoencoderKL",),
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        arguments=_BY_IDS,
        token_layout=layouts.image_by_ids,
    ),
    _image(
        name="sana",
        transformer="SanaTransformer2DModel",
        vaes=("AutoencoderDC",),
        after_blocks=_AFTER_BLOCKS,
        block_index=10,
    ),
    _image(
        name="pixart",
        transformer="PixArtTransformer2DModel",
        vaes=("AutoencoderKL",),
        after_blocks=_AFTER_BLOCKS,
        block_index=10,
    ),
)

# Of U-REPA; no transformer.
UNET = Family(
    name="unet",
    transformer="UNet2DConditionModel",
    vaes=("AutoencoderKL",),
    block_lists=("mid_block",),
    after_blocks=("up_blocks", "conv_norm_out", "conv_out"),
    block_index=0,
    hidden_size=_last_width,
    arguments=("sample",),
    token_layout=layouts.feature_map,
    temporal_factors=(1,),
    images=True,
    model="unet",
)


def supported_families() -> tuple[str, ...]:
    """Names of the model families that CREPA can be attached to."""
    return tuple(family.name for family in known_families())


def family_of(transformer: nn.Module) -> Family:
    """The family of a diffusers transformer, by its class or a base class of it.

    Raises:
        ValueError: for any other class; the message lists the supported ones.
    """
    found = _among((*known_families(), UNET), transformer, "transformer")
    if found is UNET:
        raise ValueError(
            f"{type(transformer).__name__} is a UNet, and CREPA and LayerSync are for transformers: "
            "UNets have U-REPA, UrepaRegularizer with urepa_enabled"
        )
    if found is not None:
        return found
    known = ", ".join(f"{family.name} ({family.transformer})" for family in known_families())
    raise ValueError(
        f"{type(transformer).__name__} is not a supported transformer; supported families: {known}. "
        "Of another class give block=, hidden_size= and layout=, or register_family() it"
    )


def unet_of(unet: nn.Module) -> Family:
    """The row of a diffusers UNet, by its class or a base class of it.

    Raises:
        ValueError: for any other class, or a UNet without a block in the middle.
    """
    found = _among((*known_families(), UNET), unet, "unet")
    if found is not None and found is not UNET:
        raise ValueError(
            f"{type(unet).__name__} is a transformer and no UNet: what U-REPA is to those is CREPA to transformers, "
            "CrepaRegularizer with crepa_enabled"
        )
    if found is None:
        raise ValueError(
            f"{type(unet).__name__} is no {UNET.transformer}, which is what U-REPA attaches to; CREPA attaches to "
            "transformers (CrepaRegularizer)"
        )
    if getattr(unet, "mid_block", None) is None:
        raise ValueError(f"this {UNET.transformer} has no mid_block (mid_block_type = None), which U-REPA aligns")
    return UNET


def _among(families: Sequence[Family], model: nn.Module, kind: str) -> Family | None:
    """The family of the model's class or a base class of it; a ValueError for what wraps a model."""
    # By name, so that diffusers is imported by those who have a model from it and by nobody else.
    names = {base.__name__ for base in type(model).__mro__}
    for family in families:
        if family.transformer in names:
            return family
    # DDP and DataParallel, torch.compile's module.
    wraps = any(isinstance(getattr(model, name, None), nn.Module) for name in ("module", "_orig_mod"))
    if wraps or "PeftModel" in names:
        raise ValueError(
            f"{type(model).__name__} is no {kind} but wraps one: unwrap it "
            f"(accelerator.unwrap_model({kind}), .module of DDP, get_base_model() of a PeftModel)"
        )
    return None


def image_to_video_mask(transformer: nn.Module, batch: int, frames: int) -> torch.Tensor | None:
    """The ``frame_mask`` (B, T) of image-to-video training: False at frame 0 where its tokens are clean, else None.

    Clean tokens hold the image itself, which the student has not to find: aligning them teaches nothing. Where the
    image comes in channels beside the noisy latents, frame 0 is noisy like every other one. None for families of
    images, too.

    Args:
        transformer: of a supported family, not wrapped.
        batch, frames: B and T, token frames of the forward.

    Raises:
        ValueError: for a transformer of no supported family, or one that is wrapped.
    """
    if not family_of(transformer).first_frame_is_clean(transformer.config):
        return None
    mask = torch.ones(batch, frames, dtype=torch.bool)
    mask[:, 0] = False
    return mask

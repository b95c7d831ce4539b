"""Tiny real models of every family, the calls that their pipelines make, their VAEs, and CREPA on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import tiny_images
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SanaVideoTransformer3DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from tiny import CHANNELS, TEXT_DIM, WAN, clip_pixels, reloaded, tiny_dinov2, tiny_vae

from crepa_kernels import CrepaRegularizer
from crepa_kernels.models import families

WIDTH = 32  # of the hidden states
TEXT_TOKENS = 5
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": CHANNELS, "out_channels": CHANNELS}

LTX = {**HEADS, "cross_attention_dim": WIDTH, "caption_channels": TEXT_DIM, "num_layers": 3}
SANA = {
    **HEADS,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": WIDTH,
    "caption_channels": TEXT_DIM,
    "rope_max_seq_len": 64,
}
KANDINSKY = {
    "in_visual_dim": CHANNELS,
    "out_visual_dim": CHANNELS,
    "in_text_dim": TEXT_DIM,
    "in_text_dim2": TEXT_DIM,
    "time_dim": 16,
    "model_dim": WIDTH,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (4, 6, 6),
}
SPARSE = {
    "attention_type": "nabla",
    "attention_P": 0.9,
    "attention_wT": 3,
    "attention_wH": 1,
    "attention_wW": 1,
    "attention_add_sta": True,
    "attention_method": "topcdf",
}
COGVIDEOX = {
    **HEADS,
    "time_embed_dim": 16,
    "text_embed_dim": TEXT_DIM,
    "max_text_seq_length": TEXT_TOKENS,
    "num_layers": 3,
    "sample_width": 6,
    "sample_height": 4,
    "sample_frames": 9,
}
HUNYUAN = {
    **HEADS,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "guidance_embeds": False,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": TEXT_DIM,
    "rope_axes_dim": (4, 6, 6),
}


def _text(latents: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    batch = len(latents)
    return {
        "timestep": torch.randint(1, 1000, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator),
    }


def _plain(latents: torch.Tensor, generator: torch.Generator, model: Any) -> dict[str, Any]:
    return {"hidden_states": latents, **_text(latents, generator)}


def _ltx(latents: torch.Tensor, generator: torch.Generator, model: Any) -> dict[str, Any]:
    frames, height, width = latents.shape[2:]
    return {
        "hidden_states": LTXPipeline._pack_latents(latents),
        **_text(latents, generator),
        "encoder_attention_mask": torch.ones(len(latents), TEXT_TOKENS),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _kandinsky(latents: torch.Tensor, generator: torch.Generator, model: Any) -> dict[str, Any]:
    frames, height, width = latents.shape[2:]
    states = latents.permute(0, 2, 3, 4, 1).contiguous()
    pipeline = Kandinsky5T2VPipeline(model, None, None, None, None, None, None)
    return {
        "hidden_states": states,
        **_text(latents, generator),
        "pooled_projections": torch.randn(len(latents), TEXT_DIM, generator=generator),
        "visual_rope_pos": [torch.arange(frames), torch.arange(height // 2), torch.arange(width // 2)],
        "text_rope_pos": torch.arange(TEXT_TOKENS),
        "sparse_params": pipeline.get_sparse_params(states, states.device),
    }


def _cogvideox(latents: torch.Tensor, generator: torch.Generator, model: Any) -> dict[str, Any]:
    return {"hidden_states": latents.transpose(1, 2), **_text(latents, generator)}


def _hunyuan(latents: torch.Tensor, generator: torch.Generator, model: Any) -> dict[str, Any]:
    mask = torch.ones(len(latents), TEXT_TOKENS, dtype=torch.int64)
    mask[:, -1] = 0
    return {
        "hidden_states": latents,
        **_text(latents, generator),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(len(latents), TEXT_DIM, generator=generator),
    }


def _first_or_all(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class TinyFamily:
    """One family's transformer, or one variant of it.

    Attributes:
        name: the family's.
        model: the diffusers class.
        config: its tiny settings.
        call: ``(latents (B, C, T, H, W), generator, model) -> keyword arguments`` of the transformer's forward.
        blocks: paths of the blocks in the model, in the order in which they run.
        embedding: the path of what turns a patch of latents into a token.
        query: the end of the path of the attention's query projection in a block.
        patch: (frames, height, width) of a token in latents.
        channels_first: whether the embedding's weights list channels before places.
        latents: (T, H, W) that ``inputs`` uses.
        tokens: (B, tokens, D) of the video or image in what a block returns.
        single_query: ``query`` of blocks for one stream, where it has another name.
    """

    name: str
    model: type
    config: Mapping[str, Any]
    call: Callable[..., dict[str, Any]]
    blocks: tuple[str, ...]
    embedding: str = "patch_embedding"
    query: str = "attn1.to_q"
    patch: tuple[int, int, int] = (1, 2, 2)
    latents: tuple[int, int, int] = (3, 4, 6)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    channels_first: bool = True
    tokens: Callable[[Any], torch.Tensor] = _first_or_all
    single_query: str | None = None

    @property
    def frames(self) -> int:
        return self.latents[0] // self.patch[0]

    @property
    def grid(self) -> tuple[int, int]:
        return self.latents[1] // self.patch[1], self.latents[2] // self.patch[2]

    def query_of(self, block: str) -> str:
        """The path of the query projection in the block at a path."""
        single = self.single_query if block.startswith("single") else None
        return f"{block}.{single or self.query}"

    @property
    def masked(self) -> int:
        """Frames that tests mask: the first, where it is not the only one."""
        return min(1, self.frames - 1)

    def make(self, **overrides: Any) -> Any:
        """The transformer, in train mode, saved to the hub's layout and loaded back."""
        settings = {**self.config, **self.overrides, **overrides}
        key = f"{self.model.__name__} {settings}"
        return reloaded(partial(self._built, settings), 0, None, key).train()

    def _built(self, settings: Mapping[str, Any]) -> Any:
        model = self.model(**settings)
        if isinstance(model, Kandinsky5Transformer3DModel):
            # Zero in a new model, whose blocks then do nothing.
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "modulation" in name:
                        parameter.normal_(std=0.2)
        return model

    def inputs(self, batch: int = 1, *, seed: int = 3, model: Any = None) -> dict[str, Any]:
        """Arguments of one forward on random latents."""
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(batch, CHANNELS, *self.latents, generator=generator)
        return self.call(latents, generator, self.make() if model is None else model)


def _listed(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}.{index}" for index in range(count))


_BLOCKS = _listed("transformer_blocks", 3)
_TWO_LISTS = (*_listed("transformer_blocks", 2), *_listed("single_transformer_blocks", 2))
# What most families of images have; an image is a clip of one frame.
_image = partial(TinyFamily, query="attn.to_q", latents=(1, 4, 6), tokens=tiny_images.image_tokens)

FAMILIES = {
    "wan": TinyFamily("wan", WanTransformer3DModel, WAN, _plain, _listed("blocks", 3)),
    "ltxvideo": TinyFamily("ltxvideo", LTXVideoTransformer3DModel, LTX, _ltx, _BLOCKS, "proj_in", patch=(1, 1, 1)),
    "sanavideo": TinyFamily("sanavideo", SanaVideoTransformer3DModel, SANA, _plain, _BLOCKS),
    "kandinsky5_video": TinyFamily(
        "kandinsky5_video",
        Kandinsky5Transformer3DModel,
        KANDINSKY,
        _kandinsky,
        _listed("visual_transformer_blocks", 3),
        "visual_embeddings.in_layer",
        "self_attention.to_query",
        channels_first=False,
    ),
    "cogvideox": TinyFamily(
        "cogvideox", CogVideoXTransformer3DModel, COGVIDEOX, _cogvideox, _BLOCKS, "patch_embed.proj"
    ),
    "cogvideox 1.5": TinyFamily(
        "cogvideox",
        CogVideoXTransformer3DModel,
        COGVIDEOX,
        _cogvideox,
        _BLOCKS,
        "patch_embed.proj",
        patch=(2, 2, 2),
        latents=(6, 4, 6),
        overrides={"patch_size_t": 2, "use_rotary_positional_embeddings": True},
    ),
    "hunyuan_video": TinyFamily(
        "hunyuan_video",
        HunyuanVideoTransformer3DModel,
        HUNYUAN,
        _hunyuan,
        _TWO_LISTS,
        "x_embedder.proj",
        "attn.to_q",
    ),
    "hunyuan_video token_replace": TinyFamily(
        "hunyuan_video",
        HunyuanVideoTransformer3DModel,
        HUNYUAN,
        _hunyuan,
        _TWO_LISTS,
        "x_embedder.proj",
        "attn.to_q",
        overrides={"image_condition_type": "token_replace"},
    ),
    "flux": _image("flux", FluxTransformer2DModel, tiny_images.FLUX, tiny_images.flux, _TWO_LISTS, "x_embedder"),
    "flux2": _image(
        "flux2",
        Flux2Transformer2DModel,
        tiny_images.FLUX2,
        tiny_images.flux2,
        _TWO_LISTS,
        "x_embedder",
        patch=(1, 1, 1),
        latents=(1, 2, 3),
        single_query="attn.to_qkv_mlp_proj",
    ),
    "sd3": _image("sd3", SD3Transformer2DModel, tiny_images.SD3, tiny_images.sd3, _BLOCKS, "pos_embed.proj"),
    "qwen_image": _image(
        "qwen_image", QwenImageTransformer2DModel, tiny_images.QWEN, tiny_images.qwen_image, _BLOCKS, "img_in"
    ),
    "chroma": _image(
        "chroma", ChromaTransformer2DModel, tiny_images.CHROMA, tiny_images.chroma, _TWO_LISTS, "x_embedder"
    ),
    "sana": _image(
        "sana",
        SanaTransformer2DModel,
        tiny_images.SANA,
        tiny_images.plain,
        _BLOCKS,
        "patch_embed.proj",
        query="attn1.to_q",
        patch=(1, 1, 1),
        latents=(1, 2, 3),
        tokens=_first_or_all,
    ),
    "pixart": _image(
        "pixart",
        PixArtTransformer2DModel,
        tiny_images.PIXART,
        tiny_images.plain,
        _BLOCKS,
        "pos_embed.proj",
        query="attn1.to_q",
        tokens=_first_or_all,
    ),
}


def on_grid(name: str, grid: tuple[int, int]) -> TinyFamily:
    """A family of images whose ``inputs`` are of a grid of tokens."""
    tiny = FAMILIES[name]
    return replace(tiny, latents=(1, grid[0] * tiny.patch[1], grid[1] * tiny.patch[2]))


# Flex attention has no backward on a CPU, so this one only runs forward there.
SPARSE_KANDINSKY = TinyFamily(
    "kandinsky5_video",
    Kandinsky5Transformer3DModel,
    KANDINSKY,
    _kandinsky,
    _listed("visual_transformer_blocks", 3),
    "visual_embeddings.in_layer",
    "self_attention.to_query",
    latents=(2, 16, 32),
    channels_first=False,
    overrides=SPARSE,
)

_SMALL = {"latent_channels": CHANNELS, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
LTX_VAE = {
    "latent_channels": CHANNELS,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
}
LTX2_VAE = {
    "latent_channels": CHANNELS,
    "block_out_channels": (8, 8, 8, 16),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}


def tiny_vaes(name: str, **overrides: Any) -> Any:
    """A family's usual VAE with 4 latent channels, in eval mode: ``name`` of the family, or "ltx2"."""
    usual = {row.name: row.vaes[0] for row in families.FAMILIES} | {"ltx2": "AutoencoderKLLTX2Video"}
    if usual[name] == "AutoencoderKLWan":
        return tiny_vae(**overrides)
    model, config = {
        **tiny_images.VAES,
        "AutoencoderKLLTXVideo": (AutoencoderKLLTXVideo, LTX_VAE),
        "AutoencoderKLLTX2Video": (AutoencoderKLLTX2Video, LTX2_VAE),
        "AutoencoderKLCogVideoX": (AutoencoderKLCogVideoX, _SMALL),
        "AutoencoderKLHunyuanVideo": (AutoencoderKLHunyuanVideo, _SMALL),
    }[usual[name]]
    if name == "pixart":
        overrides = {"shift_factor": None, **overrides}  # its pipeline knows none
    return reloaded(partial(_with_statistics, model, {**config, **overrides}), 1, None, f"{name} vae {overrides}")


def _with_statistics(model: Any, config: Mapping[str, Any]) -> Any:
    vae = model(**config)
    if "latents_mean" in dict(vae.named_buffers()):
        vae.latents_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5]))
        vae.latents_std.copy_(torch.tensor([1.5, 0.8, 2.0, 1.2]))
    if isinstance(vae, AutoencoderKLFlux2):
        vae.bn.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5]))
        vae.bn.running_var.copy_(torch.tensor([1.5, 0.8, 2.0, 1.2]))
    return vae


def crepa_on(transformer: Any, *, vae: Any = None, **settings: Any) -> CrepaRegularizer:
    """A regularizer of block 1 with a seeded projector and a DINOv2 teacher, or the one that ``settings`` name."""
    torch.manual_seed(0)
    config = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder_image_size": 70, **settings}
    encoder = None if "crepa_feature_source" in config else tiny_dinov2()
    return CrepaRegularizer(config, transformer, vae, encoder)


def pixels_of(tiny: TinyFamily, batch: int) -> torch.Tensor:
    """Random pixels of the clips that ``tiny.inputs`` are latents of, if each were 8 x 8 pixels."""
    frames, height, width = tiny.latents
    return clip_pixels(batch, 1 + (8 if tiny.name == "ltxvideo" else 4) * (frames - 1), 8 * height, 8 * width)


def by_frame(tokens: torch.Tensor, tiny: TinyFamily, tile: int = 1) -> torch.Tensor:
    """(B, tokens, D) in the transformer's order -> (B, T, P, D), token by token."""
    frames, (height, width) = tiny.frames, tiny.grid
    result = tokens.new_empty(len(tokens), frames, height * width, tokens.shape[-1])
    for frame in range(frames):
        for y in range(height):
            for x in range(width):
                square = (y // tile) * (width // tile) + x // tile
                place = square * tile * tile + (y % tile) * tile + x % tile
                result[:, frame, y * width + x] = tokens[:, frame * height * width + place]
    return result

"""A whole training step of each family: without CREPA, with it, and with the loss in eager PyTorch.

    python -m benches.step [--device cuda] [--family wan] [--out benches/results/step-cpu.json]

The step is the trainer's own: noise, a LoRA's forward, loss, backward, clipping, AdamW. The transformer has the shape
of a published config (``PUBLISHED``) with fewer blocks, ``--layers``, and on a CPU fewer attention heads, ``--heads``,
so that what CREPA adds, in ms, says more than its share of the step. *Live* encodes the clip's frames by DINOv2 in
every step, *cached* is given their features, *eager* too, with the backend ``"reference"``. All weights are random.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from crepa_trainer.data.dataset import Bucket
from crepa_trainer.data.sampler import MicroBatch, Position
from crepa_trainer.families import TrainingFamily
from crepa_trainer.families.folder import constructor_defaults
from crepa_trainer.settings import RunSettings
from crepa_trainer.state import TrainState, add_lora, parameter_groups
from crepa_trainer.step import training_step
from torch import nn

from benches.gpu.results import write_whole
from benches.measure import Call, interleaved_medians, keep_heap_warm, machine, peak_bytes, waiting
from benches.published import family_with
from crepa_kernels import CrepaConfig, CrepaRegularizer
from crepa_kernels.teachers.clips import ClipLengths, encode_clips
from crepa_kernels.teachers.encoding import FrameEncoder

# What differs from diffusers' defaults, which are a published config. Of these keys the number of heads is in some, and
# others are as wide as all heads together.
PUBLISHED: dict[str, dict[str, Any]] = {
    "wan": {"num_attention_heads": 12, "ffn_dim": 8960},  # 2.1 1.3B
    "ltxvideo": {},  # 2B
    "sanavideo": {},  # 2B
    "kandinsky5_video": {
        "in_visual_dim": 16, "out_visual_dim": 16, "visual_cond": True, "model_dim": 1792, "ff_dim": 7168,
        "num_text_blocks": 1,
    },  # Lite
    "cogvideox": {},  # 2B
    "hunyuan_video": {"num_refiner_layers": 1},
}  # fmt: skip
HEADS = ("num_attention_heads", "num_cross_attention_heads")
OF_ALL_HEADS = ("ffn_dim", "model_dim", "ff_dim")
KANDINSKYS_HEAD = 64  # its axes_dims together; its config counts no heads
CALLS = ("without", "cached", "live", "eager")
TEXT_TOKENS = 64
FRAME_MAP = "last"  # of a latent frame, the pixel frame that is encoded
ENCODERS = {"small": (384, 12, 6), "giant": (1536, 40, 24)}  # DINOv2's width, blocks and heads


@dataclass(frozen=True)
class Size:
    """What is measured: of the clip (pixels, pixel frames), the transformer and the encoder."""

    height: int
    width: int
    frames: int
    layers: int
    heads: float
    encoder: str
    image_size: int


ON_A_CPU = Size(192, 320, 9, 3, 0.25, "small", 224)
ON_A_GPU = Size(480, 832, 81, 6, 1.0, "giant", 518)


def transformer_config(family: type[TrainingFamily], size: Size) -> dict[str, Any]:
    """The published config with fewer blocks, and fewer heads of the same size."""
    config = {**constructor_defaults(family.transformer_class), **PUBLISHED[family.name]}
    config |= {key: size.layers if key == family.depth[0] else 1 for key in family.depth}
    if size.heads == 1:
        return config
    counts = {key: max(1, round(config[key] * size.heads)) for key in HEADS if key in config}
    for key in OF_ALL_HEADS:
        if key in config:
            config[key] = max(1, round(config[key] * size.heads / KANDINSKYS_HEAD)) * KANDINSKYS_HEAD
    if "cross_attention_dim" in config:  # as wide as the states
        config["cross_attention_dim"] = counts["num_attention_heads"] * config["attention_head_dim"]
    return config | counts


def family_of(name: str, size: Size) -> TrainingFamily:
    return family_with(name, transformer_config(TrainingFamily.known[name], size))


def texts(config: Mapping[str, Any], device: str) -> dict[str, torch.Tensor]:
    """Every family's text by the names that it may ask for, (1, L, d) and pooled (1, d)."""
    widths = ("caption_channels", "text_embed_dim", "in_text_dim", "text_dim")
    width = next(config[key] for key in widths if config.get(key))
    count = config.get("max_text_seq_length", TEXT_TOKENS)
    pooled = torch.randn(1, config.get("in_text_dim2") or config.get("pooled_projection_dim") or 1, device=device)
    return {
        "text": torch.randn(1, count, width, device=device),
        "text_mask": torch.ones(1, count, dtype=torch.bool, device=device),
        "pooled": pooled,
        "text_pooled": pooled,
    }


def encoder_of(size: Size) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    width, blocks, heads = ENCODERS[size.encoder]
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, patch_size=14, image_size=518,
        use_swiglu_ffn=size.encoder == "giant",
    )  # fmt: skip
    return Dinov2Model(config).requires_grad_(False).eval()


def steps_of(name: str, size: Size, device: str) -> dict[str, Call]:
    """A training step by the name of each call; each trains a transformer of its own with the same weights."""
    torch.manual_seed(0)
    family = family_of(name, size)
    bucket = Bucket(size.height, size.width, size.frames)
    frozen = torch.bfloat16 if device == "cuda" else torch.float32
    base = getattr(diffusers, family.transformer_class)(**family.configs["transformer"])
    base.requires_grad_(False).to(device).train()
    in_fp32 = base._keep_in_fp32_modules or ()
    for path, weights in base.named_parameters():
        if not set(in_fp32) & set(path.split(".")):
            weights.data = weights.data.to(frozen)
    encoder = encoder_of(size).to(device, frozen)
    pixels = torch.randint(0, 256, (1, size.frames, 3, size.height, size.width), dtype=torch.uint8, device=device)
    latents = torch.randn(1, *family.latent_shape(bucket), device=device)
    teacher = FrameEncoder(encoder, image_size=size.image_size)
    lengths = ClipLengths.of(None, 1, size.frames, family.layout(bucket))
    features, grid = encode_clips(teacher, pixels, lengths, FRAME_MAP, torch.device(device))
    cached = {"features": features, "feature_grid": grid}
    given: dict[str, dict[str, Any]] = {
        "without": {}, "cached": cached, "eager": cached, "live": {"pixels": pixels},
    }  # fmt: skip
    clips = {"latents": latents, **texts(family.configs["transformer"], device)}
    noise, time = torch.randn_like(latents), torch.full((1,), 0.5, device=device)
    return {
        call: _step(family, copy.deepcopy(base), encoder, call, MicroBatch(clips, given[call], noise, time), size)
        for call in CALLS
    }


def _step(family: Any, transformer: Any, encoder: nn.Module, call: str, batch: MicroBatch, size: Size) -> Call:
    torch.manual_seed(1)  # of LoRA and projector
    device = batch.noise.device.type
    settings = RunSettings(model=family.name, data=Path("data"), output=Path("output"), max_train_steps=10**6)
    add_lora(transformer, family, settings)
    crepa = None
    if call != "without":
        config = CrepaConfig(
            crepa_enabled=True,
            crepa_block_index=1,
            crepa_frame_map=FRAME_MAP,
            crepa_encoder_image_size=size.image_size,
            crepa_backend="reference" if call == "eager" else "auto",
        )
        crepa = CrepaRegularizer(config, transformer, encoder=encoder)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if device == "cuda" else "no")
    optimizer = torch.optim.AdamW(parameter_groups(transformer, 1e-4, 1e-4))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    state = TrainState(accelerator, transformer, crepa, optimizer, scheduler)
    count = itertools.count()
    return waiting(lambda: training_step(state, family, batch, Position(next(count), 0, 0)), device)


def measure(name: str, size: Size, device: str, rounds: int) -> dict[str, Any]:
    calls = steps_of(name, size, device)
    seconds = interleaved_medians(calls, rounds, warmup=1)
    family = family_of(name, size)
    layout = family.layout(Bucket(size.height, size.width, size.frames))
    return {
        "family": name,
        "hidden_size": family.hidden_size,
        "tokens": [layout.frames, *layout.grid],
        "median_ms": {call: 1e3 * value for call, value in seconds.items()},
        "peak_bytes": {call: peak_bytes(run, device) for call, run in calls.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.step", description="A training step of each family")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--family", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    kinds: dict[str, Callable[[str], Any]] = {"heads": float, "encoder": str}
    for field in Size.__dataclass_fields__:
        parser.add_argument(
            f"--{field.replace('_', '-')}", type=kinds.get(field, int), help=f"{getattr(ON_A_CPU, field)} on a CPU, "
            f"{getattr(ON_A_GPU, field)} on a GPU",
        )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    usual = ON_A_CPU if options.device == "cpu" else ON_A_GPU
    given = {name: getattr(options, name) for name in Size.__dataclass_fields__}
    size = Size(**{name: getattr(usual, name) if value is None else value for name, value in given.items()})
    keep_heap_warm()
    found = {**machine(options.device), **vars(size)}
    rows: list[dict[str, Any]] = []
    for name in options.family:
        row = measure(name, size, options.device, options.rounds)
        rows.append(row)
        print(f"{name}: " + ", ".join(f"{call} {value:.0f} ms" for call, value in row["median_ms"].items()), flush=True)
        if options.out:
            write_whole(options.out, json.dumps({**found, "families": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

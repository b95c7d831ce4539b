"""A LoRA on Wan (text to video) with CREPA: a loop of diffusers, peft and accelerate, CREPA's lines marked `# CREPA`.

    python examples/train_wan_lora.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --data videos --output lora --steps 1000

`--data` is a folder of videos, each with a caption beside it (`cat.mp4`, `cat.txt`), of which the first frames are
encoded once, before the transformer is loaded, and kept in memory. `--crepa_lambda 0.3` and so on set CREPA,
`--crepa_enabled false` trains without it. `accelerate launch` starts it on several cards.
"""

from __future__ import annotations

import argparse
import math
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.training_utils import EMAModel, cast_training_params, free_memory
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import ImageOps
from torch.utils.data import DataLoader, RandomSampler

from crepa_kernels import CrepaConfig, CrepaRegularizer  # CREPA

KINDS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
CREPA = CrepaConfig.preset("t2v", family="wan")  # CREPA: at the block recommended for Wan


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A LoRA on Wan, text to video, with CREPA.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Wan pipeline: a folder or hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder of videos with .txt captions")
    parser.add_argument("--output", required=True, type=Path, help="folder for LoRA, EMA, projector and checkpoints")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--accumulate", type=int, default=4, help="clips of an optimizer step")
    parser.add_argument("--size", type=int, nargs=3, default=(81, 480, 832), help="frames (4 n + 1), height, width")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--projector_lr", type=float, default=1e-4)  # CREPA
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--checkpoint_every", type=int, default=250, help="optimizer steps")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint of --output")
    parser.add_argument("--seed", type=int, default=0)
    CrepaConfig.add_arguments(parser, CREPA.to_dict())  # CREPA
    return parser.parse_args()


@torch.no_grad()
def encoded(pipeline: Any, file: Path, frames: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """Pixels (P, 3, H, W), latents (C, T, h, w) and text of a video's first frames, on the CPU."""
    with av.open(str(file)) as container:
        pictures = [frame.to_image() for frame in islice(container.decode(video=0), frames)]
    if len(pictures) < frames:
        raise SystemExit(f"{file} has {len(pictures)} frames, --size asks for {frames}")
    fitted = np.stack([np.array(ImageOps.fit(picture, (width, height))) for picture in pictures])
    pixels = torch.from_numpy(fitted).permute(0, 3, 1, 2)
    caption, vae = file.with_suffix(".txt").read_text(encoding="utf-8").strip(), pipeline.vae
    embeds, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
    video = pixels.transpose(0, 1)[None].to(vae.device, vae.dtype) / 127.5 - 1
    mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))
    latents = (vae.encode(video).latent_dist.sample().cpu() - mean) / std
    return {"latents": latents[0], "embeds": embeds[0].cpu(), "pixels": pixels}


def main() -> None:
    args = parse()
    config = CrepaConfig.from_args(args, CREPA, family="wan")  # CREPA: what is wrong is said before any work
    files = sorted(file for file in args.data.glob("*") if file.suffix.lower() in KINDS)
    if not files:
        raise SystemExit(f"{args.data} holds no videos ({', '.join(KINDS)})")
    dtype, precision = (torch.bfloat16, "bf16") if torch.cuda.is_available() else (torch.float32, "no")
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=args.accumulate)
    set_seed(args.seed, device_specific=True)

    types = {"default": dtype, "vae": torch.float32}
    pipeline = WanPipeline.from_pretrained(args.model, transformer=None, torch_dtype=types).to(accelerator.device)
    items = [encoded(pipeline, file, *args.size) for file in files]
    shift = pipeline.scheduler.config.get("flow_shift") or pipeline.scheduler.config.get("shift", 1.0)
    del pipeline
    free_memory()
    transformer = WanTransformer3DModel.from_pretrained(args.model, subfolder="transformer", torch_dtype=dtype)
    transformer.to(accelerator.device).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    transformer.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))
    cast_training_params(transformer, dtype=torch.float32)
    transformer.enable_gradient_checkpointing()
    lora = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": lora, "lr": args.learning_rate, "name": "lora"}]
    crepa = CrepaRegularizer(config, transformer, max_train_steps=args.steps)  # CREPA: after adapters, before optimizer
    if crepa.projector is not None:  # CREPA
        groups.append({"params": crepa.projector.parameters(), "lr": args.projector_lr, "name": "projector"})  # CREPA
    optimizer = torch.optim.AdamW(groups)
    ema = EMAModel(lora, decay=args.ema_decay)
    shuffled = torch.Generator().manual_seed(args.seed)  # not that of the noise
    drawn = args.steps * args.accumulate * accelerator.num_processes  # clips of the whole run: to resume is to skip
    sampler = RandomSampler(items, num_samples=drawn, generator=shuffled)
    loader: Any = DataLoader(items, sampler=sampler, generator=shuffled)  # type: ignore[arg-type]
    wrapped, optimizer, loader = accelerator.prepare(transformer.train(), optimizer, loader)
    accelerator.register_for_checkpointing(ema, crepa)  # CREPA: , crepa
    frozen = {name for name, parameter in transformer.named_parameters() if not parameter.requires_grad}
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: [weights[0].pop(name) for name in frozen])
    step = 0
    if args.resume and (checkpoints := sorted(args.output.glob("checkpoint-*"))):
        accelerator.load_state(checkpoints[-1], strict=False)  # without what is frozen
        step = int(checkpoints[-1].name.rpartition("-")[2])
    ema.to(accelerator.device)

    for batch in accelerator.skip_first_batches(loader, step * args.accumulate):
        with accelerator.accumulate(wrapped):
            latents = batch["latents"]
            noise = torch.randn_like(latents)
            sigma = (torch.randn(len(latents), device=latents.device) + math.log(shift)).sigmoid()
            noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1)).to(dtype)
            prediction = wrapped(noisy, sigma * 1000, batch["embeds"].to(dtype), return_dict=False)[0]
            loss = (prediction.float() - (noise - latents)).square().mean()
            aux, logs = crepa.loss(step=step, pixels=batch["pixels"])  # CREPA: or latents=latents, with vae= above
            crepa.release()  # CREPA
            accelerator.backward(loss + aux)  # CREPA: + aux
            if accelerator.sync_gradients:
                groups = optimizer.param_groups
                norms = {f"{each['name']}_norm": accelerator.clip_grad_norm_(each["params"], 1.0) for each in groups}
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            ema.step(lora)
            if step % 10 == 0 or step == args.steps:
                shown = {"loss": loss.detach(), **norms, **logs}.items()  # CREPA: **logs
                accelerator.print(f"step {step}:", ", ".join(f"{key} {float(value):.4g}" for key, value in shown))
            if step % args.checkpoint_every == 0:
                accelerator.save_state(args.output / f"checkpoint-{step:06}")

    if accelerator.is_main_process:
        WanPipeline.save_lora_weights(args.output, get_peft_model_state_dict(transformer))
        ema.copy_to(lora)
        WanPipeline.save_lora_weights(args.output / "ema", get_peft_model_state_dict(transformer))
        crepa.save_pretrained(args.output)  # CREPA: the projector, to go on from
    accelerator.end_training()


if __name__ == "__main__":
    main()

"""A LoRA on SDXL with U-REPA: a loop of diffusers, peft and accelerate, with U-REPA's lines marked `# U-REPA`.

    python examples/train_sdxl_urepa.py --model stabilityai/stable-diffusion-xl-base-1.0 --data photos --output lora

`--data` is a folder of images, each with a caption beside it (`cat.jpg`, `cat.txt`) or else `--caption`. Every image
keeps its shape, at about `--resolution` squared pixels. Texts and latents are encoded once, before the UNet is loaded.
`--urepa_lambda 0.3` and so on set U-REPA, `--urepa_enabled false` trains without it. `accelerate launch` starts it on
several cards.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params, free_memory
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from crepa_kernels import UrepaConfig, UrepaRegularizer  # U-REPA

KINDS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
UREPA = {"urepa_enabled": True}  # U-REPA


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A LoRA on Stable Diffusion XL with U-REPA.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="SDXL pipeline: a folder or hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder of images with optional .txt captions")
    parser.add_argument("--output", required=True, type=Path, help="folder for the LoRA and U-REPA's projector")
    parser.add_argument("--caption", default="", help="of images without a .txt")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--accumulate", type=int, default=4, help="images of an optimizer step")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    UrepaConfig.add_arguments(parser, UREPA)  # U-REPA
    return parser.parse_args()


@torch.no_grad()
def encoded(pipeline: Any, file: Path, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Pixels, latents, text and sizes of one image, on the CPU."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    side = 8 * pipeline.vae_scale_factor  # whole numbers of latents at every depth of the UNet
    scale = args.resolution / (image.width * image.height) ** 0.5
    width, height = (side * max(1, round(length * scale / side)) for length in image.size)
    pixels = torch.from_numpy(np.array(ImageOps.fit(image, (width, height)))).permute(2, 0, 1)
    text = file.with_suffix(".txt")
    caption = text.read_text(encoding="utf-8").strip() if text.is_file() else args.caption
    embeds, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
    vae = pipeline.vae
    latents = vae.encode((pixels[None] / 127.5 - 1).to(vae.device, vae.dtype)).latent_dist.sample()
    # Size before, top and left of the crop, size after.
    sizes = torch.tensor([image.height, image.width, 0, 0, height, width])
    found = {"embeds": embeds[0], "pooled": pooled[0], "pixels": pixels, "sizes": sizes}
    return {key: value.cpu() for key, value in {**found, "latents": latents[0] * vae.config.scaling_factor}.items()}


def predict(unet: Any, noisy: torch.Tensor, timesteps: torch.Tensor, batch: Any) -> torch.Tensor:
    added = {"text_embeds": batch["pooled"], "time_ids": batch["sizes"].to(noisy.dtype)}
    prediction: torch.Tensor = unet(noisy, timesteps, batch["embeds"], added_cond_kwargs=added, return_dict=False)[0]
    return prediction


def main() -> None:
    args = parse()
    config = UrepaConfig.from_args(args, UREPA)  # U-REPA: what is wrong is said before any work
    files = sorted(file for file in args.data.glob("*") if file.suffix.lower() in KINDS)
    if not files:
        raise SystemExit(f"{args.data} holds no images ({', '.join(KINDS)})")
    half = torch.cuda.is_available()
    dtype = torch.bfloat16 if half else torch.float32
    accelerator = Accelerator(mixed_precision="bf16" if half else "no", gradient_accumulation_steps=args.accumulate)
    set_seed(args.seed, device_specific=True)

    pipeline = StableDiffusionXLPipeline.from_pretrained(args.model, unet=None, torch_dtype=dtype)
    pipeline.to(accelerator.device)
    items = [encoded(pipeline, file, args) for file in files]
    del pipeline
    free_memory()

    scheduler = DDPMScheduler.from_pretrained(args.model, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet", torch_dtype=dtype)
    unet.to(accelerator.device).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))
    cast_training_params(unet, dtype=torch.float32)
    unet.enable_gradient_checkpointing()
    urepa = UrepaRegularizer(config, unet, max_train_steps=args.steps)  # U-REPA: after adapters, before the optimizer
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    loader: Any = DataLoader(items, batch_size=1, shuffle=True)  # type: ignore[arg-type]
    unet, optimizer, loader = accelerator.prepare(unet.train(), optimizer, loader)

    step = 0
    while step < args.steps:
        for batch in loader:
            with accelerator.accumulate(unet):
                latents = batch["latents"].to(dtype)
                noise = torch.randn_like(latents)
                steps = scheduler.config.num_train_timesteps
                timesteps = torch.randint(0, steps, (len(latents),), device=latents.device)
                prediction = predict(unet, scheduler.add_noise(latents, noise, timesteps), timesteps, batch)
                velocity = scheduler.config.prediction_type == "v_prediction"
                target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
                loss = (prediction.float() - target.float()).square().mean()
                aux, logs = urepa.loss(step=step, pixels=batch["pixels"])  # U-REPA
                urepa.release()  # U-REPA
                accelerator.backward(loss + aux)  # U-REPA: + aux
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                if step % 10 == 0 or step == args.steps:
                    shown = {"loss": loss, **logs}.items()  # U-REPA: **logs
                    accelerator.print(f"step {step}:", ", ".join(f"{key} {float(value):.4g}" for key, value in shown))
                if step == args.steps:
                    break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        lora = get_peft_model_state_dict(accelerator.unwrap_model(unet))
        StableDiffusionXLPipeline.save_lora_weights(args.output, unet_lora_layers=lora)
        urepa.save_pretrained(args.output)  # U-REPA: the projector, to go on from
    accelerator.end_training()


if __name__ == "__main__":
    main()

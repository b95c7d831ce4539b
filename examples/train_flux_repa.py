"""A LoRA on FLUX.1 with REPA: a loop of diffusers, peft and accelerate, with REPA's lines marked `# REPA`.

    python examples/train_flux_repa.py --model black-forest-labs/FLUX.1-dev --data photos --output lora --steps 1000

`--data` is a folder of images, each with a caption beside it (`cat.jpg`, `cat.txt`) or else `--caption`. Every image
keeps its shape, at about `--resolution` squared pixels. Texts and latents are encoded once, before the transformer is
loaded. `--crepa_lambda 0.3` and so on set REPA, `--crepa_enabled false` trains without it. `accelerate launch` starts
it on several cards.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import cast_training_params, free_memory
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from crepa_kernels import CrepaConfig, CrepaRegularizer  # REPA

KINDS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
REPA = {"crepa_enabled": True, "crepa_encoder_resize": "grid"}  # REPA: the block is the one recommended for Flux


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A LoRA on FLUX.1 with REPA.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="FLUX.1 pipeline: a folder or hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder of images with optional .txt captions")
    parser.add_argument("--output", required=True, type=Path, help="folder for the LoRA and REPA's projector")
    parser.add_argument("--caption", default="", help="of images without a .txt")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--accumulate", type=int, default=4, help="images of an optimizer step")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--guidance", type=float, default=1.0, help="what a guidance-distilled model is told")
    parser.add_argument("--seed", type=int, default=0)
    CrepaConfig.add_arguments(parser, REPA)  # REPA
    return parser.parse_args()


@torch.no_grad()
def encoded(pipeline: Any, file: Path, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Pixels, latents and text of one image, on the CPU."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    side = 2 * pipeline.vae_scale_factor  # pixels of a token
    scale = args.resolution / (image.width * image.height) ** 0.5
    width, height = (side * max(1, round(length * scale / side)) for length in image.size)
    pixels = torch.from_numpy(np.array(ImageOps.fit(image, (width, height)))).permute(2, 0, 1)
    caption = text.read_text(encoding="utf-8") if (text := file.with_suffix(".txt")).is_file() else args.caption
    embeds, pooled, _ = pipeline.encode_prompt(caption, caption)
    vae = pipeline.vae
    latents = vae.encode((pixels[None] / 127.5 - 1).to(vae.device, vae.dtype)).latent_dist.sample()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    found = {"latents": latents[0], "embeds": embeds[0], "pooled": pooled[0], "pixels": pixels}
    return {key: value.cpu() for key, value in found.items()}


def predict(transformer: Any, noisy: torch.Tensor, sigma: torch.Tensor, batch: Any, guidance: Any) -> torch.Tensor:
    """The transformer's prediction of noise - latents, packed as the latents that go in."""
    height, width = noisy.shape[2:]
    prediction: torch.Tensor = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, *noisy.shape),
        timestep=sigma.to(noisy.dtype),
        guidance=guidance,
        pooled_projections=batch["pooled"],
        encoder_hidden_states=batch["embeds"],
        txt_ids=noisy.new_zeros(batch["embeds"].shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, noisy.device, noisy.dtype),
        return_dict=False,
    )[0]
    return prediction


def main() -> None:
    args = parse()
    config = CrepaConfig.from_args(args, REPA, family="flux")  # REPA: what is wrong is said before any work
    files = sorted(file for file in args.data.glob("*") if file.suffix.lower() in KINDS)
    if not files:
        raise SystemExit(f"{args.data} holds no images ({', '.join(KINDS)})")
    dtype, precision = (torch.bfloat16, "bf16") if torch.cuda.is_available() else (torch.float32, "no")
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=args.accumulate)
    set_seed(args.seed, device_specific=True)

    pipeline = FluxPipeline.from_pretrained(args.model, transformer=None, torch_dtype=dtype).to(accelerator.device)
    items = [encoded(pipeline, file, args) for file in files]
    del pipeline
    free_memory()

    transformer = FluxTransformer2DModel.from_pretrained(args.model, subfolder="transformer", torch_dtype=dtype)
    transformer.to(accelerator.device).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    transformer.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))
    cast_training_params(transformer, dtype=torch.float32)
    transformer.enable_gradient_checkpointing()
    crepa = CrepaRegularizer(config, transformer, max_train_steps=args.steps)  # REPA: after adapters, before optimizer
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    loader: Any = DataLoader(items, batch_size=1, shuffle=True)  # type: ignore[arg-type]
    transformer, optimizer, loader = accelerator.prepare(transformer.train(), optimizer, loader)
    guided = torch.full((1,), args.guidance, device=accelerator.device, dtype=dtype)
    guidance = guided if accelerator.unwrap_model(transformer).config.guidance_embeds else None

    step = 0
    while step < args.steps:
        for batch in loader:
            with accelerator.accumulate(transformer):
                latents = batch["latents"].to(dtype)
                noise = torch.randn_like(latents)
                sigma = torch.randn(len(latents), device=latents.device).sigmoid()
                noisy = torch.lerp(latents, noise, sigma.to(dtype).view(-1, 1, 1, 1))
                prediction = predict(transformer, noisy, sigma, batch, guidance)
                target = FluxPipeline._pack_latents(noise - latents, *latents.shape)
                loss = (prediction.float() - target.float()).square().mean()
                aux, logs = crepa.loss(step=step, pixels=batch["pixels"])  # REPA
                crepa.release()  # REPA
                accelerator.backward(loss + aux)  # REPA: + aux
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                if step % 10 == 0 or step == args.steps:
                    shown = {"loss": loss, **logs}.items()  # REPA: **logs
                    accelerator.print(f"step {step}:", ", ".join(f"{key} {float(value):.4g}" for key, value in shown))
            if step == args.steps:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        lora = get_peft_model_state_dict(accelerator.unwrap_model(transformer))
        FluxPipeline.save_lora_weights(args.output, transformer_lora_layers=lora)
        crepa.save_pretrained(args.output)  # REPA: the projector, to go on from
    accelerator.end_training()


if __name__ == "__main__":
    main()

"""The SDXL script as a user starts it, on a tiny pipeline, and what the stock pipeline makes of what it writes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from said import everything_said
from scripts import image_folder, run_script
from tiny import TEXT_DIM, tiny_dinov2
from tiny_pipelines import VOCABULARY, tiny_tokenizer
from tiny_unets import tiny_kl, tiny_unet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from crepa_kernels import UrepaRegularizer

SCRIPT = Path(__file__).parents[2] / "examples" / "train_sdxl_urepa.py"


def whole_unet() -> UNet2DConditionModel:
    # The widths of both text encoders together.
    return tiny_unet("sdxl", cross_attention_dim=2 * TEXT_DIM)


def save_sdxl(folder: Path) -> Path:
    """A whole Stable Diffusion XL pipeline."""
    torch.manual_seed(5)
    sizes = {"hidden_size": TEXT_DIM, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    clip = CLIPTextConfig(
        vocab_size=VOCABULARY, bos_token_id=2, eos_token_id=1, pad_token_id=0, projection_dim=TEXT_DIM, **sizes
    )
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    StableDiffusionXLPipeline(
        vae=tiny_kl(),
        text_encoder=CLIPTextModel(clip),
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=whole_unet(),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def test_a_lora_is_trained_with_u_repa_and_the_stock_pipeline_shows_images_with_it(tmp_path: Path) -> None:
    model, data, output = save_sdxl(tmp_path / "sdxl"), image_folder(tmp_path / "images"), tmp_path / "lora"
    tiny_dinov2(tmp_path / "dinov2")
    words = ["--model", model, "--data", data, "--output", output, "--steps", 3, "--accumulate", 2, "--rank", 2]
    words += ["--resolution", 64, "--learning_rate", 0.01, "--urepa_model", tmp_path / "dinov2"]
    said = run_script(SCRIPT, *words, "--urepa_encoder_image_size", 70)
    for name in ("step 3: loss", "urepa_loss", "urepa_manifold_loss", "urepa_similarity", "urepa_weight 0.5"):
        assert name in said
    files = {path.name for path in output.iterdir()}
    assert files == {"pytorch_lora_weights.safetensors", "urepa_projector.safetensors", "urepa_config.json"}
    weights = load_file(output / "pytorch_lora_weights.safetensors")
    assert not [key for key in weights if "urepa" in key]
    assert any(value.any() for key, value in weights.items() if "lora_B" in key or "lora.up" in key)

    pipeline = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)

    def shown() -> torch.Tensor:
        size = {"height": 32, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
        images: torch.Tensor = pipeline("a red square", **size, generator=torch.Generator().manual_seed(0)).images
        return images

    before = shown()
    with everything_said() as lines:
        pipeline.load_lora_weights(output)
    # That the text encoders have none, diffusers says of every LoRA of a UNet.
    assert [line for line in lines if not line.startswith("No LoRA keys associated to CLIPText")] == []
    after = shown()
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    again = UrepaRegularizer.from_pretrained(output, whole_unet())
    assert again.config.urepa_manifold_weight == 3.0

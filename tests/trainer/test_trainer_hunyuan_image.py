"""HunyuanVideo image to video: clip, caption and the transformer's call are those of its stock pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crepa_trainer.families import TrainingFamily
from diffusers import DiffusionPipeline
from hub_cases import CASES, HubCase, encoded_clip
from PIL import Image
from tiny import CHANNELS, clip_pixels

from crepa_kernels import image_to_video_mask

PROMPT = "a red square moves"
# The pipelines' calls keep every second or fourth of 576 image tokens, and 252 of the text.
TOKENS = {"token_replace": 144 + 252, "latent_concat": 288 + 252}


@pytest.fixture(scope="module", params=TOKENS)
def condition(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def case(condition: str) -> HubCase:
    return CASES[f"hunyuan {condition}"]


@pytest.fixture(scope="module")
def family(case: HubCase, tmp_path_factory: pytest.TempPathFactory) -> TrainingFamily:
    return case.family(case.save(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture(scope="module")
def stock(family: TrainingFamily) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(family.model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pixels(case: HubCase) -> torch.Tensor:
    return clip_pixels(1, case.size.frames, case.size.height, case.size.width)[0]


def shown(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())


def watched(transformer: Any) -> list[dict[str, Any]]:
    """Fills with the arguments of each forward, without those that are None."""
    kept: list[dict[str, Any]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        assert not args
        kept.append({name: value for name, value in kwargs.items() if value is not None and name != "return_dict"})

    transformer.register_forward_pre_hook(keep, with_kwargs=True)
    return kept


def test_a_call_is_the_pipelines_own_from_image_prompt_and_negative_prompt(
    case: HubCase, family: TrainingFamily, stock: Any, pixels: torch.Tensor
) -> None:
    theirs = watched(stock.transformer)
    stock(
        image=shown(pixels),
        prompt=PROMPT,
        negative_prompt="",
        true_cfg_scale=2.0,
        guidance_scale=1.0,
        **family.size_arguments(case.size),
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    assert len(theirs) == 2 * 3
    encoded = encoded_clip(family, stock.vae, pixels, PROMPT)
    (negative,) = family.encode_text(family.load_text(torch.float32), [""])
    transformer = family.load_transformer(torch.float32)
    ours = watched(transformer)
    for number, call in enumerate(theirs):
        clip = {**encoded, **negative} if number % 2 else encoded
        batch = {name: tensor[None] for name, tensor in clip.items()}
        level = call["timestep"] / 1000
        # The noise that is in the pipeline's latents if the clip is this one.
        noise = (call["hidden_states"][:, :CHANNELS] - (1 - level) * batch["latents"]) / level
        noisy = family.noisy(batch, noise, level)
        prediction = family.predict(transformer, noisy, batch)
        assert prediction.shape == noisy.target.shape
        assert set(ours[-1]) == set(call)
        for name, value in call.items():
            # Products round otherwise where weights lie otherwise in memory; timesteps are up to 1000.
            torch.testing.assert_close(ours[-1][name], value, atol=1e-4, rtol=1e-5)


def test_text_is_the_pipelines_with_the_first_frame(
    condition: str, family: TrainingFamily, stock: Any, pixels: torch.Tensor
) -> None:
    kept = {"token_replace": 4, "latent_concat": 2}[condition]
    parts = family.load_text(torch.float32)
    found = family.encode_text_of_clip(parts, PROMPT, pixels[0])
    expected = stock.encode_prompt(shown(pixels), PROMPT, image_embed_interleave=kept)
    for name, tensor in zip(("text", "text_pooled", "text_mask"), expected, strict=True):
        torch.testing.assert_close(found[name], tensor[0], atol=1e-5, rtol=0)
    assert len(found["text"]) == TOKENS[condition]
    assert torch.equal(found["text_mask"][:-252], torch.ones(TOKENS[condition] - 252, dtype=torch.int64))
    # Image and caption both count, each in its own tokens.
    other = family.encode_text_of_clip(parts, PROMPT, pixels[1])
    word = family.encode_text_of_clip(parts, "a blue square moves", pixels[0])
    assert (other["text"] - found["text"])[:-252].abs().max() > 1e-3
    assert (word["text"] - found["text"])[:-252].abs().max() == 0
    assert (word["text"] - found["text"])[-252:].abs().max() > 1e-3


def test_the_black_image_of_a_negative_prompt_has_no_size(family: TrainingFamily, stock: Any) -> None:
    (found,) = family.encode_text(family.load_text(torch.float32), [""])
    for size in ((48, 32), (32, 80)):
        expected = stock.encode_prompt(Image.new("RGB", size, 0), "")
        torch.testing.assert_close(found["text"], expected[0][0], atol=1e-5, rtol=0)
    # With both conditions of the pipeline's default.
    assert len(found["text"]) == TOKENS["latent_concat"]


def test_the_images_latents_are_the_pipelines(family: TrainingFamily, stock: Any, pixels: torch.Tensor) -> None:
    encoded = family.encode_clip(stock.vae, pixels)
    sizes = {"height": pixels.shape[2], "width": pixels.shape[3], "num_frames": len(pixels)}
    _, image = stock.prepare_latents(pixels[:1] / 127.5 - 1, 1, CHANNELS, **sizes, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(encoded["image_latents"], image[0, :, :1], atol=1e-5, rtol=0)
    # Why they are cached beside the clip's.
    assert (encoded["image_latents"] - encoded["latents"][:, :1]).abs().max() > 0.01


def test_frame_0_is_left_out_of_both_losses_where_its_tokens_are_clean(
    case: HubCase, family: TrainingFamily, pixels: torch.Tensor
) -> None:
    encoded = family.encode_clip(family.load_vae(torch.float32), pixels)
    batch = {name: tensor[None] for name, tensor in encoded.items()}
    noisy = family.noisy(batch, torch.randn(batch["latents"].shape), torch.tensor([0.5]))
    mask = image_to_video_mask(family.load_transformer(torch.float32), 1, family.layout(case.size).frames)
    clean = torch.equal(noisy.latents[:, :, :1], batch["image_latents"])
    assert clean == (mask is not None)
    if mask is None:
        assert noisy.frame_mask is None
    else:
        assert noisy.frame_mask is not None
        assert torch.equal(noisy.frame_mask, mask)
        assert not mask[0, 0]
        assert mask[0, 1:].all()


def test_a_validation_clip_begins_with_the_very_frame_that_the_text_has_seen(
    family: TrainingFamily, pixels: torch.Tensor
) -> None:
    vae = family.load_vae(torch.float32)
    image = family.first_frame(vae, family.encode_clip(vae, pixels))
    assert family.image_argument(image).tobytes() == shown(pixels).tobytes()


def test_guidance_is_the_embedded_scale_or_that_of_the_negative_prompt(condition: str, family: TrainingFamily) -> None:
    key = "guidance_scale" if condition == "token_replace" else "true_cfg_scale"
    assert family.guidance_arguments(3.0) == {key: 3.0}


def test_texts_are_encoded_in_bf16_too_as_on_a_gpu(family: TrainingFamily, pixels: torch.Tensor) -> None:
    full, half = (
        family.encode_text_of_clip(family.load_text(dtype), PROMPT, pixels[0])
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half["text"].dtype == half["text_pooled"].dtype == torch.bfloat16
    # Rounding to 8 bits, which two layers average over.
    assert (half["text"].float() - full["text"]).norm() < 0.01 * full["text"].norm()

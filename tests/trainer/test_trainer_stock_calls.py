"""What the trainer gives a transformer is what the family's stock pipeline gives it at the same noise level."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.families import TrainingFamily
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hub_cases import CASES, HubCase, encoded_clip
from PIL import Image
from tiny import CHANNELS, clip_pixels
from tiny_hub_folders import QWEN_DIM

from crepa_kernels import image_to_video_mask
from crepa_kernels.models.layouts import raster_layout

STEPS = 4
# Of the pipelines' calls only, or of how the answer is returned.
IGNORED = {"self", "return_dict", "attention_kwargs"}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> HubCase:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: HubCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.save(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture(scope="module")
def family(case: HubCase, folder: Path) -> TrainingFamily:
    return case.family(folder)


@pytest.fixture(scope="module")
def stock(case: HubCase, folder: Path) -> Any:
    pipeline = case.stock(folder)
    without_spread(pipeline.vae)
    return pipeline


def without_spread(vae: Any) -> None:
    """Makes a sample of what the VAE encodes its mean: pipelines draw the image's latents."""
    if hasattr(vae.config, "z_dim"):
        return  # of Wan's the pipelines take the mode
    last = getattr(vae, "quant_conv", None) or vae.encoder.conv_out
    last = getattr(last, "conv", last)
    with torch.no_grad():
        last.weight[CHANNELS:] = 0
        last.bias[CHANNELS:] = -30


class Calls:
    """The arguments by name of every forward of a transformer, whose answer is replaced by the true one."""

    def __init__(self, clean: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor | None) -> None:
        self.clean, self.noise, self.alphas = clean, noise, alphas
        self.made: list[tuple[Any, dict[str, Any]]] = []

    def watch(self, transformer: torch.nn.Module) -> None:
        transformer.register_forward_pre_hook(self._keep, with_kwargs=True)
        transformer.register_forward_hook(self._answer)

    def _keep(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        # A copy: Kandinsky's pipelines write the next latents into the same tensor.
        copied = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
        self.made.append((module, {name: copied[name] for name in copied if name not in IGNORED}))

    def _answer(self, module: Any, args: Any, output: Any) -> Any:
        """What moves from noise to the clean clip without error: so each step's latents are known."""
        target = self.noise - self.clean
        if self.alphas is not None:
            alpha = self.alphas[self.made[-1][1]["timestep"][0]]
            target = alpha.sqrt() * self.noise - (1 - alpha).sqrt() * self.clean
        name = type(module).__name__
        if name.startswith("Kandinsky"):
            target = target.permute(0, 2, 3, 4, 1)
            return target if isinstance(output, torch.Tensor) else Transformer2DModelOutput(sample=target)
        return (target.transpose(1, 2) if name.startswith("CogVideoX") else target,)


def assert_same_calls(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in {**ours, **theirs}:
        mine, other = ours.get(name), theirs.get(name)
        if isinstance(mine, torch.Tensor):
            assert mine.shape == other.shape, name
            # Rounding over the denoising steps before, also of timesteps up to 1000.
            torch.testing.assert_close(mine.float(), other.float(), atol=1e-4, rtol=1e-6, msg=lambda m, n=name: n + m)
        elif isinstance(mine, list | tuple) and isinstance(mine[0], torch.Tensor):
            for one, another in zip(mine, other, strict=True):
                torch.testing.assert_close(one, another)
        else:
            assert mine == other, name


def test_a_call_is_the_stock_pipelines_at_every_noise_level(
    case: HubCase, family: TrainingFamily, stock: Any, folder: Path
) -> None:
    pixels = clip_pixels(1, case.size.frames, case.size.height, case.size.width)
    encoded = encoded_clip(family, stock.vae, pixels[0], "a red square moves")
    batch = {name: tensor[None] for name, tensor in encoded.items()}
    clean = batch["latents"]
    # As Kandinsky's pipelines draw it, which take no latents.
    drawn = torch.randn(clean.permute(0, 2, 3, 4, 1).shape, generator=torch.Generator().manual_seed(0))
    noise = drawn.permute(0, 4, 1, 2, 3)
    arguments = {**family.text_arguments(encoded, None), **family.size_arguments(case.size)}
    if family.name != "kandinsky5_video":
        arguments["latents"] = noise.transpose(1, 2) if family.name == "cogvideox" else noise
    if family.name == "hunyuan_video":
        # The pipeline mixes a thousandth of the image into the noise that it is given.
        share = torch.tensor([0.999])
        noise = noise * share + batch["image_latents"] * (1 - share)
    velocity = stock.scheduler.config.get("prediction_type") == "v_prediction"
    calls = Calls(clean, noise, stock.scheduler.alphas_cumprod if velocity else None)
    for part in ("transformer", "transformer_2"):
        if getattr(stock, part, None) is not None:
            calls.watch(getattr(stock, part))
    if family.task == "image2video":
        arguments["image"] = family.image_argument(pixels[0, 0] / 255)
    seeded = torch.Generator().manual_seed(0)
    stock(**arguments, num_inference_steps=STEPS, guidance_scale=1.0, generator=seeded, output_type="latent")
    theirs = [made for module, made in calls.made if module is getattr(stock, family.transformer_part)]
    assert 1 <= len(theirs) <= STEPS

    transformer = family.load_transformer(torch.float32)
    ours = Calls(clean, noise, calls.alphas)
    ours.watch(transformer)
    for made in theirs:
        times = made["timestep"].float()
        times = times.amax(1) if times.dim() == 2 else times  # of each token, and 0 for the first frame's
        # In the middle of the levels that become this timestep where those are whole numbers.
        time = (times + 0.5) / 1000 if family.name == "cogvideox" else times / 1000
        noisy = family.noisy(batch, noise, time)
        prediction = family.predict(transformer, noisy, batch)
        assert_same_calls(ours.made[-1][1], made)
        given = family.task == "image2video"
        mask = image_to_video_mask(transformer, 1, family.layout(case.size).frames) if given else None
        assert (None if noisy.frame_mask is None else noisy.frame_mask.tolist()) == (
            mask if mask is None else mask.tolist()
        )
        predicted = slice(None) if noisy.frame_mask is None else slice(1, None)
        torch.testing.assert_close(prediction[:, :, predicted], noisy.target[:, :, predicted])


def test_latents_decode_to_what_the_vae_makes_of_the_clip(case: HubCase, family: TrainingFamily, stock: Any) -> None:
    pixels = clip_pixels(1, case.size.frames, case.size.height, case.size.width)
    latents = family.encode_latents(stock.vae, pixels)
    assert latents.shape == (1, *family.latent_shape(case.size))
    with torch.no_grad():
        raw = stock.vae.encode(pixels.transpose(1, 2) / 127.5 - 1).latent_dist.mode()
        video = stock.vae.decode(raw, return_dict=False)[0]
    expected = stock.video_processor.postprocess_video(video, output_type="pt")
    # The regulariser's decoding; rounding of two affine maps in fp32.
    torch.testing.assert_close(family.decode(stock.vae, latents), expected, atol=1e-5, rtol=0)
    assert expected.shape[1] == case.size.frames


def test_sizes_from_the_configs_are_those_of_the_transformer(case: HubCase, family: TrainingFamily) -> None:
    transformer = family.load_transformer(torch.float32)
    assert family.blocks == len(family.row.blocks(transformer))
    assert family.hidden_size == family.row.hidden_size(transformer.config)
    layout = raster_layout(transformer.config, family.latent_shape(case.size)[1:])
    assert family.layout(case.size) == layout


def test_text_is_the_stock_pipelines_embedding_of_one_prompt(family: TrainingFamily, stock: Any) -> None:
    prompts = ["a red square moves over the blue pattern", "video"]
    for ours, prompt in zip(family.encode_text(family.load_text(torch.float32), prompts), prompts, strict=True):
        if family.name == "kandinsky5_video":
            text, pooled, lengths = stock.encode_prompt(prompt)
            assert text.shape[1] == lengths[-1]
            expected = {"text": text[0], "pooled": pooled[0]}
        elif family.name == "hunyuan_video":
            # Without a clip: as the pipeline encodes a negative prompt.
            text, pooled, mask = stock.encode_prompt(Image.new("RGB", (48, 32), 0), prompt)
            expected = {"text": text[0], "text_pooled": pooled[0], "text_mask": mask[0]}
        else:
            options = {"max_sequence_length": family.text_limits["tokenizer"]}
            if family.name == "wan":
                # The image-to-video pipeline's own is a copy of it, which cannot do without ftfy.
                stock = WanPipeline(stock.tokenizer, stock.text_encoder, vae=None, scheduler=None)
            embedding, _ = stock.encode_prompt(prompt, do_classifier_free_guidance=False, **options)
            expected = {"text": embedding[0]}
        assert ours.keys() == expected.keys()
        for name, tensor in ours.items():
            # Weights lie otherwise in memory after loading, so products round otherwise in the last bit.
            torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


def test_kandinskys_text_is_read_without_the_image_side_of_its_processor(tmp_path: Path) -> None:
    case = CASES["kandinsky5"]
    folder = case.save(tmp_path / "kandinsky5")
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    ours = case.family(folder)
    expected = ours.encode_text(ours.load_text(torch.float32), ["a red square"])[0]["text"]
    # As on the hub, where a processor of texts, images and videos is named that needs torchvision.
    file.write_text(json.dumps({**index, "tokenizer": ["transformers", "Qwen2_5_VLProcessor"]}))
    family = case.family(folder)
    found = family.encode_text(family.load_text(torch.float32), ["a red square"])[0]["text"]
    assert found.shape == expected.shape == (6, QWEN_DIM)  # three words, three marks of the instruction after them
    # Weights lie otherwise in memory after loading, so products round otherwise in the last bit.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_cogvideox_is_trained_at_each_timestep_as_often(tmp_path: Path) -> None:
    family = CASES["cogvideox"].family(CASES["cogvideox"].save(tmp_path / "model"))
    far = torch.tensor([-40.0, 40.0])
    draws = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)), far])
    batch = {"latents": torch.zeros(len(draws), 1, 1, 1, 1)}
    timesteps = family.noisy(batch, batch["latents"], family.noise_level(draws, (1, 1, 1, 1))).timestep
    assert timesteps.dtype == torch.int64
    assert timesteps[-2:].tolist() == [0, 999]
    counts = timesteps.bincount(minlength=1000).view(20, 50).sum(1)
    assert len(counts) == 20
    # 5000 are expected in each twentieth, with a standard deviation of 69.
    assert (counts - 5000).abs().max() < 350


def test_kandinskys_noise_levels_are_moved_by_its_schedulers_shift(tmp_path: Path) -> None:
    family = CASES["kandinsky5"].family(CASES["kandinsky5"].save(tmp_path / "model"))
    levels = family.noise_level(torch.tensor([-1.0, 0.0, 1.0]), (4, 3, 4, 6))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    unshifted = torch.tensor([-1.0, 0.0, 1.0]).sigmoid()
    scheduler.set_timesteps(sigmas=unshifted.tolist())
    torch.testing.assert_close(levels, scheduler.sigmas[:3])
    assert levels[1] > 0.8  # 5/6 of what was 1/2

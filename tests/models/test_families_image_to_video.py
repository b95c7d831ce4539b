"""Image to video: frame 0 is masked where the family's own pipeline gives the transformer its tokens without noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from family_pipelines import pipeline_of, run
from peft import LoraConfig, get_peft_model
from tiny import CHANNELS
from tiny_families import FAMILIES, tiny_vaes
from torch.nn.parallel import DistributedDataParallel

from crepa_kernels import image_to_video_mask

# Family, the transformer's settings, the pipeline's, (frames, height, width) in pixels, and whether frame 0 is clean.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[int, int, int], bool]] = {
    "wan 2.2 5B": ("wan", {}, {"expand_timesteps": True}, (9, 32, 48), True),
    "wan 2.1": ("wan", {"in_channels": 2 * CHANNELS + 4}, {}, (9, 32, 48), False),
    "ltxvideo": ("ltxvideo", {}, {}, (17, 128, 192), True),
    "sanavideo": ("sanavideo", {}, {}, (9, 32, 64), True),
    "kandinsky5_video": ("kandinsky5_video", {"visual_cond": True}, {}, (9, 32, 48), True),
    "cogvideox": ("cogvideox", {"in_channels": 2 * CHANNELS}, {}, (9, 32, 48), False),
    "hunyuan_video latent_concat": (
        "hunyuan_video",
        {"image_condition_type": "latent_concat", "in_channels": 2 * CHANNELS + 1},
        {},
        (9, 32, 48),
        False,
    ),
    "hunyuan_video token_replace": (
        "hunyuan_video",
        {"image_condition_type": "token_replace"},
        {},
        (9, 32, 48),
        True,
    ),
}


def first_frame(name: str, latents: torch.Tensor, tokens: int) -> torch.Tensor:
    """What a forward was given as frame 0, without what stands beside the latents in channels."""
    if name == "ltxvideo":
        return latents[:, :tokens]
    if name == "kandinsky5_video":
        return latents[:, 0, ..., :CHANNELS]
    return latents[:, 0, :CHANNELS] if name == "cogvideox" else latents[:, :CHANNELS, 0]


@pytest.mark.parametrize("case", CASES)
def test_frame_0_is_masked_where_its_tokens_are_clean(case: str) -> None:
    name, settings, options, pixels, clean = CASES[case]
    transformer = FAMILIES[name].make(**settings).eval()
    mask = image_to_video_mask(transformer, 2, 3)
    assert (None if mask is None else mask.tolist()) == ([[False, True, True]] * 2 if clean else None)

    given: list[torch.Tensor] = []

    def keep(module: Any, args: Any, arguments: dict[str, Any]) -> None:
        latents = args[0] if args else arguments["hidden_states"]
        given.append(first_frame(name, latents, 24).clone())

    transformer.register_forward_pre_hook(keep, with_kwargs=True)
    pipeline = pipeline_of(name, transformer, tiny_vaes(name), image=True, **options)
    image = torch.rand(1, 3, *pixels[1:], generator=torch.Generator().manual_seed(7))
    run(name, pipeline, 1, pixels, image=image, num_inference_steps=2)
    # What is clean stays as it is from step to step; what is denoised does not.
    assert len(given) == 2
    assert torch.equal(given[0], given[1]) == clean


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: get_peft_model(model, LoraConfig(target_modules=["to_q"])),
    ],
)
def test_a_wrapped_transformer_is_to_be_unwrapped(wrap: Any) -> None:
    with pytest.raises(ValueError, match=r"wraps one: unwrap it \(accelerator.unwrap_model"):
        image_to_video_mask(wrap(FAMILIES["wan"].make()), 1, 3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="DistributedDataParallel is no transformer but wraps one: unwrap it"):
            image_to_video_mask(DistributedDataParallel(FAMILIES["wan"].make()), 1, 3)
    finally:
        dist.destroy_process_group()

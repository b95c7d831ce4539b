"""Validation clips of transformers in bf16, as mixed precision has them, with text in either type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from crepa_trainer.validation import Sampling, sample_clips
from hub_cases import CASES

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", CASES)
def test_a_transformer_in_bf16_is_sampled_with(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    family = case.family(case.save(tmp_path / "model"))
    pixels = torch.zeros(case.size.frames, 3, case.size.height, case.size.width, dtype=torch.uint8)
    parts = family.load_text(torch.float32)
    texts = [family.encode_text_of_clip(parts, "a red square moves", pixels[0]), *family.encode_text(parts, ["video"])]
    transformer = family.load_transformer(torch.bfloat16)
    latents = torch.zeros(family.latent_shape(case.size))
    first = [{"latents": latents, "first_frame": pixels[0]}] if family.task == "image2video" else []
    for dtype in (torch.float32, torch.bfloat16):  # the text encoder's on a CPU, and on a GPU
        text, negative = ({key: each.to(dtype) for key, each in text.items()} for text in texts)
        sampling = Sampling([text], negative, case.size, steps=2, guidance=5.0, seed=0, clips=first)
        (clip,) = sample_clips(family, transformer, sampling, CPU)
        assert clip.shape == case.shown
        assert np.ptp(clip) > 0
    assert transformer.dtype == torch.bfloat16

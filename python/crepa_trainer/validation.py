"""A short clip for each validation prompt, from the weights as they are, as a video and as a strip of frames."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import torch
from torch import Tensor, nn

from crepa_kernels.regularizer.saving import replacing

if TYPE_CHECKING:
    from .families import ClipSize, Text, TrainingFamily

FRAMES_PER_SECOND = 16
STRIP_FRAMES = 8


@dataclass(frozen=True)
class Sampling:
    """How validation clips are sampled. `texts`: embeddings of the prompts, `negative` of the empty prompt."""

    texts: Sequence[Text]
    negative: Text | None
    size: ClipSize
    steps: int
    guidance: float
    seed: int
    tiling: bool = False  # of the VAE
    # Image to video: as `TrainingFamily.encode_clip` gives them, one for each prompt, whose first frames are given.
    clips: Sequence[Mapping[str, Tensor]] = ()


@torch.no_grad()
def sample_clips(
    family: TrainingFamily, transformer: nn.Module, sampling: Sampling, device: torch.device
) -> list[np.ndarray]:
    """One clip (P, H, W, 3) uint8 for each text; transformer, random states and train mode are left as they were.

    The VAE is loaded for it and let go. Every clip starts from the noise of the same seed.
    """
    was_training = transformer.training
    vae = family.load_vae(torch.float32, sampling.tiling).to(device)
    devices = [device] if device.type == "cuda" else []
    dtype: Any = transformer.dtype
    # As in training: some pipelines give a VAE in fp32 what a transformer in bf16 made, or it what is in fp32.
    mixed = torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))
    with torch.random.fork_rng(devices=devices), mixed:
        try:
            transformer.eval()
            pipeline = family.pipeline(transformer, vae)
            pipeline.set_progress_bar_config(disable=True)
            clips = [
                family.sample(
                    pipeline,
                    _moved(text, device),
                    None if sampling.negative is None else _moved(sampling.negative, device),
                    sampling.size,
                    steps=sampling.steps,
                    guidance=sampling.guidance,
                    generator=torch.Generator().manual_seed(sampling.seed),
                    image=_first_frame(family, vae, sampling, number),
                )
                for number, text in enumerate(sampling.texts)
            ]
        finally:
            transformer.train(was_training)
    return [(clip * 255).round().astype(np.uint8) for clip in clips]


def _first_frame(family: TrainingFamily, vae: nn.Module, sampling: Sampling, number: int) -> Tensor | None:
    if not sampling.clips:
        return None
    return family.first_frame(vae, sampling.clips[number % len(sampling.clips)])


def _moved(text: Text, device: torch.device) -> Text:
    return {name: tensor.to(device) for name, tensor in text.items()}


def save_clip(clip: np.ndarray, folder: Path, name: str) -> np.ndarray:
    """`name.mp4` and `name.png`, a strip of up to 8 frames, (H, n W, 3) uint8, which is returned."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    write_video(clip, folder / f"{name}.mp4")
    shown = np.unique(np.linspace(0, len(clip) - 1, min(STRIP_FRAMES, len(clip))).round().astype(int))
    strip = np.concatenate(list(clip[shown]), axis=1)
    Image.fromarray(strip).save(folder / f"{name}.png")
    return strip


def save_index(folder: Path, prompts: Sequence[str], sampling: Sampling) -> None:
    """samples.json: of what each clip in the folder was sampled, and how."""
    size = [sampling.size.frames, sampling.size.height, sampling.size.width]
    how = {"seed": sampling.seed, "steps": sampling.steps, "guidance": sampling.guidance, "size": size}
    rows = [
        {"file": f"prompt-{number}.mp4", "strip": f"prompt-{number}.png", "prompt": prompt, **how}
        for number, prompt in enumerate(prompts)
    ]
    with replacing(folder / "samples.json") as file:
        file.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_video(clip: np.ndarray, path: Path) -> None:
    """H.264 of a clip (P, H, W, 3) uint8 with even height and width."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

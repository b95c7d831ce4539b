"""Complete tiny pipelines with seeded random weights and a tokenizer, saved in the hub's folder layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from crepa_trainer.families import TrainingFamily
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, WanPipeline
from tiny import TEXT_DIM, tiny_vae, tiny_wan
from tiny_families import FAMILIES, tiny_vaes
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ("a", "square", "moves", "over", "red", "blue", "pattern", "video", "of", "the")
VOCABULARY = len(WORDS) + 3
UMT5 = {"d_model": TEXT_DIM, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Knows `WORDS`; pads with 0 and ends a text with </s>, as T5's does."""
    vocabulary = {word: n for n, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_umt5(seed: int = 5) -> UMT5EncoderModel:
    """A UMT5 encoder of width 8 over the tiny tokenizer's words."""
    return _built(lambda: UMT5EncoderModel(UMT5Config(vocab_size=VOCABULARY, **UMT5)), seed)


def save_tiny_wan_pipeline(
    folder: Path, *, transformer: dict[str, Any] | None = None, vae: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A whole WanPipeline folder: 16 pixels a token, 4 frames a latent. `config`: of the pipeline itself."""
    WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_umt5(),
        transformer=tiny_wan(**(transformer or {})),
        vae=tiny_vae(**(vae or {})),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **config,
    ).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class TinyPipeline:
    """A family's whole pipeline on tiny parts.

    Attributes:
        name: the family's.
        save: writes the folder.
        size: (height, width, frames) of clips that it makes.
        tasks: what it can be trained for.
    """

    name: str
    save: Callable[[Path], Path]
    size: tuple[int, int, int]
    tasks: tuple[str, ...] = ("text2video", "image2video")


def _built(build: Callable[[], Any], seed: int = 5) -> Any:
    """A model with weights of ``seed``, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def save_tiny_pipeline(folder: Path, name: str, **parts: Any) -> Path:
    """A family's whole text-to-video pipeline; what is not given is as most families have it."""
    usual = {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_umt5(),
        "transformer": FAMILIES[name].make(),
        "vae": tiny_vaes(name),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    kind = getattr(diffusers, TrainingFamily.known[name].pipelines["text2video"])
    kind(**{**usual, **parts}).save_pretrained(folder)
    return folder


def save_tiny_ltx_pipeline(folder: Path, **vae: Any) -> Path:
    """32 pixels a token, 8 frames a latent; the scheduler moves its levels with the clip's length, as the hub's."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=4,
        max_image_seq_len=32,
        shift_terminal=0.1,
    )
    t5 = _built(lambda: T5EncoderModel(T5Config(vocab_size=VOCABULARY, **UMT5)))
    return save_tiny_pipeline(
        folder, "ltxvideo", text_encoder=t5, vae=tiny_vaes("ltxvideo", **vae), scheduler=scheduler
    )


def save_tiny_sana_pipeline(folder: Path, vae: str = "sanavideo") -> Path:
    """16 pixels a token, 4 frames a latent; with ``vae`` "ltx2" 64 pixels and 8 frames."""
    config = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 16}
    gemma = Gemma2Config(vocab_size=VOCABULARY, hidden_size=TEXT_DIM, num_hidden_layers=2, **config)
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=8.0, final_sigmas_type="zero"
    )
    encoder = _built(lambda: Gemma2Model(gemma))
    return save_tiny_pipeline(folder, "sanavideo", text_encoder=encoder, vae=tiny_vaes(vae), scheduler=scheduler)


def save_tiny_hunyuan_pipeline(folder: Path, **transformer: Any) -> Path:
    """16 pixels a token, 4 frames a latent; distilled to take the guidance scale as an input."""
    sizes = {"hidden_size": TEXT_DIM, "intermediate_size": 16, "num_attention_heads": 2}
    llama = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=3, num_key_value_heads=1, **sizes)
    clip = CLIPTextConfig(vocab_size=VOCABULARY, num_hidden_layers=2, eos_token_id=1, pad_token_id=0, **sizes)
    return save_tiny_pipeline(
        folder,
        "hunyuan_video",
        text_encoder=_built(lambda: LlamaModel(llama)),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_2=_built(lambda: CLIPTextModel(clip)),
        transformer=FAMILIES["hunyuan_video"].make(**{"guidance_embeds": True, **transformer}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


TINY_PIPELINES = {
    "ltxvideo": TinyPipeline("ltxvideo", save_tiny_ltx_pipeline, (64, 96, 17)),
    "sanavideo": TinyPipeline("sanavideo", save_tiny_sana_pipeline, (32, 64, 9)),
    "sanavideo ltx2": TinyPipeline("sanavideo", partial(save_tiny_sana_pipeline, vae="ltx2"), (128, 128, 17)),
    "hunyuan_video": TinyPipeline("hunyuan_video", save_tiny_hunyuan_pipeline, (32, 48, 9), ("text2video",)),
}

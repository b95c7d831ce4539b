"""Complete tiny pipelines with seeded random weights and a tokenizer, saved in the hub's folder layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from tiny import TEXT_DIM, tiny_vae, tiny_wan
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ("a", "square", "moves", "over", "red", "blue", "pattern", "video", "of", "the")
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS) + 3, **UMT5)).eval()


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

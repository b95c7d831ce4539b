"""Complete tiny pipelines in the hub's layout: Wan with experts or an image encoder, Kandinsky 5, CogVideoX, and
HunyuanVideo with an image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from tiny import CHANNELS, TEMPORAL, TEXT_DIM, tiny_vae, tiny_wan
from tiny_families import COGVIDEOX, FAMILIES, SPARSE, tiny_vaes
from tiny_pipelines import WORDS, tiny_tokenizer, tiny_umt5
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

BOUNDARY = 0.875
QWEN_DIM = 16
IMAGE_DIM = 16
T5 = {"d_model": TEXT_DIM, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
CLIP_TEXT = {"hidden_size": TEXT_DIM, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP_VISION = {"hidden_size": IMAGE_DIM, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
QWEN = {
    "text_config": {
        "hidden_size": QWEN_DIM,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": QWEN_DIM,
        "fullatt_block_indexes": [0],
    },
}


ENDS = {"bos_token_id": 1, "eos_token_id": 0}


def _seeded(build: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def save_tiny_wan_experts(folder: Path, *, image: bool = False) -> Path:
    """Wan 2.2 A14B: two transformers with different weights, and with `image` the image's channels."""
    settings = {"in_channels": 2 * CHANNELS + TEMPORAL} if image else {}
    kind = WanImageToVideoPipeline if image else WanPipeline
    kind(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_umt5(),
        transformer=tiny_wan(**settings),
        transformer_2=tiny_wan(seed=7, **settings),
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        boundary_ratio=BOUNDARY,
    ).save_pretrained(folder)
    return folder


def save_tiny_wan_image(folder: Path) -> Path:
    """Wan 2.1 image to video: the image's channels beside the noisy ones, and CLIP's embedding of it."""
    vision = CLIPVisionConfig(image_size=28, patch_size=14, **CLIP_VISION)
    WanImageToVideoPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_umt5(),
        image_encoder=_seeded(lambda: CLIPVisionModel(vision), 8),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        transformer=tiny_wan(in_channels=2 * CHANNELS + TEMPORAL, image_dim=IMAGE_DIM, added_kv_proj_dim=32),
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Splits into words and marks; the pipeline's instruction is of 128 tokens, as many as Qwen's own makes of it."""
    instruction = Kandinsky5T2VPipeline(*[None] * 7).prompt_template
    splitter = Whitespace()
    words = dict.fromkeys(word for word, _ in splitter.pre_tokenize_str(f"{instruction} {' '.join(WORDS)}"))
    vocabulary = {word: n for n, word in enumerate(("<pad>", "<s>", "<unk>", *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def save_tiny_kandinsky(folder: Path, *, image: bool = False, sparse: bool = False, cond: bool = True) -> Path:
    """Kandinsky 5 with Qwen2.5-VL and CLIP. Of Qwen's processor the tokenizer: images and videos need torchvision."""
    qwen, clip = qwen_tokenizer(), tiny_tokenizer()
    text = Qwen2_5_VLConfig(**{**QWEN, "text_config": {**QWEN["text_config"], "vocab_size": len(qwen)}}, **ENDS)
    pooled = CLIPTextConfig(
        vocab_size=len(clip), eos_token_id=clip.eos_token_id, pad_token_id=0, bos_token_id=2, **CLIP_TEXT
    )
    overrides = {"visual_cond": cond, "in_text_dim": QWEN_DIM, **(SPARSE if sparse else {})}
    kind = Kandinsky5I2VPipeline if image else Kandinsky5T2VPipeline
    kind(
        tokenizer=qwen,
        text_encoder=_seeded(lambda: Qwen2_5_VLForConditionalGeneration(text), 5),
        tokenizer_2=clip,
        text_encoder_2=_seeded(lambda: CLIPTextModel(pooled), 6),
        transformer=FAMILIES["kandinsky5_video"].make(**overrides),
        vae=tiny_vaes("kandinsky5_video"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    ).save_pretrained(folder)
    return folder


def save_tiny_cogvideox(folder: Path, *, image: bool = False, version: str = "1.0", **transformer: Any) -> Path:
    """CogVideoX 1.0 with sine positions (2B), or 1.5 with rotary ones and token frames of two latent frames."""
    channels = {"in_channels": 2 * CHANNELS, "out_channels": CHANNELS} if image else {}
    newer = {"patch_size_t": 2, "use_rotary_positional_embeddings": True, **({"ofs_embed_dim": 16} if image else {})}
    settings = {**COGVIDEOX, "max_text_seq_length": 226, **(newer if version == "1.5" else {}), **channels}
    tokenizer = tiny_tokenizer()
    kind = CogVideoXImageToVideoPipeline if image else CogVideoXPipeline
    kind(
        tokenizer=tokenizer,
        text_encoder=_seeded(lambda: T5EncoderModel(T5Config(vocab_size=len(tokenizer), **T5)), 5),
        transformer=FAMILIES["cogvideox"].make(**{**settings, **transformer}),
        vae=tiny_vaes("cogvideox", **({"invert_scale_latents": True} if version == "1.5" else {})),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=3.0,
        ),
    ).save_pretrained(folder)
    return folder


LLAMA_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")


def llava_tokenizer() -> PreTrainedTokenizerFast:
    """Makes as many tokens of the image-to-video pipeline's instruction, 103, as Llama 3's own."""
    template = str(DEFAULT_PROMPT_TEMPLATE["template"])
    # Words of more than twelve letters are two.
    splitter = Split(Regex(r"\w{1,12}|[^\w\s]|\n\n"), "removed", invert=True)
    for mark in LLAMA_MARKS:
        template = template.replace(mark, " ")
    words = dict.fromkeys(word for word, _ in splitter.pre_tokenize_str(f"{template} {' '.join(WORDS)}"))
    vocabulary = {word: n for n, word in enumerate(("<pad>", "<s>", "<unk>", *LLAMA_MARKS, *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        additional_special_tokens=list(LLAMA_MARKS),
    )


def save_tiny_hunyuan_image(folder: Path, condition: str, **transformer: Any) -> Path:
    """HunyuanVideo image to video; its image processor makes 576 patches, as many as the pipeline's instruction has."""
    tokenizer, clip, side = llava_tokenizer(), tiny_tokenizer(), 24 * 2
    sizes = {"hidden_size": TEXT_DIM, "intermediate_size": 16, "num_attention_heads": 2}
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=side, patch_size=2, num_hidden_layers=2, **sizes),
        text_config=LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=3, num_key_value_heads=1, **sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    ends = {"eos_token_id": clip.eos_token_id, "pad_token_id": 0, "bos_token_id": 2}
    pooled = CLIPTextConfig(vocab_size=len(clip), **ends, **CLIP_TEXT)
    channels = {"in_channels": 2 * CHANNELS + 1, "guidance_embeds": False} if condition == "latent_concat" else {}
    settings = {"guidance_embeds": True, "image_condition_type": condition, **channels, **transformer}
    HunyuanVideoImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=_seeded(lambda: LlavaForConditionalGeneration(llava), 5),
        tokenizer_2=clip,
        text_encoder_2=_seeded(lambda: CLIPTextModel(pooled), 6),
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        transformer=FAMILIES["hunyuan_video"].make(**settings),
        vae=tiny_vaes("hunyuan_video"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    ).save_pretrained(folder)
    return folder

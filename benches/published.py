"""Published transformers: what differs from diffusers' default configs, and the clips that they are trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from crepa_trainer.data.dataset import Bucket
from crepa_trainer.families import TrainingFamily
from crepa_trainer.families.folder import constructor_defaults

from crepa_kernels.models.families import FAMILIES

# CogVideoX has its own noise.
SCHEDULER = "CogVideoXDDIMScheduler"
SCHEDULERS = {"cogvideox": {**constructor_defaults(SCHEDULER), "prediction_type": "v_prediction"}}

_COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_KANDINSKY = {"in_visual_dim": 16, "out_visual_dim": 16, "visual_cond": True}


@dataclass(frozen=True)
class Published:
    """A model as the tables of docs/ have it.

    width: D. clip: what docs/families.md trains it on. Where it makes videos of text alone, `scales`: docs/scaling.md
    has it too, and `text`: its large text encoder, with the parameters that a token goes through.
    """

    title: str
    family: str
    overrides: dict[str, Any]
    width: int
    clip: Bucket
    text: tuple[str, float] = field(default=("", 0.0))

    @property
    def scales(self) -> bool:
        return bool(self.text[0])


_UMT5, _T5 = ("UMT5-XXL", 4.63e9), ("T5-XXL", 4.63e9)
_480P = Bucket(480, 832, 81)
# In the order of the table of memory in docs/families.md.
MODELS = (
    Published("LTX 2B", "ltxvideo", {}, 2048, Bucket(512, 704, 161), _T5),
    Published("SANA-Video 2B", "sanavideo", {}, 2240, _480P, ("Gemma 2 2B", 2.02e9)),
    Published("HunyuanVideo", "hunyuan_video", {}, 3072, Bucket(544, 960, 61), ("Llama 3 8B", 6.98e9)),
    Published("Wan 1.3B", "wan", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1536, _480P, _UMT5),
    Published("Wan 14B", "wan", {}, 5120, _480P, _UMT5),
    Published("Wan 14B, image", "wan", {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, 5120, _480P),
    Published(
        "Wan 2.2 5B",
        "wan",
        {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30},
        3072,
        Bucket(704, 1280, 121),
    ),
    Published(
        "Kandinsky 5 Lite",
        "kandinsky5_video",
        {**_KANDINSKY, "model_dim": 1792, "ff_dim": 7168},
        1792,
        Bucket(512, 768, 121),
        ("Qwen 2.5 VL 7B", 6.53e9),
    ),
    Published(
        "Kandinsky 5 Pro",
        "kandinsky5_video",
        {
            **_KANDINSKY, "model_dim": 4096, "ff_dim": 16384, "time_dim": 1024, "num_text_blocks": 4,
            "num_visual_blocks": 60, "axes_dims": (32, 48, 48),
        },
        4096,
        Bucket(512, 768, 121),
        ("Qwen 2.5 VL 7B", 6.53e9),
    ),
    Published("CogVideoX 2B", "cogvideox", {}, 1920, Bucket(480, 720, 49), _T5),
    Published("CogVideoX 5B", "cogvideox", _COGVIDEOX_5B, 3072, Bucket(480, 720, 49), _T5),
    Published(
        "CogVideoX 1.5 5B",
        "cogvideox",
        {**_COGVIDEOX_5B, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 512},
        3072,
        Bucket(768, 1360, 81),
    ),
)  # fmt: skip


def family_with(name: str, transformer: Mapping[str, Any]) -> TrainingFamily:
    """A family with this transformer's config, and diffusers' default of its VAE, which is a published one."""
    kind = TrainingFamily.known[name]
    vae = next(row.vaes[0] for row in FAMILIES if row.name == name)
    configs = {
        "pipeline": {
            "transformer": ["diffusers", kind.transformer_class],
            "vae": ["diffusers", vae],
            "scheduler": ["diffusers", SCHEDULER],
        },
        "scheduler": SCHEDULERS.get(name, {}),
        "transformer": transformer,
        "vae": constructor_defaults(vae),
    }
    return kind(name, "text2video", configs)

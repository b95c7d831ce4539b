"""What each way to train keeps on each GPU, sends between them, and must encode before: docs/scaling.md.

    python -m benches.scaling

Bytes are counted on the models' own classes, without memory, and so are the VAE's operations (a multiplication and an
addition are two). Nothing here ran on a GPU: hours are operations at a rate that is assumed (``GPU``), and at the
rate of the CPU whose training steps are stored in benches/results/step-cpu.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from crepa_trainer.data.names import teacher_frames
from crepa_trainer.families import TrainingFamily
from crepa_trainer.families.folder import constructor_defaults
from crepa_trainer.reporting.plan import projector_bytes
from crepa_trainer.reporting.table import readable_bytes
from crepa_trainer.settings import RunSettings
from crepa_trainer.state import add_lora
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benches.gpu.results import MEASURED, write_whole
from benches.published import MODELS, Published, family_with
from benches.step import ENCODERS
from benches.table import ROOT, replaced
from crepa_kernels import CrepaConfig
from crepa_kernels.models.families import family_of

PAGE = ROOT / "docs/scaling.md"
RESULTS = MEASURED / "scaling.json"
GPUS = (1, 2, 4, 8, 64)
TRAINED = 16  # bytes of a trained parameter in fp32: itself, its gradient, AdamW's two averages
BF16, FP32 = 2, 4
NF4 = 0.5 + FP32 / 64  # 4 bits, and a scale for each 64 weights
GATHERED = 2  # units that FSDP2 has whole at once: the one at work, and the next
TEXT_WIDTHS = ("text_dim", "caption_channels", "text_embed_dim", "in_text_dim")
TEACHER = "DINOv2 giant"
TEACHER_PARAMETERS, TEACHER_SIDE, PATCH = 1_136_480_768, 518, 14
CLIPS = 1_000_000


@dataclass(frozen=True)
class Rate:
    """Operations of a device in a second."""

    name: str
    bf16: float
    fp32: float


# 40 % of what its maker says of an H100 SXM: 989e12 in bf16, 67e12 in fp32, as VAEs encode.
GPU = Rate("an H100 at 40 % of its peak", 0.4 * 989e12, 0.4 * 67e12)


@dataclass(frozen=True)
class Counted:
    """A model's sizes: parameters, bytes of one clip, and operations to encode it.

    Attributes:
        parameters: of the transformer; `block`: of its largest block; `outside`: of no block; `linear`: weights of
            linear layers, which a quantizer takes.
        fp8: bytes after diffusers' layerwise casting.
        lora: parameters of the trainer's LoRA of rank 16; `projector`: of CREPA's.
        states: numbers of all blocks' inputs, of the clip's tokens, which gradient checkpointing keeps.
        latents, text, frames, features: bytes of a clip in the cache, the text's at most.
        vae, text_encoder, teacher: operations for a clip.
    """

    title: str
    clip: str
    parameters: int
    block: int
    outside: int
    linear: int
    fp8: int
    lora: int
    projector: int
    states: int
    latents: int
    text: int
    frames: int
    features: int
    tokens: int
    vae: float
    text_encoder: float
    teacher: float


def transformer_of(model: Published) -> Any:
    """The transformer, without memory."""
    with torch.device("meta"):
        kind = TrainingFamily.known[model.family].transformer_class
        return getattr(diffusers, kind)(**model.overrides)


def lora_parameters(model: Published, transformer: Any) -> int:
    """Of the LoRA that the trainer gives it."""
    transformer.requires_grad_(False)
    settings = RunSettings(model="unread", data=ROOT, output=ROOT / "out", max_train_steps=1)
    with torch.device("meta"):
        add_lora(transformer, TrainingFamily.known[model.family], settings)  # type: ignore[arg-type]
    return sum(each.numel() for each in transformer.parameters() if each.requires_grad)


def _encoding(family: TrainingFamily, model: Published) -> float:
    """Operations of the VAE on one clip."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        vae = getattr(diffusers, str(family.vae_class))().eval()
        vae.encode(torch.empty(1, 3, model.clip.frames, model.clip.height, model.clip.width))
    return float(counted.get_total_flops())


def teacher_operations(width: int, blocks: int, parameters: int, side: int) -> float:
    """Of a vision transformer with patches of 14 on one frame."""
    tokens = (side // PATCH) ** 2 + 1
    return 2.0 * parameters * tokens + 4.0 * blocks * tokens**2 * width


def count(model: Published) -> Counted:
    transformer, kind = transformer_of(model), TrainingFamily.known[model.family].transformer_class
    family = family_with(model.family, {**constructor_defaults(kind), **model.overrides})
    numbers = [sum(each.numel() for each in block.parameters()) for block in family_of(transformer).blocks(transformer)]
    parameters = sum(each.numel() for each in transformer.parameters())
    linear = sum(each.weight.numel() for each in transformer.modules() if isinstance(each, nn.Linear))
    lora = lora_parameters(model, transformer)
    cast = transformer_of(model).to(torch.bfloat16)
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    layout, config = family.layout(model.clip), family.config("transformer")
    limit = family.text_limits["tokenizer"]
    width, blocks, _ = ENCODERS["giant"]
    seen, patches = len(teacher_frames(CrepaConfig(), family, model.clip)), (TEACHER_SIDE // PATCH) ** 2
    return Counted(
        title=model.title,
        clip=str(model.clip),
        parameters=parameters,
        block=max(numbers),
        outside=parameters - sum(numbers),
        linear=linear,
        fp8=sum(each.numel() * each.itemsize for each in cast.parameters()),
        lora=lora,
        projector=projector_bytes(model.width, width) // TRAINED,
        states=len(numbers) * layout.frames * prod(layout.grid) * model.width,
        latents=FP32 * prod(family.latent_shape(model.clip)),
        text=BF16 * limit * next(getattr(config, key) for key in TEXT_WIDTHS if hasattr(config, key)),
        frames=seen * 3 * model.clip.height * model.clip.width,
        features=layout.frames * patches * width * BF16,
        tokens=layout.frames * patches,
        vae=_encoding(family, model),
        text_encoder=2.0 * model.text[1] * limit,
        teacher=seen * teacher_operations(width, blocks, TEACHER_PARAMETERS, TEACHER_SIDE),
    )


Cell = Callable[[Counted, int], float]


def lora_whole(model: Counted, _: int = 1) -> float:
    """Bytes on each GPU with one GPU, with DDP, and with context parallel: a bf16 base, LoRA and projector."""
    return BF16 * model.parameters + TRAINED * (model.lora + model.projector)


def lora_sharded(model: Counted, gpus: int) -> float:
    """The same under FSDP2."""
    return lora_whole(model) / gpus + _gathered(model, gpus)


def full_sharded(model: Counted, gpus: int) -> float:
    """All weights trained in fp32 under FSDP2, on one GPU or with DDP whole."""
    return TRAINED * (model.parameters + model.projector) / gpus + _gathered(model, gpus)


def _gathered(model: Counted, gpus: int) -> float:
    return GATHERED * BF16 * model.block if gpus > 1 else 0


def quantized(model: Counted, bytes_of_linear: float) -> float:
    """With the linear layers' weights at fewer bytes each."""
    return lora_whole(model) - (BF16 - bytes_of_linear) * model.linear


def cast_to_fp8(model: Counted) -> float:
    return lora_whole(model) - BF16 * model.parameters + model.fp8


def offloaded(model: Counted) -> float:
    """Blocks in the host's memory but for the one at work and the next."""
    return lora_whole(model) - BF16 * (model.parameters - model.outside - GATHERED * model.block)


def kept_states(model: Counted, gpus: int) -> float:
    """Inputs of the blocks of one clip in bf16, under gradient checkpointing and context parallel."""
    return BF16 * model.states / gpus


def all_reduced(parameters: int, gpus: int) -> float:
    """Bytes that each GPU sends to add up gradients in fp32, by a ring."""
    return 2 * (gpus - 1) / gpus * FP32 * parameters


def crepa_in_ddp(model: Counted, gpus: int) -> float:
    """A step, once: the projector's gradient."""
    return all_reduced(model.projector, gpus)


def crepa_in_fsdp(model: Counted, gpus: int) -> float:
    """A micro-batch: the projector gathered in forward and backward, its gradient added up and scattered."""
    return 3 * (gpus - 1) / gpus * FP32 * model.projector


def base_in_fsdp(model: Counted, gpus: int) -> float:
    """A micro-batch: a frozen bf16 base gathered in forward and backward."""
    return 2 * (gpus - 1) / gpus * BF16 * model.parameters


def by_gpus(models: Sequence[Counted], cell: Cell, gpus: Sequence[int] = GPUS) -> str:
    """A Markdown table of bytes: a row a model, a column a number of GPUs."""
    heads = [f"{number} GPU{'s' * (number != 1)}" for number in gpus]
    return _table(["model", *heads], [[each.title, *(_bytes(cell(each, n)) for n in gpus)] for each in models])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(heads), "|".join(["---", *["--:"] * (len(heads) - 1)]), *(" | ".join(row) for row in rows)]
    return "\n".join(f"|{line}|" if line.startswith("---") else f"| {line} |" for line in lines)


def _bytes(value: float) -> str:
    return readable_bytes(round(value)) if value else "-"


def one_card(models: Sequence[Counted]) -> str:
    rows = [
        [
            each.title,
            f"{each.parameters / 1e9:.3g} B",
            *map(
                _bytes,
                (
                    lora_whole(each), cast_to_fp8(each), quantized(each, 1), quantized(each, NF4), offloaded(each),
                    TRAINED * each.lora, TRAINED * each.projector,
                ),
            ),
        ]
        for each in models
    ]  # fmt: skip
    heads = ["model", "parameters", "`bf16`", "`fp8`", "`int8`", "`nf4`", '`offload: "block"`', "LoRA", "projector"]
    return _table(heads, rows)


def cache_sizes(models: Sequence[Counted]) -> str:
    """Of a million clips. Features in 8 bits have a scale of 4 bytes a token beside them."""

    def terabytes(value: float) -> str:
        return f"{value * CLIPS / 1e12:.3g} TB"

    rows = []
    for each in models:
        sizes = (each.latents, each.text, each.frames, each.features, each.features / BF16 + FP32 * each.tokens)
        rows.append([each.title, each.clip, *map(terabytes, sizes)])
    return _table(["model", "clip", "latents", "text, at most", "frames", "features", "features in 8 bits"], rows)


def hours(models: Sequence[Counted], cpu: float) -> str:
    """To encode a million clips, of one device. cpu: operations a second."""
    rows = []
    for each in models:
        times = (each.vae / GPU.fp32, each.text_encoder / GPU.bf16, each.teacher / GPU.bf16)
        cells = [f"{seconds * CLIPS / 3600:,.0f}" for seconds in (*times, sum(times))]
        years = (each.vae + each.text_encoder + each.teacher) / cpu * CLIPS / 3600 / 24 / 365
        work = [f"{each.vae / 1e12:.3g}", f"{each.text_encoder / 1e12:.3g}", f"{each.teacher / 1e12:.3g}"]
        rows.append([each.title, " + ".join(work), *cells, f"{years:,.0f}"])
    heads = ["model", "10^12 operations a clip", "VAE, h", "text, h", "teacher, h", "in all, h", "on the CPU, years"]
    return _table(heads, rows)


def cpu_rate(stored: Mapping[str, Any]) -> float:
    """Operations a second of the CPU of benches.step: what its teacher took of a step that encodes live."""
    width, blocks, _ = ENCODERS[stored["encoder"]]
    each = teacher_operations(width, blocks, 12 * blocks * width**2, stored["image_size"])
    row = stored["families"][0]
    return float(each * row["tokens"][0] / (row["median_ms"]["live"] - row["median_ms"]["cached"]) * 1e3)


def rendered(page: str, models: Sequence[Counted], cpu: float) -> str:
    """``page`` with every table."""
    tables = {
        "one card": one_card(models),
        "fsdp2 lora": by_gpus(models, lora_sharded, GPUS[1:]),
        "fsdp2 full": by_gpus(models, full_sharded),
        "states": by_gpus(models, kept_states),
        "ddp": by_gpus(models, crepa_in_ddp, GPUS[1:]),
        "fsdp2": by_gpus(models, crepa_in_fsdp, GPUS[1:]),
        "fsdp2 base": by_gpus(models, base_in_fsdp, GPUS[1:]),
        "cache": cache_sizes(models),
        "hours": hours(models, cpu) + f"\n\nThe GPU: {GPU.name} ({GPU.bf16 / 1e12:.0f} x 10^12 a second in bf16, "
        f"{GPU.fp32 / 1e12:.0f} in fp32). The CPU: {cpu / 1e12:.2f}, by the stored step.",
    }  # fmt: skip
    for name, table in tables.items():
        page = replaced(page, name, table, "computed")
    return page


def stored() -> tuple[list[Counted], float]:
    """What was counted of each model, and the rate of the CPU."""
    models = [Counted(**each) for each in json.loads(RESULTS.read_text())]
    return models, cpu_rate(json.loads(Path(MEASURED / "step-cpu.json").read_text()))


def main() -> None:
    counted = [asdict(count(model)) for model in MODELS if model.scales]
    write_whole(RESULTS, json.dumps(counted, indent=1) + "\n")
    write_whole(PAGE, rendered(PAGE.read_text(), *stored()))


if __name__ == "__main__":
    main()

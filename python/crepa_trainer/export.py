"""The trained weights for others: a LoRA or a transformer of stock diffusers, the EMA's, CREPA's projector."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from .checkpoint import Checkpoint, newest_checkpoint, read_checkpoint, trained_weights
from .comfyui import DOWN, comfyui_lora
from .sharding import is_sharded, whole_copy, whole_weights
from .state import trained_parameters
from .state_files import json_digest

if TYPE_CHECKING:
    import torch
    from diffusers.training_utils import EMAModel
    from torch import Tensor, nn

    from crepa_kernels import CrepaRegularizer

    from .families import TrainingFamily

FOLDER = "trained"
EMA_FOLDER = "ema"
EXPORTED = "exported"
COMFYUI_FILE = "comfyui_lora.safetensors"


def export(
    family: TrainingFamily,
    transformer: nn.Module,
    crepa: CrepaRegularizer | None,
    ema: EMAModel | None,
    described: Checkpoint,
    form: str,
) -> None:
    """Writes the weights into the folder of `described` and those of their exponential moving average into `ema` there;
    in one process, or where they are sharded in all of them, of which the first writes.

    A LoRA of the form "diffusers" is `pytorch_lora_weights.safetensors` for `load_lora_weights(folder)`, of "comfyui"
    `comfyui_lora.safetensors`, of "both" the two; a whole transformer is for `from_pretrained(folder,
    subfolder="transformer")`, or "transformer_2" where that was trained. Beside them CREPA's projector and settings.
    """
    _write(family, transformer, described, form)
    if crepa is not None:
        crepa.save_pretrained(described.folder)
    if ema is not None:
        with ema_weights(transformer, ema):
            _write(family, transformer, replace(described, folder=described.folder / EMA_FOLDER), form)


@contextmanager
def ema_weights(transformer: nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """The EMA in the place of the trained weights, which come back."""
    if ema is None:
        yield
        return
    weights = list(trained_parameters(transformer).values())
    ema.store(weights)
    ema.copy_to(weights)
    try:
        yield
    finally:
        ema.restore(weights)


def where(folder: Path, *, full: bool, expert: str | None) -> str:
    """A line that says where the trained weights are, and how they are loaded where that is not as usual."""
    how = ", for load_lora_weights with load_into_transformer_2=True" if expert == "low" and not full else ""
    return f"The trained weights are in {folder}{how}"


def export_checkpoint(place: Path, folder: Path | None, form: str, dtype: torch.dtype) -> str:
    """Writes a checkpoint's trained weights in `dtype` into `folder`, None: `exported/step-...` beside the checkpoints.

    place: a checkpoint, or a run's output folder, whose newest is taken. form: as of `export`, or "peft", an adapter's
    folder for PeftModel.from_pretrained. Returns a line that says where they are.

    Raises:
        ValueError: no checkpoint, a damaged one, another form than "diffusers" of one without a LoRA, or ComfyUI's
            where no original names are known; for ComfyUI, and where all weights were trained, also as
            `TrainingFamily.of`: of the first the model's configs are read, of the second its weights.
    """
    place = newest_checkpoint(place) or place
    checkpoint = read_checkpoint(place)
    folder = place.resolve().parent.parent / EXPORTED / place.resolve().name if folder is None else folder
    weights = {name: tensor.to(dtype) for name, tensor in trained_weights(place).items()}
    identity = checkpoint.identity
    full = identity["training"] == "full"
    if full and form != "diffusers":
        raise ValueError(f"--format {form}: {place} has no LoRA, all weights were trained")
    described = replace(checkpoint, folder=folder)
    if full:
        family = _family(checkpoint)
        transformer: Any = family.load_transformer(dtype)
        transformer.load_state_dict({**transformer.state_dict(), **weights})
        transformer.save_pretrained(folder / family.transformer_part)
    elif form == "peft":
        _write_for_peft(_lora(weights), described)
    else:
        _write_lora(None if form == "diffusers" else _family(checkpoint), _lora(weights), described, form)
    return where(folder, full=full, expert=identity["expert"])


def save_lora(
    family: TrainingFamily, weights: Mapping[str, Tensor], described: Checkpoint, form: str = "diffusers"
) -> None:
    """Writes a LoRA, given as trained weights by name, into the folder of `described`; form: as of `export`."""
    _write_lora(family, _lora(weights), described, form)


def _write(family: TrainingFamily, transformer: Any, described: Checkpoint, form: str) -> None:
    sharded = is_sharded(transformer)
    if described.identity["training"] == "full":
        model = whole_copy(transformer) if sharded else transformer
        if model is not None:
            model.save_pretrained(described.folder / family.transformer_part)
    elif weights := whole_weights(transformer, trained=True) if sharded else trained_parameters(transformer):
        save_lora(family, weights, described, form)


def _lora(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights of an adapter by the names of its layers alone."""
    return {name.replace(".default.", "."): tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _family(checkpoint: Checkpoint) -> TrainingFamily:
    from .families import TrainingFamily

    return TrainingFamily.of(checkpoint.model, checkpoint.identity["task"], None, checkpoint.identity["expert"])


def _write_lora(family: TrainingFamily | None, lora: Mapping[str, Tensor], described: Checkpoint, form: str) -> None:
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

    files: dict[str, dict[str, Tensor]] = {}
    if form in ("diffusers", "both"):
        files[LORA_WEIGHT_NAME_SAFE] = {f"transformer.{name}": tensor for name, tensor in lora.items()}
    if family is not None and form in ("comfyui", "both"):
        files[COMFYUI_FILE] = comfyui_lora(family, lora)
    described.folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        _save(tensors, described.folder / name, _metadata(lora, described))


def _write_for_peft(lora: Mapping[str, Tensor], described: Checkpoint) -> None:
    from peft import LoraConfig

    layers, rank = _layers(lora), described.identity["lora_rank"]
    described.folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(r=rank, lora_alpha=rank, target_modules=layers).save_pretrained(str(described.folder))
    named = {f"base_model.model.{name}": tensor for name, tensor in lora.items()}
    _save(named, described.folder / "adapter_model.safetensors", _metadata(lora, described))


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """A safetensors file of the same bytes each time: the library writes metadata in another order in each process."""
    content = memoryview(save(tensors, metadata))
    begin = 8 + int.from_bytes(content[:8], "little")
    header = {**json.loads(bytes(content[8:begin])), "__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with file.open("wb") as opened:
        opened.writelines((len(text).to_bytes(8, "little"), text, content[begin:]))


def _layers(lora: Mapping[str, Tensor]) -> list[str]:
    return sorted(name.removesuffix(DOWN) for name in lora if name.endswith(DOWN))


def _metadata(lora: Mapping[str, Tensor], described: Checkpoint) -> dict[str, str]:
    """What a LoRA's file says of itself, in its header."""
    identity, model = described.identity, Path(described.model)
    rank = str(identity["lora_rank"])
    return {
        "format": "pt",
        # A folder's name: where it lies is nobody's business.
        "base_model": model.name if model.is_absolute() else described.model,
        **({} if identity["expert"] is None else {"expert": identity["expert"]}),
        "rank": rank,
        "alpha": rank,
        "targets": json.dumps(sorted({re.sub(r"\.\d+\.", ".*.", layer, count=1) for layer in _layers(lora)})),
        "steps": str(described.step),
        "settings_sha256": json_digest(dict(identity)),
        "versions": json.dumps(versions()),
    }


def versions() -> dict[str, str]:
    """Of the packages that a run's weights come from."""
    return {package: version(package) for package in ("crepa-kernels", "diffusers", "peft", "torch")}

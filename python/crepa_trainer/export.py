"""The trained weights for others: a LoRA or a transformer of stock diffusers, the EMA's, CREPA's projector."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from .adapters import Adapter, adapter_layers, peft_names
from .checkpoint import STATE_FILE, Checkpoint, newest_checkpoint, read_checkpoint, trained_weights
from .comfyui import comfyui_lora
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
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FILES = {
    "diffusers": (_DIFFUSERS_FILE,),
    "comfyui": (COMFYUI_FILE,),
    "both": (_DIFFUSERS_FILE, COMFYUI_FILE),
    "peft": (_PEFT_FILE, _PEFT_CONFIG),
}


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
    `comfyui_lora.safetensors`, of "both" the two, of "peft" a folder for `PeftModel.from_pretrained`; a file of another
    form that is there is removed. A whole transformer is for `from_pretrained(folder, subfolder="transformer")`, or
    "transformer_2" where that was trained. Beside them CREPA's projector and settings.
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

    place: a checkpoint, or a run's output folder, whose newest is taken. form: as of `export`. Returns a line that
    says where they are.

    Raises:
        ValueError: no checkpoint, a damaged one, another form than "diffusers" of one without a LoRA, that form of what
            diffusers does not load, or ComfyUI's where no original names are known; for ComfyUI, and where all weights
            were trained, also as `TrainingFamily.of`: of the first the model's configs are read, of the second its
            weights.
    """
    newest = newest_checkpoint(place)
    if newest is None and place.is_dir() and not (place / STATE_FILE).exists():
        raise ValueError(f"{place} is no complete checkpoint, and no run's folder that has one")
    place = newest or place
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
    else:
        adapter = Adapter.of(identity)
        if form in ("diffusers", "both") and not adapter.is_lora:
            raise ValueError(f"--format {form}: stock diffusers loads no {adapter.kind}: take peft or comfyui")
        _write_lora(_family(checkpoint) if form in ("comfyui", "both") else None, peft_names(weights), described, form)
    return where(folder, full=full, expert=identity["expert"])


def save_lora(
    family: TrainingFamily, weights: Mapping[str, Tensor], described: Checkpoint, form: str | None = None
) -> None:
    """Writes a LoRA, given as trained weights by name, into the folder of `described`.

    form: as of `export`; None is that of stock diffusers, or of peft where it loads no such adapter.
    """
    if form is None:
        form = "diffusers" if Adapter.of(described.identity).is_lora else "peft"
    _write_lora(family, peft_names(weights), described, form)


def _write(family: TrainingFamily, transformer: Any, described: Checkpoint, form: str) -> None:
    sharded = is_sharded(transformer)
    if described.identity["training"] == "full":
        model = whole_copy(transformer) if sharded else transformer
        if model is not None:
            model.save_pretrained(described.folder / family.transformer_part)
    elif weights := whole_weights(transformer, trained=True) if sharded else trained_parameters(transformer):
        save_lora(family, weights, described, form)
        # What the run has left there at an earlier end, in another form, is of fewer steps.
        for name in {each for names in _FILES.values() for each in names}.difference(_FILES[form]):
            (described.folder / name).unlink(missing_ok=True)


def _family(checkpoint: Checkpoint) -> TrainingFamily:
    from .families import TrainingFamily

    return TrainingFamily.of(checkpoint.model, checkpoint.identity["task"], None, checkpoint.identity["expert"])


def _write_lora(family: TrainingFamily | None, lora: Mapping[str, Tensor], described: Checkpoint, form: str) -> None:
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    adapter, layers = Adapter.of(described.identity), adapter_layers(lora)
    metadata = _metadata(adapter, layers, described)
    described.folder.mkdir(parents=True, exist_ok=True)
    if form in ("diffusers", "both"):
        told = {f"transformer.{key}": value for key, value in adapter.told_to_diffusers(layers).items()}
        more = {LORA_ADAPTER_METADATA_KEY: json.dumps(told, sort_keys=True)} if told else {}
        weights = {f"transformer.{name}": tensor for name, tensor in lora.items()}
        _save(weights, described.folder / _DIFFUSERS_FILE, metadata | more)
    if family is not None and form in ("comfyui", "both"):
        _save(comfyui_lora(family, lora, adapter), described.folder / COMFYUI_FILE, metadata)
    if form == "peft":
        adapter.config(layers).save_pretrained(str(described.folder))
        named = {f"base_model.model.{name}": tensor for name, tensor in lora.items()}
        _save(named, described.folder / _PEFT_FILE, metadata)


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """A safetensors file of the same bytes each time: the library writes metadata in another order in each process."""
    content = memoryview(save(tensors, metadata))
    begin = 8 + int.from_bytes(content[:8], "little")
    header = {**json.loads(bytes(content[8:begin])), "__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with file.open("wb") as opened:
        opened.writelines((len(text).to_bytes(8, "little"), text, content[begin:]))


def _metadata(adapter: Adapter, layers: Sequence[str], described: Checkpoint) -> dict[str, str]:
    """What a LoRA's file says of itself, in its header."""
    identity, model = described.identity, Path(described.model)
    return {
        "format": "pt",
        # A folder's name: where it lies is nobody's business.
        "base_model": model.name if model.is_absolute() else described.model,
        **({} if identity["expert"] is None else {"expert": identity["expert"]}),
        **({} if adapter.kind == "lora" else {"type": adapter.kind}),
        "rank": str(adapter.rank),
        "alpha": str(adapter.alpha),
        "targets": json.dumps(sorted({re.sub(r"\.\d+\.", ".*.", layer, count=1) for layer in layers})),
        "steps": str(described.step),
        "settings_sha256": json_digest(dict(identity)),
        "versions": json.dumps(versions()),
    }


def versions() -> dict[str, str]:
    """Of the packages that a run's weights come from."""
    return {package: version(package) for package in ("crepa-kernels", "diffusers", "peft", "torch")}

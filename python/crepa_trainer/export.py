"""The trained weights for others: a LoRA or a transformer of stock diffusers, the EMA's, CREPA's projector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from .checkpoint import WEIGHTS_FILE, Checkpoint, newest_checkpoint, read_checkpoint
from .state import trained_parameters

if TYPE_CHECKING:
    import torch
    from diffusers.training_utils import EMAModel
    from torch import Tensor, nn

    from crepa_kernels import CrepaRegularizer

    from .families import TrainingFamily

FOLDER = "trained"
EMA_FOLDER = "ema"
EXPORTED = "exported"
FORMS = ("diffusers", "peft")


def export(
    family: TrainingFamily,
    transformer: nn.Module,
    crepa: CrepaRegularizer | None,
    ema: EMAModel | None,
    *,
    full: bool,
    folder: Path,
) -> None:
    """Writes the weights into `folder` and those of their exponential moving average into `folder/ema`; in one process.

    A LoRA is `pytorch_lora_weights.safetensors` for `load_lora_weights(folder)`, a whole transformer is for
    `from_pretrained(folder, subfolder="transformer")`, or "transformer_2" where that was trained. Beside them CREPA's
    projector and settings.
    """
    _write(family, transformer, full, folder)
    if crepa is not None:
        crepa.save_pretrained(folder)
    if ema is not None:
        with ema_weights(transformer, ema):
            _write(family, transformer, full, folder / EMA_FOLDER)


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

    place: a checkpoint, or a run's output folder, whose newest is taken. form: of `FORMS`; "peft" is an adapter's
    folder for PeftModel.from_pretrained. Returns a line that says where they are.

    Raises:
        ValueError: no checkpoint, a damaged one, "peft" of one without a LoRA; where all weights were trained also as
            `TrainingFamily.of`, whose model is loaded.
    """
    place = newest_checkpoint(place) or place
    checkpoint = read_checkpoint(place)
    folder = place.resolve().parent.parent / EXPORTED / place.resolve().name if folder is None else folder
    weights = {name: tensor.to(dtype) for name, tensor in load_file(place / WEIGHTS_FILE).items()}
    identity = checkpoint.identity
    full = identity["training"] == "full"
    if full and form != "diffusers":
        raise ValueError(f"--format {form}: {place} has no LoRA, all weights were trained")
    folder.mkdir(parents=True, exist_ok=True)
    if full:
        _write_transformer(checkpoint, weights, folder)
    else:
        lora = {name.replace(".default.", "."): tensor for name, tensor in weights.items()}
        _LORA_WRITERS[form](lora, folder)
    return where(folder, full=full, expert=identity["expert"])


def _write_transformer(checkpoint: Checkpoint, weights: Mapping[str, Tensor], folder: Path) -> None:
    from .families import TrainingFamily

    family = TrainingFamily.of(checkpoint.model, checkpoint.identity["task"], None, checkpoint.identity["expert"])
    dtype = next(iter(weights.values())).dtype
    transformer: Any = family.load_transformer(dtype)
    transformer.load_state_dict({**transformer.state_dict(), **weights})
    transformer.save_pretrained(folder / family.transformer_part)


def _write_for_diffusers(lora: Mapping[str, Tensor], folder: Path) -> None:
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

    named = {f"transformer.{name}": tensor for name, tensor in lora.items()}
    save_file(named, folder / LORA_WEIGHT_NAME_SAFE, {"format": "pt"})


def _write_for_peft(lora: Mapping[str, Tensor], folder: Path) -> None:
    from peft import LoraConfig

    ranks = {name.split(".lora_A.")[0]: len(tensor) for name, tensor in lora.items() if ".lora_A." in name}
    (rank,) = set(ranks.values())
    LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(ranks)).save_pretrained(str(folder))
    named = {f"base_model.model.{name}": tensor for name, tensor in lora.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})


_LORA_WRITERS = dict(zip(FORMS, (_write_for_diffusers, _write_for_peft), strict=True))


def _write(family: TrainingFamily, transformer: Any, full: bool, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if full:
        transformer.save_pretrained(folder / family.transformer_part)
    else:
        family.save_lora(transformer, folder)

"""The trained weights for others: a LoRA or a transformer of stock diffusers, the average's, CREPA's projector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .student import trained_parameters

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel
    from torch import nn

    from crepa_kernels import CrepaRegularizer

    from .families import TrainingFamily

FOLDER = "trained"
AVERAGE = "ema"


def export(
    family: TrainingFamily,
    transformer: nn.Module,
    crepa: CrepaRegularizer | None,
    average: EMAModel | None,
    *,
    full: bool,
    folder: Path,
) -> None:
    """Writes the weights into `folder` and the average's into `folder/ema`; in one process.

    A LoRA is `pytorch_lora_weights.safetensors` for `load_lora_weights(folder)`, a whole transformer is for
    `from_pretrained(folder, subfolder="transformer")`, or "transformer_2" where that was trained. Beside them CREPA's
    projector and settings.
    """
    _write(family, transformer, full, folder)
    if crepa is not None:
        crepa.save_pretrained(folder)
    if average is not None:
        with averaged(transformer, average):
            _write(family, transformer, full, folder / AVERAGE)


@contextmanager
def averaged(transformer: nn.Module, average: EMAModel | None) -> Iterator[None]:
    """The average in the place of the trained weights, which come back."""
    if average is None:
        yield
        return
    weights = list(trained_parameters(transformer).values())
    average.store(weights)
    average.copy_to(weights)
    try:
        yield
    finally:
        average.restore(weights)


def _write(family: TrainingFamily, transformer: Any, full: bool, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if full:
        transformer.save_pretrained(folder / family.transformer_part)
    else:
        family.save_lora(transformer, folder)

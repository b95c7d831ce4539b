"""What `lora_type` trains beside the frozen weights, through peft."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from crepa_kernels.config.rules import describe

if TYPE_CHECKING:
    from torch import Tensor

_LINEAR_AND_IMAGES = (nn.Linear, nn.Conv1d, nn.Conv2d)
_LORAS = ("lora", "dora", "rslora")
# What they are where all weights are trained.
_WITHOUT = {"lora_type": "lora", "lora_alpha": None, "lora_dropout": 0, "lora_format": "diffusers"}
_PARAMETER = re.compile(r"\.(lora_|hada_|lokr_)")


@dataclass(frozen=True)
class Adapter:
    """An adapter as the settings, or a checkpoint's identity, say it.

    kind: "lora", "dora" or "rslora", of peft's LoraConfig; "loha" or "lokr". alpha: what its product is multiplied by,
    times the rank, of "rslora" times its root.
    """

    kind: str
    rank: int
    alpha: float
    dropout: float

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Adapter:
        """Of settings by key; what a checkpoint of an earlier version does not say was not there."""
        rank = values["lora_rank"]
        alpha = values.get("lora_alpha") or rank
        # peft's own type, in files of whole numbers.
        alpha = int(alpha) if float(alpha).is_integer() else alpha
        return cls(values.get("lora_type", "lora"), rank, alpha, values.get("lora_dropout", 0.0))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.kind == "rslora" else self.rank)

    @property
    def is_lora(self) -> bool:
        """Whether stock diffusers loads it."""
        return self.kind in _LORAS

    @property
    def takes(self) -> tuple[type[nn.Module], ...]:
        """The layers that it can be put on."""
        return (*_LINEAR_AND_IMAGES, nn.Conv3d) if self.is_lora else _LINEAR_AND_IMAGES

    def config(self, targets: Iterable[str]) -> Any:
        """peft's config of it on the layers that `targets` names."""
        import peft

        shared: dict[str, Any] = {"r": self.rank, "target_modules": list(targets)}
        if not self.is_lora:
            kind = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[self.kind]
            return kind(**shared, alpha=self.alpha, init_weights=True)
        return peft.LoraConfig(**shared, **self._of_lora, lora_dropout=self.dropout, init_lora_weights=True)

    @property
    def _of_lora(self) -> dict[str, Any]:
        return {"lora_alpha": self.alpha, "use_dora": self.kind == "dora", "use_rslora": self.kind == "rslora"}

    def told_to_diffusers(self, layers: Iterable[str]) -> dict[str, Any]:
        """What diffusers does not see in the weights, by its own names; nothing where there is nothing."""
        if self.kind == "lora" and self.alpha == self.rank:
            return {}
        return {"r": self.rank, "target_modules": sorted(layers), **self._of_lora}


def adapter_problems(values: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    """Settings of an adapter that contradict each other, or would do nothing: the keys, and what is wrong."""
    kind, form, dropout = values["lora_type"], values["lora_format"], values["lora_dropout"]
    said = f'lora_type = "{kind}"'
    if values["training"] == "full":
        rule = 'training = "full" trains all weights and has no LoRA'
        for key, without in _WITHOUT.items():
            if values[key] != without:
                yield {"training", key}, describe(key, values[key], rule)
    elif kind not in _LORAS:
        if dropout:
            yield {"lora_type", "lora_dropout"}, describe("lora_dropout", dropout, f"{said} has none in peft")
        if form in ("diffusers", "both"):
            rule = f'pipelines of stock diffusers load no {said}: must be "peft" or "comfyui"'
            yield {"lora_type", "lora_format"}, describe("lora_format", form, rule)
    elif kind == "dora" and form in ("comfyui", "both"):
        rule = f'ComfyUI reads {said} otherwise than it was trained: must be "diffusers" or "peft"'
        yield {"lora_type", "lora_format"}, describe("lora_format", form, rule)


def adapter_layers(weights: Iterable[str]) -> list[str]:
    """The layers with an adapter, by the names of its weights."""
    return sorted({name[: found.start()] for name in weights if (found := _PARAMETER.search(name))})


def peft_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights of an adapter on the CPU, by the names that peft gives them in a file."""
    named = {re.sub(r"\.default(?=\.|$)", "", name): tensor for name, tensor in weights.items()}
    magnitudes = "lora_magnitude_vector"
    return {
        name.replace(f"{magnitudes}.weight", magnitudes): tensor.detach().cpu().contiguous()
        for name, tensor in named.items()
    }

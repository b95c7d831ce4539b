"""What a run trains, put together in the order that CREPA asks for: adapter, CREPA and LayerSync, optimiser, scheduler,
prepare.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from crepa_kernels import CrepaRegularizer, LayerSync
from crepa_kernels.models.families import family_of

from .comfyui import original_layers
from .offload import offload_blocks
from .precision import QUANTIZED, loading, prepare_base

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    from crepa_kernels import CrepaConfig

    from .families import TrainingFamily
    from .settings import RunSettings

# torch 2.13's C++ code gave wrong gradients: with convolutions laid out otherwise one of SANA-Video's first block, 100
# times too large; with vector instructions some of HunyuanVideo's, 1.6 % off.
COMPILER_ON_CPU = {"layout_optimization": False, "cpp.simdlen": 1}
_TAKE_A_LORA = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class TrainState:
    """What a run trains and with what, prepared by `accelerator`. `crepa` None trains without CREPA, so `layersync`."""

    accelerator: Accelerator
    transformer: torch.nn.Module
    crepa: CrepaRegularizer | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    max_grad_norm: float = 1.0
    layersync: LayerSync | None = None


def make_state(
    accelerator: Accelerator, family: TrainingFamily, settings: RunSettings, config: CrepaConfig
) -> TrainState:
    """The transformer with its adapter or all of its weights in fp32, CREPA on it, optimiser and scheduler, prepared.

    Frozen weights are as `base_precision` and `offload` say. ValueError for LoRA targets that the model lacks, and as
    CrepaRegularizer and LayerSync.
    """
    from diffusers.optimization import get_scheduler

    full = settings.training == "full"
    place = partial(place_base, settings=settings, device=accelerator.device)
    transformer: Any = family.load_transformer(
        torch.float32 if full else PRECISIONS[settings.mixed_precision], place, **loading(settings.base_precision)
    )
    if full:
        transformer.requires_grad_(True)
    else:
        add_lora(transformer, family, settings)
    place(transformer)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    crepa = None
    if config.crepa_enabled:
        crepa = CrepaRegularizer(config, transformer, max_train_steps=settings.max_train_steps)
    layersync = LayerSync(settings.layersync, transformer) if settings.layersync_enabled else None
    if settings.compile_blocks:
        compile_blocks(transformer, options=COMPILER_ON_CPU if accelerator.device.type == "cpu" else None)
    groups = parameter_groups(
        transformer, settings.learning_rate, settings.projector_learning_rate or settings.learning_rate
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    scheduler = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
    if settings.base_precision != "bf16":
        # Each process reads them from the same files, in types that processes cannot send each other.
        frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)
    transformer, optimizer, scheduler = accelerator.prepare(
        transformer, optimizer, scheduler, device_placement=[settings.offload == "none", True, True]
    )
    if crepa is not None:
        crepa.check_optimizer(optimizer)
    return TrainState(accelerator, transformer, crepa, optimizer, scheduler, settings.max_grad_norm, layersync)


def place_base(transformer: Any, settings: RunSettings, device: torch.device) -> None:
    """Brings a loaded transformer, with its adapters if any, to what `base_precision` and `offload` say."""
    prepare_base(transformer, settings.base_precision, PRECISIONS[settings.mixed_precision])
    if settings.offload == "none":
        transformer.to(device)
        return
    # diffusers takes torchao's weights for present where a stream has sent them off.
    streams = device.type == "cuda" and settings.base_precision not in QUANTIZED
    offload_blocks(transformer, family_of(transformer).blocks(transformer), settings.offload, device, streams=streams)


def parameter_groups(
    transformer: torch.nn.Module, learning_rate: float, projector_learning_rate: float
) -> list[dict[str, Any]]:
    """Optimiser groups of all that requires a gradient; the projector starts from nothing and may learn faster."""
    trained = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
    projector = [p for name, p in trained if name.startswith("crepa_projector.")]
    adapter = [p for name, p in trained if not name.startswith("crepa_projector.")]
    groups = [{"params": adapter, "lr": learning_rate}, {"params": projector, "lr": projector_learning_rate}]
    return [group for group in groups if group["params"]]


def add_lora(transformer: Any, family: TrainingFamily, settings: RunSettings) -> None:
    """A LoRA in fp32 on the layers of `lora_targets`, or on those that the family names.

    ValueError for one that the model lacks, or that has no name in the file that `lora_format` asks for.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    targets = list(settings.lora_targets or family.lora_targets)
    for target in targets:
        found = [each for name, each in transformer.named_modules() if name == target or name.endswith(f".{target}")]
        if not found:
            raise ValueError(f"lora_targets: {target} is no layer of {type(transformer).__name__}")
        # peft's own words show the whole layer.
        wrong = next((type(each).__name__ for each in found if not isinstance(each, _TAKE_A_LORA)), None)
        if wrong is not None:
            raise ValueError(f"lora_targets: {target} is a {wrong}, and only linear and convolution layers take a LoRA")
    transformer.add_adapter(
        LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=targets, init_lora_weights=True)
    )
    cast_training_params(transformer, dtype=torch.float32)
    if settings.lora_format != "diffusers":
        original_layers(
            family,
            (name.removesuffix(".lora_A") for name, _ in transformer.named_modules() if name.endswith(".lora_A")),
        )


def compile_blocks(transformer: Any, **options: Any) -> None:
    """Compiles a transformer's repeated blocks as diffusers does, or each block where it does not list their classes.

    `options`: of torch.compile. The hooks that capture hidden states stay in force, names of weights as they are.
    """
    blocks = family_of(transformer).blocks(transformer)
    # diffusers compiles what it lists of HunyuanVideo even where the blocks are of other classes (token_replace).
    if {type(block).__name__ for block in blocks} <= set(transformer._repeated_blocks or ()):
        transformer.compile_repeated_blocks(**options)
    else:
        for block in blocks:
            block.compile(**options)


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights of an unwrapped transformer by name, without CREPA's projector."""
    return {
        name: parameter
        for name, parameter in transformer.named_parameters()
        if parameter.requires_grad and not name.startswith("crepa_projector.")
    }


def make_ema(transformer: nn.Module, decay: float | None) -> EMAModel | None:
    """The exponential moving average of the trained weights of an unwrapped transformer, as they are now."""
    from diffusers.training_utils import EMAModel

    if decay is None:
        return None
    return EMAModel(trained_parameters(transformer).values(), decay=decay, foreach=True)

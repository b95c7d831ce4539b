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

from .adapters import Adapter, adapter_layers
from .comfyui import check_layers
from .context import share_tokens
from .offload import offload_blocks
from .optimizers import make_optimizer, start_training
from .precision import QUANTIZED, loading, prepare_base
from .ranks import wait_for_all
from .sharding import is_sharded, shard

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    from crepa_kernels import CrepaConfig

    from .families import TrainingFamily
    from .settings import RunSettings

# torch 2.13's C++ code gave wrong gradients: with convolutions laid out otherwise one of SANA-Video's first block, 100
# times too large; with vector instructions some of HunyuanVideo's, 1.6 % off.
COMPILER_ON_CPU = {"layout_optimization": False, "cpp.simdlen": 1}
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class TrainState:
    """What a run trains and with what, prepared by `accelerator`. `crepa` None trains without CREPA, so `layersync`.

    `context_parallel`: processes that share out the tokens of a clip.
    """

    accelerator: Accelerator
    transformer: torch.nn.Module
    crepa: CrepaRegularizer | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    max_grad_norm: float = 1.0
    layersync: LayerSync | None = None
    context_parallel: int = 1


def make_state(
    accelerator: Accelerator, family: TrainingFamily, settings: RunSettings, config: CrepaConfig
) -> TrainState:
    """The transformer with its adapter or all of its weights in fp32, CREPA on it, optimiser and scheduler, prepared.

    Frozen weights are as `base_precision` and `offload` say; with `sharding` each process has its share of all weights.
    ValueError for LoRA targets that the model lacks, and as CrepaRegularizer and LayerSync.
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
    sharded = settings.sharding == "fsdp2"
    place(transformer)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    crepa = None
    if config.crepa_enabled:
        crepa = CrepaRegularizer(
            config,
            transformer,
            max_train_steps=settings.max_train_steps,
            teacher_device=settings.teacher_device,
            teacher_offload=settings.teacher_offload,
        )
    layersync = LayerSync(settings.layersync, transformer) if settings.layersync_enabled else None
    if settings.compile_blocks:
        compile_blocks(transformer, options=COMPILER_ON_CPU if accelerator.device.type == "cpu" else None)
    wait_for_all()  # one may load for longer than a step may take
    share_tokens(transformer, settings.context_parallel, accelerator.device.type)
    if sharded:
        shard(transformer, accelerator.device)
    groups = parameter_groups(
        transformer, settings.learning_rate, settings.projector_learning_rate or settings.learning_rate
    )
    optimizer = make_optimizer(settings.optimizer, groups, settings.optimizer_args, settings.weight_decay)
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
    if sharded:
        # Autocast alone, without DistributedDataParallel.
        transformer = accelerator.prepare_model(transformer, device_placement=False, evaluation_mode=True)
        optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    else:
        transformer, optimizer, scheduler = accelerator.prepare(
            transformer, optimizer, scheduler, device_placement=[settings.offload == "none", True, True]
        )
    start_training(optimizer)
    if crepa is not None:
        crepa.check_optimizer(optimizer)
    return TrainState(
        accelerator,
        transformer,
        crepa,
        optimizer,
        scheduler,
        settings.max_grad_norm,
        layersync,
        settings.context_parallel,
    )


def place_base(transformer: Any, settings: RunSettings, device: torch.device) -> None:
    """Brings a loaded transformer, with its adapters if any, to what `base_precision` and `offload` say."""
    prepare_base(transformer, settings.base_precision, PRECISIONS[settings.mixed_precision])
    if settings.sharding != "none":
        return  # it moves block by block: a device need not hold the whole model
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
    """The adapter of `lora_type` in fp32 on the layers of `lora_targets`, or on those that the family names.

    ValueError for one that the model lacks, that takes no such adapter, or that has no name in the file that
    `lora_format` asks for.
    """
    from diffusers.training_utils import cast_training_params

    adapter = Adapter.of(settings.model_dump())
    targets = list(settings.lora_targets or family.lora_targets)
    for target in targets:
        found = [each for name, each in transformer.named_modules() if name == target or name.endswith(f".{target}")]
        if not found:
            raise ValueError(f"lora_targets: {target} is no layer of {type(transformer).__name__}")
        # peft's own words show the whole layer.
        wrong = next((type(each).__name__ for each in found if not isinstance(each, adapter.takes)), None)
        if wrong is not None:
            which = "linear and convolution layers take a LoRA"
            if not adapter.is_lora:
                which = f"linear layers and convolutions of images take lora_type = {adapter.kind}"
            raise ValueError(f"lora_targets: {target} is a {wrong}, and only {which}")
    transformer.add_adapter(adapter.config(targets))
    cast_training_params(transformer, dtype=torch.float32)
    if settings.lora_format in ("comfyui", "both"):
        check_layers(family, adapter, adapter_layers(trained_parameters(transformer)))


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
    # torch copies lists of shares in no one call.
    foreach = not is_sharded(transformer)
    return EMAModel(trained_parameters(transformer).values(), decay=decay, foreach=foreach)

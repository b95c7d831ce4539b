"""What the launcher and its environment say: applied, or refused by name; never instead of the settings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .settings import RunSettings

_YES = {"1", "true", "t", "yes", "y", "on"}
_SETTING = 'use sharding = "fsdp2" in the settings, and distributed_type MULTI_GPU in accelerate\'s config'
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed, whose engine keeps the backward, clipping, the optimizer and its "
    f"checkpoints to itself; FSDP2 shards what ZeRO does: {_SETTING}",
    "ACCELERATE_USE_FSDP": f"FSDP by accelerate, which makes no unit of CREPA's projector: {_SETTING}",
    "ACCELERATE_USE_MEGATRON_LM": f"Megatron-LM, which has no diffusers transformers: {_SETTING}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": f"a parallelism config: {_SETTING}",
}


def launched_processes() -> int:
    """The number of processes as torchrun or accelerate says, before they know of each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def training_device() -> str:
    """The type of the device that accelerate will train on, which its config may put on the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in _YES:
        return "cpu"
    if named := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        return torch.device(named).type
    device = torch.accelerator.current_accelerator()
    return device.type if device is not None and torch.accelerator.is_available() else "cpu"


def device_memory() -> int | None:
    """Bytes of the training device, of the first where there are several; None on a CPU, or where it does not say."""
    if training_device() != "cuda":
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def check_teacher_device(settings: RunSettings) -> None:
    """ValueError for a `teacher_device` that this machine does not have."""
    if settings.teacher_device is None:
        return
    wanted, there = torch.device(settings.teacher_device), torch.accelerator.current_accelerator()
    if wanted.type == "cpu":
        return
    number = torch.accelerator.device_count()
    if there is None or wanted.type != there.type or (wanted.index or 0) >= number:
        found = "a CPU alone" if there is None or not number else f"{number} x {there.type}"
        raise ValueError(f"teacher_device = {settings.teacher_device}: this machine has {found}")


def check_launcher(settings: RunSettings) -> None:
    """ValueError that names each variable of accelerate's environment, which `accelerate launch` sets from its config,
    that says something else than the settings, or asks for what this trainer cannot do; and fp16 without a GPU,
    and offloading in several processes.
    """
    refused = [
        f"{name} = {os.environ[name]}: launched with {what}"
        for name, what in _REFUSED.items()
        if os.environ.get(name, "").lower() in _YES
    ]
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "")
    if backend.lower() not in ("", "no"):
        # It would compile the whole model, whose weights then have other names.
        rule = 'use compile_blocks, and dynamo_backend "no" in accelerate\'s config'
        refused.append(f"ACCELERATE_DYNAMO_BACKEND = {backend}: {rule}")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if steps not in ("", str(settings.gradient_accumulation_steps)):
        rule = f"gradient_accumulation_steps is {settings.gradient_accumulation_steps}; give one of them, or the same"
        refused.append(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS = {steps}: {rule}")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    # The launcher sets "no" where nobody said anything.
    if precision not in ("", "no", settings.mixed_precision):
        rule = f"mixed_precision is {settings.mixed_precision}; give one of them, or the same"
        refused.append(f"ACCELERATE_MIXED_PRECISION = {precision}: {rule}")
    if refused:
        raise ValueError("; ".join(refused))
    if settings.offload != "none" and launched_processes() > 1:
        rule = "processes that share their gradients keep all weights on their devices; use none, or one process"
        raise ValueError(f"offload = {settings.offload}: launched as {launched_processes()} processes: {rule}")
    if settings.context_parallel > 1 and not torch.accelerator.device_count():
        raise ValueError(
            f"context_parallel = {settings.context_parallel} needs GPUs: diffusers shares out no tokens on CPUs"
        )
    if settings.mixed_precision == "fp16" and training_device() == "cpu":
        raise ValueError("mixed_precision = fp16 needs a GPU: use bf16 or no")

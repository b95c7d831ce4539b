"""`RunSettings`: what `crepa-train run` is told besides CREPA's own keys, from a file and the command line."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from crepa_kernels.config import ConfigError, CrepaConfig, LayerSyncConfig, UrepaConfig
from crepa_kernels.config.base import Integer, Settings, flag, integer, number
from crepa_kernels.config.layersync import LayerSyncKeys
from crepa_kernels.config.rules import PRESETS, describe, recommended_block_index, unknown_preset
from crepa_kernels.config.sources import add_json_options, read_settings, unknown_options

from .adapters import adapter_problems
from .offload import Offload
from .optimizers import OPTIMIZERS, optimizer_problems
from .precision import BasePrecision, base_problems

logger = logging.getLogger(__name__)

PRESET = "preset"
WORKERS_WITH_GPU = 2
MOST_SEED = 2**32 - 1  # that NumPy takes
A_WEEK = 7 * 24 * 3600


def _tuples(value: Any) -> Any:
    # JSON has lists only; frozen settings hold tuples.
    return tuple(_tuples(each) for each in value) if isinstance(value, list | tuple) else value


def at_home(value: Any) -> Any:
    """A path with its ~ replaced: a shell does not where it is in a file or behind a "=". ValueError for NUL in it."""
    if isinstance(value, str) and "\0" in value:
        raise ValueError("no path has NUL in it")
    return os.path.expanduser(value) if isinstance(value, str) else value


def _each_once(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise ValueError("one is there twice")
    return values


def _device(value: str) -> str:
    try:
        torch.device(value)
    except RuntimeError:
        raise ValueError('must be a device such as "cpu" or "cuda:1"') from None
    return value


Place = Annotated[str, BeforeValidator(at_home)]
Folder = Annotated[
    Path, BeforeValidator(lambda value: Path(at_home(value)) if isinstance(value, str) and value else value)
]
Device = Annotated[str, AfterValidator(_device)]
Seed = Annotated[Integer, Field(ge=0, le=MOST_SEED)]
_SEED_RULE = f"must be an integer from 0 to {MOST_SEED}"
AtLeastOne = Annotated[Integer, Field(ge=1)]
Counts = Annotated[tuple[AtLeastOne, ...], BeforeValidator(_tuples)]
Sizes = Annotated[tuple[tuple[AtLeastOne, AtLeastOne], ...], BeforeValidator(_tuples)]


class Arguments(dict[str, Any]):
    """Keyword arguments as a value of settings, equal and hashed by what they say; nobody changes them."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


def _arguments(value: Any) -> Any:
    return Arguments({key: _tuples(each) for key, each in value.items()}) if isinstance(value, dict) else value


Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_tuples)]
WordOrWords = Annotated[
    Words, BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), AfterValidator(_each_once)
]


class RunSettings(LayerSyncKeys, Settings):
    """Settings of a training run, LayerSync's among them; see `Settings`."""

    TITLE = "training"
    PREFIXES = ("",)  # none
    UNKNOWN = MappingProxyType(
        {
            "caption_dropout": "unknown key; captions are not dropped",
            "config": "the file of settings is given on the command line, as --config FILE",
            **dict.fromkeys(
                (key for key in UrepaConfig.model_fields if key.startswith("urepa_")),
                "U-REPA is for UNets, and crepa-train trains transformers: CREPA is for those, with the keys crepa_*",
            ),
        }
    )
    NEAR = (PRESET, *CrepaConfig.model_fields)

    model: Place = Field(min_length=1, description="pipeline folder in the hub's layout, or hub id; required")
    data: Folder = Field(description="folder of videos with captions beside them (name.mp4, name.txt); required")
    output: Folder = Field(description="folder for checkpoints, logs and the trained weights; required")
    family: str | None = Field(
        None, min_length=1, description="model family; must be that of the transformer, which is taken when null"
    )
    task: Literal["text2video", "image2video"] = Field(
        "text2video", description='what is trained; must be "text2video" or "image2video"'
    )
    expert: Literal["high", "low"] | None = Field(
        None,
        description="which of two transformers is trained, that of the high or of the low noise levels, null where the "
        'model has one; must be "high" or "low"',
    )
    training: Literal["lora", "full"] = Field("lora", description='trained weights; must be "lora" or "full"')
    lora_type: Literal["lora", "dora", "rslora", "loha", "lokr"] = Field(
        "lora",
        description='the adapter that is trained, as peft has it; must be "lora", "dora", "rslora", "loha" or "lokr"',
    )
    lora_rank: Integer = integer(16, "rank of the LoRA", ge=1)
    lora_alpha: float | None = number(
        None, "of the LoRA, whose product is multiplied by it and divided by the rank, lora_rank when null", gt=0
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the LoRA's inputs that are left out in training; must be in [0, 1)"
    )
    lora_targets: Words | None = Field(
        None,
        min_length=1,
        description="layers that get a LoRA, the attention's projections when null; "
        'must be a list of names such as ["to_q", "to_v"]',
    )
    lora_format: Literal["diffusers", "comfyui", "both", "peft"] = Field(
        "diffusers",
        description="the file of the trained LoRA, for stock diffusers, by the original names for ComfyUI, the two, or "
        'for peft; must be "diffusers", "comfyui", "both" or "peft"',
    )
    resolutions: Sizes = Field(
        ((480, 832),),
        min_length=1,
        description="pixel sizes that clips are cropped to, the nearest aspect ratio for each video; "
        "must be a list of [height, width] such as [[480, 832]]",
    )
    frame_counts: Counts = Field(
        (81,),
        min_length=1,
        description="lengths of clips in pixel frames, the largest that each video has; must be a list such as [81]",
    )
    clips_per_video: Integer = integer(1, "clips cut from each video, evenly spread", ge=1)
    max_train_steps: Integer = Field(ge=1, description="optimiser steps; must be an integer >= 1, required")
    batch_size: Integer = integer(1, "clips of a micro-batch on each process", ge=1)
    gradient_accumulation_steps: Integer = integer(1, "micro-batches of an optimiser step", ge=1)
    optimizer: Literal[
        "adamw",
        "adam",
        "nadam",
        "radam",
        "adamax",
        "adagrad",
        "adafactor",
        "rmsprop",
        "sgd",
        "muon",
        "adamw8bit",
        "adam8bit",
        "ademamix8bit",
        "lion8bit",
        "paged_adamw8bit",
        "lion",
        "prodigy",
        "adamw_schedulefree",
        "radam_schedulefree",
        "sgd_schedulefree",
    ] = Field(
        "adamw",
        description="of torch, or of the package that its name says; must be one of "
        + ", ".join(f'"{name}"' for name in OPTIMIZERS),
    )
    optimizer_args: Annotated[dict[str, Any], AfterValidator(_arguments)] = Field(
        Arguments(),
        description="more arguments of the optimizer, by its own names; must be a mapping such as "
        '{"betas": [0.9, 0.99]}',
    )
    learning_rate: float = Field(1e-4, gt=0, description="must be a number > 0")
    projector_learning_rate: float | None = number(None, "of CREPA's projector, learning_rate when null", gt=0)
    weight_decay: float = number(1e-2, "of the optimizer", ge=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field(
        "constant",
        description='learning rate over the run; must be "constant", "constant_with_warmup", "linear", "cosine", '
        '"cosine_with_restarts" or "polynomial"',
    )
    lr_warmup_steps: Integer = integer(0, "steps over which the learning rate rises from 0", ge=0)
    max_grad_norm: float = number(1.0, "norm that gradients are clipped to", gt=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "bf16", description='type of the forward pass and of frozen weights; must be "no", "fp16" or "bf16"'
    )
    base_precision: BasePrecision = Field(
        "bf16",
        description='numbers in which frozen weights are kept, "bf16" for the type of mixed_precision; must be "bf16", '
        '"fp8", "int8", "fp8_dynamic" or "nf4"',
    )
    offload: Offload = Field(
        "none",
        description="frozen weights that wait in host memory for their turn, by blocks or by single layers; must be "
        '"none", "block" or "leaf"',
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="whether each of several processes keeps the whole model or, by blocks, its share of weights, "
        'gradients and optimizer; must be "none" or "fsdp2"',
    )
    step_timeout: Annotated[Integer, Field(ge=1, le=A_WEEK)] = Field(
        600,
        description="seconds that processes wait for each other in a step before all stop; must be an integer from 1 "
        f"to {A_WEEK}",
    )
    context_parallel: Integer = integer(
        1, "processes that share out the tokens of each clip among them, by diffusers' Ulysses attention", ge=1
    )
    gradient_checkpointing: bool = flag(True, "compute activations again in the backward pass")
    compile_blocks: bool = flag(False, "torch.compile each block")
    ema_decay: float | None = Field(
        None, ge=0, lt=1, description="of the trained weights' moving average, none when null; must be in [0, 1)"
    )
    seed: Seed = Field(0, description=f"of weights, noise and order of clips; {_SEED_RULE}")
    cache: Folder | None = Field(None, description="folder of encoded clips and captions, output/cache when null")
    cache_teacher: Literal["frames", "features"] = Field(
        "frames",
        description="what is kept of the teacher's side, the frames it will see or what it made of them; "
        'must be "frames" or "features"',
    )
    cache_teacher_precision: Literal["teacher", "int8"] = Field(
        "teacher",
        description="of kept features, the type that the teacher makes or 8 bits with a scale for each token; "
        'must be "teacher" or "int8"',
    )
    teacher_device: Device | None = Field(
        None,
        min_length=1,
        description='where the teacher runs, the training device when null; must be a device such as "cpu" or "cuda:1"',
    )
    teacher_offload: bool = flag(False, "keep the teacher's weights on the CPU between its uses")
    vae_tiling: bool = flag(
        False, "encode and decode clips in overlapping tiles, which needs less memory and changes them a little"
    )
    checkpoint_every: Integer = integer(500, "steps between checkpoints", ge=1)
    checkpoints_kept: Integer = integer(3, "newest checkpoints kept", ge=1)
    resume: Place | None = Field(None, min_length=1, description='go on from "latest" or from a checkpoint folder')
    validation_prompts: Words = Field(
        (), description='prompts of the clips sampled in between; must be a list of text such as ["a red square"]'
    )
    validation_every: Integer = integer(0, "steps between validations, 0 for never", ge=0)
    validation_steps: Integer = integer(30, "denoising steps of a sample", ge=1)
    validation_guidance: float = number(5.0, "guidance scale of a sample", ge=0)
    validation_seed: Seed = Field(0, description=f"of a sample's noise; {_SEED_RULE}")
    matrix_every: Integer = integer(0, "steps between similarity matrices in looks/ and in trackers, 0 for never", ge=0)
    report_to: WordOrWords = Field(
        ("tensorboard",),
        description="where values are logged beside metrics.jsonl, by accelerate's names for its trackers; "
        'must be a name or a list of names such as ["tensorboard", "wandb"], each once',
    )
    fps: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="frames a second at which clips are taken, each video's own when null; "
        "must be a number > 0, at most 1000",
    )
    hdr: Literal["tonemap", "skip"] = Field(
        "tonemap",
        description='what becomes of HDR videos (PQ, HLG), tone-mapped to SDR or left out; must be "tonemap" or "skip"',
    )
    strict: bool = flag(False, "stop at a video that cannot be used")
    workers: Integer | None = integer(
        None,
        "processes beside each training process that read clips and draw noise ahead, when null 2 with "
        "a GPU and 0 on a CPU",
        ge=0,
    )

    def _joint_problems(self) -> Iterator[tuple[set[str], str]]:
        """Settings that contradict each other, or of which one would do nothing."""
        yield from self.layersync_problems()
        values = self.model_dump()
        yield from adapter_problems(values)
        yield from optimizer_problems(values, self.model_fields_set)
        yield from base_problems(values)
        yield from self._sharding_problems()
        warm_up, most, prompts = self.lr_warmup_steps, self.max_train_steps, self.validation_prompts
        if warm_up and self.lr_scheduler == "constant" and not OPTIMIZERS[self.optimizer].schedule_free:
            rule = 'lr_scheduler = "constant" has no warm-up: use "constant_with_warmup"'
            yield {"lr_warmup_steps", "lr_scheduler"}, describe("lr_warmup_steps", warm_up, rule)
        if warm_up > most:
            yield {"lr_warmup_steps"}, describe("lr_warmup_steps", warm_up, f"must be at most max_train_steps = {most}")
        keys = {"validation_every", "validation_prompts"}
        if self.validation_every and not prompts:
            rule = "validation_prompts is empty: give what to sample, or 0"
            yield keys, describe("validation_every", self.validation_every, rule)
        # A 0 that is given means never.
        if prompts and "validation_every" not in self.model_fields_set:
            rule = "validation_every is not given: give the steps between validations, or 0 for never"
            yield keys, describe("validation_prompts", prompts, rule)
        if self.cache_teacher_precision == "int8" and self.cache_teacher == "frames":
            rule = 'only features are kept in 8 bits: give cache_teacher = "features"'
            yield {"cache_teacher_precision", "cache_teacher"}, describe("cache_teacher_precision", "int8", rule)
        if self.teacher_offload and self.teacher_device is not None and torch.device(self.teacher_device).type == "cpu":
            rule = f"teacher_device = {self.teacher_device}, where its weights are already: give one of the two"
            yield {"teacher_offload", "teacher_device"}, describe("teacher_offload", True, rule)
        if self.output.resolve() == self.data.resolve():
            rule = "must be another folder than data, whose videos are trained on"
            yield {"output", "data"}, describe("output", str(self.output), rule)

    def _sharding_problems(self) -> Iterator[tuple[set[str], str]]:
        """Of what each process has a share of: what has not been tried with it is refused."""
        if self.sharding == "none":
            return
        if self.mixed_precision == "fp16":
            rule = 'sharding = "fsdp2" has no gradient scaler: use "bf16" or "no"'
            yield {"mixed_precision", "sharding"}, describe("mixed_precision", self.mixed_precision, rule)
        known: dict[str, tuple[Any, ...]] = {
            "optimizer": ("adamw", "adam", "sgd"),
            "lora_type": ("lora", "rslora"),
            "base_precision": ("bf16",),
            "offload": ("none",),
            "context_parallel": (1,),
        }
        for key, values in known.items():
            if (value := getattr(self, key)) not in values:
                few = " or ".join(json.dumps(each) for each in values)
                yield {key, "sharding"}, describe(key, value, f'sharding = "fsdp2" needs {few}')

    @property
    def layersync(self) -> LayerSyncConfig:
        """LayerSync's settings."""
        return LayerSyncConfig.from_dict(self.model_dump(exclude_unset=True))

    @property
    def cache_folder(self) -> Path:
        """Where encoded clips and captions are kept."""
        return self.output / "cache" if self.cache is None else self.cache

    def workers_on(self, device_type: str) -> int:
        """`workers`, or the default for training on such a device."""
        if self.workers is not None:
            return self.workers
        # On a CPU they would take from the training what they save it.
        return 0 if device_type == "cpu" else WORKERS_WITH_GPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each key, `--preset`, and CREPA's and LayerSync's; what is not given is not in the namespace."""
    group = parser.add_argument_group(RunSettings.TITLE)
    own = [key for key in RunSettings.model_fields if key not in LayerSyncKeys.model_fields]
    RunSettings.add_options(group, own, {})
    add_json_options(group, {PRESET: f"crepa_* values under those that are given; must be one of {', '.join(PRESETS)}"})
    CrepaConfig.add_arguments(parser)
    LayerSyncConfig.add_arguments(parser)


def given_values(namespace: argparse.Namespace) -> dict[str, Any]:
    """The keys of `add_arguments` that are in a namespace, with their values."""
    values = vars(namespace)
    known = {*RunSettings.model_fields, PRESET}
    return {key: value for key, value in values.items() if key in known} | CrepaConfig.ours(values)


def load_settings(
    config_file: Path | None, cli_overrides: Mapping[str, Any], *, rest: Sequence[str] = ()
) -> tuple[RunSettings, CrepaConfig]:
    """Settings of a flat file, `cli_overrides` on top of it, and CREPA's keys on top of those of `preset`.

    A missing `crepa_block_index` of an enabled configuration becomes the one recommended for the model's family,
    which is logged; for that alone the model's configs are read.

    rest: words of a command line that its parser did not know.

    Raises:
        ConfigError: (a ValueError) a file that is not one mapping of keys to values; every wrong, missing and unknown
            key.
        ValueError: a model that is not a pipeline, where its family must be known, as `TrainingFamily.of`.
    """
    from_file = {} if config_file is None else read_settings(config_file)
    problems = _unknown_words(rest)
    ours, crepa = _split(from_file, cli_overrides, problems)
    settings = config = None
    try:
        settings = RunSettings(**ours)
    except ConfigError as error:
        problems += error.problems
    missing = crepa.get("crepa_enabled") is True and crepa.get("crepa_block_index") is None
    try:
        # Rules that involve the block are asked again, when the model's own is known.
        config = CrepaConfig.from_dict({**crepa, "crepa_block_index": 0} if missing else crepa)
    except ConfigError as error:
        problems += error.problems
    if settings is None or config is None or problems:
        sources = [str(config_file)] * (config_file is not None) + ["the command line"] * bool(cli_overrides or rest)
        raise ConfigError(problems, " and ".join(sources) or None)
    for each in (config, settings.layersync):
        if each.idle is not None:
            logger.warning("%s is %s", each.TITLE, each.idle)
    return settings, _at_recommended_block(settings, config) if missing else config


def _split(
    from_file: Mapping[str, Any], over: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of `RunSettings`, and the `crepa_*` ones with those of the preset under them."""
    both = {**from_file, **over}
    name = both.pop(PRESET, None)
    preset = PRESETS.get(name, {}) if isinstance(name, str) else {}
    if name is not None and not preset:
        problems.append(describe(PRESET, name, unknown_preset(name)))
    crepa = [CrepaConfig.ours(each) for each in (from_file, over)]
    ours = {key: value for key, value in both.items() if key not in CrepaConfig.ours(both)}
    merged = CrepaConfig.merged(CrepaConfig.merged(preset, crepa[0]), crepa[1])
    return ours, {**merged, **{key: at_home(merged[key]) for key in ("crepa_encoder", "crepa_model") if key in merged}}


def _unknown_words(rest: Sequence[str]) -> list[str]:
    known = [*RunSettings.model_fields, *RunSettings.NEAR, *CrepaConfig.ALIASES]
    options = unknown_options(rest, known, ("-",), RunSettings.UNKNOWN)
    # A word after an unknown option was its value.
    return options or [f"{word}: not an option" for word in rest]


def _at_recommended_block(settings: RunSettings, config: CrepaConfig) -> CrepaConfig:
    from .families import TrainingFamily

    family = TrainingFamily.of(settings.model, settings.task, settings.family, settings.expert).name
    index = recommended_block_index(family)
    logger.info("crepa_block_index = %d, the recommended block for %s", index, family)
    return config.replace(crepa_block_index=index)

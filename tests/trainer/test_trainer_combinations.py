"""Settings of small cards and of many, each with every other: refused by its keys before a weight is loaded, or run."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from crepa_trainer.context import check_context
from crepa_trainer.data.dataset import Bucket
from crepa_trainer.families import TrainingFamily
from crepa_trainer.launcher import check_launcher, check_teacher_device
from crepa_trainer.optimizers import OPTIMIZERS, check_optimizer
from crepa_trainer.precision import check_base_precision
from crepa_trainer.settings import RunSettings
from training_runs import metrics_rows, tiny_config, tiny_settings, train_elsewhere

from crepa_kernels.config import ConfigError

Values = Mapping[str, Any]

FEW = ("adamw", "adam8bit", "prodigy", "adamw_schedulefree")
AXES: dict[str, tuple[Any, ...]] = {
    "base_precision": ("bf16", "fp8", "int8", "fp8_dynamic", "nf4"),
    "offload": ("none", "block", "leaf"),
    "lora_type": ("lora", "dora", "rslora", "loha", "lokr"),
    "sharding": ("none", "fsdp2"),
    "context_parallel": (1, 2),
    "training": ("lora", "full"),
    "cache_teacher": ("frames", "features"),
    "cache_teacher_precision": ("teacher", "int8"),
    "teacher_device": (None, "cpu", "cuda:1"),
}
PROCESSES = (1, 2)
BUCKET = Bucket(32, 48, 9)


@pytest.fixture(autouse=True)
def accelerators() -> Iterator[None]:
    """diffusers' context parallelism counts them, and takes a CPU for none."""
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        yield


def given(values: Values) -> dict[str, Any]:
    """With what some of them ask for: a file that can hold the adapter, a rate of the optimizer's own."""
    with_them = {"mixed_precision": "bf16", **values}
    if values["lora_type"] in ("loha", "lokr") and values["training"] == "lora":
        with_them["lora_format"] = "peft"
    if OPTIMIZERS[values["optimizer"]].one_rate:
        with_them["learning_rate"] = 1.0
    return with_them


def refusal(models: Path, values: Values, processes: int) -> str | None:
    """What a run says before it loads a weight, as `plan_run` and `make_plan` ask."""
    try:
        settings = tiny_settings(models, models / "never made", **given(values))
    except ConfigError as error:
        for problem in error.problems:
            assert named(problem, values), problem
        return error.problems[0]
    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}):
        refused = _of_machine(settings, processes)
    assert refused is None or named(refused, values), refused
    return refused


def _of_machine(settings: RunSettings, processes: int) -> str | None:
    try:
        check_launcher(settings)
        check_base_precision(settings.base_precision, "cpu")
        check_teacher_device(settings)
        check_optimizer(settings.optimizer, settings.optimizer_args, settings.weight_decay, "cpu")
        check_context(settings, FAMILIES[0], [BUCKET], processes)
    except ValueError as error:
        return str(error)
    return None


FAMILIES: list[TrainingFamily] = []


@pytest.fixture(autouse=True)
def family(models: Path) -> None:
    """Its configs are read once."""
    FAMILIES[:] = FAMILIES or [TrainingFamily.of(str(models / "wan"))]


def named(line: str, values: Values) -> bool:
    """Whether a line is one, and names a key that was given and its value."""
    return "\n" not in line and any(
        line.startswith(f"{key} = ") and str(value) in line for key, value in values.items()
    )


def every(optimizers: Any) -> Iterator[dict[str, Any]]:
    for optimizer, *others in itertools.product(optimizers, *AXES.values()):
        yield {"optimizer": optimizer, **dict(zip(AXES, others, strict=True))}


@pytest.mark.parametrize(
    "optimizers", [FEW[:1], pytest.param(tuple(OPTIMIZERS), marks=pytest.mark.slow)], ids=["adamw", "every"]
)
def test_each_is_accepted_or_refused_by_its_keys(models: Path, optimizers: tuple[str, ...]) -> None:
    found = [refusal(models, values, processes) for values in every(optimizers) for processes in PROCESSES]
    assert 0.01 < sum(each is None for each in found) / len(found) < 0.2


def accepted(models: Path) -> list[tuple[dict[str, Any], int]]:
    """One of each kind, the optimizers, teachers and caches in turn."""
    seen: dict[tuple[Any, ...], tuple[dict[str, Any], int]] = {}
    in_turn = itertools.cycle(OPTIMIZERS)
    turns = ("cache_teacher", "cache_teacher_precision", "teacher_device", "optimizer")
    for values in every(FEW[:1]):
        for processes in PROCESSES:
            kind = (*(value for key, value in values.items() if key not in turns), processes)
            if kind in seen or refusal(models, values, processes) is not None:
                continue
            changes = {"teacher_device": (None, "cpu")[len(seen) % 2]}
            if len(seen) % 3 == 0:
                changes |= {"cache_teacher": "features", "cache_teacher_precision": "int8"}
            tried = ({**values, **changes, "optimizer": next(in_turn)} for _ in OPTIMIZERS)
            seen[kind] = next(each for each in tried if refusal(models, each, processes) is None), processes
    return list(seen.values())


@pytest.mark.slow
def test_what_is_accepted_runs(models: Path, tmp_path: Path) -> None:
    runs = accepted(models)
    assert len(runs) > 24
    failed = []
    for number, (values, processes) in enumerate(runs):
        settings = tiny_settings(models, tmp_path / str(number), max_train_steps=2, **given(values))
        clips = {"wide": 2, "tall": 0, "pixels": values["cache_teacher"] == "frames"}
        config = tiny_config(models, crepa_encoder_image_size=28)
        done = train_elsewhere(settings, config, processes=processes, accelerators=1, **clips)
        if done.returncode:
            failed.append(f"{values} x {processes}: {done.stderr[-2000:]}")
            continue
        rows = metrics_rows(settings.output)
        if len(rows) != 2 or not all(torch.tensor(row["loss"]).isfinite() for row in rows):
            failed.append(f"{values} x {processes}: {rows}")
    assert not failed, "\n\n".join(failed)

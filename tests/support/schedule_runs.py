"""Short runs of a schedule, for its tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("pydantic")  # `make gpu-check` runs with the machine's own packages
from crepa_kernels.config import CrepaConfig
from crepa_kernels.regularizer.schedule import CrepaSchedule, Decision


def schedule(max_train_steps: int = 1000, /, **settings: Any) -> CrepaSchedule:
    return CrepaSchedule(CrepaConfig(**settings), max_train_steps)


def observe(crepa: CrepaSchedule, step: int, value: float, count: int = 1) -> None:
    crepa.observe(step, torch.tensor(value * count, dtype=torch.float64), torch.tensor(count))


def run(crepa: CrepaSchedule, values: list[float], start: int = 0) -> list[Decision]:
    """One decision for each step; the step's value is observed where CREPA runs."""
    decisions = []
    for step, value in enumerate(values, start):
        decisions.append(crepa.decide(step))
        if decisions[-1].run:
            observe(crepa, step, value)
    return decisions

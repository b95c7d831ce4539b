"""The bench of training steps, at sizes at which it takes no time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from crepa_trainer.families import TrainingFamily

from benches.step import CALLS, ON_A_CPU, ON_A_GPU, PUBLISHED, Size, steps_of, transformer_config

TINY = Size(height=128, width=128, frames=9, layers=2, heads=0.04, encoder="small", image_size=28)


def test_every_family_of_the_trainer_is_there() -> None:
    assert PUBLISHED.keys() == TrainingFamily.known.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_fewer_heads_are_as_large_as_the_published(name: str) -> None:
    family = TrainingFamily.known[name]
    whole, part = (transformer_config(family, replace(ON_A_CPU, heads=heads)) for heads in (1.0, 0.25))
    assert whole == transformer_config(family, replace(ON_A_GPU, layers=ON_A_CPU.layers))
    assert part[family.depth[0]] == ON_A_CPU.layers
    for key in ("attention_head_dim", "axes_dims", "caption_channels", "text_embed_dim"):
        assert part.get(key) == whole.get(key)
    assert part != whole


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.usefixtures("one_thread")
def test_a_step_of_each_kind_is_the_same_loss(name: str) -> None:
    steps = steps_of(name, TINY, "cpu")
    assert tuple(steps) == CALLS
    logs = {call: step() for call, step in steps.items()}
    assert "crepa_loss" not in logs["without"]
    assert len({float(found["flow_loss"]) for found in logs.values()}) == 1
    cached = logs["cached"]["crepa_loss"]
    assert math.isfinite(cached)
    torch.testing.assert_close(
        [logs[call]["crepa_loss"] for call in ("live", "eager")], [cached] * 2, rtol=1e-4, atol=1e-5
    )

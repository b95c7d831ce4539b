"""What CREPA loaded itself is let go when it has ended, and what the caller gave is not."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tiny import clip_pixels, is_captured, tiny_dinov2, tiny_wan, wan_inputs

from crepa_kernels import CrepaRegularizer

CONFIG: dict[str, Any] = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder_image_size": 70}


@pytest.mark.parametrize("ends_by", ["cutoff", "remove"])
@pytest.mark.parametrize("loaded_here", [True, False])
def test_the_encoder_is_let_go_only_if_it_was_loaded_here(ends_by: str, loaded_here: bool) -> None:
    transformer, made = tiny_wan(), []

    def load() -> torch.nn.Module:
        encoder = tiny_dinov2()
        made.append(weakref.ref(encoder))
        return encoder

    config = CONFIG | {"crepa_cutoff_step": 1}
    crepa = CrepaRegularizer(config, transformer, encoder=load if loaded_here else load(), feature_size=32)
    transformer(**wan_inputs())
    crepa.loss(step=0, pixels=clip_pixels())
    if ends_by == "cutoff":
        transformer(**wan_inputs())
        crepa.loss(step=1, pixels=clip_pixels())
    else:
        crepa.remove()
    gc.collect()
    assert (made[0]() is None) == loaded_here


def test_hidden_states_are_let_go_while_the_weight_is_0() -> None:
    transformer = tiny_wan()
    crepa = CrepaRegularizer(CONFIG | {"crepa_warmup_steps": 2}, transformer, feature_size=8)
    made: list[weakref.ref[torch.Tensor]] = []
    transformer.blocks[1].register_forward_hook(lambda module, args, output: made.append(weakref.ref(output)))
    transformer(**wan_inputs())
    assert made[0]() is not None
    assert is_captured(crepa)
    crepa.loss(step=0, pixels=clip_pixels())
    assert made[0]() is None
    assert not is_captured(crepa)

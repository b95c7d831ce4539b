"""Frozen weights that wait in host memory: what they compute, where they are when, and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from apart import host_memory_apart
from crepa_trainer.families import TrainingFamily
from crepa_trainer.launcher import check_launcher
from crepa_trainer.offload import Offload, offload_blocks
from crepa_trainer.precision import BasePrecision, prepare_base
from crepa_trainer.settings import RunSettings
from peft import LoraConfig
from tiny import tiny_wan, wan_inputs
from tiny_families import FAMILIES

from crepa_kernels import CrepaRegularizer
from crepa_kernels.models.families import family_of
from crepa_kernels.regularizer.offloading import offloading_groups

HERE = torch.device("cpu")
CONFIG = {"crepa_enabled": True, "crepa_block_index": 1}


def model() -> Any:
    """A frozen Wan with a LoRA, and a norm beside its blocks whose weight a backward pass reads."""
    transformer = tiny_wan(num_layers=4).requires_grad_(False)
    transformer.enable_gradient_checkpointing()
    torch.manual_seed(0)
    targets = ["to_q", "ffn.net.2"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    transformer.norm_out = torch.nn.LayerNorm(32).requires_grad_(False)
    return transformer


def attach(transformer: Any) -> CrepaRegularizer:
    torch.manual_seed(0)
    return CrepaRegularizer(CONFIG, transformer, feature_size=8)


def gradients(transformer: Any, crepa: CrepaRegularizer, step: int) -> dict[str, torch.Tensor]:
    transformer.zero_grad()
    prediction = transformer(**wan_inputs())[0]
    features = torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(6))
    (prediction.square().mean() + crepa.loss(step=step, features=features)[0]).backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    transformer = model()
    return gradients(transformer, attach(transformer), 0)


@pytest.mark.parametrize("offload", ["block", "leaf"])
@pytest.mark.parametrize("attached_first", [False, True])
def test_gradients_are_those_of_a_model_that_stays_though_its_weights_are_gone_in_between(
    expected: dict[str, torch.Tensor], offload: Offload, attached_first: bool
) -> None:
    transformer = model()
    crepa = attach(transformer) if attached_first else None
    offload_blocks(transformer, transformer.blocks, offload, HERE, streams=False)
    crepa = crepa or attach(transformer)
    groups = offloading_groups(transformer)
    with host_memory_apart(groups) as apart:
        found = [gradients(transformer, crepa, step) for step in range(2)]
    for each in found:
        assert all(torch.equal(each[name], gradient) for name, gradient in expected.items())
    assert apart.most == 1
    assert offloading_groups(transformer.crepa_projector) == []
    coming = [tensor for group in groups for tensor in group.parameters]
    linear = sum(
        module.weight.numel() for module in transformer.blocks.modules() if isinstance(module, torch.nn.Linear)
    )
    assert not any(tensor.requires_grad for tensor in coming)
    assert sum(tensor.numel() for tensor in coming) > 0.7 * linear


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TrainingFamily.known))
@pytest.mark.parametrize("base_precision", ["bf16", "fp8"])
def test_every_family_trains_offloaded(name: str, base_precision: BasePrecision) -> None:
    """Convolutions, norms beside the blocks, blocks of two lists, adapters outside of them."""

    def gradients_of(offload: Offload) -> dict[str, torch.Tensor]:
        family = FAMILIES[name]
        transformer = family.make().requires_grad_(False).train()
        transformer.enable_gradient_checkpointing()
        torch.manual_seed(0)
        targets = list(TrainingFamily.known[name].lora_targets)
        transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        prepare_base(transformer, base_precision, torch.float32)
        if offload != "none":
            offload_blocks(transformer, family_of(transformer).blocks(transformer), offload, HERE, streams=False)
        with host_memory_apart(offloading_groups(transformer)) as apart:
            transformer(**family.inputs(model=transformer), return_dict=False)[0].square().mean().backward()
        assert apart.most == (offload != "none")
        return {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}

    expected = gradients_of("none")
    for offload in ("block", "leaf"):
        found = gradients_of(offload)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_several_processes_do_not_offload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RunSettings(
        model="wan", data=str(tmp_path / "videos"), output=str(tmp_path / "run"), max_train_steps=1, offload="block"
    )
    check_launcher(settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"offload = block: launched as 2 processes: .*use none, or one process"):
        check_launcher(settings)

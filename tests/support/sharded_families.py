"""Gradients of a step of the families' transformers, by one process and by several.

Those have a share of the transformer each, or of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from crepa_trainer.context import share_tokens
from crepa_trainer.sharding import shard, whole, whole_copy
from peft import LoraConfig, inject_adapter_in_model
from tiny_families import FAMILIES, TinyFamily
from torch import Tensor

from crepa_kernels import CrepaRegularizer

RANKS = 2
FEATURE_SIZE = 8


def _built(tiny: TinyFamily) -> tuple[Any, CrepaRegularizer]:
    transformer = tiny.make().requires_grad_(False)
    torch.manual_seed(0)
    targets = [tiny.query_of(path) for path in tiny.blocks]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), transformer)
    transformer.enable_gradient_checkpointing()
    settings = {"crepa_enabled": True, "crepa_block_index": 1}
    return transformer, CrepaRegularizer(settings, transformer, feature_size=FEATURE_SIZE)


def _inputs(tiny: TinyFamily, sample: int) -> dict[str, Any]:
    inputs = tiny.inputs(seed=sample, model=tiny.make())
    if tiny.name == "ltxvideo":
        # A text that ends before its limit, and a first frame that is given: each token has its time.
        inputs["encoder_attention_mask"][:, -2:] = 0
        times = torch.full(inputs["hidden_states"].shape[:2], 500.0)
        times[:, : tiny.grid[0] * tiny.grid[1]] = 0
        inputs["timestep"] = times
    return inputs


def _backward(tiny: TinyFamily, transformer: Any, crepa: CrepaRegularizer, samples: Iterable[int], scale: float) -> Any:
    for sample in samples:
        prediction = transformer(**_inputs(tiny, sample), return_dict=False)[0]
        shape = (1, tiny.frames, 6, FEATURE_SIZE)
        features = torch.randn(shape, generator=torch.Generator().manual_seed(sample))
        aux, _ = crepa.loss(step=0, features=features, feature_grid=(2, 3))
        ((prediction.square().mean() + aux) * scale).backward()
    return {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}


def gradients_alone(case: str, samples: int = RANKS) -> dict[str, Tensor]:
    """Of LoRA and projector, the mean over some samples."""
    tiny = FAMILIES[case]
    found: dict[str, Tensor] = _backward(tiny, *_built(tiny), range(samples), 1 / samples)
    return found


def sharded_gradients(folder: str) -> None:
    """The same of every family in RANKS processes, of which each has a sample; the first writes `folder`/NAME.pt.

    And what it gets of a transformer to write it is what was shared out, as from `from_pretrained`.
    """
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for case, tiny in FAMILIES.items():
        transformer, crepa = _built(tiny)
        shard(transformer, torch.device("cpu"))
        found = {name: whole(each) for name, each in _backward(tiny, transformer, crepa, [rank], 1.0).items()}
        if rank == 0:
            torch.save(found, Path(folder) / f"{case}.pt")
        transformer = tiny.make()
        shard(transformer, torch.device("cpu"))
        copy = whole_copy(transformer)
        assert (copy is not None) == (rank == 0)
        if copy is not None:
            assert type(copy) is tiny.model
            copy.save_pretrained(Path(folder) / case)
            saved, expected = tiny.model.from_pretrained(Path(folder) / case).state_dict(), tiny.make().state_dict()
            assert saved.keys() == expected.keys()
            assert all(torch.equal(saved[name], expected[name]) for name in expected)
    dist.barrier()
    dist.destroy_process_group()


# Those of which RANKS processes can have a part of each sample.
SHARING = ("wan", "ltxvideo")


def context_gradients(folder: str) -> None:
    """The same of one sample, of whose tokens each of RANKS processes has a part."""
    dist.init_process_group("gloo")
    for case in SHARING:
        tiny = FAMILIES[case]
        transformer, crepa = _built(tiny)
        # It counts the machine's accelerators, and takes a CPU for none.
        with mock.patch.object(torch.accelerator, "device_count", return_value=1):
            share_tokens(transformer, RANKS, "cpu")
        found = _backward(tiny, transformer, crepa, [0], 1.0)
        for each in found.values():
            dist.all_reduce(each)
        if dist.get_rank() == 0:
            torch.save(found, Path(folder) / f"{case}.pt")
    dist.barrier()
    dist.destroy_process_group()

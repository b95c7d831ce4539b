"""A projector that no optimizer trains is seen; one that any kind of optimizer trains never is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from tiny import tiny_wan, wan_inputs
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from crepa_kernels import CrepaRegularizer
from crepa_kernels.regularizer.attach import CREPA

pytestmark = pytest.mark.usefixtures("one_thread")

WARNED, FAILED = 5, 50  # optimizer steps without a change


def features() -> torch.Tensor:
    return torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(6))


def regularized(**settings: Any) -> tuple[Any, CrepaRegularizer]:
    transformer = tiny_wan(num_layers=1)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    config = {"crepa_enabled": True, "crepa_block_index": 0, **settings}
    return transformer, CrepaRegularizer(config, transformer, feature_size=8)


def trained(transformer: nn.Module) -> list[nn.Parameter]:
    return [p for p in transformer.parameters() if p.requires_grad]


def lora(transformer: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in transformer.named_parameters() if "lora" in name]


class ThroughData(torch.optim.Optimizer):
    """Writes through ``p.data``, as Prodigy, Lion and others outside of torch do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "for each": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=False),
    "foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-9, fused=True),
    "fused, in a long warm-up": lambda params: torch.optim.AdamW(params, lr=1e-12, fused=True),
    "fused SGD": lambda params: torch.optim.SGD(params, lr=1e-3, fused=True),
    "learning rate 0": lambda params: torch.optim.AdamW(params, lr=0.0),
    "through data": lambda params: ThroughData(params, lr=1e-3),
}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def train(
    transformer: Any, crepa: CrepaRegularizer, optimizer: torch.optim.Optimizer, steps: range, *, micro: int = 1
) -> None:
    for step in steps:
        for _ in range(micro):
            prediction = transformer(**wan_inputs())[0]
            aux, _ = crepa.loss(step=step, features=features())
            (prediction.square().mean() + aux).backward()
        optimizer.step()
        optimizer.zero_grad()


def without_optimizer(crepa: CrepaRegularizer, transformer: Any, steps: range) -> None:
    """The states stay until the next forward, and nothing changes a weight."""
    transformer(**wan_inputs())
    for step in steps:
        crepa.loss(step=step, features=features())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kind_of_optimizer_is_seen_to_train_the_projector(name: str, said: Any) -> None:
    transformer, crepa = regularized()
    optimizer = OPTIMIZERS[name](trained(transformer))
    train(transformer, crepa, optimizer, range(13))
    assert said() == []
    # Whether by version or by value, it begins anew with each change: also the last steps' are seen before it warns.
    without_optimizer(crepa, transformer, range(13, 12 + WARNED))
    assert said() == []
    without_optimizer(crepa, transformer, range(12 + WARNED, 14 + 2 * WARNED))
    assert len(said()) == 1


def built_before() -> tuple[Any, CrepaRegularizer, torch.optim.Optimizer]:
    transformer = tiny_wan(num_layers=1)
    optimizer = torch.optim.AdamW(trained(transformer), lr=1e-3)
    config = {"crepa_enabled": True, "crepa_block_index": 0}
    return transformer, CrepaRegularizer(config, transformer, feature_size=8), optimizer


def by_name() -> tuple[Any, CrepaRegularizer, torch.optim.Optimizer]:
    transformer, crepa = regularized()
    return transformer, crepa, torch.optim.AdamW(lora(transformer), lr=1e-3)


@pytest.mark.parametrize("order", [built_before, by_name])
def test_a_projector_outside_the_optimizer_is_one_warning_and_then_an_error(order: Any, said: Any) -> None:
    transformer, crepa, optimizer = order()
    with pytest.raises(ValueError, match=rf"crepa_projector.*1\.weight.*not in the optimizer.*{CREPA.order}"):
        crepa.check_optimizer(optimizer)
    train(transformer, crepa, optimizer, range(WARNED), micro=2)
    assert said() == []
    train(transformer, crepa, optimizer, range(WARNED, WARNED + 3))
    without_optimizer(crepa, transformer, range(WARNED + 3, FAILED))
    [warning] = said()
    assert f"has not changed over {WARNED} optimizer steps" in warning
    assert CREPA.order in warning
    with pytest.raises(ValueError, match=f"has not changed over {FAILED} optimizer steps.*{CREPA.order}"):
        without_optimizer(crepa, transformer, range(FAILED, FAILED + 1))


@pytest.mark.parametrize("interval", [1, 100], ids=["probes", "weight 0"])
def test_steps_in_which_nothing_can_learn_do_not_count(interval: int, said: Any) -> None:
    transformer, crepa = regularized(
        crepa_warmup_steps=1,
        crepa_similarity_threshold=1e-6,
        crepa_similarity_ema_decay=0.0,
        crepa_threshold_mode="recoverable",
        crepa_probe_interval=interval,
        crepa_adjacent_distance=0,
    )
    transformer(**wan_inputs())
    with torch.no_grad():
        good = crepa.projector(crepa.captured(0).hidden_states)
    for step in range(12):  # weight 0, two steps until the first similarity is known, and then as `interval` says
        transformer(**wan_inputs())
        crepa.loss(step=step, features=good)
    assert said() == ["crepa_similarity_threshold: 1e-06 on similarity is 1e-06 on alignment_score"]


def test_losses_without_gradients_do_not_count(said: Any) -> None:
    transformer, crepa = regularized()
    for step in range(12):
        transformer(**wan_inputs())
        with torch.no_grad():
            crepa.loss(step=step, features=features())
    assert said() == []


def test_a_change_of_the_optimizer_on_the_way_is_seen(said: Any) -> None:
    transformer, crepa = regularized()
    train(transformer, crepa, torch.optim.AdamW(trained(transformer), lr=1e-3), range(3))
    train(transformer, crepa, torch.optim.AdamW(lora(transformer), lr=1e-3), range(3, 9))
    assert len(said()) == 1


def test_weights_that_are_loaded_begin_anew(said: Any) -> None:
    transformer, crepa = regularized()
    without_optimizer(crepa, transformer, range(4))
    crepa.load_state_dict(crepa.state_dict())
    without_optimizer(crepa, transformer, range(4, 8))
    assert said() == []


def test_check_optimizer_takes_whatever_holds_the_weights() -> None:
    transformer, crepa = regularized()
    crepa.check_optimizer(torch.optim.AdamW(trained(transformer)))
    parts = [torch.optim.SGD(p, lr=1.0) for p in (lora(transformer), crepa.projector.parameters())]
    crepa.check_optimizer(*parts)
    with pytest.raises(ValueError, match=r"0\.bias, 1\.weight, 1\.bias are not in the optimizer"):
        crepa.check_optimizer(torch.optim.SGD([crepa.projector[0].weight], lr=1.0))
    with pytest.raises(ValueError, match="optimizers with param_groups, got list"):
        crepa.check_optimizer(trained(transformer))
    off = CrepaRegularizer({"crepa_enabled": False}, tiny_wan(num_layers=1))
    off.check_optimizer(parts[0])


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ddp(transformer: Any, **options: Any) -> Any:
    return DistributedDataParallel(transformer, **options)


def shard(transformer: Any, **options: Any) -> Any:
    for part in (*transformer.blocks, transformer.crepa_projector):
        fully_shard(part, **options)
    return fully_shard(transformer)


WRAPS: dict[str, Callable[[Any], Any]] = {
    "DDP": ddp,
    "static graph": lambda transformer: ddp(transformer, static_graph=True),
    "sharded": shard,
    # Then the projector's whole weights, which no optimizer knows, are in place at the loss.
    "sharded, whole until the backward": lambda transformer: shard(transformer, reshard_after_forward=False),
    "compiled": lambda transformer: torch.compile(transformer, backend="eager"),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_models_are_seen_to_train_or_not(one_process: None, said: Any, wrap: str, fused: bool) -> None:
    for whose, expected in ((trained, 0), (lora, 1)):
        torch._dynamo.reset()
        transformer, crepa = regularized()
        model = WRAPS[wrap](transformer)
        train(model, crepa, torch.optim.AdamW(whose(transformer), lr=1e-3, fused=fused), range(8))
        found = [line for line in said() if "has not changed" in line]
        assert len(found) == expected


def test_steps_that_a_scaler_leaves_out_at_first_are_no_error(said: Any) -> None:
    transformer, crepa = regularized()
    optimizer = torch.optim.AdamW(trained(transformer), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2000)
    for step in range(FAILED + 2):
        with torch.autocast("cpu", torch.float16):
            prediction = transformer(**wan_inputs())[0]
            aux, _ = crepa.loss(step=step, features=features())
        scaler.scale(prediction.float().square().mean() + aux).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    # About 20 halvings, of which the fifth is told.
    [warning] = said()
    assert "gradient scaler" in warning

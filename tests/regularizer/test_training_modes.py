"""CREPA in the ways that people train: checkpointing, compiled blocks, autocast, a gradient scaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from tiny import tiny_wan, wan_inputs
from torch.utils.checkpoint import checkpoint

from crepa_kernels import CrepaRegularizer

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3


def features() -> torch.Tensor:
    return torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(6))


def regularized(**settings: Any) -> tuple[WanTransformer3DModel, CrepaRegularizer]:
    transformer = tiny_wan(num_layers=2)
    transformer.requires_grad_(False)
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    config = {"crepa_enabled": True, "crepa_block_index": 1, **settings}
    return transformer, CrepaRegularizer(config, transformer, feature_size=8)


def reentrant(module: torch.nn.Module, *args: Any) -> Any:
    return checkpoint(module.__call__, *args, use_reentrant=True)


def compile_each_block(transformer: WanTransformer3DModel) -> None:
    for block in transformer.blocks:
        block.compile(backend="aot_eager")


def compile_repeated_blocks(transformer: WanTransformer3DModel) -> None:
    transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)


def checkpointed_and_compiled(transformer: WanTransformer3DModel) -> None:
    transformer.enable_gradient_checkpointing()
    compile_each_block(transformer)


MODES: dict[str, Callable[[WanTransformer3DModel], None]] = {
    "checkpointing": lambda transformer: transformer.enable_gradient_checkpointing(),
    "reentrant checkpointing": lambda transformer: transformer.enable_gradient_checkpointing(reentrant),
    "compiled blocks": compile_each_block,
    "compiled repeated blocks": compile_repeated_blocks,
    "checkpointing and compiled blocks": checkpointed_and_compiled,
}
# Compiled chains round elsewhere than eager ones, in the type of the activations.
TYPES = {torch.float32: {"rtol": 1e-4, "atol": 1e-6}, torch.bfloat16: {"rtol": 0.05, "atol": 2e-3}}


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(
    transformer: WanTransformer3DModel,
    crepa: CrepaRegularizer,
    *,
    dtype: torch.dtype = torch.float32,
    scaler: torch.amp.GradScaler | None = None,
    model: Callable[..., Any] | None = None,
) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, Any]]]:
    """Gradients and logs of each step."""
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    gradients, history = [], []
    for step in range(STEPS):
        inputs = wan_inputs(seed=step)
        # A reentrant checkpoint passes gradients only to inputs that ask for them.
        inputs["hidden_states"].requires_grad_(True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            prediction = (model or transformer)(**inputs)[0]
            aux, logs = crepa.loss(step=step, features=features())
            loss = prediction.float().square().mean() + aux
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        history.append(logs)
    return gradients, history


def assert_close(found: Any, expected: Any, **tolerance: float) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        assert len(one) == 2 * 2 * 2 * 2 + 4  # blocks x attentions x (to_q, to_v) x (A, B), the projector
        torch.testing.assert_close(one, other, **tolerance)
    for key in ("crepa_loss", "crepa_similarity"):
        torch.testing.assert_close([logs[key] for logs in found[1]], [logs[key] for logs in expected[1]], **tolerance)


@pytest.mark.every(3)
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_training_is_that_of_the_eager_model(mode: str, dtype: torch.dtype) -> None:
    expected = train(*regularized(), dtype=dtype)
    transformer, crepa = regularized()
    MODES[mode](transformer)
    assert_close(train(transformer, crepa, dtype=dtype), expected, **TYPES[dtype])


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("compiled", ["blocks", pytest.param("model", marks=pytest.mark.slow)])
def test_nothing_is_compiled_again_in_later_steps(compiled: str) -> None:
    # CREPA off in step 0, on, and cut off for good: neither a step's number nor a tensor is a reason.
    torch._dynamo.utils.counters.clear()
    transformer, crepa = regularized(crepa_warmup_steps=1, crepa_cutoff_step=4)
    run: Callable[..., Any] = transformer
    if compiled == "blocks":
        compile_each_block(transformer)
    else:
        run = torch.compile(transformer, backend="aot_eager")
    frames = []
    for step in range(8):
        run(**wan_inputs())[0].sum().backward()
        crepa.loss(step=step, features=features())
        crepa.release()
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    # A compiled model has the hooks in its graph, so each of its frames is compiled once more when they end.
    on, off = frames[:5], frames[5:]
    assert len(set(on)) == len(set(off)) == 1, frames
    assert 0 < on[0] <= off[0] <= (on[0] if compiled == "blocks" else 2 * on[0])


def test_fp16_with_a_scaler_gives_the_gradients_of_fp32() -> None:
    expected = train(*regularized())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = train(*regularized(), dtype=torch.float16, scaler=scaler)
    assert scaler.get_scale() == 1024.0  # No step was skipped.
    for one, other in zip(found[0], expected[0], strict=True):
        for name, gradient in one.items():
            # Ten bits through a dozen of operations, of the largest element.
            torch.testing.assert_close(gradient, other[name], rtol=0, atol=0.03 * float(other[name].abs().max()))


def test_an_overflow_skips_the_step_and_leaves_the_schedule_alone() -> None:
    transformer, crepa = regularized(crepa_similarity_threshold=0.9)
    before = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-10)
    gradients, history = train(transformer, crepa, dtype=torch.float16, scaler=scaler)
    assert scaler.get_scale() < 2.0**60
    assert not all(gradient.isfinite().all() for gradient in gradients[0].values())
    assert all(torch.equal(p, before[name]) for name, p in transformer.named_parameters())
    assert all(logs["crepa_loss"].isfinite() for logs in history)
    assert history[-1]["crepa_similarity_ema"].isfinite()

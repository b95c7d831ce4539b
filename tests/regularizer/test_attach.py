"""Attaching CREPA to a transformer, in which order, and taking it off."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model
from tiny import tiny_wan, wan_inputs
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from crepa_kernels import CrepaProjector, CrepaRegularizer
from crepa_kernels.regularizer.offloading import execution_device, offloading_groups

CONFIG: dict[str, Any] = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder_image_size": 70}
ORDER = "adapters, CrepaRegularizer, optimizer, LR scheduler, prepare/DDP/fully_shard"


def regularizer(transformer: Any, **settings: Any) -> CrepaRegularizer:
    torch.manual_seed(0)  # the projector's weights
    return CrepaRegularizer({**CONFIG, **settings}, transformer, feature_size=8)


def features(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 6, 8, generator=torch.Generator().manual_seed(6))


def add_lora(transformer: WanTransformer3DModel, target: Any = ("to_q",), name: str = "default") -> None:
    target = target if isinstance(target, str) else list(target)
    transformer.add_adapter(LoraConfig(r=2, target_modules=target, init_lora_weights=False), adapter_name=name)


# The projector


def test_the_projector_is_a_trainable_fp32_part_of_a_frozen_bf16_model() -> None:
    transformer = tiny_wan().to(torch.bfloat16)
    transformer.requires_grad_(False)
    add_lora(transformer)
    crepa = regularizer(transformer)
    trainable = [p for p in transformer.parameters() if p.requires_grad]
    assert transformer.crepa_projector is crepa.projector
    for parameter in crepa.projector.parameters():
        assert any(parameter is one for one in trainable)
        assert parameter.dtype == torch.float32
    inputs = {key: v.bfloat16() if v.is_floating_point() else v for key, v in wan_inputs().items()}
    prediction = transformer(**inputs)[0]
    assert prediction.dtype == torch.bfloat16
    crepa.loss(step=0, features=features())[0].backward()
    assert all(p.grad is not None for n, p in transformer.named_parameters() if "blocks.0" in n and "lora" in n)


def test_training_under_autocast() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = transformer(**wan_inputs())[0]
        aux, _ = crepa.loss(step=0, features=features())
    assert aux.dtype == torch.float32
    (prediction.float().square().mean() + aux).backward()
    assert all(p.grad.isfinite().all() for p in transformer.parameters() if p.grad is not None)
    assert crepa.projector[1].weight.grad.dtype == torch.float32


def total_gradients(transformer: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    add_lora(transformer)
    crepa = regularizer(transformer)
    prediction = transformer(**wan_inputs())[0]
    (prediction.square().mean() + crepa.loss(step=0, features=features())[0]).backward()
    return {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}


def test_checkpointing_and_compiled_blocks_change_no_gradient() -> None:
    expected = total_gradients(tiny_wan())
    assert len(expected) == 3 * 2 * 2 + 4  # blocks x attentions x (A, B), the projector
    checkpointed, both = tiny_wan(), tiny_wan()
    for transformer in (checkpointed, both):
        transformer.enable_gradient_checkpointing()
    torch._dynamo.reset()
    both.compile_repeated_blocks(backend="aot_eager")
    for transformer in (checkpointed, both):
        found = total_gradients(transformer)
        for name, gradient in expected.items():
            # Compiled chains round elsewhere.
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


# Wrong orders


def to_bf16(transformer: Any, crepa: Any) -> None:
    transformer.to(torch.bfloat16)


def freeze(transformer: Any, crepa: Any) -> None:
    transformer.requires_grad_(False)


def adapter_afterwards(transformer: Any, crepa: Any) -> None:
    add_lora(transformer)


def adapter_around_the_projector(transformer: Any, crepa: Any) -> None:
    add_lora(transformer, r"crepa_projector\.1|blocks\.0\.attn1\.to_q")


def replace(transformer: Any, crepa: Any) -> None:
    transformer.crepa_projector = copy.deepcopy(crepa.projector)


def delete(transformer: Any, crepa: Any) -> None:
    del transformer.crepa_projector


def to_meta(transformer: Any, crepa: Any) -> None:
    transformer.crepa_projector.to("meta")


WRONG: list[tuple[Callable[[Any, Any], None], str]] = [
    (to_bf16, "must stay fp32, but 0.weight was cast to torch.bfloat16"),
    (freeze, "must be trainable, but 0.weight is frozen"),
    (adapter_afterwards, "must be trainable, but 0.weight is frozen"),
    (adapter_around_the_projector, "was wrapped by an adapter that was added after it"),
    (replace, "was replaced by a CrepaProjector"),
    (delete, "is gone from the transformer"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[change.__name__ for change, _ in WRONG])
@pytest.mark.parametrize("after", [0, 2])
def test_a_wrong_order_is_named_at_the_first_loss_and_whenever_it_happens(
    change: Callable[[Any, Any], None], message: str, after: int
) -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer)
    for step in range(after):
        transformer(**wan_inputs())
        crepa.loss(step=step, features=features())
    change(transformer, crepa)
    inputs = wan_inputs()
    if change is to_bf16:
        inputs = {key: v.bfloat16() if v.is_floating_point() else v for key, v in inputs.items()}
    transformer(**inputs)
    with pytest.raises(ValueError, match=f"crepa_projector {message}.*{ORDER}"):
        crepa.loss(step=after, features=features())


def fp8(transformer: Any) -> None:
    transformer.to(torch.float8_e4m3fn)


def fp8_projector(transformer: Any) -> None:
    transformer.crepa_projector.to(torch.float8_e5m2)


def fp8_storage(transformer: Any) -> None:
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def to_int8(transformer: Any) -> None:
    linear = transformer.crepa_projector[1]
    linear.weight = torch.nn.Parameter((100 * linear.weight.detach()).to(torch.int8), requires_grad=False)


class Quantized(torch.Tensor):
    """Says that it is fp32 and computes nothing, as the weights of quantization libraries do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.sum:
            raise NotImplementedError("sum of quantized weights")
        return super().__torch_function__(func, types, args, kwargs or {})


def tensor_subclass(transformer: Any) -> None:
    linear = transformer.crepa_projector[1]
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Quantized))


class QuantizedLinear(torch.nn.Linear):
    """A layer of its own, as bitsandbytes puts in the place of the one that was there."""


def layer_replaced(transformer: Any) -> None:
    layer = QuantizedLinear(32, 8)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantized), requires_grad=False)
    transformer.crepa_projector[1] = layer


def torchao_int8(transformer: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(transformer, quantization.Int8WeightOnlyConfig(version=2))


CASTS: list[tuple[Callable[[Any], None], str]] = [
    (lambda transformer: transformer.half(), "0.weight was cast to torch.float16"),
    (fp8, "0.weight was cast to torch.float8_e4m3fn"),
    (fp8_projector, "0.weight was cast to torch.float8_e5m2"),
    (fp8_storage, "was cast to torch.float8_e4m3fn"),
    (to_int8, "1.weight was cast to torch.int8"),
    (tensor_subclass, "1.weight was quantized to Quantized"),
    (layer_replaced, "1.weight was quantized to Quantized"),
    (torchao_int8, "1.weight was quantized to Int8Tensor"),
]


@pytest.mark.parametrize(("cast", "message"), CASTS)
def test_a_cast_is_named_before_the_model_or_a_hook_fails_of_it(cast: Any, message: str) -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer)
    cast(transformer)
    inputs = wan_inputs()
    if cast is CASTS[0][0]:
        inputs = {key: v.half() if v.is_floating_point() else v for key, v in inputs.items()}

    def step() -> None:
        transformer(**inputs)
        crepa.loss(step=0, features=features())

    with pytest.raises(ValueError, match=f"crepa_projector must stay fp32, but .*{message}.*{ORDER}"):
        step()


def test_a_model_that_was_cast_for_sampling_samples() -> None:
    transformer = tiny_wan()
    regularizer(transformer)
    fp8_storage(transformer)
    with torch.no_grad():
        transformer(**wan_inputs())
    transformer.eval()(**wan_inputs())


def test_slices_of_a_projector_are_plain_and_copies_are_projectors() -> None:
    projector = CrepaProjector(4, 8)
    for part, layers in ((projector[:1], [0]), (projector[1:], [1]), (projector[:], [0, 1])):
        assert type(part) is torch.nn.Sequential
        assert list(part) == [projector[layer] for layer in layers]
        assert list(part.state_dict()) == [key for key in projector.state_dict() if int(key[0]) in layers]
    assert isinstance(projector[-1], torch.nn.Linear)
    assert isinstance(copy.deepcopy(projector), CrepaProjector)


def offloading_hooks(module: torch.nn.Module) -> list[str]:
    return [
        name for name, each in module.named_modules() if hasattr(each, "_diffusers_hook") and offloading_groups(each)
    ]


@pytest.mark.parametrize("attached_first", [False, True])
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_a_projector_stays_where_diffusers_offloads_the_model(offload_type: str, attached_first: bool) -> None:
    expected = tiny_wan()(**wan_inputs())[0]
    transformer = tiny_wan()
    here = torch.device("cpu")
    attached = regularizer(transformer) if attached_first else None
    transformer.enable_group_offload(here, here, offload_type=offload_type, num_blocks_per_group=1)
    crepa = attached or regularizer(transformer)
    # Until the first forward diffusers' are on both layers that it found there.
    assert offloading_hooks(crepa.projector) == (["0", "1"] if attached_first else [])
    blocks = len(offloading_hooks(transformer.blocks))
    for step in range(2):
        torch.testing.assert_close(transformer(**wan_inputs())[0], expected)
        crepa.loss(step=step, features=features())[0].backward()
        assert offloading_hooks(crepa.projector) == []
    assert len(offloading_hooks(transformer.blocks)) == blocks >= 3


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_a_block_that_waits_in_host_memory_is_where_it_comes_to(offload_type: str) -> None:
    transformer = tiny_wan()
    block = transformer.blocks[1]
    there, here = torch.device("cuda"), torch.device("cpu")
    assert execution_device(block, transformer) == here
    transformer.enable_group_offload(there, here, offload_type=offload_type, num_blocks_per_group=1)
    assert block.attn1.to_q.weight.device == here
    assert execution_device(block, transformer) == there


def test_a_projector_elsewhere_than_the_captured_block_is_named() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer)
    transformer.to("meta")
    crepa.projector.to_empty(device="cpu")
    transformer(**{name: each.to("meta") for name, each in wan_inputs().items()})
    with pytest.raises(ValueError, match=f"is on cpu, but the captured block computes on meta.*{ORDER}"):
        crepa.loss(step=0, features=features())


def offloads(transformer: Any) -> None:
    here = torch.device("cpu")
    transformer.enable_group_offload(here, here, offload_type="block_level", num_blocks_per_group=1)


DOCUMENTED = [
    (add_lora, fp8_storage, regularizer),
    (offloads, add_lora, regularizer),
    (add_lora, regularizer, offloads),
]


@pytest.mark.parametrize("order", DOCUMENTED, ids=lambda order: "-".join(each.__name__ for each in order))
def test_a_base_of_fp8_and_an_offloaded_one_train_in_the_documented_order(order: Any) -> None:
    transformer = tiny_wan().requires_grad_(False)
    found = [prepare(transformer) for prepare in order]
    (crepa,) = [each for each in found if each is not None]
    trained = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    assert any("lora_A" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values())
    crepa.check_optimizer(optimizer)
    prediction = transformer(**wan_inputs())[0]
    aux, _ = crepa.loss(step=0, features=features())
    (prediction.square().mean() + aux).backward()
    optimizer.step()
    assert [name for name, parameter in trained.items() if torch.equal(parameter, before[name])] == []


@pytest.mark.parametrize("elsewhere", ["patch_embedding", "blocks.0", "blocks.2", "blocks.1"])
def test_the_projector_is_put_where_the_captured_block_is(elsewhere: str) -> None:
    transformer = tiny_wan()
    transformer.get_submodule(elsewhere).to("meta")
    if elsewhere == "blocks.1":  # nowhere: then where the rest is
        transformer.patch_embedding.to("meta")
    crepa = regularizer(transformer)
    assert {p.device.type for p in crepa.projector.parameters()} == {"cpu"}


def test_a_projector_without_weights_is_named() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer)
    transformer(**wan_inputs())
    to_meta(transformer, crepa)
    with pytest.raises(ValueError, match=r"0.weight is on the meta device"):
        crepa.loss(step=0, features=features())


@pytest.fixture
def one_process() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(transformer: WanTransformer3DModel) -> Any:
    return fully_shard(transformer, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DistributedDataParallel, "wrapped in DDP"),
        (torch.nn.DataParallel, "data-parallel"),
        (lambda model: torch.compile(model, backend="eager"), "torch.compile"),
        (sharded, "fully_shard"),
        (lambda model: get_peft_model(model, LoraConfig(target_modules=["to_q"])), "get_base_model"),
    ],
)
def test_a_wrapped_model_is_refused(one_process: None, wrap: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*{ORDER}"):
        regularizer(wrap(tiny_wan()))


def test_two_regularizers_on_one_model_and_a_model_without_weights_are_refused() -> None:
    transformer = tiny_wan()
    regularizer(transformer)
    with pytest.raises(ValueError, match="already has a crepa_projector"):
        regularizer(transformer)
    with pytest.raises(ValueError, match="meta device"):
        regularizer(tiny_wan().to("meta"))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("target", "reaches"),
    [
        (r"blocks\.2\.attn1\.to_q", False),
        ("proj_out", False),
        (r"blocks\.[12]\.attn1\.to_q", True),
        (r"blocks\.0\.ffn\.net\.2", True),
    ],
)
def test_a_lora_that_crepa_cannot_reach_is_warned_about_once(
    target: str, reaches: bool, caplog: pytest.LogCaptureFixture
) -> None:
    transformer = tiny_wan()
    add_lora(transformer, target)
    crepa = regularizer(transformer)
    for step in range(3):
        transformer(**wan_inputs())
        crepa.loss(step=step, features=features())
    found = warnings_of(caplog)
    assert len(found) == (0 if reaches else 1)
    assert reaches or "block 1 or before it" in found[0]


def network_beside(transformer: WanTransformer3DModel, block: int) -> list[torch.nn.Parameter]:
    """A LoRA that is no part of the model: it replaces the forward of a layer, as kohya's networks do."""
    layer = transformer.blocks[block].attn1.to_q
    down, up = torch.nn.Linear(32, 2, bias=False), torch.nn.Linear(2, 32, bias=False)
    forward = layer.forward
    layer.forward = lambda x: forward(x) + up(down(x))
    return [*down.parameters(), *up.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("block", "reaches"), [(0, True), (1, True), (2, False)])
def test_a_lora_outside_of_the_model_is_seen(
    block: int, reaches: bool, checkpointing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    transformer = tiny_wan().requires_grad_(False)
    weights = network_beside(transformer, block)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    crepa = regularizer(transformer)
    transformer(**wan_inputs())
    crepa.loss(step=0, features=features())[0].backward()
    assert all((p.grad is not None) == reaches for p in weights)
    assert ["no trainable weight acts" in line for line in warnings_of(caplog)] == [True] * (not reaches)


def test_reentrant_checkpointing_that_cuts_the_graph_is_an_error() -> None:
    transformer = tiny_wan()
    add_lora(transformer)
    transformer.enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, use_reentrant=True))
    crepa = regularizer(transformer)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        transformer(**wan_inputs())
    with pytest.raises(ValueError, match=r"not attached to the graph.*not reentrant"):
        crepa.loss(step=0, features=features())


# Taking it off


def traces(transformer: WanTransformer3DModel) -> Any:
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._state_dict_hooks)) for m in transformer.modules()
    ]
    return (
        list(transformer.state_dict()),
        sorted(transformer.__dict__),
        hooks,
        [id(p) for p in transformer.parameters()],
    )


def test_remove_leaves_the_model_as_it_was_found() -> None:
    transformer = tiny_wan()
    add_lora(transformer)
    found = traces(transformer)
    crepa = regularizer(transformer)
    assert traces(transformer) != found
    transformer(**wan_inputs())
    crepa.remove()
    assert traces(transformer) == found
    crepa.remove()
    with pytest.raises(ValueError, match="removed"):
        crepa.loss(step=0, features=features())
    regularizer(transformer)

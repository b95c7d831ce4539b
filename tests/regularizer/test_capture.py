"""Hidden states out of a stock Wan transformer: values, gradients, and when nothing is captured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DModel, WanTransformer3DModel
from peft import LoraConfig
from tiny import tiny_wan, wan_inputs
from tiny_families import FAMILIES
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from crepa_kernels import CrepaProjector
from crepa_kernels.models.families import family_of, supported_families
from crepa_kernels.regularizer.attach import CREPA
from crepa_kernels.regularizer.capture import Capture

FRAMES, GRID = 3, (2, 3)  # of wan_inputs()
TOKENS = 6


def attached(transformer: WanTransformer3DModel, *indices: int) -> Capture:
    projector = CrepaProjector(32, 8)
    transformer.add_module(CREPA.projector, projector)
    chosen = {f"block {index}": index for index in indices or (1,)}
    capture = Capture(transformer, family_of(transformer), chosen, projector)
    capture.attach()
    return capture


def without_blocks(transformer: WanTransformer3DModel) -> None:
    """Makes every block the identity: no gate, no cross-attention."""
    with torch.no_grad():
        for parameter in transformer.condition_embedder.time_proj.parameters():
            parameter.zero_()
        for block in transformer.blocks:
            block.scale_shift_table.zero_()
            for parameter in block.attn2.to_out.parameters():
                parameter.zero_()


def test_states_are_the_blocks_output_by_frame_and_raster_position() -> None:
    transformer = tiny_wan()
    capture = attached(transformer)
    seen: list[torch.Tensor] = []
    transformer.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    transformer(**wan_inputs(batch=2))
    states, layout = capture.states(1)
    assert states.shape == (2, FRAMES, TOKENS, 32)
    assert (layout.frames, layout.grid) == (FRAMES, GRID)
    for frame in range(FRAMES):
        for y in range(GRID[0]):
            for x in range(GRID[1]):
                token = (frame * GRID[0] + y) * GRID[1] + x
                assert torch.equal(states[:, frame, y * GRID[1] + x], seen[0][:, token])


def test_a_token_lies_where_its_patch_of_the_latents_lies() -> None:
    transformer = tiny_wan()
    without_blocks(transformer)
    capture = attached(transformer, 0, 2)
    inputs = wan_inputs(batch=2)
    transformer(**inputs)
    patches = transformer.patch_embedding(inputs["hidden_states"])  # [B, D, T, height, width]
    expected = patches.permute(0, 2, 3, 4, 1).flatten(2, 3)
    for index in (0, 2):
        # What the identity blocks add is 0 exactly.
        assert torch.equal(capture.states(index).hidden_states, expected)


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_prediction_does_not_change(return_dict: bool) -> None:
    plain, transformer = tiny_wan(), tiny_wan()
    attached(transformer)
    for training in (True, False):
        outputs = [model.train(training)(**wan_inputs(), return_dict=return_dict) for model in (plain, transformer)]
        assert type(outputs[0]) is type(outputs[1])
        assert torch.equal(outputs[0][0], outputs[1][0])


def reentrant(module: torch.nn.Module, *args: Any) -> Any:
    return checkpoint(module.__call__, *args, use_reentrant=True)


def gradients_of(transformer: WanTransformer3DModel, *, run: Callable[..., Any] | None = None) -> list[torch.Tensor]:
    """Of the prediction's and the captured states' squares, to every weight of the transformer."""
    capture = attached(transformer)
    inputs = wan_inputs(batch=2)
    # A reentrant checkpoint passes gradients only to inputs that ask for them.
    inputs["hidden_states"].requires_grad_(True)
    prediction = (transformer if run is None else run)(**inputs)[0]
    states = capture.states(1).hidden_states
    (prediction.square().mean() + states.square().mean()).backward()
    assert capture.states(1).hidden_states.data_ptr() == states.data_ptr(), (
        "the recomputation in the backward was captured"
    )
    weights = [(n, p) for n, p in transformer.named_parameters() if CREPA.projector not in n]
    return [p.grad for n, p in weights if p.grad is not None]


@pytest.mark.parametrize("mode", ["not reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradients(mode: str) -> None:
    plain, transformer = tiny_wan(), tiny_wan()
    transformer.enable_gradient_checkpointing(reentrant if mode == "reentrant" else None)
    expected, found = gradients_of(plain), gradients_of(transformer)
    assert len(expected) == len(found) > 50
    for one, other in zip(expected, found, strict=True):
        # The same operations in the same order; a reentrant backward adds up in another one.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def lora(transformer: WanTransformer3DModel, blocks: str = r"\d") -> WanTransformer3DModel:
    transformer.requires_grad_(False)
    target = rf"blocks\.{blocks}\.attn1\.(to_q|to_v)"
    transformer.add_adapter(LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    return transformer


def test_gradients_reach_the_adapters_up_to_the_block_and_no_further() -> None:
    transformer = lora(tiny_wan())
    capture = attached(transformer)
    transformer.enable_gradient_checkpointing()
    transformer(**wan_inputs())
    capture.states(1).hidden_states.square().mean().backward()
    reached = {int(name.split(".")[1]) for name, p in transformer.named_parameters() if p.grad is not None}
    assert reached == {0, 1}


def test_states_follow_autocast() -> None:
    transformer = tiny_wan()
    capture = attached(transformer)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = transformer(**wan_inputs())[0]
    states = capture.states(1).hidden_states
    assert prediction.dtype == states.dtype == torch.bfloat16
    states.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in transformer.blocks[0].attn1.to_q.parameters())


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_are_captured_and_never_recompiled(dynamo: None, checkpointing: bool) -> None:
    expected = gradients_of(tiny_wan())
    transformer = tiny_wan()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    found = gradients_of(transformer)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # fused chains round elsewhere
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            transformer(**wan_inputs(batch=2))[0].sum().backward()


def test_a_compiled_model_is_captured(dynamo: None) -> None:
    expected = gradients_of(tiny_wan())
    transformer = tiny_wan()
    found = gradients_of(transformer, run=torch.compile(transformer, backend="aot_eager"))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # fused chains round elsewhere


def test_a_compiled_model_with_checkpointing_says_to_compile_the_blocks(dynamo: None) -> None:
    transformer = tiny_wan(num_layers=2)
    transformer.enable_gradient_checkpointing()
    capture = attached(transformer)
    torch.compile(transformer, backend="aot_eager")(**wan_inputs())
    with pytest.raises(ValueError, match=r"compile the blocks.*and not the model"):
        capture.states(1)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_ddp_needs_nothing_in_steps_without_crepa(one_process: None, options: dict[str, bool]) -> None:
    transformer = lora(tiny_wan())
    capture = attached(transformer)
    model = DistributedDataParallel(transformer, **options)
    projector = transformer.crepa_projector
    for with_crepa in (True, False, True):
        loss = model(**wan_inputs())[0].square().mean()
        if with_crepa:
            loss = loss + projector(capture.states(1).hidden_states).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in projector.parameters())


def test_without_the_projector_in_the_graph_ddp_fails(one_process: None) -> None:
    # What the test above guards against does happen.
    transformer = lora(tiny_wan())
    transformer.add_module(CREPA.projector, CrepaProjector(32, 8))
    model = DistributedDataParallel(transformer)
    model(**wan_inputs())[0].square().mean().backward()
    with pytest.raises(RuntimeError, match=r"unused|finished reduction"):
        model(**wan_inputs())[0].square().mean().backward()


def test_nothing_is_captured_without_gradients_in_eval_mode_or_when_disabled() -> None:
    transformer = tiny_wan()
    capture = attached(transformer)
    with pytest.raises(ValueError, match="forward was not called before loss"):
        capture.states(1)
    with torch.no_grad():
        transformer(**wan_inputs())
    with pytest.raises(ValueError, match="without gradients"):
        capture.states(1)
    transformer.eval()(**wan_inputs())
    with pytest.raises(ValueError, match="eval mode"):
        capture.states(1)
    capture.enabled = False
    transformer.train()(**wan_inputs())
    with pytest.raises(ValueError, match="weight became 0"):
        capture.states(1)
    capture.enabled = True
    transformer(**wan_inputs())
    assert capture.states(1).hidden_states.requires_grad


def test_only_the_asked_for_blocks_are_kept_and_only_until_released() -> None:
    transformer = tiny_wan()
    capture = attached(transformer, 0, 2)
    transformer(**wan_inputs())
    first = capture.states(0).hidden_states
    assert not torch.equal(first, capture.states(2).hidden_states)
    with pytest.raises(ValueError, match="block 1 is not captured, only 0, 2"):
        capture.states(1)
    transformer(**wan_inputs(seed=9))
    assert not torch.equal(first, capture.states(0).hidden_states)
    capture.release()
    assert capture.is_empty
    with pytest.raises(ValueError, match="forward was not called"):
        capture.states(0)


def test_a_copy_of_the_model_runs_and_keeps_its_states_to_itself() -> None:
    transformer = tiny_wan()
    capture = attached(transformer)
    transformer(**wan_inputs())
    states = capture.states(1).hidden_states
    copied = copy.deepcopy(transformer)
    copied(**wan_inputs(seed=9))
    assert torch.equal(states, capture.states(1).hidden_states)


def test_no_hook_is_left_after_remove() -> None:
    transformer = tiny_wan()
    capture = attached(transformer)
    capture.remove()
    for module in transformer.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("index", [3, 40, -1])
def test_a_block_index_out_of_range_says_which_are_valid(index: int) -> None:
    with pytest.raises(ValueError, match=rf"crepa_block_index = {index}: .* valid are 0 to 2"):
        family_of(tiny_wan()).block(tiny_wan(), index, "crepa_block_index")


def test_another_class_says_which_families_are_supported() -> None:
    other = partial(UNet2DModel, sample_size=8, block_out_channels=(32,), norm_num_groups=8)
    unet = other(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    with pytest.raises(ValueError, match=r"UNet2DModel is not .*supported families: wan \(WanTransformer3DModel\)"):
        family_of(unet)
    assert set(supported_families()) == {tiny.name for tiny in FAMILIES.values()}


def test_a_subclass_belongs_to_its_base_class_family() -> None:
    class Patched(WanTransformer3DModel):
        pass

    transformer = tiny_wan()
    transformer.__class__ = Patched
    assert family_of(transformer).name == "wan"

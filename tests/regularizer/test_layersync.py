"""LayerSync on stock transformers: against the loss written out, beside CREPA on the same hooks, and alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from tiny import is_captured, tiny_wan, wan_inputs
from tiny_families import FAMILIES, TinyFamily
from tiny_unets import tiny_unet
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from crepa_kernels import CrepaRegularizer, LayerSync, LayerSyncConfig

STUDENT, TEACHER = 0, 2
CONFIG: dict[str, Any] = {
    "layersync_enabled": True,
    "layersync_student_block": STUDENT,
    "layersync_teacher_block": TEACHER,
    "layersync_lambda": 0.3,
}
CREPA: dict[str, Any] = {"crepa_enabled": True, "crepa_block_index": STUDENT}
LOGS = {"layersync_loss", "layersync_similarity"}


def features(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 6, 8, generator=torch.Generator().manual_seed(6))


def crepa_on(transformer: nn.Module, **settings: Any) -> CrepaRegularizer:
    torch.manual_seed(0)
    return CrepaRegularizer({**CREPA, **settings}, transformer, feature_size=8)


def mean_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Of tokens (B, tokens, D); the teacher's do not learn."""
    student, teacher = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (student, teacher.detach()))
    return (student * teacher).sum(-1).mean()


class Outputs:
    """The tokens of the video or image that a plain model's blocks return."""

    def __init__(self, tiny: TinyFamily, transformer: nn.Module, *indices: int) -> None:
        self._tiny = tiny
        self.found: dict[int, torch.Tensor] = {}
        for index in indices:
            transformer.get_submodule(tiny.blocks[index]).register_forward_hook(self._keep(index))

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.found[index] = self._tiny.tokens(output)

        return hook


def gradients(transformer: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: p.grad for name, p in transformer.named_parameters() if p.grad is not None and "crepa_proj" not in name
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        # fp32 sums in another order, relative to the whole of a weight's gradient.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_loss_written_out(name: str) -> None:
    tiny = FAMILIES[name]
    plain, transformer = tiny.make(), tiny.make()
    last = len(tiny.blocks) - 1
    outputs = Outputs(tiny, plain, 1, last)
    inputs = tiny.inputs(2)
    prediction = plain(**inputs)[0]
    cosine = mean_cosine(outputs.found[1], outputs.found[last])
    (prediction.square().mean() - 0.3 * cosine.float()).backward()

    layersync = LayerSync({**CONFIG, "layersync_student_block": 1, "layersync_teacher_block": last}, transformer)
    prediction = transformer(**inputs)[0]
    aux, logs = layersync.loss()
    (prediction.square().mean() + aux).backward()
    assert set(logs) == LOGS
    assert not any(value.requires_grad for value in logs.values())
    torch.testing.assert_close(logs["layersync_similarity"].double(), cosine.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(aux.detach(), -0.3 * cosine.float().detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(aux.detach(), logs["layersync_loss"])
    assert_same(gradients(transformer), gradients(plain))


def test_only_what_acts_on_the_students_block_learns_from_it() -> None:
    transformer = tiny_wan()
    layersync = LayerSync(CONFIG, transformer)
    transformer(**wan_inputs())
    layersync.loss()[0].backward()
    reached = {name.split(".")[1] for name in gradients(transformer) if name.startswith("blocks.")}
    assert reached == {str(STUDENT)}


def test_a_teacher_before_the_student_is_taken_too() -> None:
    transformer = tiny_wan()
    outputs = Outputs(FAMILIES["wan"], transformer, 0, 2)
    swapped = {**CONFIG, "layersync_student_block": 2, "layersync_teacher_block": 0}
    layersync = LayerSync(swapped, transformer)
    transformer(**wan_inputs())
    found = layersync.loss()[1]["layersync_similarity"]
    torch.testing.assert_close(found, mean_cosine(outputs.found[2], outputs.found[0]).float(), rtol=1e-5, atol=1e-6)


def test_frames_that_are_masked_are_not_in_the_loss() -> None:
    transformer = tiny_wan()
    layersync = LayerSync(CONFIG, transformer)
    outputs = Outputs(FAMILIES["wan"], transformer, STUDENT, TEACHER)
    transformer(**wan_inputs())
    found = layersync.loss(frame_mask=torch.tensor([[False, True, True]]))[1]["layersync_similarity"]
    student, teacher = (outputs.found[block].unflatten(1, (3, 6))[:, 1:] for block in (STUDENT, TEACHER))
    torch.testing.assert_close(found, mean_cosine(student, teacher).float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="frame_mask"):
        layersync.loss(frame_mask=torch.ones(1, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    "how",
    ["checkpointing", "reentrant checkpointing", "lora", "autocast", pytest.param("compiled", marks=pytest.mark.slow)],
)
def test_the_ways_of_training_give_the_plain_gradients(how: str) -> None:
    def gradients_of(way: str) -> dict[str, torch.Tensor]:
        transformer = tiny_wan()
        if how == "lora":
            transformer.requires_grad_(False)
            torch.manual_seed(0)
            transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        if way == "checkpointing":
            transformer.enable_gradient_checkpointing()
        if way == "reentrant checkpointing":
            transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
        layersync = LayerSync(CONFIG, transformer)
        if way == "compiled":
            transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            inputs = wan_inputs()
            inputs["hidden_states"].requires_grad_(True)  # which a reentrant checkpoint asks for
            prediction = transformer(**inputs)[0]
            aux, _ = layersync.loss()
        (prediction.float().square().mean() + aux).backward()
        return gradients(transformer)

    found, expected = gradients_of(how), gradients_of("plain")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Under autocast bf16 rounds each layer; else sums come in another order.
        off = float((found[name] - gradient).norm() / gradient.norm().clamp_min(1e-3))
        assert off < (0.2 if how == "autocast" else 1e-3), f"{name}: {off}"


# Beside CREPA


def hooks_of(transformer: nn.Module) -> dict[str, int]:
    counts = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in transformer.named_modules()}
    return {name: count for name, count in counts.items() if count}


def both(transformer: nn.Module, first: str, **crepa: Any) -> tuple[CrepaRegularizer, LayerSync]:
    if first == "CREPA":
        regularizer = crepa_on(transformer, **crepa)
        return regularizer, LayerSync(CONFIG, transformer)
    layersync = LayerSync(CONFIG, transformer)
    return crepa_on(transformer, **crepa), layersync


@pytest.mark.parametrize("first", ["CREPA", "LayerSync"])
def test_a_block_that_both_read_has_one_hook(first: str) -> None:
    transformer = tiny_wan()
    found = hooks_of(transformer)
    crepa, layersync = both(transformer, first)
    # Two on the model; the block that they share, and the one that teaches.
    assert hooks_of(transformer) == {"": 2, f"blocks.{STUDENT}": 1, f"blocks.{TEACHER}": 1}
    backbone = {"crepa_feature_source": "backbone", "crepa_teacher_block_index": TEACHER}
    crepa.remove()
    assert hooks_of(transformer) == {"": 2, f"blocks.{STUDENT}": 1, f"blocks.{TEACHER}": 1}
    crepa = CrepaRegularizer({**CREPA, **backbone}, transformer)
    assert hooks_of(transformer) == {"": 2, f"blocks.{STUDENT}": 1, f"blocks.{TEACHER}": 1}
    layersync.remove()
    transformer(**wan_inputs())
    crepa.loss(step=0)[0].backward()
    crepa.remove()
    assert hooks_of(transformer) == found == {}


@pytest.mark.parametrize("first", ["CREPA", "LayerSync"])
def test_the_gradients_of_both_add_up(first: str) -> None:
    def gradients_of(*losses: str) -> dict[str, torch.Tensor]:
        transformer = tiny_wan()
        crepa, layersync = both(transformer, first)
        loss = transformer(**wan_inputs())[0].square().mean() * ("main" in losses)
        if "CREPA" in losses:
            loss = loss + crepa.loss(step=0, features=features())[0]
        if "LayerSync" in losses:
            loss = loss + layersync.loss()[0]
        crepa.release()
        layersync.release()
        loss.backward()
        return gradients(transformer)

    alone = [gradients_of(name) for name in ("main", "CREPA", "LayerSync")]
    together = gradients_of("main", "CREPA", "LayerSync")
    assert_same(together, {name: sum(each.get(name, 0) for each in alone) for name in together})  # type: ignore[misc]


@pytest.mark.parametrize("why", ["weight 0", "cutoff", "released", "never asked"])
def test_what_crepa_lets_go_of_stays_for_layersync(why: str) -> None:
    options = {"weight 0": {"crepa_lambda": 0.0}, "cutoff": {"crepa_cutoff_step": 1}}.get(why, {})
    transformer = tiny_wan()
    crepa, layersync = both(transformer, "CREPA", **options)
    expected = []
    for step in range(3):
        transformer(**wan_inputs())
        if why != "never asked":
            crepa.loss(step=step, features=features())
        crepa.release()
        assert not is_captured(crepa)
        expected.append(layersync.loss()[1]["layersync_similarity"])
        layersync.release()
        with pytest.raises(ValueError, match=r"not called before loss\(\) since release"):
            layersync.loss()
    assert expected[0] == expected[1] == expected[2]


def test_no_state_is_held_longer_than_one_of_them_needs_it() -> None:
    transformer = tiny_wan()
    crepa = crepa_on(transformer, crepa_block_index=1, crepa_cutoff_step=1)
    layersync = LayerSync(CONFIG, transformer)
    slots = next(iter(transformer.blocks[1]._forward_hooks.values()))
    transformer(**wan_inputs())
    crepa.loss(step=0, features=features())
    crepa.release()
    assert slots.output is None
    layersync.loss()
    layersync.release()
    assert all(next(iter(transformer.blocks[block]._forward_hooks.values())).output is None for block in (0, 1, 2))
    transformer(**wan_inputs())
    crepa.loss(step=1)
    assert crepa.ended
    transformer(**wan_inputs())
    assert slots.output is None, "CREPA has ended, and nobody else reads this block"
    layersync.loss()
    layersync.release()
    assert all(next(iter(transformer.blocks[block]._forward_hooks.values())).output is None for block in (0, 1, 2))


def test_crepa_that_has_ended_has_no_states_where_layersync_still_captures() -> None:
    transformer = tiny_wan()
    crepa, layersync = both(transformer, "LayerSync", crepa_cutoff_step=1)
    for step in range(3):
        transformer(**wan_inputs())
        crepa.loss(step=step, features=features())
        layersync.loss()
    assert not is_captured(crepa)
    with pytest.raises(ValueError, match="let go of"):
        crepa.captured()


def test_crepa_learns_the_same_with_layersync_attached() -> None:
    def losses(with_layersync: bool) -> list[float]:
        transformer = tiny_wan()
        crepa = crepa_on(transformer)
        if with_layersync:
            LayerSync(CONFIG, transformer)
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
        found = []
        for step in range(3):
            prediction = transformer(**wan_inputs())[0]
            aux, _ = crepa.loss(step=step, features=features())
            (prediction.square().mean() + aux).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(aux.detach()))
        return found

    assert losses(True) == losses(False)


# Alone


def test_training_raises_the_similarity() -> None:
    transformer = tiny_wan()
    layersync = LayerSync(CONFIG, transformer)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    found = []
    for _ in range(15):
        prediction = transformer(**wan_inputs())[0]
        aux, logs = layersync.loss()
        (prediction.square().mean() + aux).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(logs["layersync_similarity"]))
    assert 1 - found[-1] < 0.7 * (1 - found[0])


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_ddp_needs_nothing(one_process: None, options: dict[str, bool]) -> None:
    transformer = tiny_wan()
    layersync = LayerSync(CONFIG, transformer)
    model = DistributedDataParallel(transformer, **options)
    for _ in range(3):
        prediction = model(**wan_inputs())[0]
        (prediction.square().mean() + layersync.loss()[0]).backward()
    found = gradients(transformer)
    single = tiny_wan()
    layersync = LayerSync(CONFIG, single)
    for _ in range(3):
        prediction = single(**wan_inputs())[0]
        (prediction.square().mean() + layersync.loss()[0]).backward()
    assert_same(found, gradients(single))


def test_remove_leaves_the_model_as_it_was_found() -> None:
    transformer = tiny_wan()
    before = sorted(transformer.__dict__), list(transformer.state_dict())
    layersync = LayerSync(CONFIG, transformer)
    assert (sorted(transformer.__dict__), list(transformer.state_dict())) == before
    transformer(**wan_inputs())
    layersync.remove()
    layersync.remove()
    assert hooks_of(transformer) == {}
    with pytest.raises(ValueError, match="this LayerSync was removed"):
        layersync.loss()


def test_a_copy_of_the_model_runs_and_keeps_its_states_to_itself() -> None:
    transformer = tiny_wan()
    layersync = LayerSync(CONFIG, transformer)
    transformer(**wan_inputs())
    expected = layersync.loss()[0]
    for copied in (copy.deepcopy(transformer), pickle.loads(pickle.dumps(transformer))):
        copied(**wan_inputs(seed=9))
        assert torch.equal(layersync.loss()[0], expected)


def test_nothing_is_attached_where_it_is_off(caplog: pytest.LogCaptureFixture) -> None:
    transformer = tiny_wan()
    layersync = LayerSync({"layersync_lambda": 0.5}, transformer)
    assert hooks_of(transformer) == {}
    assert "LayerSync is OFF: " in caplog.text
    transformer(**wan_inputs())
    aux, logs = layersync.loss()
    assert float(aux) == 0
    assert logs == {}
    layersync.release()
    layersync.remove()


def test_an_adapter_that_reaches_no_block_up_to_the_students_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transformer = tiny_wan()
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, target_modules=r"blocks\.2\.attn1\.to_q"))
    layersync = LayerSync(CONFIG, transformer)
    for _ in range(2):
        transformer(**wan_inputs())
        layersync.loss()
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert warned[0].endswith("nothing learns from LayerSync")


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layersync_student_block": None}, "layersync_student_block = null: .*required when layersync_enabled"),
        ({"layersync_teacher_block": None}, "layersync_teacher_block = null: .*required when layersync_enabled"),
        ({"layersync_teacher_block": STUDENT}, "layersync_teacher_block = 0: must be another block than layersync_st"),
        ({"layersync_student_block": -1}, "layersync_student_block = -1: .*integer >= 0"),
        ({"layersync_student_block": 0.5}, "layersync_student_block = 0.5: .*integer >= 0"),
        ({"layersync_lambda": 0}, "layersync_lambda = 0.0: .*number > 0|layersync_lambda = 0: .*number > 0"),
        ({"layersync_lambda": float("nan")}, "layersync_lambda = NaN: .*number > 0"),
        ({"layersync_lambda": "0.5"}, 'layersync_lambda = "0.5": .*number > 0'),
        ({"layersync_enabled": "yes"}, 'layersync_enabled = "yes": .*true or false'),
        ({"layersync_lamda": 1}, "layersync_lamda = 1: unknown key; did you mean layersync_lambda"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerSyncConfig.from_dict({**CONFIG, **changes, "another_programs_key": 1})


def test_all_wrong_settings_are_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"2 settings are wrong:\n.*lambda.*\n.*teacher_block"):
        LayerSyncConfig.from_dict({**CONFIG, "layersync_lambda": -1, "layersync_teacher_block": STUDENT})


def test_settings_come_from_json_and_the_command_line(tmp_path: Any) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"crepa_enabled": true, "layersync_student_block": 3, "layersync_teacher_block": 9}')
    config, rest = LayerSyncConfig.parse_known_args(
        ["--layersync_enabled", "--layersync_lambda", "1e-1", "--crepa_lambda", "1"], LayerSyncConfig.from_file(file)
    )
    assert config.to_dict() == {
        "layersync_enabled": True,
        "layersync_student_block": 3,
        "layersync_teacher_block": 9,
        "layersync_lambda": 0.1,
    }
    assert rest == ["--crepa_lambda", "1"]
    assert LayerSyncConfig.from_dict(config.to_dict()) == config
    assert LayerSyncConfig().layersync_lambda == 0.2


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("layersync_student_block", r"layersync_student_block = 7: .*valid are 0 to 2"),
        ("layersync_teacher_block", r"layersync_teacher_block = 7: .*valid are 0 to 2"),
    ],
)
def test_a_block_that_the_model_lacks_is_an_error(block: str, message: str) -> None:
    transformer = tiny_wan()
    with pytest.raises(ValueError, match=message):
        LayerSync({**CONFIG, block: 7}, transformer)
    assert hooks_of(transformer) == {}


def test_what_cannot_be_attached_to_is_an_error(one_process: None) -> None:
    with pytest.raises(ValueError, match=r"LayerSync must be given the transformer itself, but it is wrapped in DDP"):
        LayerSync(CONFIG, DistributedDataParallel(tiny_wan()))
    with pytest.raises(ValueError, match="is a UNet, and CREPA and LayerSync are for transformers: UNets have U-REPA"):
        LayerSync(CONFIG, tiny_unet())
    with pytest.raises(ValueError, match=r"Linear is not a supported transformer"):
        LayerSync(CONFIG, nn.Linear(2, 2))


def test_a_forward_that_captures_nothing_says_why() -> None:
    transformer = tiny_wan()
    layersync = LayerSync(CONFIG, transformer)
    with pytest.raises(ValueError, match=r"forward was not called before loss.*LayerSync was given"):
        layersync.loss()
    with torch.no_grad():
        transformer(**wan_inputs())
    with pytest.raises(ValueError, match=r"without gradients .*nothing was captured for LayerSync"):
        layersync.loss()
    transformer.eval()(**wan_inputs())
    with pytest.raises(ValueError, match="eval mode"):
        layersync.loss()
    transformer.train()(**wan_inputs())
    with torch.no_grad():
        assert not layersync.loss()[0].requires_grad


def test_attached_after_a_forward_it_has_nothing_of_it() -> None:
    transformer = tiny_wan()
    crepa = crepa_on(transformer)
    transformer(**wan_inputs())
    layersync = LayerSync(CONFIG, transformer)
    with pytest.raises(ValueError, match="forward was not called before loss"):
        layersync.loss()
    crepa.loss(step=0, features=features())

"""What the plan says that a run needs, against what the CPU's allocator gives out in the trainer's own steps."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from crepa_trainer.data.dataset import Bucket
from crepa_trainer.families import TrainingFamily
from crepa_trainer.optimizers import OPTIMIZERS, make_optimizer, start_training
from crepa_trainer.reporting.memory import BaseWeights, Phase, RunMemory, state_bytes
from crepa_trainer.reporting.shadow import LiveBytes
from crepa_trainer.reporting.table import memory_rows, readable_bytes
from crepa_trainer.settings import RunSettings
from memory import allocated_peak
from planned_steps import Measured, batch, made, measured, measured_apart, planned
from processes import run
from tiny import tiny_dinov2
from tiny_families import FAMILIES
from tiny_pipelines import save_tiny_ltx_pipeline, save_tiny_wan_pipeline
from torch.utils._pytree import tree_leaves
from training_runs import TinyClips, save_models, tiny_config, tiny_settings, train
from videos import moving_square, write_video

from crepa_kernels import CrepaConfig
from crepa_kernels.teachers.dinov2 import DinoV2

WIDE = {"num_attention_heads": 4, "attention_head_dim": 32}
WITHIN = 0.15


def save_ltx(folder: Path) -> None:
    transformer = FAMILIES["ltxvideo"].make(**WIDE, cross_attention_dim=128)
    save_tiny_ltx_pipeline(folder)
    transformer.save_pretrained(folder / "transformer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that are wide enough, and clips that are long enough, for what has one size only to be little."""
    folder = tmp_path_factory.mktemp("memory")
    save_tiny_wan_pipeline(folder / "wan", transformer={**WIDE, "ffn_dim": 512})
    save_ltx(folder / "ltxvideo")
    # For what needs no measuring: every block that is traced takes its time.
    save_tiny_wan_pipeline(folder / "small", transformer={"num_layers": 2})
    tiny_dinov2(folder / "dinov2", hidden_size=64)
    (folder / "data").mkdir()
    for name in "ab":
        write_video(folder / "data" / f"{name}.mp4", moving_square(20, 96, 160))
        (folder / "data" / f"{name}.txt").write_text("a square")
    return folder


SIZES = {"wan": ((96, 160), 17), "ltxvideo": ((192, 320), 17)}
SMALL = ((32, 48), 9)


def settings_for(folder: Path, family: str, **changes: Any) -> RunSettings:
    size, frames = SIZES.get(family, SMALL)
    places = {"model": str(folder / family), "data": folder / "data", "output": folder / "out"}
    given = {"resolutions": [size], "frame_counts": [frames], "max_train_steps": 3, "batch_size": 2}
    return RunSettings(**{**places, **given, **changes})


def crepa(folder: Path, **changes: Any) -> CrepaConfig:
    values = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder": str(folder / "dinov2")}
    return CrepaConfig(**{**values, "crepa_encoder_image_size": 70, **changes})


def check_training(folder: Path, family: str, taught: bool, **changes: Any) -> None:
    plan = planned(settings_for(folder, family, **changes), crepa(folder) if taught else CrepaConfig())
    found = RunMemory(plan).training()
    there, peak = measured(plan)
    held = sum(found.terms[name] for name in ("transformer", "trained", "optimizer", "EMA"))
    if taught:
        held += 4 * DinoV2(plan.config.crepa_encoder).parameters()
    assert held == pytest.approx(there, rel=0.01)  # an optimizer counts its steps, one number a parameter
    assert found.total - held == pytest.approx(peak, rel=WITHIN)
    assert found.total == pytest.approx(there + peak, rel=WITHIN)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("wan", {"gradient_checkpointing": True}),
        ("ltxvideo", {"training": "full", "gradient_checkpointing": True, "mixed_precision": "no", "ema_decay": 0.9}),
    ],
)
def test_training_needs_what_the_plan_says(folder: Path, family: str, changes: dict[str, Any]) -> None:
    check_training(folder, family, taught=True, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "training", "checkpointing", "precision", "taught"),
    list(itertools.product(SIZES, ("lora", "full"), (True, False), ("no", "bf16"), (True, False))),
)
def test_training_of_every_kind_needs_what_the_plan_says(
    folder: Path, family: str, training: str, checkpointing: bool, precision: str, taught: bool
) -> None:
    changes = {"training": training, "gradient_checkpointing": checkpointing, "mixed_precision": precision}
    check_training(folder, family, taught=taught, **changes)


def check_apart(folder: Path, tmp_path: Path, family: str, processes: int, taught: bool, **changes: Any) -> None:
    """The most that any of several processes needs."""
    settings, config = settings_for(folder, family, **changes), crepa(folder) if taught else CrepaConfig()
    # diffusers' context parallelism counts the accelerators, and takes a CPU for none.
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        found = RunMemory(planned(settings, config, processes=processes)).training()
    done = run(measured_apart, settings.model_dump(mode="json"), config.to_dict(), str(tmp_path), ranks=processes)
    assert done.returncode == 0, done.stderr
    each = [Measured(*torch.load(tmp_path / f"{rank}.pt")) for rank in range(processes)]
    held = sum(found.terms[name] for name in ("transformer", "trained", "optimizer", "EMA"))
    if taught:
        held += 4 * DinoV2(config.crepa_encoder).parameters()
    # Where a share does not come out even, the last processes have less.
    assert held == pytest.approx(max(of.there for of in each), rel=0.01)
    assert found.total - held == pytest.approx(max(of.peak for of in each), rel=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "processes", "changes"),
    [("wan", 2, {"sharding": "fsdp2"}), ("wan", 2, {"context_parallel": 2})],
)
def test_each_of_two_processes_needs_what_the_plan_says(
    folder: Path, tmp_path: Path, family: str, processes: int, changes: dict[str, Any]
) -> None:
    check_apart(folder, tmp_path, family, processes, taught=True, **changes)


LAYERS = {"layersync_student_block": 0, "layersync_teacher_block": 2}
FULL = {"training": "full", "mixed_precision": "no", "ema_decay": 0.9}
WHOLE = {"gradient_checkpointing": False}


@pytest.mark.slow
@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize(
    ("family", "processes", "changes"),
    [
        ("wan", 3, {"sharding": "fsdp2", **FULL}),
        ("ltxvideo", 2, {"sharding": "fsdp2", **FULL, **WHOLE, "mixed_precision": "bf16"}),
        ("ltxvideo", 2, {"context_parallel": 2, **WHOLE}),
        ("wan", 4, {"context_parallel": 2, **FULL}),
        ("wan", 4, {"context_parallel": 4, "layersync_enabled": True, **LAYERS}),
    ],
)
def test_each_of_several_processes_needs_what_the_plan_says(
    folder: Path, tmp_path: Path, family: str, processes: int, changes: dict[str, Any], taught: bool
) -> None:
    check_apart(folder, tmp_path, family, processes, taught=taught, **changes)


@pytest.mark.parametrize(("family", "size", "frames"), [("wan", (32, 48), 9), ("ltxvideo", (64, 96), 17)])
def test_the_vae_needs_what_the_plan_says(folder: Path, family: str, size: tuple[int, int], frames: int) -> None:
    """By its tensors: a CPU's convolutions have copies of their inputs besides."""
    sizes = {"resolutions": [size], "frame_counts": [frames], "mixed_precision": "no"}
    memory = RunMemory(planned(settings_for(folder, family, **sizes), CrepaConfig()))
    vae, family_of = memory.family.load_vae(torch.float32), memory.family
    found = memory.clips()
    assert found.terms["VAE"] == sum(each.nbytes for each in vae.parameters())
    with LiveBytes() as live:
        live.leave_out(vae)
        family_of.encode_clip(vae, torch.zeros(frames, 3, *size, dtype=torch.uint8))
    assert found.terms["activations"] == pytest.approx(live.peak, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_denoising_needs_what_the_plan_says(folder: Path, family: str) -> None:
    plan = planned(settings_for(folder, family, mixed_precision="no"), CrepaConfig())
    memory, state, given = RunMemory(plan), made(plan), batch(plan)
    noisy = plan.family.noisy(given.clips, given.noise, given.time)

    @torch.no_grad()
    def predict() -> None:
        plan.family.predict(state.transformer, noisy, given.clips)

    there = sum(each.nbytes for each in (*given.clips.values(), noisy.latents, noisy.target, noisy.timestep))
    assert memory.denoising == pytest.approx(allocated_peak(predict) + there, rel=WITHIN)


def test_it_says_what_to_switch_on_to_fit(folder: Path) -> None:
    changes = {"training": "full", "gradient_checkpointing": False, "mixed_precision": "no"}
    memory = RunMemory(planned(settings_for(folder, "wan", **changes), crepa(folder), device_type="cuda"))
    need = memory.need()
    assert memory.remedies(need) == []
    every = memory.remedies(1)
    assert [each.need for each in every] == sorted((each.need for each in every), reverse=True)
    assert len({each.key for each in every}) == len(every)
    assert all(each.saved > 0 and each.key in RunSettings.model_fields for each in every)
    assert need - sum(each.saved for each in every) == every[-1].need
    assert memory.need(replace(memory.chosen, **{each.key: each.value for each in every})) == every[-1].need
    first, *_ = memory.remedies(need - 1)
    rows = dict(memory_rows(memory, need - 1))
    value = json.dumps(first.value).strip('"')
    words = f"needs {readable_bytes(need)}, has {readable_bytes(need - 1)}: {first.key}={value} saves "
    assert rows["memory"] == words + readable_bytes(first.saved)
    assert " with gradient checkpointing" in rows["memory, training"]
    assert dict(memory_rows(memory, need))["memory"].endswith(f", has {readable_bytes(need)}")
    hopeless = dict(memory_rows(memory, 1))["memory"]
    assert hopeless.endswith("is still too much without smaller resolutions, frame_counts or batch_size")


def test_several_processes_are_told_to_share_and_not_to_offload(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "small", tmp_path / "heavy")
    config = tmp_path / "heavy/transformer/config.json"
    # It is all that a plan reads; training must need more than encoding does.
    config.write_text(json.dumps({**json.loads(config.read_text()), "ffn_dim": 2**16, "num_layers": 8}))
    settings = settings_for(folder, "small", model=str(tmp_path / "heavy"))
    keys = []
    for processes in (1, 2):
        memory = RunMemory(planned(settings, CrepaConfig(), processes=processes, device_type="cuda"))
        keys.append({each.key for each in memory.remedies(1)})
    assert keys == [{"offload"}, {"sharding"}]


def test_counting_logs_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    RunMemory(planned(settings_for(folder, "small"), crepa(folder, crepa_similarity_threshold=0.9))).training()
    assert [record.message for record in caplog.records if record.name.startswith("crepa")] == []


def test_a_teacher_elsewhere_or_put_away_takes_less(folder: Path) -> None:
    def training(**changes: Any) -> Phase:
        settings = settings_for(folder, "small", **changes)
        return RunMemory(planned(settings, crepa(folder), device_type="cuda")).training()

    here = training()
    assert here.terms["teacher"] >= 2 * DinoV2(str(folder / "dinov2")).parameters()
    assert training(teacher_device="cpu").terms["teacher"] == 0
    assert training(teacher_offload=True).total < here.total
    assert training(cache_teacher="features").terms["teacher"] == 0


def test_base_weights_by_precision_and_offload() -> None:
    weights = BaseWeights(outside=100, other=40, linear=4000, numbers=2000, widest=50, blocks=10)
    assert weights.on_device() == 4140
    assert weights.on_device("fp8") == weights.on_device("int8") == 100 + 40 + 2000 + 50
    assert weights.on_device("nf4") == 100 + 40 + 1125 + 50
    assert weights.on_device(offload="block") == 100 + 4040 * 2 // 10
    assert weights.on_device("nf4", "block") == 100 + (40 + 1125) * 2 // 10 + 50
    assert weights.on_device(offload="leaf") == 100 + 40 + 400
    assert BaseWeights(0, 0, 0, 0, 0, 10).on_device("nf4", "block") == 0


def test_optimizer_state_is_that_of_the_real_ones() -> None:
    parameter = torch.nn.Parameter(torch.randn(64, 64))
    optimizers = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    for name, kind in optimizers.items():
        optimizer = kind([parameter])
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        held = sum(each.nbytes for each in optimizer.state[parameter].values() if each.dim())
        assert state_bytes(name, parameter.numel()) == held
    assert state_bytes("adamw8bit", 10**6) < state_bytes("lion", 10**6) < state_bytes("adamw", 10**6)
    assert state_bytes("unheard of", 10) == state_bytes("adamw", 10)


def test_blank_clips_have_the_shapes_of_real_ones(folder: Path) -> None:
    family = TrainingFamily.of(str(folder / "ltxvideo"))
    bucket = Bucket(192, 320, 17)
    real = family.encode_clip(family.load_vae(torch.float32), torch.zeros(17, 3, 192, 320, dtype=torch.uint8))
    text = family.encode_text(family.load_text(torch.float32), ["a square " * 200])[0]
    for blank, found in ((family.blank_clip(bucket), real), (family.blank_text(), text)):
        assert {name: each.shape for name, each in blank.items()} == {name: each.shape for name, each in found.items()}


def test_a_run_is_the_same_wherever_its_teacher_waits(tmp_path: Path) -> None:
    models, rows = save_models(tmp_path / "models"), []
    for number, place in enumerate(({}, {"teacher_offload": True}, {"teacher_device": "cpu"})):
        run = tiny_settings(models, tmp_path / str(number), max_train_steps=1, **place)
        rows.append(train(run, tiny_config(models, crepa_encoder_image_size=28), TinyClips(pixels=True)))
    assert rows[0]
    assert rows[1] == rows[2] == rows[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_state_is_as_large_as_the_plan_says(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(512, 512))
    optimizer = make_optimizer(name, [{"params": [weight], "lr": 1e-3}], {}, 0.0)
    start_training(optimizer)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    tensors = {
        id(each): each for each in tree_leaves(optimizer.state_dict()["state"]) if isinstance(each, torch.Tensor)
    }
    kept = sum(each.nbytes for each in tensors.values())
    assert kept == pytest.approx(state_bytes(name, weight.numel()), rel=0.15, abs=0.05 * weight.nbytes)

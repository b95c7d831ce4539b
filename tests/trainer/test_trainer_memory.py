"""What the plan says that a run needs, against what the CPU's allocator gives out in the trainer's own steps."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from crepa_trainer.data.dataset import Bucket, find_clips
from crepa_trainer.data.sampler import MicroBatch, Position
from crepa_trainer.families import TrainingFamily
from crepa_trainer.optimizers import OPTIMIZERS, make_optimizer, start_training
from crepa_trainer.reporting.memory import BaseWeights, Phase, RunMemory, state_bytes
from crepa_trainer.reporting.plan import Plan, make_plan
from crepa_trainer.reporting.shadow import LiveBytes
from crepa_trainer.reporting.table import memory_rows, readable_bytes
from crepa_trainer.run import make_accelerator
from crepa_trainer.settings import RunSettings
from crepa_trainer.state import TrainState, make_ema, make_state
from crepa_trainer.step import training_step
from memory import allocated_peak
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


def planned(settings: RunSettings, config: CrepaConfig, **given: Any) -> Plan:
    family = TrainingFamily.of(settings.model)
    return make_plan(settings, config, family, find_clips(settings, family), **given)


def made(plan: Plan) -> TrainState:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    state = make_state(make_accelerator(plan.settings), plan.family, plan.settings, plan.config)
    state.transformer.train()
    return state


def batch(plan: Plan) -> MicroBatch:
    family, bucket = plan.family, plan.buckets[0]
    blank = {**family.blank_clip(bucket.bucket), **family.blank_text()}
    clips = {name: torch.stack([each] * plan.settings.batch_size) for name, each in blank.items()}
    teacher: dict[str, Any] = {}
    if plan.config.crepa_enabled:
        shape = plan.settings.batch_size, bucket.encoded or 0, 3, bucket.bucket.height, bucket.bucket.width
        teacher["pixels"] = torch.randint(0, 256, shape, dtype=torch.uint8)
    noise = torch.randn(clips["latents"].shape)
    return MicroBatch(clips, teacher, noise, torch.full((len(noise),), 0.5))


def measured(plan: Plan) -> tuple[int, int]:
    """Bytes that are there before a step, and those that a step adds at the most."""
    state = made(plan)
    ema = make_ema(state.transformer, plan.settings.ema_decay)
    # Optimizer state and teacher come with the first.
    training_step(state, plan.family, batch(plan), Position(0, 0, 0))
    held = [*state.transformer.parameters(), *(ema.shadow_params if ema is not None else ())]
    held += [each for of in state.optimizer.state.values() for each in of.values() if isinstance(each, torch.Tensor)]
    weights = 0
    if plan.config.crepa_enabled:
        weights = 4 * DinoV2(plan.config.crepa_encoder).parameters()
    peak = allocated_peak(lambda: training_step(state, plan.family, batch(plan), Position(1, 0, 0)))
    return sum(each.nbytes for each in held) + weights, peak


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

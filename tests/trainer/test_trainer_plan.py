"""The plan of a run: its numbers against what the models really are and keep, and that nothing is loaded for it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corner_videos import corners, write
from crepa_trainer.cli import main
from crepa_trainer.data.dataset import find_clips
from crepa_trainer.data.names import encoder_type
from crepa_trainer.families import TrainingFamily
from crepa_trainer.families.wan import WanFamily
from crepa_trainer.reporting import plan as plan_module
from crepa_trainer.reporting.plan import Plan, make_plan, projector_bytes
from crepa_trainer.reporting.table import print_plan
from crepa_trainer.settings import RunSettings
from crepa_trainer.state import add_lora
from rich.console import Console
from tiny import tiny_dinov2
from tiny_pipelines import save_tiny_wan_pipeline
from videos import moving_square, write_video

from crepa_kernels import CrepaConfig, CrepaProjector
from crepa_kernels.grid import plan_alignment
from crepa_kernels.loss import KEPT_BYTES
from crepa_kernels.teachers.dinov2 import DinoV2

REQUIRED = {"resolutions": ((32, 48), (48, 32)), "frame_counts": (5, 9), "max_train_steps": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_tiny_wan_pipeline(folder / "wan")
    tiny_dinov2(folder / "dinov2")
    (folder / "data").mkdir()
    for name, frames, height, width in (("a", 12, 48, 80), ("b", 12, 48, 80), ("c", 12, 48, 80), ("tall", 6, 80, 48)):
        write_video(folder / "data" / f"{name}.mp4", moving_square(frames, height, width))
        (folder / "data" / f"{name}.txt").write_text("a square")
    return folder


def planned(folder: Path, config: CrepaConfig, *, device_type: str = "cpu", processes: int = 1, **changes: Any) -> Plan:
    places = {"model": str(folder / "wan"), "data": folder / "data", "output": folder / "out"}
    settings = RunSettings(**{**places, **REQUIRED, **changes})
    family = TrainingFamily.of(settings.model)
    return make_plan(
        settings, config, family, find_clips(settings, family), processes=processes, device_type=device_type
    )


def crepa(folder: Path, **changes: Any) -> CrepaConfig:
    values = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder": str(folder / "dinov2")}
    return CrepaConfig(**{**values, "crepa_encoder_image_size": 70, **changes})


def test_buckets_are_those_of_the_models(folder: Path) -> None:
    plan = planned(folder, crepa(folder))
    wide, tall = plan.buckets[1], plan.buckets[0]
    assert (str(tall.bucket), tall.clips, tall.latent_frames, tall.grid, tall.tokens) == (
        "9 frames of 32x48", 3, 3, (2, 3), 18,
    )  # fmt: skip
    assert (str(wide.bucket), wide.clips, wide.latent_frames, wide.grid, wide.tokens) == (
        "5 frames of 48x32", 1, 2, (3, 2), 12,
    )  # fmt: skip
    assert [each.teacher_grid for each in plan.buckets] == [(5, 5), (5, 5)]
    assert [each.encoded for each in plan.buckets] == [3, 2]
    grid = planned(folder, crepa(folder, crepa_encoder_resize="grid", crepa_frame_map="mean"))
    assert [each.teacher_grid for each in grid.buckets] == [(2, 3), (3, 2)]
    assert [each.encoded for each in grid.buckets] == [9, 5]


@pytest.mark.parametrize("training", ["lora", "full"])
def test_parameters_are_counted_as_the_loaded_model_has_them(folder: Path, training: str) -> None:
    plan = planned(folder, CrepaConfig(), training=training, lora_rank=3, lora_targets=("to_q", "to_out.0"))
    transformer = plan.family.load_transformer(torch.float32)
    assert plan.parameters == sum(each.numel() for each in transformer.parameters())
    if training == "full":
        assert plan.trained == plan.parameters
    else:
        add_lora(transformer, plan.family, plan.settings)
        assert plan.trained == sum(each.numel() for each in transformer.parameters() if each.requires_grad) > 0
    assert plan.memory is None


def test_epochs_and_checkpoints_count_every_process(folder: Path) -> None:
    # Three and one clips in batches of two: three batches see each clip once.
    plan = planned(
        folder, CrepaConfig(), batch_size=2, gradient_accumulation_steps=3, processes=2, max_train_steps=7,
        checkpoint_every=3, validation_every=2, validation_prompts=("a square",),
    )  # fmt: skip
    assert plan.epochs == 7 * 3 * 2 / 3
    assert (plan.clips_a_step, plan.checkpoints, plan.validations) == (8, 3, 3)
    from crepa_trainer.data.sampler import ClipOrder, Position

    order = ClipOrder([key.bucket for key in plan.found.keys], batch_size=2, accumulation=3, world=2, seed=0)
    assert order.epoch(Position(7, 0, 0)) == plan.epochs


def test_the_projector_costs_its_weights_gradients_and_optimizer() -> None:
    projector = CrepaProjector(48, 40)
    optimizer = torch.optim.AdamW(projector.parameters())
    projector(torch.randn(3, 48)).sum().backward()
    optimizer.step()
    held = [tensor for each in projector.parameters() for tensor in (each, each.grad)]
    held += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert projector_bytes(48, 40) == sum(tensor.nbytes for tensor in held if tensor is not None)


def keeps(backend: str, frames: int, dtype: torch.dtype, device_type: str = "cpu") -> int:
    """What the loss keeps of `frames` of the larger bucket, 2 x 3 tokens each."""
    plan, teacher = plan_alignment("student", (2, 3), (5, 5)), encoder_type(torch.device(device_type))
    return KEPT_BYTES[backend](plan, frames, 32, 32, dtype, teacher, device_type)


def test_memory_is_that_of_the_largest_bucket(folder: Path) -> None:
    memory = planned(folder, crepa(folder), batch_size=2, mixed_precision="no").memory
    assert memory is not None
    assert memory.kept == keeps("torch", 2 * 3, torch.float32)
    assert memory.projector == projector_bytes(32, 32)
    assert memory.teacher == 4 * sum(each.numel() for each in tiny_dinov2().parameters())
    assert memory.total == memory.kept + memory.projector + memory.teacher
    on_gpu = planned(folder, crepa(folder), device_type="cuda").memory
    assert on_gpu is not None
    assert on_gpu.teacher == memory.teacher // 2
    cached = planned(folder, crepa(folder), cache_teacher="features").memory
    assert cached is not None
    assert (cached.teacher, cached.kept) == (0, keeps("torch", 3, torch.bfloat16))


def test_relations_keep_rows_of_their_own(folder: Path) -> None:
    plan = planned(folder, crepa(folder, crepa_relational_weight=0.5), batch_size=2, mixed_precision="no")
    assert plan.memory is not None
    assert plan.memory.kept == 2 * keeps("torch", 2 * 3, torch.float32)
    assert "weight 0.5, constant, relations of neighbours x 0.5" in printed(plan)


def test_memory_is_that_of_the_backend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` on a GPU is Triton, as far as a plan can know; the environment overrides the setting."""
    pytest.importorskip("triton")
    monkeypatch.setattr(plan_module, "why_not_triton_for", lambda device, dtype: None)

    def kept(backend: str) -> int:
        memory = planned(folder, crepa(folder, crepa_backend=backend), device_type="cuda").memory
        assert memory is not None
        return memory.kept

    torch_keeps, triton_keeps = (keeps(name, 3, torch.bfloat16, "cuda") for name in ("torch", "triton"))
    assert [kept(name) for name in ("auto", "triton", "torch")] == [triton_keeps, triton_keeps, torch_keeps]
    monkeypatch.setenv("CREPA_BACKEND", "torch")
    assert kept("triton") == torch_keeps
    monkeypatch.setattr(plan_module, "why_not_triton_for", lambda device, dtype: "no GPU")
    monkeypatch.setenv("CREPA_BACKEND", "auto")
    assert kept("triton") == torch_keeps
    monkeypatch.delenv("CREPA_BACKEND")
    with pytest.raises(ValueError, match="crepa_backend = triton cannot run here: no GPU"):
        kept("triton")


def test_backbone_mode_and_a_weight_of_nothing_need_no_encoder(folder: Path) -> None:
    backbone = crepa(folder, crepa_encoder="nowhere/x", crepa_use_backbone_features=True, crepa_teacher_block_index=2)
    for config in (backbone, crepa(folder, crepa_encoder="nowhere/x", crepa_lambda=0)):
        plan = planned(folder, config)
        assert plan.memory is not None
        assert plan.memory.teacher == 0
        assert [(each.teacher_grid, each.encoded) for each in plan.buckets] == [(None, None)] * 2
        assert "of the model itself" in printed(plan) or "weight is 0" in printed(plan)


def printed(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=110)
    print_plan(console, plan)
    file: Any = console.file
    return " ".join(file.getvalue().split())


def test_the_plan_says_what_issue_and_user_ask_for(folder: Path) -> None:
    text = printed(
        planned(folder, crepa(folder), batch_size=2, processes=2, validation_every=5, validation_prompts=("x",))
    )
    for words in (
        f"model {folder / 'wan'}: wan, text2video, 3 blocks of width 32, ",
        "trained LoRA of rank 16 on to_q, to_k, to_v, to_out.0: ",
        "4 clips of 4 videos",
        "9 frames of 32x48: 3 clips, 3 latent frames, 6 tokens a frame (2x3), 18 a clip",
        "CREPA block 1 of 0 to 2, weight 0.5, constant",
        f"teacher {folder / 'dinov2'}, 5x5 patches a frame",
        "frames encoded 3 of 9, 2 of 5 of a clip, each time it is seen",
        "extra memory ",
        "steps 10 (2.67 clips a step on average, in micro-batches of 1 to 2, 2 processes), 6.67 epochs",
        "frame rates 25 (4 videos) a second",
        "checkpoints 1, every 500 steps and at the end, the last 3 kept",
        "validation 2 times, 1 prompt",
        "workers none: ",
    ):
        assert words in text, text
    small = printed(planned(folder, CrepaConfig(), base_precision="int8", offload="block"))
    assert "parameters, bf16, frozen weights in int8, offloaded by block, gradient checkpointing" in small
    assert "CREPA off" in printed(planned(folder, CrepaConfig()))
    assert "CREPA off" in printed(planned(folder, CrepaConfig(crepa_enabled=False, crepa_lambda=0.1)))
    idle = printed(planned(folder, CrepaConfig(crepa_lambda=0.1, crepa_block_index=1)))
    assert "OFF: neither crepa_enabled nor a preset is given, without which crepa_block_index, crepa_lambda" in idle


@pytest.mark.parametrize(
    ("given", "device_type", "workers", "words"),
    [
        (None, "cpu", 0, "workers none: clips are read and noise is drawn in the training process"),
        (None, "cuda", 2, "workers 2, which read clips and draw noise, at most 4 micro-batches ahead"),
        (0, "cuda", 0, "workers none"),
        (1, "cpu", 1, "workers 1, which read clips and draw noise, at most 2 micro-batches ahead"),
    ],
)
def test_the_plan_says_who_reads_the_clips(
    folder: Path, given: int | None, device_type: str, workers: int, words: str
) -> None:
    plan = planned(folder, CrepaConfig(), device_type=device_type, workers=given)
    assert plan.workers == plan.settings.workers_on(device_type) == workers
    assert words in printed(plan)


def test_the_plan_of_a_published_teacher_needs_no_network_when_features_are_cached(folder: Path) -> None:
    config = crepa(folder, crepa_encoder="dinov2_vitg14", crepa_encoder_image_size=518)
    plan = planned(folder, config, cache_teacher="features")
    assert [each.teacher_grid for each in plan.buckets] == [(37, 37), (37, 37)]
    assert plan.memory is not None
    assert plan.memory.projector == projector_bytes(32, 1536)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crepa_block_index": 3}, ["crepa_block_index = 3", "has 3 blocks, valid are 0 to 2"]),
        (
            {"crepa_use_backbone_features": True, "crepa_teacher_block_index": 7},
            ["crepa_teacher_block_index = 7", "valid are 0 to 2"],
        ),
        ({"crepa_encoder": "/"}, ["crepa_encoder = /", "config.json cannot be read"]),
        ({"crepa_encoder_image_size": 64}, ["crepa_encoder_image_size = 64", "patch size"]),
        ({"teacher_device": "cuda:97"}, ["teacher_device = cuda:97: this machine has "]),
        ({"lora_targets": ["to_q", "to_z"]}, ["lora_targets: to_z is no layer"]),
        ({"resolutions": [[32, 40]]}, ["resolution 32x40"]),
        ({"task": "image2video"}, ["task = image2video"]),
        ({"family": "ltxvideo"}, ["family = ltxvideo"]),
        ({"model": "nowhere"}, ["model = nowhere"]),
        ({"data": "nowhere"}, ["nowhere: no such folder"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_run_is_one_line_before_any_weight_is_loaded(
    folder: Path,
    tmp_path: Path,
    change: dict[str, Any],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {"model": str(folder / "wan"), "data": str(folder / "data"), "output": str(tmp_path / "out")}
    own = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder": str(folder / "dinov2")}
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**places, **REQUIRED, **own, "crepa_encoder_image_size": 70, **change}))

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("weights were loaded")

    for name in ("load_vae", "load_text", "load_transformer"):
        monkeypatch.setattr(WanFamily, name, refuse)
    monkeypatch.setattr(DinoV2, "load", refuse)
    for words_of_run in (["run", "--config", str(file), "--plan"], ["run", "--config", str(file)]):
        assert main(words_of_run) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("crepa-train: error: ")
        assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_what_becomes_of_pictures_and_times_is_said(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    tags = {"colorspace": 9, "color_range": 1, "color_trc": 18, "color_primaries": 9}
    write(data / "a.mp4", [corners()] * 12)
    write(data / "hdr.mov", [np.full((96, 160, 3), 512, np.uint16)] * 12, pixels="yuv420p10le", tags=tags)
    write(data / "portrait.mp4", [corners(384, 216)] * 12, rate=60)
    write(data / "small.mp4", [corners(16, 24)] * 12)
    write(data / "vfr.mkv", [corners()] * 12, times=[n * (n + 1) for n in range(12)])
    for name in ("a", "hdr", "portrait", "small", "vfr", "alone"):
        (data / f"{name}.txt").write_text("corners")
    sizes = {"data": data, "resolutions": ((32, 48),), "batch_size": 4}
    text = printed(planned(folder, CrepaConfig(), **sizes))
    for words in (
        "5 clips of 5 videos",
        "passed over captions without a video: 1",
        "frame rates 25 (3 videos), 60 (1 video), variable (1 video) a second; frame by frame",
        "cropped portrait.mp4 loses 62% of its picture",
        "enlarged small.mp4 2 times",
        "HDR tone-mapped to SDR: hdr.mov (HLG)",
        "2.5 clips a step on average, in micro-batches of 1 to 4",
    ):
        assert words in text, text
    plan = planned(folder, CrepaConfig(), **{**sizes, "fps": 50, "hdr": "skip", "strict": True})
    assert dict(plan.found.skipped) == {str(data / "hdr.mov"): 'HDR (HLG), and hdr is "skip"'}
    assert "frame rates taken at 50 a second; found: 25 (2 videos), 60 (1 video), variable (1 video)" in printed(plan)


def test_captions_that_the_text_encoder_cuts_are_named(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, words in (("a", 20), ("deep/B", 700), ("c", 511), ("d", 700)):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        write(data / f"{name}.mp4", [corners()] * 5)
        (data / f"{name}{'.TXT' if name == 'deep/B' else '.txt'}").write_text(" ".join(["square"] * words))
    long = " ".join(["red"] * 1100)
    plan = planned(folder, CrepaConfig(), data=data, validation_prompts=("a", long), validation_every=5)
    assert "captions cut at 512 tokens: d.txt (701); deep/B.TXT (701); validation prompt 2 (1,101)" in printed(plan)
    assert "cut" not in printed(planned(folder, CrepaConfig()))


def test_a_plan_is_printed_and_nothing_else_happens(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model": str(folder / "wan"), "data": str(folder / "data"), **REQUIRED}))
    words = ["run", "--config", str(file), "--output", str(tmp_path / "out"), "--preset", "i2v", "--plan"]
    words += ["--crepa_block_index", "2", "--crepa_encoder", str(folder / "dinov2"), "--lora_rank", "4"]
    assert main(words) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "LoRA of rank 4" in text
    assert "CREPA block 2 of 0 to 2" in text
    assert not (tmp_path / "out").exists()

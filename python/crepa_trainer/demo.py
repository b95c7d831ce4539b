"""`crepa-train demo`: a small random Wan learns on real video with CREPA beside it, and what came of it is shown.

The transformer, the VAE and the DINOv2 teacher have seeded random weights, so nothing is downloaded; the video, the
latents, the losses and the training are real. The text condition is one fixed random embedding for all clips: what
the student knows of a clip comes from its latents.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from crepa_kernels import CrepaRegularizer

from .data.clips import ClipSet, ClipSpec, load_clips, sample_videos
from .data.listing import list_videos
from .evaluate import Alignment, Evaluator, Features
from .launcher import check_launcher
from .loop import Student, parameter_groups, train, training_step
from .models import ModelFolders, add_lora, encode_latents, load_transformer, load_vae, save_demo_models, save_lora
from .reporting.plots import PatchFeatures, plot_patches, plot_similarity_matrices, plot_training
from .reporting.progress import training_progress
from .reporting.report import ENDS, Summary, ends, print_summary
from .reporting.trackers import CSVTracker

if TYPE_CHECKING:
    from crepa_kernels import CrepaConfig

# Over what CrepaConfig says by itself. The published models' block 8 does not exist in a model of six.
DEMO_CREPA = {
    "crepa_enabled": True,
    "crepa_block_index": 2,
    "crepa_encoder_resize": "grid",
    "crepa_scheduler": "cosine",
    "crepa_lambda_end": 0.1,
}
TEXT_TOKENS = 8


@dataclass(frozen=True)
class DemoOptions:
    """The demo's settings beside CREPA's own. `noise_level` in [0, 1] is what the evaluation asks the student at."""

    output: Path
    data: Path | None = None
    steps: int = 300
    seed: int = 0
    strict: bool = False
    batch_size: int = 1
    lora_rank: int = 16
    learning_rate: float = 2e-3
    projector_learning_rate: float = 3e-3
    noise_level: float = 0.1
    timed_steps: int = 20
    clips: ClipSpec = field(default_factory=ClipSpec)

    @property
    def teacher_folder(self) -> Path:
        return self.output / "models" / "dinov2"


def run_demo(options: DemoOptions, config: CrepaConfig, console: Console) -> Summary:
    """Trains, evaluates, saves and reports into `options.output`.

    ValueError for what the user can put right, FloatingPointError when training diverges.
    """
    check_launcher(mixed_precision="no", gradient_accumulation_steps=1)
    found = load_clips(
        sample_videos() if options.data is None else list_videos(options.data).videos,
        options.clips,
        strict=options.strict,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    metrics = CSVTracker(options.output / "metrics.csv")
    accelerator = Accelerator(log_with=["tensorboard", metrics], project_dir=options.output / "tensorboard")
    if accelerator.num_processes > 1:
        raise ValueError(f"the demo runs as one process, it was started as {accelerator.num_processes}")
    accelerator.init_trackers(time.strftime("%Y%m%d-%H%M%S"))
    set_seed(options.seed)
    console.print(
        f"{len(found.clips)} clips of {options.clips.frames} frames, {options.clips.height} x {options.clips.width}, "
        f"on {accelerator.device}",
        highlight=False,
    )

    pixels = torch.stack([clip.pixels for clip in found.clips])
    with console.status("making the models and encoding the clips to latents"):
        folders = save_demo_models(options.output / "models", _first_of_each_video(found, pixels), options.seed)
        latents = encode_latents(load_vae(folders.wan).to(accelerator.device), pixels)
    student = make_student(accelerator, folders, config, options)
    text = _fixed_text(accelerator.unwrap_model(student.transformer).config.text_dim, options.seed).to(
        accelerator.device
    )
    loader = make_loader(accelerator, latents, pixels, options)

    evaluator = Evaluator(config, latents, pixels, text, time=options.noise_level, seed=options.seed)
    projector = student.crepa.projector if student.crepa else None
    before = evaluator.alignment(evaluator.features(student.transformer), projector) if projector else None
    rows: list[dict[str, float]] = []
    with training_progress(console, options.steps) as show:

        def on_step(step: int, values: dict[str, float]) -> None:
            rows.append(values)
            show(step, values)

        generator = torch.Generator().manual_seed(options.seed)
        train(accelerator, student, loader, text, steps=options.steps, generator=generator, on_step=on_step)
    accelerator.end_training()
    save_lora(accelerator.unwrap_model(student.transformer), options.output)
    after = None
    if student.crepa and projector:
        student.crepa.save_pretrained(options.output)
        features = evaluator.features(student.transformer)
        after = evaluator.alignment(features, projector)
        _plot_alignment(options.output, found, evaluator, features, projector)
    plot_training(rows, options.output / "training.png", constant=after.constant if after else None)
    with console.status("timing steps with and without CREPA"):
        seconds = time_steps(accelerator, folders, config, loader, text, options)

    summary = _summary(options, found, rows, student, before, after, seconds)
    summary.save(options.output / "summary.json")
    print_summary(console, summary, options.noise_level)
    console.print(f"Everything is in {options.output}", highlight=False, markup=False, soft_wrap=True)
    return summary


def make_student(
    accelerator: Accelerator, folders: ModelFolders, config: CrepaConfig | None, options: DemoOptions
) -> Student:
    """Loads a transformer and makes it trainable. The order matters: adapter, CREPA, optimiser, prepare."""
    transformer = load_transformer(folders.wan).to(accelerator.device)
    add_lora(transformer, options.lora_rank)
    crepa = None
    if config is not None:
        crepa = CrepaRegularizer(config, transformer, max_train_steps=options.steps)
    optimizer = torch.optim.AdamW(parameter_groups(transformer, options.learning_rate, options.projector_learning_rate))
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    if crepa is not None:
        crepa.check_optimizer(optimizer)
    return Student(transformer, crepa, optimizer)


def make_loader(
    accelerator: Accelerator, latents: Tensor, pixels: Tensor, options: DemoOptions
) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of (latents, pixels) in a seeded random order, on the device."""
    loader = DataLoader(
        TensorDataset(latents.cpu(), pixels),
        batch_size=min(options.batch_size, len(latents)),
        shuffle=True,
        generator=torch.Generator().manual_seed(options.seed),
    )
    return accelerator.prepare(loader)


def time_steps(
    accelerator: Accelerator,
    folders: ModelFolders,
    config: CrepaConfig,
    loader: DataLoader[tuple[Tensor, ...]],
    text: Tensor,
    options: DemoOptions,
) -> tuple[float | None, float]:
    """Median seconds of a training step with CREPA, None where it is off, and without it.

    Two fresh students of one checkpoint train in turns on the same batches, the second without anything of CREPA
    attached, so a busy machine slows both. The weight is held at its full value: with 0 there would be nothing to
    time.
    """
    active = config.replace(
        crepa_scheduler=None,
        crepa_warmup_steps=None,
        crepa_cutoff_step=None,
        crepa_similarity_threshold=None,
    )
    runs = config.crepa_enabled and config.crepa_lambda > 0
    students = [make_student(accelerator, folders, each, options) for each in ([active] if runs else []) + [None]]
    generator = torch.Generator().manual_seed(options.seed)
    seconds: list[list[float]] = [[] for _ in students]
    batch = next(iter(loader))
    warm_up = 2
    for step in range(warm_up + options.timed_steps):
        for student, measured in zip(students, seconds, strict=True):
            student.transformer.train()
            _wait_for(accelerator.device)
            start = time.perf_counter()
            training_step(accelerator, student, batch, text, step, generator)
            _wait_for(accelerator.device)
            if step >= warm_up:
                measured.append(time.perf_counter() - start)
    medians = [statistics.median(measured) for measured in seconds]
    return (medians[0] if runs else None), medians[-1]


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _first_of_each_video(found: ClipSet, pixels: Tensor) -> Tensor:
    first = {clip.video: number for number, clip in reversed(list(enumerate(found.clips)))}
    return pixels[sorted(first.values())]


def _fixed_text(width: int, seed: int) -> Tensor:
    return torch.randn(1, TEXT_TOKENS, width, generator=torch.Generator().manual_seed(seed))


def _summary(
    options: DemoOptions,
    found: ClipSet,
    rows: list[dict[str, float]],
    student: Student,
    before: Alignment | None,
    after: Alignment | None,
    seconds: tuple[float | None, float],
) -> Summary:
    weight = [row["crepa_weight"] for row in rows if "crepa_weight" in row]
    return Summary(
        clips=len(found.clips),
        steps=len(rows),
        ends=min(ENDS, len(rows)),
        loss=ends(rows, "loss"),
        flow_loss=ends(rows, "flow_loss"),
        weight=(weight[0], weight[-1]) if weight else None,
        training_similarity=ends(rows, "crepa_similarity"),
        before=before,
        after=after,
        seconds_per_step=seconds[0],
        seconds_per_step_without_crepa=seconds[1],
        timed_steps=options.timed_steps,
        frames_read=found.frames_read,
        frames_to_latents=sum(len(clip.pixels) for clip in found.clips),
        frames_decoded=student.crepa.frames_decoded if student.crepa else 0,
        frames_encoded=student.crepa.frames_encoded if student.crepa else 0,
        videos_skipped=len(found.skipped),
    )


def _plot_alignment(
    output: Path, found: ClipSet, evaluator: Evaluator, features: Features, projector: torch.nn.Module
) -> None:
    """Similarity matrix and patches of one clip from each of the first two videos."""
    shown = list({clip.video: number for number, clip in enumerate(found.clips)}.values())[:2]
    matrices = evaluator.matrix(features, projector)
    plot_similarity_matrices({found.clips[n].name: matrices[n] for n in shown}, output / "similarity_matrix.png")
    projected, teacher = evaluator.on_common_grid(features, projector)
    frames = evaluator.teacher_frames(features.teacher.shape[1])
    clips = [
        PatchFeatures(found.clips[n].name, found.clips[n].pixels[frames], frames, teacher[n], projected[n])
        for n in shown
    ]
    plot_patches(clips, output / "patches.png")

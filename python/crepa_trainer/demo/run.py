"""`crepa-train demo`: a small random Wan learns on real video with CREPA beside it, and what came of it is shown.

Transformer, VAE and text encoder have seeded random weights; the teacher, EfficientNet-Lite0, was trained on ImageNet
and comes with a package, so nothing else is downloaded. The videos, the latents, the losses and the training are real,
and the training is `crepa-train run`'s. All clips have one caption: what the student knows of a clip comes from its
latents.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor

from crepa_kernels import CrepaConfig

from ..alignment import on_common_grid, teacher_frames
from ..checkpoint import newest_checkpoint, read_checkpoint
from ..data.clips import read_clips, sample_videos
from ..data.dataset import Bucket
from ..data.listing import list_videos
from ..data.sampler import MicroBatch, MicroBatches, Position
from ..data.video import VideoError
from ..folders import METRICS_FILE, one_run_in
from ..launcher import launched_processes
from ..reporting.plots import PatchFeatures, plot_patches, plot_similarity_matrices, plot_training
from ..reporting.report import REPORT, write_report
from ..reporting.trackers import read_metrics
from ..run import TrainingRun, run
from ..settings import RunSettings
from ..state import TrainState, make_state
from ..step import training_step
from ..terminal import say
from .evaluation import Evaluator
from .models import save_demo_model
from .summary import ENDS, Summary, ends, print_summary

if TYPE_CHECKING:
    from crepa_kernels.regularizer.aligning import Sides

# Over what CrepaConfig says by itself. The published models' block 8 does not exist in a model of six, and the first
# blocks of random weights make little of where a patch is: a deeper one, with more weight, learns it in few steps.
DEMO_CREPA = {
    "crepa_enabled": True,
    "crepa_block_index": 4,
    "crepa_encoder": "efficientnet_lite0",
    "crepa_encoder_resize": "grid",
    "crepa_lambda": 2.0,
    "crepa_scheduler": "cosine",
    "crepa_lambda_end": 0.5,
}
CAPTION = "a video"
WITHOUT = "without"  # in the demo's folder, that of the run without CREPA
CLIP = Bucket(64, 112, 17)
NOISE_LEVEL = 0.1  # at which the student is asked what it has learned


@dataclass(frozen=True)
class DemoOptions:
    """The demo's settings beside CREPA's own."""

    output: Path
    data: Path | None = None
    steps: int = 500
    seed: int = 0
    strict: bool = False
    batch_size: int = 1
    learning_rate: float = 2e-3
    timed_steps: int = 10
    size: Bucket = CLIP
    clips_per_video: int = 8
    comparison: bool = True  # trains the same without CREPA too

    @property
    def model_folder(self) -> Path:
        return self.output / "models" / "wan"

    def settings(self) -> RunSettings:
        """What `crepa-train run` is told."""
        return RunSettings.from_dict(
            {
                "model": str(self.model_folder),
                "data": self.output / "clips",
                "output": self.output,
                "resolutions": ((self.size.height, self.size.width),),
                "frame_counts": (self.size.frames,),
                "clips_per_video": self.clips_per_video,
                "max_train_steps": self.steps,
                "batch_size": self.batch_size,
                "learning_rate": self.learning_rate,
                "projector_learning_rate": 3e-3,
                "mixed_precision": "no",
                "gradient_checkpointing": False,
                "seed": self.seed,
                "strict": self.strict,
            }
        )


def run_demo(options: DemoOptions, config: CrepaConfig, console: Console) -> Summary:
    """Trains, evaluates, saves and reports into `options.output`.

    ValueError for what the user can put right, FloatingPointError when training diverges.
    """
    if launched_processes() > 1:
        raise ValueError(f"the demo runs as one process, it was started as {launched_processes()}")
    settings = options.settings()
    videos = _videos(options)
    with one_run_in(options.output), console.status("making the model"):
        for folder in (options.output, options.output / WITHOUT):
            _forget_an_earlier_demo(folder, options.model_folder)
        _link_with_captions(videos, settings.data)
        first = _first_clips(list(videos.values()), options.size)
        save_demo_model(options.model_folder, first, options.seed)
    trained = run(settings, config, console)
    rows = read_metrics(options.output / METRICS_FILE)

    before = after = answers = answers_without = None
    if trained.state.crepa is not None:
        evaluator = Evaluator(config, trained.family, trained.clips, time=NOISE_LEVEL, seed=options.seed)
        before = evaluator.alignment(evaluator.features(_fresh_state(trained, config)))
        features = evaluator.features(trained.state)
        after = evaluator.alignment(features)
        _plot_alignment(options.output, trained, evaluator, features)
        if options.comparison:
            answers = evaluator.answers(trained.state)
    plot_training(rows, options.output / "training.png", rival=after.position if after else None)
    with console.status("timing steps with and without CREPA"):
        seconds = time_steps(trained, config, options.timed_steps)
    if answers is not None:
        answers_without = evaluator.answers(_without_crepa(trained, console).state)
        both = [options.output, options.output / WITHOUT]
        say(console, f"with and without CREPA: {write_report(both, options.output / REPORT)}")

    summary = replace(
        _summary(options, len(videos), trained, rows, seconds),
        before=before,
        after=after,
        answers=answers,
        answers_without_crepa=answers_without,
    )
    summary.save(options.output / "summary.json")
    print_summary(console, summary, NOISE_LEVEL)
    say(console, f"Everything is in {options.output}")
    return summary


def _videos(options: DemoOptions) -> dict[str, Path]:
    """The videos to train on, by what they are called."""
    if options.data is None:
        return {path.name: path for path in sample_videos()}
    found = list_videos(options.data, (options.output,)).videos
    return {path.relative_to(options.data).as_posix(): path.resolve() for path in found}


def _forget_an_earlier_demo(output: Path, model: Path) -> None:
    """Removes the checkpoints of one, which `run` does not train over; any other run's are kept, and named by it."""
    newest = newest_checkpoint(output)
    if newest is not None and read_checkpoint(newest).model == str(model.resolve()):
        shutil.rmtree(newest.parent)


def _without_crepa(trained: TrainingRun, console: Console) -> TrainingRun:
    """The same training but for CREPA, on the clips that are encoded, in a folder of its own."""
    settings = trained.settings
    folders = {"output": settings.output / WITHOUT, "cache": settings.cache_folder}
    say(console, f"the same LoRA without CREPA, from the same seed, into {folders['output']}")
    with console.status("training without CREPA"):
        return run(settings.model_copy(update=folders), CrepaConfig.from_dict({}), Console(quiet=True))


def _link_with_captions(videos: dict[str, Path], folder: Path) -> None:
    """A folder of links to the videos, each with a caption beside it; those of an earlier demo go."""
    for caption in folder.rglob("*.txt"):
        links = [path for path in caption.parent.glob(f"{escape(caption.stem)}.*") if path.is_symlink()]
        if links and caption.read_bytes() == CAPTION.encode():
            for path in (*links, caption):
                path.unlink()
    for name, path in videos.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.absolute())
        link.with_suffix(".txt").write_text(CAPTION)


def _first_clips(videos: Sequence[Path], size: Bucket) -> list[Tensor]:
    """The beginning of each video that has one, (P, 3, H, W); of the others the run says what is wrong with them."""
    clips: list[Tensor] = []
    for path in videos:
        with suppress(VideoError):
            clips += [pixels for _, pixels in read_clips(path, size.height, size.width, [0], size.frames)]
    return clips


def _fresh_state(trained: TrainingRun, config: CrepaConfig) -> TrainState:
    """What the run began with."""
    set_seed(trained.settings.seed)
    return make_state(trained.accelerator, trained.family, trained.settings, config)


def time_steps(trained: TrainingRun, config: CrepaConfig, steps: int) -> tuple[float | None, float]:
    """Median seconds of a training step with CREPA, None where it is off, and without it.

    Two fresh states train in turns on the same batch, the second without anything of CREPA attached, so a busy machine
    slows both. The weight is held at its full value: with 0 there would be nothing to time.
    """
    active = config.replace(
        crepa_scheduler=None,
        crepa_warmup_steps=None,
        crepa_cutoff_step=None,
        crepa_similarity_threshold=None,
    )
    runs = config.crepa_enabled and config.crepa_lambda > 0
    configs = [active] * runs + [config.replace(crepa_enabled=False)]
    states = [_fresh_state(trained, each) for each in configs]
    seconds: list[list[float]] = [[] for _ in states]
    batch = MicroBatches(trained.clips, trained.order, trained.family.noise_level)[Position(0, 0, 0), True]
    if not isinstance(batch, MicroBatch):
        raise batch
    warm_up = 2
    for step in range(warm_up + steps):
        for state, measured in zip(states, seconds, strict=True):
            _wait_for(state.accelerator.device)
            start = time.perf_counter()
            training_step(state, trained.family, batch, Position(step, 0, 0))
            _wait_for(state.accelerator.device)
            if step >= warm_up:
                measured.append(time.perf_counter() - start)
    medians = [statistics.median(measured) for measured in seconds]
    return (medians[0] if runs else None), medians[-1]


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summary(
    options: DemoOptions,
    videos: int,
    trained: TrainingRun,
    rows: list[dict[str, float]],
    seconds: tuple[float | None, float],
) -> Summary:
    weight = [row["crepa_weight"] for row in rows if "crepa_weight" in row]
    keys, crepa = trained.clips.keys, trained.state.crepa
    # A video is decoded up to the end of its last clip.
    read = {key.video: key.start + key.bucket.frames for key in sorted(keys, key=lambda key: key.start)}
    return Summary(
        clips=len(keys),
        steps=len(rows),
        ends=min(ENDS, len(rows)),
        loss=ends(rows, "loss"),
        flow_loss=ends(rows, "flow_loss"),
        weight=(weight[0], weight[-1]) if weight else None,
        training_similarity=ends(rows, "crepa_similarity"),
        before=None,
        after=None,
        answers=None,
        answers_without_crepa=None,
        seconds_per_step=seconds[0],
        seconds_per_step_without_crepa=seconds[1],
        timed_steps=options.timed_steps,
        frames_read=sum(read.values()),
        frames_to_latents=sum(key.bucket.frames for key in keys),
        frames_decoded=crepa.frames_decoded if crepa else 0,
        frames_encoded=crepa.frames_encoded if crepa else 0,
        videos_skipped=videos - len(read),
    )


def _plot_alignment(output: Path, trained: TrainingRun, evaluator: Evaluator, features: Sides) -> None:
    """Similarity matrix and patches of one clip from each of the first two videos."""
    keys = trained.clips.keys
    shown = list({key.video: number for number, key in enumerate(keys)}.values())[:2]
    matrices = evaluator.matrix(features)
    plot_similarity_matrices({keys[n].name: matrices[n] for n in shown}, output / "similarity_matrix.png")
    projected, teacher = on_common_grid(features, evaluator.config)
    frames = teacher_frames(evaluator.config, keys[0].bucket.frames, teacher.shape[1])
    clips = []
    for n in shown:
        key, size = keys[n], keys[n].bucket
        path = trained.settings.data / key.video
        ((_, pixels),) = read_clips(path, size.height, size.width, [key.start], size.frames)
        clips.append(PatchFeatures(key.name, pixels[frames], frames, teacher[n], projected[n]))
    plot_patches(clips, output / "patches.png")

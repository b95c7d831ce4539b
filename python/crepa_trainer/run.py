"""`crepa-train run`: a whole training run, from the settings to the exported weights."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, InitProcessGroupKwargs, set_seed
from rich.console import Console
from torch import Tensor

from . import export
from .alignment import AlignedClip, teacher_frames
from .checkpoint import Checkpoint, Checkpoints, check_videos, find_checkpoint, run_identity, videos_identity
from .control import Command, RunControl, turn
from .data.cache import clip_of_prompt, prepare_cache
from .data.clips import read_clips
from .data.dataset import ClipKey, FoundClips, find_clips
from .data.sampler import ClipOrder, MicroBatch, MicroBatches, Position, RankPositions, micro_batches
from .data.video import VideoError
from .families import TrainingFamily
from .folders import check_folders, one_run_in
from .launcher import check_launcher, check_teacher_device, device_memory, launched_processes, training_device
from .optimizers import weights_for_use
from .precision import check_base_precision
from .ranks import PATIENCE, limit_waits, wait_for_all
from .reporting.plan import Plan, make_plan
from .reporting.progress import training_progress
from .reporting.table import print_plan
from .reporting.trackers import log_picture, log_values, make_trackers, peak_memory, start_trackers
from .sharding import is_sharded
from .state import TrainState, make_ema, make_state, trained_parameters
from .step import StepReports, StepValues, training_step
from .stopping import Stopped, stop_kept
from .terminal import say, several
from .validation import Sampling, sample_clips, save_clip, save_index

if TYPE_CHECKING:
    import numpy as np
    from diffusers.training_utils import EMAModel

    from crepa_kernels import CrepaConfig

    from .data.cache import CachedClips
    from .settings import RunSettings

# The signal's number, and what was asked for, among a step's values, where they are added up over processes.
_STOP, _ASKED = "stop", "asked"
_BITS: dict[Command, int] = {"save": 1, "sample": 2}
_PLAIN = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
}


def run(settings: RunSettings, config: CrepaConfig, console: Console, queue: Path | None = None) -> TrainingRun:
    """Encodes the clips, trains, checkpoints, validates and exports into `settings.output`; in every process.

    queue: the folder in whose queue it waits for its turn first, None waits for nobody.

    Returns the finished run, with its family, its encoded clips and the state that it trained.

    Raises:
        ValueError: for what the user can put right, before any weight is loaded where that is possible.
        OSError: a checkpoint that could not be written. FloatingPointError: training that diverged.
    """
    check_launcher(settings)
    check_folders(settings)
    if queue is not None and launched_processes() > 1:
        raise ValueError(f"--queue {queue}: runs of several processes do not wait for each other")
    first = os.environ.get("RANK", "0") == "0"
    with (
        one_run_in(settings.output) if first else nullcontext(),
        RunControl(settings.output, settings.max_train_steps, first=first) as control,
        turn(queue, lambda before: control.phase("waiting", f"{before} before it")),
    ):
        trained = _run(settings, config, console if first else Console(quiet=True), control)
    if first:
        _report(settings.output, console)
    return trained


def _report(output: Path, console: Console) -> None:
    from .reporting.report import REPORT, write_report

    try:
        say(console, write_report([output], output / REPORT))
    except (OSError, ValueError, ImportError) as error:  # what was trained is there
        say(console, f"no report: {error}")


def _run(settings: RunSettings, config: CrepaConfig, console: Console, control: RunControl) -> TrainingRun:
    control.phase("loading")
    identity = run_identity(settings, config, launched_processes())
    checkpoint = find_checkpoint(settings, identity)
    # A run on a CPU has nothing to fit into, and does not wait for the count.
    family, found = show_plan(settings, config, console, memory=training_device() != "cpu")
    if checkpoint is not None:
        check_videos(checkpoint, found)
    identity["videos"] = videos_identity(found)
    accelerator = make_accelerator(settings, checkpoint.step if checkpoint else 0)
    # Where a run goes on from is said at each start; it is none of its own settings.
    given = settings.model_dump(mode="json", exclude_unset=True, exclude={"resume"}) | config.model_dump(
        mode="json", exclude_unset=True
    )
    about = {"family": family.name, "model": settings.model, "device": str(accelerator.device)}
    control.describe(given, {**about, "processes": accelerator.num_processes, "versions": export.versions()})
    control.phase("encoding")
    clips = prepare_cache(settings, config, family, accelerator.device, console, found)
    control.phase("loading")
    return train_on(clips, accelerator, family, settings, config, console, identity, checkpoint, control)


def show_plan(
    settings: RunSettings, config: CrepaConfig, console: Console, *, memory: bool = False
) -> tuple[TrainingFamily, FoundClips]:
    """Prints what the run will do; returns what it found. ValueError as `plan_run`. memory: as `print_plan`."""
    plan = plan_run(settings, config)
    if not console.quiet:
        print_plan(console, plan, memory=memory)
    return plan.family, plan.found


def check_resume(settings: RunSettings, config: CrepaConfig) -> None:
    """ValueError where `resume` names no checkpoint, or one that the run cannot go on from."""
    if settings.resume is not None:
        find_checkpoint(settings, run_identity(settings, config, launched_processes()))


def plan_run(settings: RunSettings, config: CrepaConfig) -> Plan:
    """What the run will do, from configs and the videos' first frames.

    ValueError for all that can be known to be wrong before a weight is loaded.
    """
    check_launcher(settings)
    check_folders(settings)
    check_base_precision(settings.base_precision, training_device())
    check_teacher_device(settings)
    family = TrainingFamily.of(settings.model, settings.task, settings.family, settings.expert)
    found = find_clips(settings, family)
    # Where the run will be: no accelerator is made for a plan.
    return make_plan(
        settings,
        config,
        family,
        found,
        processes=launched_processes(),
        device_type=training_device(),
        available=device_memory(),
    )


def make_accelerator(settings: RunSettings, first_step: int = 0) -> Accelerator:
    """Accelerate as the settings and the launcher say; its file of metrics goes on at `first_step`.

    ValueError where the launcher's environment says something else, as `check_launcher`.
    """
    check_launcher(settings)
    accelerator = Accelerator(
        # accelerate takes no notice of a launcher on a machine without a GPU unless it is told that it is to be so.
        cpu=training_device() == "cpu",
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        log_with=make_trackers(settings, first_step),
        project_dir=settings.output,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            # Else the whole model in the lower precision would stay until the forward ends.
            AutocastKwargs(cache_enabled=settings.sharding == "none"),
        ],
    )
    if accelerator.num_processes != launched_processes():
        raise ValueError(
            f"launched as {several(launched_processes(), 'process', 'es')}, "
            f"of which each knows {accelerator.num_processes}"
        )
    if accelerator.distributed_type not in _PLAIN:
        kind = accelerator.distributed_type.value
        raise ValueError(f"launched with {kind}, which is not used: see sharding and context_parallel")
    return accelerator


def train_on(
    clips: CachedClips,
    accelerator: Accelerator,
    family: TrainingFamily,
    settings: RunSettings,
    config: CrepaConfig,
    console: Console,
    identity: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    control: RunControl,
) -> TrainingRun:
    """The run on clips that are encoded: from step 0, or on from a checkpoint of the same clips."""
    identity = {**identity, "clips": _fingerprint(clips)}
    if checkpoint is not None and checkpoint.identity["clips"] != identity["clips"]:
        raise ValueError(
            f"{checkpoint.folder} is of a run on other clips than {settings.data} gives now: start anew "
            "in another output"
        )
    set_seed(settings.seed)
    state = make_state(accelerator, family, settings, config)
    transformer = accelerator.unwrap_model(state.transformer)
    ema = make_ema(transformer, settings.ema_decay)
    full = settings.training == "full"
    checkpoints = Checkpoints(
        state,
        ema,
        save_lora=None if full else lambda weights, described: export.save_lora(family, weights, described),
        output=settings.output,
        kept=settings.checkpoints_kept,
        identity=identity,
        model=str(Path(settings.model).resolve()) if Path(settings.model).is_dir() else settings.model,
    )
    first_step = 0
    if checkpoint is not None:
        first_step = checkpoint.step
        say(console, f"going on from {checkpoint.folder}")
        checkpoints.load(checkpoint)
    elif settings.resume is not None:
        say(console, "there is no checkpoint yet: starting at step 0")
    start_trackers(accelerator, settings.model_dump(mode="json") | config.to_dict())
    trained = TrainingRun(family, settings, clips, state, ema, checkpoints, control)
    limit_waits(timedelta(seconds=settings.step_timeout))
    stopped = trained.steps(first_step, console)
    if stopped is None and (accelerator.is_main_process or is_sharded(transformer)):
        folder = settings.output / export.FOLDER
        control.phase("exporting")
        described = checkpoints.described(folder, settings.max_train_steps)
        with weights_for_use(state.optimizer):
            export.export(family, transformer, state.crepa, ema, described, settings.lora_format)
        say(console, export.where(folder, full=full, expert=settings.expert))
    # Together, also because gloo hangs where it is shut down within microseconds of its last reduction: its thread
    # wants the interpreter's lock to let go of the tensor, and shutting down waits for that thread with the lock held.
    wait_for_all()
    accelerator.end_training()
    if stopped is not None:
        raise stopped
    return trained


def _fingerprint(clips: CachedClips) -> str:
    """Of the clips and their order: those that could be decoded, which `check_videos` cannot know."""
    return hashlib.sha256(repr([astuple(key) for key in clips.keys]).encode()).hexdigest()


@dataclass
class TrainingRun:
    """The optimiser steps of a prepared state on cached clips."""

    family: TrainingFamily
    settings: RunSettings
    clips: CachedClips
    state: TrainState
    ema: EMAModel | None
    checkpoints: Checkpoints
    control: RunControl

    def __post_init__(self) -> None:
        self.accelerator = self.state.accelerator
        self.order = ClipOrder(
            [key.bucket for key in self.clips.keys],
            batch_size=self.settings.batch_size,
            accumulation=self.settings.gradient_accumulation_steps,
            world=self.accelerator.num_processes // self.settings.context_parallel,
            seed=self.settings.seed,
        )
        self.transformer = self.accelerator.unwrap_model(self.state.transformer)
        # Of the processes that take the same clips.
        self._rank = self.accelerator.process_index // self.settings.context_parallel
        # Every process has to take part in what calls a transformer whose weights or tokens are shared out.
        shared = self.settings.context_parallel > 1 or is_sharded(self.transformer)
        self._together = self.accelerator.is_main_process or shared
        self._stopped: int | None = None  # the signal that has reached any of several processes
        self._asked: set[Command] = set()  # of all of them, at the same step
        self._seconds = 0.0  # that the last step took
        self._pictures: dict[int, np.ndarray] = {}  # of steps whose values are under way

    def steps(self, first_step: int, console: Console) -> Stopped | None:
        """All steps from `first_step` on, with their checkpoints and validations; or up to a signal, with a checkpoint.

        One that reaches any of several processes stops all, a step later.
        """
        settings, total = self.settings, self.settings.max_train_steps
        self.state.transformer.train()
        positions = RankPositions(self.order.accumulation, self._rank, first_step)
        device = self.accelerator.device
        with (
            stop_kept(lambda line: say(console, line)) as asked,
            training_progress(console, total, first_step) as show,
            StepReports(self.state, lambda step, values: self._report(step, values, show)) as late,
            micro_batches(
                MicroBatches(self.clips, self.order, self.family.noise_level),
                positions,
                workers=settings.workers_on(device.type),
                device=device,
            ) as batches,
        ):
            for step in range(first_step, total):
                positions.without_teacher = self._untaught
                began = time.perf_counter()
                values = self._step(step, batches)
                taken = self.control.take()
                if self.accelerator.num_processes > 1:
                    values.add({_STOP: torch.full((), asked.number or 0, device=device)})
                    bits = sum(_BITS[command] for command in taken)
                    values.add({_ASKED: torch.full((), bits, device=device)})
                else:
                    self._asked |= taken
                late.send(step, values)
                self._seconds = time.perf_counter() - began
                done = step + 1
                self.control.step(done)
                wanted, self._asked = self._asked, set()
                stopped = asked.number if self.accelerator.num_processes == 1 else self._stopped
                every = settings.validation_every
                validates = ((every and done % every == 0) or "sample" in wanted) and not stopped
                saves = done % settings.checkpoint_every == 0 or done == total or stopped or "save" in wanted
                if validates or saves:
                    late.flush()
                if validates:
                    self._validate(done, console)
                if saves:
                    self.control.phase("saving")
                    self.checkpoints.save(done)
                    say(console, f"step {done}: checkpoint written")
                if stopped:
                    return Stopped(stopped, f" after step {done} of {total}: go on with --resume latest")
        return None

    @property
    def _untaught(self) -> bool:
        """Whether nothing of the teacher's side is needed any more."""
        return self.state.crepa is None or self.state.crepa.ended

    def _report(self, step: int, values: Mapping[str, float], show: Callable[[int, Mapping[str, float]], None]) -> None:
        values = {"epoch": self.order.epoch(Position(step, 0, 0)), **values}
        # A mean over processes, of which one may have had SIGINT and another nothing.
        if mean := values.pop(_STOP, 0):
            self._stopped = signal.SIGINT if mean == signal.SIGINT else signal.SIGTERM
        # A mean too, of which only the first process has something.
        bits = round(values.pop(_ASKED, 0) * self.accelerator.num_processes)
        self._asked |= {command for command, bit in _BITS.items() if bits & bit}
        measured = {"time": time.time(), "seconds": self._seconds, "memory": peak_memory(self.accelerator.device)}
        log_values(self.accelerator, {**values, **measured}, step)
        # Not before the values of its step: some trackers take nothing of an earlier step than the last.
        if (picture := self._pictures.pop(step, None)) is not None:
            log_picture(self.accelerator.trackers, "similarity_matrix", picture, step)
        show(step, values)

    def _step(self, step: int, batches: Iterator[MicroBatch]) -> StepValues:
        values = StepValues()
        every = self.settings.matrix_every
        for micro in range(self.settings.gradient_accumulation_steps):
            position = Position(step, micro, self._rank)
            batch = next(batches)
            if self._untaught:
                batch = batch._replace(teacher={})  # it was made ahead
            look = every and step % every == 0 and micro == 0 and self._together
            logs = training_step(self.state, self.family, batch, position, look=bool(look))
            seen, crepa = logs.pop("look", None), self.state.crepa
            if seen is not None and crepa is not None and self.accelerator.is_main_process:
                self._keep_look(step, int(batch.clips["index"][0]), seen, crepa.config)
                # A number, since no other process has it.
                logs["crepa_constant"] = seen.constant.item()
            values.add(logs)
        if self.ema is not None and not self.accelerator.optimizer_step_was_skipped:
            self.ema.step(trained_parameters(self.transformer).values())
        return values

    def _keep_look(self, step: int, clip: int, look: AlignedClip, config: CrepaConfig) -> None:
        from .reporting.looks import save_look
        from .reporting.plots import figure_pixels, similarity_figure

        self._pictures[step] = figure_pixels(similarity_figure({f"step {step}": look.matrix}))
        key = self.clips.keys[clip]
        frames = teacher_frames(config, key.bucket.frames, len(look.matrix))
        save_look(self.settings.output, step, key.name, frames, self._frames(key, frames), look)

    def _frames(self, key: ClipKey, frames: Sequence[int]) -> Tensor | None:
        """Some frames of a clip, (n, 3, H, W) uint8; None where its video, which is encoded, is gone by now."""
        path, size = self.settings.data / key.video, key.bucket
        try:
            ((_, clip),) = read_clips(path, size.height, size.width, [key.start], size.frames, self.settings.fps)
        except VideoError:
            return None
        return clip[list(frames)]

    def _validate(self, done: int, console: Console) -> None:
        if not self.clips.validation_text:
            say(console, f"step {done}: nothing to sample, validation_prompts is empty")
            return
        self.control.phase("validating")
        if self._together:
            sampling = self._sampling()
            with weights_for_use(self.state.optimizer), export.ema_weights(self.transformer, self.ema):
                clips = sample_clips(self.family, self.transformer, sampling, self.accelerator.device)
        if self.accelerator.is_main_process:
            folder = self.settings.output / "validation" / f"step-{done:08d}"
            for number, clip in enumerate(clips):
                strip = save_clip(clip, folder, f"prompt-{number}")
                log_picture(self.accelerator.trackers, f"validation/{number}", strip, done)
            save_index(folder, self.settings.validation_prompts, sampling)
            say(console, f"step {done}: {several(len(clips), 'clip')} sampled into {folder}")
        wait_for_all()

    def _sampling(self) -> Sampling:
        settings, keys = self.settings, self.clips.keys
        given: list[dict[str, Tensor]] = []
        if self.family.task == "image2video":
            numbers = range(len(settings.validation_prompts))
            given = [self.clips[clip_of_prompt(number, len(keys))] for number in numbers]
        return Sampling(
            texts=self.clips.validation_text,
            negative=self.clips.negative_text,
            size=keys[0].bucket,
            steps=settings.validation_steps,
            guidance=settings.validation_guidance,
            seed=settings.validation_seed,
            tiling=settings.vae_tiling,
            clips=given,
        )

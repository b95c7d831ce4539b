"""Checkpoints that a kill or a full disk cannot spoil: written beside the others, made whole, then renamed."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .dataset import listed
from .student import trained_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    from crepa_kernels import CrepaConfig, CrepaRegularizer

    from .dataset import FoundClips
    from .loop import Student
    from .settings import RunSettings

FOLDER = "checkpoints"
STATE_FILE = "state.json"
WEIGHTS_FILE = "trained_weights.safetensors"
_WRITING = ".writing-"
_ADVICE = "go on with what it had, or start anew in another output"

# Settings that change nothing of what is trained; the family is the model's.
_FREE = {
    "family",
    "output",
    "resume",
    "cache",
    "checkpoint_every",
    "checkpoints_kept",
    "validation_prompts",
    "validation_every",
    "validation_steps",
    "validation_guidance",
    "validation_seed",
    "matrix_every",
    "strict",
    "workers",
    "crepa_backend",
}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. `step`: optimiser steps done; `identity`: of the run that wrote it."""

    folder: Path
    step: int
    identity: Mapping[str, Any]


def run_identity(settings: RunSettings, config: CrepaConfig, processes: int) -> dict[str, Any]:
    """Everything that a resumed run must have in common with the one that it goes on from, by key."""
    lengths_matter = settings.lr_scheduler not in ("constant", "constant_with_warmup") or (
        config.crepa_enabled and config.crepa_scheduler != "constant" and config.crepa_decay_steps == 0
    )
    free = _FREE if lengths_matter else _FREE | {"max_train_steps"}
    given = settings.model_dump(mode="json") | config.to_dict() | {"processes": processes}
    kept = {key: value for key, value in given.items() if key not in free}
    # However they were written; a hub id stays one.
    return kept | {key: str(Path(kept[key]).resolve()) for key in ("model", "data") if Path(kept[key]).is_dir()}


def find_checkpoint(settings: RunSettings, identity: Mapping[str, Any]) -> Checkpoint | None:
    """What `settings.resume` names, with all its parts; None for a run that starts, also with "latest" of none.

    Raises:
        ValueError: a checkpoint with a part missing or cut short, or of a run with other settings (every differing
            key is named); checkpoints in the output folder of a run that is not to go on from them, or newer ones.
    """
    complete = _complete(settings.output / FOLDER)
    if settings.resume is None:
        if complete:
            raise ValueError(
                f"{settings.output} has checkpoints of an earlier run: go on from them with resume = latest, "
                "or give another output"
            )
        return None
    if settings.resume == "latest":
        if not complete:
            return None
        folder = complete[-1]
    else:
        folder = _named(settings.resume, complete)
    found = read_checkpoint(folder)
    keys = sorted({*identity, *found.identity})
    differing = [
        f"{key} = {json.dumps(identity.get(key))} (checkpoint: {json.dumps(found.identity.get(key))})"
        for key in keys
        if key in identity and identity.get(key) != found.identity.get(key)
    ]
    if differing:
        raise ValueError(f"{folder} is of a run with other settings: {'; '.join(differing)}; {_ADVICE}")
    if found.step > settings.max_train_steps:
        raise ValueError(f"{folder} is at step {found.step}, past max_train_steps = {settings.max_train_steps}")
    newer = [path.name for path in complete if int(path.name.removeprefix("step-")) > found.step]
    if newer:
        raise ValueError(
            f"{settings.output} has checkpoints after step {found.step} ({', '.join(newer)}): remove them to go back "
            "to it, or go on from the newest with resume = latest"
        )
    return found


def _named(resume: str, complete: Sequence[Path]) -> Path:
    """The checkpoint's folder that `settings.resume` names. ValueError with the nearest where there is none."""
    folder = Path(resume)
    if folder.is_dir():
        return folder
    known = {"latest": "latest", **{path.name: str(path) for path in reversed(complete)}}
    match = difflib.get_close_matches(folder.name, known, n=1)
    hint = f"did you mean {known[match[0]]}?" if match else 'it is "latest" or a checkpoint\'s folder'
    raise ValueError(f"resume = {resume}: no such folder; {hint}")


def videos_identity(found: FoundClips) -> dict[str, list[str]]:
    """By what each video and its caption are known, by the video's name: part of a run's identity as "videos"."""
    captions = {key.video: hashlib.sha256(key.caption.encode()).hexdigest()[:32] for key in found.keys}
    return {name: [found.contents[name], caption] for name, caption in captions.items()}


def check_videos(checkpoint: Checkpoint, found: FoundClips) -> None:
    """ValueError naming the videos that are not those of the checkpoint's run, or have other captions."""
    now = videos_identity(found)
    # One of an earlier version has none: then only `train_on` compares the clips.
    before = checkpoint.identity.get("videos", now)
    both = [name for name in now if name in before]
    changed = [
        *(f"{name} is new" for name in now if name not in before),
        *(f"{name} is not there" for name in before if name not in now),
        *(f"{name} is another file" for name in both if now[name][0] != before[name][0]),
        *(f"{name} has another caption" for name in both if now[name][1] != before[name][1]),
    ]
    if changed:
        raise ValueError(
            f"{checkpoint.folder} is of a run on other clips than {found.folder} gives: {listed(changed)}; {_ADVICE}"
        )


def _complete(folder: Path) -> list[Path]:
    """Checkpoints that were renamed to their place, oldest first."""
    found = (path.parent for path in folder.glob(f"step-*/{STATE_FILE}"))
    # A copy that somebody keeps under a name of its own is theirs.
    return sorted(path for path in found if path.name.removeprefix("step-").isdecimal())


def _partial(folder: Path) -> list[Path]:
    """Folders in a checkpoint's place that are none, as a kill leaves one that was being removed."""
    return [
        path
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdecimal() and not (path / STATE_FILE).exists()
    ]


def newest_checkpoint(output: Path) -> Path | None:
    """The newest in a run's output folder."""
    return next(reversed(_complete(output / FOLDER)), None)


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint with all its parts. ValueError for one that lacks a part, or has one cut short."""
    file = folder / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is not a complete checkpoint: {STATE_FILE} is missing")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        step, identity, parts = state["step"], state["identity"], state["parts"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is not a complete checkpoint: {', '.join(missing)} missing")
    short = [name for name, size in parts.items() if (folder / name).stat().st_size != size]
    if short:
        raise ValueError(f"{folder} is not a complete checkpoint: {', '.join(short)} of another size than was written")
    return Checkpoint(folder, step, identity)


class Checkpoints:
    """Writes and loads a run's checkpoints, the same calls in every process.

    Through accelerate: optimiser, scheduler, scaler, the random state of each rank, CREPA's state and the average;
    of the transformer the trained weights only, and a LoRA also as stock pipelines load it from there.

    Args:
        accelerator: that prepared the student.
        save_lora: writes the LoRA into a folder; None where all weights are trained.
        output: the run's folder.
        kept: how many of the newest are left there.
        identity: of the run, kept in each checkpoint.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: Student,
        average: EMAModel | None,
        *,
        save_lora: Callable[[Path], object] | None,
        output: Path,
        kept: int,
        identity: Mapping[str, Any],
    ) -> None:
        self._accelerator, self._average, self._save_lora = accelerator, average, save_lora
        self._folder, self._kept, self._identity = output / FOLDER, kept, identity
        self._transformer: nn.Module = accelerator.unwrap_model(student.transformer)
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)
        self._crepa = None if student.crepa is None else _StateOfAllRanks(student.crepa)
        accelerator.register_for_checkpointing(*(each for each in (self._crepa, average) if each is not None))

    def save(self, step: int) -> Path:
        """The state after `step` optimiser steps; returns its folder.

        Raises:
            OSError: it could not be written; the checkpoints before it are as they were.
        """
        target, temporary = self._folder / f"step-{step:08d}", self._folder / f"{_WRITING}{step:08d}"
        if self._crepa is not None:
            self._crepa.take()
        self._together(target, lambda: self._clear(temporary))
        self._together(target, lambda: self._accelerator.save_state(str(temporary)))
        self._together(target, lambda: self._finish(temporary, target, step))
        return target

    def load(self, checkpoint: Checkpoint) -> None:
        """Puts everything back as it was."""
        self._accelerator.load_state(str(checkpoint.folder))
        if self._average is not None:
            self._average.to(self._accelerator.device)

    def _together(self, target: Path, work: Any) -> None:
        """Does a piece of work in every process, and fails in every process if it fails in one."""
        error: Exception | None = None
        try:
            work()
        # torch and safetensors say of a full disk that writing failed, in errors of their own.
        except (OSError, RuntimeError, SafetensorError) as caught:
            error = caught
        failed = torch.tensor(float(error is not None), device=self._accelerator.device)
        if float(self._accelerator.reduce(failed, "sum")) == 0:
            return
        if self._accelerator.is_main_process:
            for leftover in self._folder.glob(f"{_WRITING}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        why = "in another process" if error is None else str(error)
        raise OSError(f"checkpoint {target} could not be written: {why}; the ones before it are whole") from error

    def _clear(self, temporary: Path) -> None:
        if self._accelerator.is_main_process:
            for leftover in (*self._folder.glob(f"{_WRITING}*"), *_partial(self._folder)):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)

    def _finish(self, temporary: Path, target: Path, step: int) -> None:
        if not self._accelerator.is_main_process:
            return
        parts = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        state = {"step": step, "identity": self._identity, "parts": parts}
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _to_disk(path)
        os.replace(temporary, target)
        _to_disk(self._folder)
        for old in _complete(self._folder)[: -self._kept]:
            # Out of the way first: a kill while it is removed leaves nothing that looks like a checkpoint.
            shutil.rmtree(old.replace(self._folder / f"{_WRITING}{old.name}"))

    def _save_weights(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()
        if self._accelerator.is_main_process:
            trained = trained_parameters(self._transformer)
            tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trained.items()}
            save_file(tensors, Path(folder) / WEIGHTS_FILE)
            if self._save_lora is not None:
                self._save_lora(Path(folder))

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        saved, trained = load_file(Path(folder) / WEIGHTS_FILE), trained_parameters(self._transformer)
        wrong = sorted(
            name
            for name in {*saved, *trained}
            if name not in saved or name not in trained or saved[name].shape != trained[name].shape
        )
        if wrong:
            raise ValueError(f"{folder}: {WEIGHTS_FILE} is of another model, first at {wrong[0]}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])


class _StateOfAllRanks:
    """CREPA's state, which all ranks add up together: taken before writing, where one of them may fail."""

    def __init__(self, crepa: CrepaRegularizer) -> None:
        self._crepa = crepa
        self._state: dict[str, Any] = {}

    def take(self) -> None:
        self._state = self._crepa.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._crepa.load_state_dict(state)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

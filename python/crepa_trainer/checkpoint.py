"""Checkpoints that a kill or a full disk cannot spoil: written beside the others, made whole, then renamed."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crepa_kernels import CrepaConfig
from crepa_kernels.teachers.encoding import named_encoder

from .data.dataset import listed
from .data.files import model_identity
from .data.names import teacher_is_encoder
from .optimizers import OPTIMIZERS, SHAPED_OTHERWISE, weights_for_use
from .ranks import anywhere
from .sharding import is_sharded, place_shares, read_shares, read_whole, take_shares, whole_weights, write_shares
from .state import trained_parameters
from .state_files import file_digest, json_digest, random_state, read_state, set_random_state, write_state

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

    from .data.dataset import FoundClips
    from .settings import RunSettings
    from .state import TrainState

FOLDER = "checkpoints"
STATE_FILE = "state.json"
WEIGHTS_FILE = "trained_weights.safetensors"
# Of a schedule-free optimizer, which trains others than are to be used.
UNAVERAGED_FILE = "unaveraged_weights.safetensors"
SHARES = "shares"  # the folder with what each process had of a sharded run, also of the trained weights
_WEIGHTS = "weights."  # before their names there
_WRITING = ".writing-"
_EMA = "average"  # in the names of files, where earlier checkpoints have it
_ANEW = "start anew in another output"
_OLDER = f"remove it to go on from the one before it, or {_ANEW}"
_ADVICE = "go on with what it had, or start anew in another output"

# Settings that change nothing of what is trained; the family is the model's.
_FREE = {
    "family",
    "data",  # its videos are known by `videos_identity`
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
    "report_to",
    "strict",
    "workers",
    "crepa_backend",
    "crepa_recompute",
    "teacher_offload",
    "lora_format",
    "offload",
    "step_timeout",
}
# Together they say which clips a step takes: the first two may differ where their product does not.
_MICRO_BATCHES = ("processes", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    `step`: optimiser steps done; `identity`: of the run that wrote it; `model`: where that found its model.
    """

    folder: Path
    step: int
    identity: Mapping[str, Any]
    model: str


def run_identity(settings: RunSettings, config: CrepaConfig, processes: int) -> dict[str, Any]:
    """Everything that a resumed run must have in common with the one that it goes on from, by key."""
    lengths_matter = settings.lr_scheduler not in ("constant", "constant_with_warmup") or (
        config.crepa_enabled and config.crepa_scheduler != "constant" and config.crepa_decay_steps == 0
    )
    free = _FREE if lengths_matter else _FREE | {"max_train_steps"}
    given = settings.model_dump(mode="json") | config.to_dict() | {"processes": processes}
    kept = {key: value for key, value in given.items() if key not in free}
    # Wherever they lie and however that was written; a hub id stays one.
    return kept | {"model": _of_folder(kept["model"]), "crepa_encoder": _of_encoder(config)}


def _of_encoder(config: CrepaConfig) -> str:
    """The teacher of a name that is neither a folder nor on the hub with the key of its content, where it has one."""
    name = config.crepa_encoder
    key = named_encoder(name).content_key() if teacher_is_encoder(config) else None
    return f"{name} {key}" if key else _of_folder(name)


def _of_folder(model: str) -> str:
    """By what a local model's content is known, all parts of a pipeline included; a hub id as it is."""
    if not any((Path(model) / name).is_file() for name in ("model_index.json", "config.json")):
        return model  # also of a folder that holds no model, which is refused where it is loaded
    parts = sorted(path.name for path in Path(model).iterdir() if path.is_dir() and path.name[0] != ".")
    return f"content {json_digest(model_identity(model, *parts))[:32]}"


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
    # What the version that wrote it did not know was not on.
    defaults = {key: field.default for key, field in type(settings).model_fields.items()} | CrepaConfig.from_dict(
        {}
    ).to_dict()
    before = {key: found.identity.get(key, defaults.get(key)) for key in identity}
    differing = [
        f"{key} = {json.dumps(value)} (checkpoint: {json.dumps(before[key], default=str)})"
        for key, value in sorted(identity.items())
        if value != before[key] and not (key in _MICRO_BATCHES and _micro_batches(identity) == _micro_batches(before))
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


def _micro_batches(identity: Mapping[str, Any]) -> int:
    """Of a step, over all processes, which take them from one stream."""
    return math.prod(identity[key] for key in _MICRO_BATCHES)


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
    return sorted(path for path in _of_steps(folder) if (path / STATE_FILE).exists())


def _of_steps(folder: Path) -> list[Path]:
    # A copy that somebody keeps under a name of its own is theirs.
    return [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]


def newest_checkpoint(output: Path) -> Path | None:
    """The newest in a run's output folder."""
    return next(reversed(_complete(output / FOLDER)), None)


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint of which every byte is as it was written, parts of other steps or under other names included."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    file = folder / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is not a complete checkpoint: {STATE_FILE} is missing")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        digest = state.pop("digest", None)
        step, identity, model = int(state["step"]), dict(state["identity"]), str(state.get("model"))
        # One without digests is of a version whose parts were pickles; it would have to be trusted.
        parts = {} if digest is None else {str(name): (size, sum_) for name, (size, sum_) in state["parts"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {_short(error)}") from error
    if digest is None:
        raise ValueError(f"{folder} is of an earlier version, in files that can hold code: it is not opened; {_ANEW}")
    if digest != json_digest(state):
        raise ValueError(f"{file} is damaged: its digest is not that of what it says")
    named = folder.name.removeprefix("step-")
    if step < 0 or (named.isdecimal() and int(named) != step):
        raise ValueError(f"{folder} holds a checkpoint of step {step}: it was renamed or damaged")
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is not a complete checkpoint: {', '.join(missing)} missing")
    short = [name for name, (size, _) in parts.items() if (folder / name).stat().st_size != size]
    if short:
        raise ValueError(f"{folder} is not a complete checkpoint: {', '.join(short)} of another size than was written")
    other = [name for name, (_, sum_) in parts.items() if file_digest(folder / name) != sum_]
    if other:
        raise ValueError(f"{folder} is damaged: {', '.join(other)} with other bytes than were written; {_OLDER}")
    return Checkpoint(folder, step, identity, model)


def _short(error: Exception) -> str:
    # It quotes the whole file otherwise.
    return f"{type(error).__name__}: {error}" if isinstance(error, UnicodeDecodeError) else repr(error)


class Checkpoints:
    """Writes and loads a run's checkpoints, the same calls in every process.

    Optimizer, scheduler, scaler, the random state of each rank, CREPA's state and the EMA; of the transformer the
    trained weights only, and a LoRA also as stock pipelines load it from there. All of it as safetensors and JSON: a
    checkpoint that somebody else made runs none of their code. Of a sharded run each process writes its shares.

    Args:
        state: what the run trains.
        ema: of its weights, or None.
        save_lora: writes the LoRA, given as trained weights by name, into a checkpoint's folder; None where all
            weights are trained.
        output: the run's folder.
        kept: how many of the newest are left there.
        identity: of the run, kept in each checkpoint.
        model: where the run found it; kept too, and free to change.
    """

    def __init__(
        self,
        state: TrainState,
        ema: EMAModel | None,
        *,
        save_lora: Callable[[Mapping[str, Tensor], Checkpoint], object] | None,
        output: Path,
        kept: int,
        identity: Mapping[str, Any],
        model: str,
    ) -> None:
        self._state, self._ema = state, ema
        self._save_lora, self._model = save_lora, model
        self._folder, self._kept, self._identity = output / FOLDER, kept, identity
        self._transformer: nn.Module = state.accelerator.unwrap_model(state.transformer)
        self._schedule_free = OPTIMIZERS[identity["optimizer"]].schedule_free
        self._rank, self._sharded = state.accelerator.process_index, is_sharded(self._transformer)

    def described(self, folder: Path, step: int) -> Checkpoint:
        """What is known of the run after `step` optimiser steps, of weights that are written into `folder`."""
        return Checkpoint(folder, step, self._identity, self._model)

    def save(self, step: int) -> Path:
        """The state after `step` optimiser steps; returns its folder.

        Raises:
            OSError: it could not be written; the checkpoints before it are as they were.
        """
        target, temporary = self._folder / f"step-{step:08d}", self._folder / f"{_WRITING}{step:08d}"
        # All ranks add CREPA's state up together, and shares of the LoRA: before writing, where one of them may fail.
        states = {name: part.state_dict() for name, part in self._parts().items()}
        shares: dict[str, Tensor] = {}
        trained: Mapping[str, Tensor] = trained_parameters(self._transformer)
        if self._sharded:
            shares = {f"{_WEIGHTS}{name}": parameter.detach() for name, parameter in trained.items()}
            states = {name: take_shares(state, name, shares) for name, state in states.items()}
            trained = {} if self._save_lora is None else whole_weights(self._transformer, trained=True)
        self._together(target, lambda: self._clear(temporary))
        self._together(target, lambda: self._write(temporary, step, states, trained))
        if shares:
            self._together(target, lambda: write_shares(temporary / SHARES, shares))
        self._together(target, lambda: self._finish(temporary, target, step))
        return target

    def load(self, checkpoint: Checkpoint) -> None:
        """Puts everything back as it was. ValueError naming a file that is of another model or run."""
        folder = checkpoint.folder
        parts = self._parts()
        states = {name: read_state(folder / f"{name}.safetensors") for name in parts}
        if self._sharded:
            states = self._load_shares(folder, states)
        else:
            self._load_weights(folder / (UNAVERAGED_FILE if self._schedule_free else WEIGHTS_FILE))
        for name, part in parts.items():
            _put_back(folder / f"{name}.safetensors", partial(_give, name, part, states[name]))
        if self._ema is not None:
            self._ema.to(self._state.accelerator.device)
        # On another number of processes each has that of one of those that there were.
        file = folder / _random_file(self._rank % int(checkpoint.identity["processes"]))
        numbers = read_state(file)
        _put_back(file, lambda: set_random_state(numbers, self._state.accelerator.device))

    def _parts(self) -> dict[str, Any]:
        """What has a state, by the name of its file."""
        parts = {
            "optimizer": self._state.optimizer,
            "scheduler": self._state.scheduler,
            "scaler": self._state.accelerator.scaler,
            "crepa": self._state.crepa,
            _EMA: self._ema,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _together(self, target: Path, work: Any) -> None:
        """Does a piece of work in every process, and fails in every process if it fails in one."""
        error: Exception | None = None
        try:
            work()
        # torch and safetensors say of a full disk that writing failed, in errors of their own.
        except (OSError, RuntimeError, SafetensorError) as caught:
            error = caught
        if not anywhere(error is not None):
            return
        if self._state.accelerator.is_main_process:
            for leftover in self._folder.glob(f"{_WRITING}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        why = "in another process" if error is None else str(error)
        raise OSError(f"checkpoint {target} could not be written: {why}; the ones before it are whole") from error

    def _clear(self, temporary: Path) -> None:
        if self._state.accelerator.is_main_process:
            # A kill may also leave a folder in a checkpoint's place that is none.
            partial_ones = [path for path in _of_steps(self._folder) if not (path / STATE_FILE).exists()]
            for leftover in (*self._folder.glob(f"{_WRITING}*"), *partial_ones):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)

    def _write(
        self, temporary: Path, step: int, states: Mapping[str, Mapping[str, Any]], trained: Mapping[str, Tensor]
    ) -> None:
        # Of one rank on another machine the folder may not be visible yet.
        temporary.mkdir(parents=True, exist_ok=True)
        write_state(temporary / _random_file(self._rank), random_state(self._state.accelerator.device))
        if not self._state.accelerator.is_main_process:
            return
        for name, state in states.items():
            write_state(temporary / f"{name}.safetensors", state)
        if self._schedule_free:
            _save_weights(trained, temporary / UNAVERAGED_FILE)
        with weights_for_use(self._state.optimizer):
            if not self._sharded:
                _save_weights(trained, temporary / WEIGHTS_FILE)
            if self._save_lora is not None:
                self._save_lora(trained, self.described(temporary, step))

    def _finish(self, temporary: Path, target: Path, step: int) -> None:
        if not self._state.accelerator.is_main_process:
            return
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        parts = {path.relative_to(temporary).as_posix(): [path.stat().st_size, file_digest(path)] for path in files}
        state = {"step": step, "identity": self._identity, "model": self._model, "parts": parts}
        text = json.dumps({**state, "digest": json_digest(state)}, indent=2) + "\n"
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
        for path in (*temporary.rglob("*"), temporary):
            _to_disk(path)
        os.replace(temporary, target)
        _to_disk(self._folder)
        for old in _complete(self._folder)[: -self._kept]:
            # Out of the way first: a kill while it is removed leaves nothing that looks like a checkpoint.
            shutil.rmtree(old.replace(self._folder / f"{_WRITING}{old.name}"))

    def _load_shares(self, folder: Path, states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Loads the trained weights, and gives the parts' states with their shares."""
        trained: dict[str, Any] = dict(trained_parameters(self._transformer))
        shares: dict[str, Tensor] = {f"{_WEIGHTS}{name}": parameter.detach() for name, parameter in trained.items()}
        mesh = next(iter(trained.values())).device_mesh
        placed: dict[str, dict[str, Any]] = {}
        places = ((name, place_shares(state, mesh, shares)) for name, state in states.items())
        _put_back(folder, lambda: placed.update(places))
        read_shares(folder / SHARES, shares)
        return placed

    def _load_weights(self, file: Path) -> None:
        trained = trained_parameters(self._transformer)
        saved = _read_weights(file)
        shapes = [{name: each.shape for name, each in tensors.items()} for tensors in (saved, trained)]
        wrong = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        if wrong:
            raise ValueError(f"{file} is of another model, first at {wrong[0]}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])


def trained_weights(folder: Path) -> dict[str, Tensor]:
    """Of a checkpoint, by name, whole, on the CPU. ValueError where they are damaged."""
    return read_whole(folder / SHARES, _WEIGHTS) if (folder / SHARES).is_dir() else _read_weights(folder / WEIGHTS_FILE)


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _save_weights(trained: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: parameter.detach().cpu().contiguous() for name, parameter in trained.items()}, file)


def _random_file(rank: int) -> str:
    return f"random_state_{rank}.safetensors"


def _put_back(file: Path, work: Callable[[], object]) -> None:
    try:
        work()
    # Each kind of state has its own way to say that it is of something else.
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is of another run: {error}") from error


def _give(name: str, part: Any, state: dict[str, Any]) -> None:
    # Neither the optimiser nor the EMA looks at shapes: they would fail in their next step.
    if name == "optimizer":
        state = _numbered(state, part)
    elif name == _EMA:
        old, new = ([each.shape for each in shadows] for shadows in (state["shadow_params"], part.shadow_params))
        if old != new:
            raise ValueError("its weights have other shapes")
    part.load_state_dict(state)


def _numbered(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state with its parameters numbered again (JSON has text for keys).

    ValueError where a moment is not of its parameter's shape, or larger where it need not be.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {int(number): each for number, each in state["state"].items()}
    for number, tensors in moments.items():
        shape = parameters[number].shape
        found = {name: each for name, each in tensors.items() if isinstance(each, Tensor) and each.ndim}
        for name, each in found.items():
            if each.numel() > shape.numel() or (each.shape != shape and name not in SHAPED_OTHERWISE):
                raise ValueError(f"its parameter {number} is not of the shape {tuple(shape)}")
    return {**state, "state": moments}


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

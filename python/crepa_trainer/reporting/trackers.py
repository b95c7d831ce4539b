"""Every logged value of a run in one file of lines, and wherever `report_to` says, through accelerate's trackers."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers, on_main_process

from crepa_kernels.config.rules import nearest

from ..folders import METRICS_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..settings import RunSettings

PROJECT, TENSORBOARD = "crepa", "tensorboard"

# Of a row, what another run of the same settings has otherwise.
MEASURED = ("time", "seconds", "memory")


class MetricsTracker(GeneralTracker):
    """Appends one JSON object a logged step to `path`, a line each, beside whatever other trackers the run has.

    It holds `step` and what was logged in that step; null is a number that is not finite.

    first_step: the step at which the run goes on. Lines of earlier steps are kept, what comes after them is cut off.
    """

    name = "metrics"
    requires_logging_directory = False

    def __init__(self, path: Path, first_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.first_step = first_step

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            kept = [end for end, row in _rows(self.path) if row["step"] < self.first_step]
            file.truncate(kept[-1] if kept else 0)

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in {"step": step, **values}.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for one that accelerate does not know, or whose package is not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            match = nearest(name, LOGGER_TYPE_TO_CLASS)
            hint = f"did you mean {match}?" if match else f"accelerate knows {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            raise ValueError(f"report_to: {name} is unknown; {hint}")
        if name not in [str(each) for each in get_available_trackers()]:
            raise ValueError(f"report_to: {name} is not installed: pip install {name.replace('_', '-')}")


def make_trackers(settings: RunSettings, first_step: int) -> list[GeneralTracker]:
    """Those of `report_to` and the file of metrics, for accelerate to start; a resumed run goes on at `first_step`."""
    name, folder = settings.output.absolute().name, str(settings.output)
    # TensorBoard leaves out what a run that was killed has logged from its first step on; the others begin anew.
    more: dict[str, dict[str, Any]] = {
        TENSORBOARD: {"purge_step": first_step},
        "wandb": {"name": name, "dir": folder},
        "trackio": {"name": name},
    }
    trackers: list[GeneralTracker] = []
    for each in settings.report_to:
        kind: Any = LOGGER_TYPE_TO_CLASS[each]
        folders = [folder] if kind.requires_logging_directory else []
        trackers.append(kind(TENSORBOARD if each == TENSORBOARD else PROJECT, *folders, **more.get(each, {})))
    return [*trackers, MetricsTracker(settings.output / METRICS_FILE, first_step)]


def start_trackers(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Starts all of them and gives them the settings. ValueError where one cannot start, as without an account."""
    flat = {
        key: value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
        for key, value in settings.items()
    }
    try:
        accelerator.init_trackers(PROJECT)
        for tracker in accelerator.trackers:
            if tracker.name not in (TENSORBOARD, MetricsTracker.name):  # they have them in settings.json
                tracker.store_init_configuration(flat)
    except Exception as error:  # each package has its own
        line = " ".join(str(error).split())
        raise ValueError(f"report_to: {type(error).__name__}: {line}") from error


def log_values(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """A step's values to all of them. OSError that says so where they cannot be written, as on a full disk."""
    try:
        accelerator.log(dict(values), step=step)
    except OSError as error:
        raise OSError(f"the values of step {step} could not be logged: {error}; checkpoints are whole") from error


def log_picture(trackers: Iterable[GeneralTracker], name: str, picture: np.ndarray, step: int) -> None:
    """A picture (H, W, 3) uint8 to each that takes pictures; after the values of the steps before it."""
    for tracker in trackers:
        if tracker.name == TENSORBOARD:
            tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [picture]}, step=step)


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of tensors on an accelerator, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a file that MetricsTracker wrote, without a last one that a kill tore; NaN is what was not finite."""
    return [{name: math.nan if value is None else value for name, value in row.items()} for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with the number of bytes up to its end, as far as whole lines go and steps rise."""
    end, last = 0, -1
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(row, dict) or not isinstance(row.get("step"), int) or row["step"] <= last:
                return
            end, last = end + len(line), row["step"]
            yield end, row

"""`crepa-train cache`: what a run encodes before it trains, without the training, by any number of jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate import PartialState

from .data.cache import fill_share, prepare_cache
from .data.dataset import find_clips, tell_skipped
from .families import TrainingFamily
from .folders import check_folders
from .launcher import check_launcher, launched_processes, training_device
from .ranks import PATIENCE
from .reporting.plan import make_plan
from .reporting.table import data_rows, print_rows
from .terminal import say

if TYPE_CHECKING:
    from rich.console import Console

    from crepa_kernels import CrepaConfig

    from .data.shares import Share
    from .settings import RunSettings


def fill_cache(settings: RunSettings, config: CrepaConfig, share: Share | None, console: Console) -> None:
    """Encodes what a run with these settings would, or one share of it, into the run's cache; in every process.

    Raises ValueError and OSError as `run`, for all that it would refuse before a weight is loaded.
    """
    check_launcher(settings)
    check_folders(settings)
    family = TrainingFamily.of(settings.model, settings.task, settings.family, settings.expert)
    share = None if share is None or share.of == 1 else share
    found = find_clips(settings, family, share)
    if found.keys:
        device_type = training_device()
        plan = make_plan(settings, config, family, found, processes=launched_processes(), device_type=device_type)
        print_rows(console, data_rows(plan))
    else:
        tell_skipped(found.skipped, len(found.skipped))
    state = PartialState(cpu=training_device() == "cpu", timeout=PATIENCE)
    if share is None:
        prepare_cache(settings, config, family, state.device, console, found)
    else:
        fill_share(settings, config, family, state.device, console, found, share)
    say(console, f"{settings.cache_folder} has {f'share {share}' if share else 'all'} of {settings.data}")
    state.wait_for_everyone()
    state.destroy_process_group()

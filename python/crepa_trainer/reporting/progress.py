"""The bar of a training run, with its losses beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_ROOM = 100  # columns below which the losses, which nobody can guess, have the bar's place
_BESIDE = 11  # columns of the time left, the slash and the gaps
_BAR = 14  # and at least of the bar with its name
_SHOWN = (
    ("loss", "loss"),
    ("flow", "flow_loss"),
    ("similarity", "crepa_similarity"),
    ("weight", "crepa_weight"),
    ("layersync", "layersync_similarity"),
)


@contextmanager
def training_progress(
    console: Console, steps: int, first_step: int = 0
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Gives what is called after each step; where the console is a file, it prints a line every tenth of the run."""
    bar = Progress(
        *([TextColumn("training"), BarColumn()] if console.width >= _ROOM else []),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("training", total=steps, completed=first_step, losses="")

        def on_step(step: int, values: Mapping[str, float]) -> None:
            losses = "  ".join(f"{name} {values[key]:.3f}" for name, key in _SHOWN if key in values)
            # Where they have no room, they are cut, and not the step or the time left.
            room = console.width - _BESIDE - 2 * len(str(steps)) - (_BAR if console.width >= _ROOM else 0)
            bar.update(task, advance=1, losses=losses if len(losses) <= room else f"{losses[: room - 1]}…")
            if not console.is_terminal and (step + 1) % max(1, steps // 10) == 0:
                console.print(f"step {step + 1}/{steps}  {losses}", highlight=False)

        yield on_step

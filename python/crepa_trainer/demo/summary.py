"""What a run ends with: a table, and the same numbers as JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..terminal import several
from .evaluation import LEVELS, Alignment, Answers

ENDS = 10
Ends = tuple[float, float] | None
NONE = (None, None)


@dataclass(frozen=True)
class Summary:
    """The numbers of a run. Losses and training similarity are means over the first and last few steps."""

    clips: int
    steps: int
    ends: int
    loss: Ends
    flow_loss: Ends
    weight: Ends
    training_similarity: Ends
    before: Alignment | None
    after: Alignment | None
    answers: Answers | None
    answers_without_crepa: Answers | None
    seconds_per_step: float | None
    seconds_per_step_without_crepa: float
    timed_steps: int
    frames_read: int
    frames_to_latents: int
    frames_decoded: int
    frames_encoded: int
    videos_skipped: int

    @property
    def rise(self) -> float:
        """How much crepa_similarity over all clips rose, from before training to after; NaN without CREPA."""
        return self.after.similarity - self.before.similarity if self.after and self.before else math.nan

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def ends(rows: Sequence[dict[str, float]], key: str) -> Ends:
    """Mean of a logged value over its first and its last `ENDS` steps (fewer in a shorter run), None if never."""
    values = [row[key] for row in rows if key in row]
    if not values:
        return None
    return statistics.fmean(values[:ENDS]), statistics.fmean(values[-ENDS:])


def print_summary(console: Console, summary: Summary, noise_time: float) -> None:
    """The table, with what each number was measured on below it."""
    table = Table(
        title=f"CREPA on {several(summary.clips, 'clip')}, {several(summary.steps, 'step')}", title_justify="left"
    )
    table.add_column()
    table.add_column("first", justify="right")
    table.add_column("last", justify="right")

    def row(name: str, *values: float | None, end: bool = False) -> None:
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        table.add_row(name, *cells, end_section=end)

    row("flow-matching loss [dim](a)", *(summary.flow_loss or NONE))
    row("loss with CREPA [dim](a)", *(summary.loss or NONE))
    row("crepa_weight", *(summary.weight or NONE), end=True)
    if summary.before and summary.after:
        before, after = summary.before, summary.after
        row("crepa_similarity in training [dim](a)", *(summary.training_similarity or NONE))
        row("[bold]crepa_similarity, all clips[/bold] [dim](b)", before.similarity, after.similarity)
        row("  best constant predictor [dim](c)", before.constant, after.constant)
        row("  best constant for each position [dim](c)", before.position, after.position)
        row("  teacher's patches shuffled [dim](d)", before.shuffled, after.shuffled, end=True)
    table.add_row("", "with CREPA", "without")
    seconds = summary.seconds_per_step, summary.seconds_per_step_without_crepa
    compared = [each for each in (summary.answers, summary.answers_without_crepa) if each is not None]
    row("seconds a step [dim](e)", *seconds, end=not compared)
    if compared:
        row("flow-matching loss after training [dim](f)", *(each.flow_loss for each in compared))
        row("teacher's features in its block [dim](g)", *(each.readable for each in compared), end=True)
    table.add_row("video frames read / to latents", str(summary.frames_read), str(summary.frames_to_latents))
    table.add_row("frames encoded by the teacher", "", str(summary.frames_encoded))
    table.add_row("frames decoded by the VAE", "", str(summary.frames_decoded))
    table.add_row("videos skipped", "", str(summary.videos_skipped))
    console.print(table)
    notes = [f"(a) mean of the first and last {several(summary.ends, 'step')}, noise level drawn anew each step"]
    if summary.after:
        notes += [
            f"(b) the training clips at one fixed noise of level {noise_time:g}, before and after training",
            "(c) the best that one vector for all patches, or one for each place in the",
            "    frame, scores on (b): neither looks at the clip",
            "(d) as (b), the teacher's patches in random order within each frame",
        ]
    notes.append(f"(e) median of {several(summary.timed_steps, 'step')} each, taken in turns after training")
    if compared:
        levels = ", ".join(f"{level:g}" for level in LEVELS)
        notes += [
            "(f) the same LoRA, trained from the same seed with CREPA and without it, on the",
            f"    training clips at the noise levels {levels}, the same noise for both",
            "(g) mean cosine of the teacher's features with what a linear map, fitted to every",
            "    other clip, makes of the block's states in the rest, at the noise of (b)",
        ]
    console.print("\n".join(notes), style="dim", highlight=False)
    console.print(verdict(summary), highlight=False)
    if changed := what_changed(summary):
        console.print(changed, highlight=False)


def what_changed(summary: Summary) -> str:
    """One sentence about the same training without CREPA; empty where there was none."""
    ours, others = summary.answers, summary.answers_without_crepa
    if ours is None or others is None:
        return ""
    parts = [f"a flow-matching loss of {ours.flow_loss:.3f} instead of {others.flow_loss:.3f}"]
    if ours.readable is not None and others.readable is not None:
        parts.insert(0, f"a block with {ours.readable:.3f} instead of {others.readable:.3f} of the teacher in it (g)")
    return f"Against the same training without CREPA: {', and '.join(parts)}."


def verdict(summary: Summary) -> str:
    """One sentence a user can check against the table."""
    after = summary.after
    if after is None:
        return "CREPA was off."
    lead = after.similarity - after.constant
    if lead <= 0:
        return (
            f"crepa_similarity rose by {summary.rise:.3f} but does not beat the best constant predictor yet "
            f"({after.similarity:.3f} against {after.constant:.3f}): the projector has learned no more than a mean."
        )
    lost = (after.similarity - after.shuffled) / lead
    if lost < 0.5:
        about = "much of it is not about where patches are"
    elif after.similarity > after.position:
        about = "patch answers patch"
    else:
        about = "it is about where patches are, and no more yet than each position's mean"
    return (
        f"crepa_similarity rose by {summary.rise:.3f} and is {lead:.3f} above the best constant predictor; shuffling "
        f"the teacher's patches takes {100 * min(lost, 1.0):.0f} % of that lead{' and more' if lost > 1 else ''}: "
        f"{about}."
    )

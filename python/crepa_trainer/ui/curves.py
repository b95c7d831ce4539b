"""The curves, samples and matrices of runs on a page, drawn again as they grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nicegui import ui
from nicegui.elements.plotly import Plotly  # now: by way of ui the first visit would wait for its import

from ..reporting.panels import Curves, Options, matrix_figure, panels
from ..reporting.runs import Look, RunFolder, Sample
from .shelf import name_of
from .shell import View

EVERY = 2.0  # seconds between two looks at the files


class Range(ui.input):
    """A whole number from 0 to `most` on a slider: the browser's own, whose name and value screen readers say."""

    def __init__(self, name: str, value: int, most: int, on_change: Callable[[], None]) -> None:
        super().__init__(value=str(value), on_change=on_change)
        self.props(f'type=range min=0 step=1 dense borderless aria-label="{name}"')
        self.reach(most)

    @property
    def place(self) -> int:
        """Where it stands."""
        return int(self.value or 0)

    def reach(self, most: int) -> None:
        """Sets its end."""
        self.props(f"max={most}")


class LiveCurves:
    """Every panel of some runs, over each other. runs: called each time, since they may be others by then."""

    def __init__(self, view: View, runs: Callable[[], Sequence[RunFolder]]) -> None:
        self.view, self.words, self.runs = view, view.words, runs
        self.plots: dict[str, Any] = {}
        self._drawn: object = None
        with ui.row().classes("items-center gap-4 w-full"):
            axis = {"step": self.words("Steps"), "time": self.words("Hours")}
            self.axis = ui.toggle(axis, value="step", on_change=self.update).props(
                f'no-caps aria-label="{self.words("Horizontal axis")}"'
            )
            ui.label(self.words("Smoothing"))
            self.smoothing = Range(self.words("Smoothing"), 3, 20, self.update).classes("w-40")
        self.empty = ui.label(self.words("Nothing was logged."))
        self.grid = ui.element("div").classes("w-full grid grid-cols-1 lg:grid-cols-2 gap-4")
        self.update()
        ui.timer(EVERY, self.update)

    def update(self) -> None:
        """Draws what has changed."""
        runs = list(self.runs())
        curves = [Curves(name_of(self.view.folders, run), run.metrics(), run.settings()) for run in runs]
        lengths = [len(curve.metrics.columns.get("loss", ((), ()))[0]) for curve in curves]
        now = (self.axis.value, self.smoothing.value, [curve.name for curve in curves], lengths)
        if now == self._drawn:
            return
        self._drawn = now
        # Of a long run a wider window: the slider is in hundredths of it.
        window = max([1, *lengths]) * self.smoothing.place // 100
        options = Options(self.axis.value == "time", window, self.view.dark, self.words)
        found = dict(panels(curves, options))
        self.empty.set_visibility(not found)
        for title in self.plots.keys() - found.keys():
            self.plots.pop(title).parent_slot.parent.delete()
        for title, figure in found.items():
            if title in self.plots:
                self.plots[title].update_figure(figure)
                continue
            with self.grid, ui.card().classes("w-full"):
                ui.label(title).classes("text-subtitle1").props("role=heading aria-level=2")
                self.plots[title] = Plotly(figure).classes("w-full h-64")


class Gallery:
    """Samples by prompt and step, of several runs side by side, each with a lightbox."""

    def __init__(self, view: View, runs: Callable[[], Sequence[RunFolder]]) -> None:
        self.view, self.words, self.runs = view, view.words, runs
        self._drawn: object = None
        self.clips: list[tuple[str, Sample]] = []  # in the order that they are shown in
        self.box = ui.column().classes("w-full gap-2")
        self.update()
        ui.timer(EVERY, self.update)

    def update(self) -> None:
        """Draws again where there are others."""
        found = [(name_of(self.view.folders, run), sample) for run in self.runs() for sample in run.samples()]
        if found == self._drawn:
            return
        self._drawn = found
        self.box.clear()
        self.clips.clear()
        with self.box:
            if not found:
                ui.label(self.words("No samples yet."))
            # The same prompt and seed, so that one difference is the run's.
            for prompt, seed in dict.fromkeys((sample.prompt, sample.seed) for _, sample in found):
                same = [(name, each) for name, each in found if (each.prompt, each.seed) == (prompt, seed)]
                ui.label(prompt).classes("text-subtitle1").props("role=heading aria-level=3")
                for step in sorted({sample.step for _, sample in same}, reverse=True):
                    self._row(step, [(name, sample) for name, sample in same if sample.step == step])

    def _row(self, step: int, clips: Sequence[tuple[str, Sample]]) -> None:
        with ui.row().classes("w-full gap-2 items-end"):
            ui.label(f"{self.words('step')} {step}").classes("w-24 text-caption")
            for name, sample in clips:
                label = f"{self.words('Show')}: {name}, {self.words('step')} {step}, {sample.prompt}"
                number = len(self.clips)
                self.clips.append((name, sample))
                with ui.button(on_click=lambda number=number: Lightbox(self.view, list(self.clips), number)) as button:
                    ui.image(self.view.file(sample.strip)).classes("w-56").props("fit=contain")
                button.props("flat no-caps padding=none").props(f'aria-label="{label.replace(chr(34), chr(39))}"')


class Lightbox:
    """One clip large, and by buttons or arrow keys those before and after it. Closed, the keyboard is where it was."""

    def __init__(self, view: View, clips: Sequence[tuple[str, Sample]], number: int) -> None:
        self.view, self.words, self.clips, self.number = view, view.words, clips, number
        with ui.dialog(value=True) as dialog, ui.card().classes("w-full max-w-screen-lg items-center"):
            self.video = ui.video("", autoplay=True, muted=True, loop=True).classes("w-full")
            self.text = ui.label().props("role=status")
            with ui.row().classes("justify-center"):
                self._button("Previous", "chevron_left", -1)
                ui.button(self.words("Close"), on_click=dialog.close).props("no-caps autofocus")
                self._button("Next", "chevron_right", 1)
        dialog.on("keydown.left", lambda: self.go(-1)).on("keydown.right", lambda: self.go(1))
        dialog.on("hide", dialog.delete)
        self.go(0)

    def _button(self, name: str, icon: str, by: int) -> ui.button:
        made = ui.button(icon=icon, on_click=lambda: self.go(by)).props(f'flat round aria-label="{self.words(name)}"')
        return made.tooltip(self.words(name))

    def go(self, by: int) -> None:
        """Shows the clip that is `by` further, if there is one."""
        self.number = min(max(self.number + by, 0), len(self.clips) - 1)
        name, sample = self.clips[self.number]
        self.video.set_source(self.view.file(sample.video))
        words = self.words
        self.text.set_text(
            f"{name} · {words('step')} {sample.step} · {words('seed')} {sample.seed} · {sample.prompt}"
            f" · {self.number + 1} / {len(self.clips)}"
        )


class Matrices:
    """The similarity matrices of a run over time, and patches beside PCA colors."""

    def __init__(self, view: View, run: RunFolder) -> None:
        self.view, self.words, self.run = view, view.words, run
        self.looks: list[Look] = []
        self.none = ui.label(self.words("None yet: matrix_every says how often."))
        with ui.column().classes("w-full") as self.box:
            ui.label(self.words("The dotted line is where a frame meets itself.")).classes("text-caption")
            self.slider = Range(self.words("Which look"), 0, 0, self._draw).classes("w-full max-w-xl")
            self.plot = Plotly({"data": [], "layout": {}}).classes("w-full max-w-xl h-96")
            self.picture = ui.image().classes("w-full max-w-4xl")
        self.update()
        ui.timer(EVERY, self.update)

    def update(self) -> None:
        """Takes in new ones; at the newest it stays at the newest."""
        looks = self.run.looks()
        self.none.set_visibility(not looks)
        self.box.set_visibility(bool(looks))
        if len(looks) == len(self.looks):
            return
        follows = self.slider.place >= len(self.looks) - 1
        self.looks = looks
        self.slider.reach(len(looks) - 1)
        if follows:
            self.slider.set_value(str(len(looks) - 1))
        self._draw()

    def _draw(self) -> None:
        if not self.looks:
            return
        look = self.looks[min(self.slider.place, len(self.looks) - 1)]
        self.plot.update_figure(matrix_figure(look, Options(dark=self.view.dark, words=self.words)))
        self.picture.set_visibility(look.patches is not None)
        if look.patches is not None:
            self.picture.set_source(self.view.file(look.patches))

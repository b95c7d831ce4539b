"""New run: every setting as a form, as the file, and as the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import run, ui

from crepa_kernels.config.rules import PRESETS

from ...reporting.panels import Options, weight_figure
from ..form import (
    FIELDS,
    LOSSES,
    SECTIONS,
    VALIDATION,
    Checked,
    FormField,
    Values,
    check,
    command_line,
    json_text,
    read_command_line,
    read_json_text,
    shown_value,
)
from ..form_words import field_help, field_label
from ..model_sizes import is_cached, suggested
from ..shell import Page, View
from ..starting import read_settings, save_settings, saved_name, settings_files


class _Field:
    """One setting's widget, with its help, its key, what is wrong of it, and where its value comes from.

    It is made with its value: one that it got later would be sent after the page, over what was typed in until then.
    """

    def __init__(
        self, field: FormField, view: View, values: Values, on_edit: Callable[[str, Any], None], hints: list[str]
    ) -> None:
        self.field, self.view, self.words, self._on_edit = field, view, view.words, on_edit
        self._filling = False
        label = field_label(field, view.language)
        with ui.column().classes("gap-0 w-full") as self.box:
            with ui.row().classes("w-full items-center no-wrap gap-1"):
                self.widget = self._make(label, self._held(values), hints)
                clear = f"{view.words('Back to the default')}: {label}"
                self.clear = ui.button(icon="backspace", on_click=lambda: self._edited(None))
                self.clear.props(f'flat round dense size=sm aria-label="{clear}"').tooltip(clear)
            self.error = ui.label().classes("text-negative text-caption").props("role=alert")
            help_text = field_help(field, view.language)
            with ui.element("div").classes("text-caption opacity-80"):
                ui.label(field.key).classes("font-mono inline mr-1")
                ui.label(help_text).classes("inline")
            self.source = ui.label().classes("text-caption text-primary")

    def _held(self, values: Values) -> Any:
        """What the widget itself holds of the values; what is not given is its placeholder's."""
        value, source = shown_value(values, self.field.key)
        if self.field.kind == "flag":
            return value is True
        given = value if source == "given" else None
        if self.field.kind == "choice":
            return given
        return "" if given is None else self.field.written(given)

    def _options(self, held: Any) -> list[Any]:
        return [*self.field.choices, *([] if held is None or held in self.field.choices else [held])]

    def _make(self, label: str, held: Any, hints: list[str]) -> Any:
        mark = f"{label} *" if self.field.required else label
        if self.field.kind == "flag":
            return ui.switch(mark, value=held, on_change=lambda event: self._edited(event.value))
        if self.field.kind == "choice":
            made: Any = ui.select(
                self._options(held), label=mark, value=held, on_change=lambda event: self._edited(event.value)
            )
            return made.classes("grow").props("dense")
        choices = hints or [self.field.written(word) for word in self.field.choices]
        entry = ui.input(
            mark, value=held, on_change=lambda event: self._typed(event.value), autocomplete=choices or None
        )
        return entry.classes("grow").props("dense stack-label")

    def _typed(self, text: str | None) -> None:
        self._edited(self.field.read(text) if text else None)

    def _edited(self, value: Any) -> None:
        if not self._filling:
            self._on_edit(self.field.key, value)

    @contextmanager
    def _fill(self) -> Iterator[None]:
        self._filling = True
        try:
            yield
        finally:
            self._filling = False

    def show(self, values: Values, wrong: str | None, *, edited: bool) -> None:
        """edited: whether the change came from this widget, which then has its text already."""
        value, source = shown_value(values, self.field.key)
        default = "" if value is None else self.field.written(value)
        with self._fill():
            held = self._held(values)
            if self.field.kind == "choice":
                self.widget.set_options(self._options(held), value=held)
            elif self.field.kind == "flag" or not edited:
                self.widget.set_value(held)
            if self.field.kind != "flag" and source != "given":
                self.widget.props(add=f'placeholder="{_quoted(default)}"')
                if self.field.kind == "choice":
                    self.widget.props(add=f'stack-label display-value="{_quoted(default)}"')
            elif self.field.kind == "choice":
                self.widget.props(remove="display-value")
        self.clear.set_visibility(source == "given")
        self.error.set_text(self.view.phrase(wrong or ""))
        self.error.set_visibility(bool(wrong))
        self.source.set_text(self.words("from the preset: {value}").format(value=default) if source == "preset" else "")
        self.source.set_visibility(source == "preset")


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', "'")


class _NewRun:
    def __init__(self, view: View, name: str | None) -> None:
        """name: of a file of the runs' folder that the form begins with."""
        self.view, self.words = view, view.words
        self.values: Values = {}
        self.opened: str | None = None
        begun = saved_name(name) if name and self._read(name) else ""
        with ui.row().classes("w-full items-end gap-2"):
            self._file_bar(begun)
        with ui.grid().classes("w-full grid-cols-1 lg:grid-cols-5 gap-4"):
            with ui.column().classes("lg:col-span-3 gap-2 w-full"):
                self.fields = self._sections()
            with ui.column().classes("lg:col-span-2 gap-2 w-full lg:sticky lg:top-16 self-start"):
                self._texts()
        self.show(edited=None)

    # Files

    def _file_bar(self, begun: str) -> None:
        words = self.words
        self.open_menu = ui.select(settings_files(self.view.folders), label=words("Open a file"), on_change=self._open)
        self.open_menu.classes("min-w-48").props("dense")
        self.name = ui.input(words("File name"), placeholder="my-run.json", value=begun)
        self.name.classes("min-w-48").props("dense")
        ui.button(words("Save"), icon="save", on_click=self._save)
        ui.button(words("Plan"), icon="checklist", on_click=self._plan).props("outline")
        ui.button(words("To the runs"), icon="play_arrow", on_click=self._to_runs).props("outline")

    def _read(self, name: str) -> bool:
        """Takes the values of a file of the runs' folder; False, and says why, where they cannot be read."""
        try:
            self.values = dict(read_settings(self.view.folders, name))
        except ValueError as error:
            self.view.problem(str(error))
            return False
        # What is saved is JSON: another format stays as it was, and so does a file of the name that it would have.
        self.opened = name if name == saved_name(name) else None
        return True

    def _open(self, event: Any) -> None:
        if event.value and self._read(event.value):
            self.name.set_value(saved_name(event.value))
            self.show(edited=None)

    async def _save(self) -> bool:
        name = (self.name.value or "").strip()
        if not name:
            self.view.problem(self.words("Give a file name"))
            return False
        name = saved_name(name)
        if (self.view.folders.runs / name).exists() and name != self.opened and not await self._confirmed(name):
            return False
        try:
            path = save_settings(self.view.folders, name, self.values)
        except ValueError as error:
            self.view.problem(str(error))
            return False
        self.opened = name
        self.name.set_value(name)
        self.open_menu.set_options(settings_files(self.view.folders))
        self.view.done(self.words("Saved as {path}").format(path=path))
        return True

    async def _confirmed(self, name: str) -> bool:
        with ui.dialog() as dialog, ui.card():
            ui.label(self.words("{name} is there already: replace it?").format(name=name))
            with ui.row():
                ui.button(self.words("Replace"), on_click=lambda: dialog.submit(True))
                ui.button(self.words("Cancel"), on_click=lambda: dialog.submit(False)).props("flat")
        return bool(await dialog)

    async def _plan(self) -> None:
        if await self._save():
            ui.navigate.to(f"/plan?file={quote(self.opened or '')}")

    async def _to_runs(self) -> None:
        if await self._save():
            ui.navigate.to(f"/runs?file={quote(self.opened or '')}")

    # The form

    def _sections(self) -> dict[str, _Field]:
        fields: dict[str, _Field] = {}
        for section in SECTIONS:
            with ui.expansion(self.words(section), value=section != VALIDATION).classes("w-full border rounded"):
                if section == LOSSES:
                    self.weight = ui.plotly({"data": [], "layout": {}}).classes("w-full h-48")
                    self.preset_changes = ui.label().classes("text-caption text-primary")
                with ui.grid().classes("w-full grid-cols-1 md:grid-cols-2 gap-x-4 gap-y-3"):
                    for field in FIELDS.values():
                        if field.section == section:
                            fields[field.key] = _Field(
                                field, self.view, self.values, self._edit, self._hints(field.key)
                            )
        fields["model"].widget.on("blur", self._fill_from_model).on("keydown.enter", self._fill_from_model)
        return fields

    def _hints(self, key: str) -> list[str]:
        if key != "model":
            return []
        roots = (self.view.folders.runs, *self.view.folders.others)
        depths = [f"{depth}model_index.json" for depth in ("", "*/", "*/*/")]
        return [str(path.parent) for root in roots for depth in depths for path in root.glob(depth)]

    def _edit(self, key: str, value: Any) -> None:
        if value is None:
            self.values.pop(key, None)
        else:
            self.values[key] = value
        self.show(edited=key)

    async def _fill_from_model(self) -> None:
        model, expert = self.values.get("model"), self.values.get("expert")
        if not isinstance(model, str):
            return
        try:
            if Path(model).expanduser().is_dir():
                model = str(self.view.folders.inside(model))
            elif not await run.io_bound(is_cached, model):
                return
            found = await run.io_bound(suggested, model, self.values.get("task", "text2video"), expert)
        except ValueError as error:
            self.model_says.set_text(self.view.phrase(str(error)))
            return
        if found is None:  # the server is ending
            return
        new = {key: value for key, value in found.items() if key not in self.values}
        self.model_says.set_text(
            self.words("Filled in from the model: {what}").format(what=", ".join(new)) if new else ""
        )
        if new:
            self.values |= new
            self.show(edited=None)

    # The texts beside it

    def _texts(self) -> None:
        words = self.words
        self.problems = ui.column().classes("w-full gap-0").props("role=status aria-live=polite")
        self.model_says = ui.label().classes("text-caption text-primary").props("role=status")
        self.json = ui.textarea(
            words("Settings file (JSON)"),
            value=json_text(self.values),
            on_change=lambda event: self._typed_json(event.value),
        )
        self.json_error = ui.label().classes("text-negative text-caption").props("role=alert")
        self.command = ui.textarea(
            words("Command line"),
            value=command_line(self.values),
            on_change=lambda event: self._typed_command(event.value),
        )
        self.command_error = ui.label().classes("text-negative text-caption").props("role=alert")
        for text in (self.json, self.command):
            text.classes("w-full font-mono").props("outlined autogrow spellcheck=false input-class=text-xs")
        self._filling = False

    def _typed_json(self, text: str) -> None:
        if not self._filling:
            self._take_text(text, read_json_text, self.json_error, "json")

    def _typed_command(self, text: str) -> None:
        if not self._filling:
            self._take_text(text, read_command_line, self.command_error, "command")

    def _take_text(self, text: str, read: Callable[[str], Values], error: ui.label, edited: str) -> None:
        try:
            values = read(text)
        except ValueError as problem:
            error.set_text(self.view.phrase(str(problem)))
            return
        error.set_text("")
        self.values = values
        self.show(edited=edited)

    # All of it

    def show(self, edited: str | None) -> None:
        """Brings everything up to the values but the text that was just edited: a field's key, "json", "command"."""
        checked = check(self.values)
        for key, field in self.fields.items():
            field.show(self.values, checked.wrong.get(key), edited=key == edited)
        self._filling = True
        if edited != "json":
            self.json.set_value(json_text(self.values))
            self.json_error.set_text("")
        if edited != "command":
            self.command.set_value(command_line(self.values))
            self.command_error.set_text("")
        self._filling = False
        self._show_problems(checked)
        self._show_preset()
        self._show_weight(checked)

    def _show_problems(self, checked: Checked) -> None:
        self.problems.clear()
        with self.problems:
            if checked.is_usable:
                ui.label(self.words("These settings can be used")).classes("text-positive")
            for line in checked.others:
                ui.label(self.view.phrase(line)).classes("text-negative")
            for key in checked.wrong:
                # The line itself stands beside its field.
                ui.label(f"{key}: {self.words('see the form')}").classes("text-negative text-caption")
            for line in checked.notes:
                ui.label(self.view.phrase(line)).classes("text-warning")

    def _show_preset(self) -> None:
        preset = PRESETS.get(str(self.values.get("preset")), {})
        changes = [f"{key} = {FIELDS[key].written(value)}" for key, value in preset.items() if key not in self.values]
        text = self.words("The preset sets: {what}").format(what=", ".join(changes)) if changes else ""
        self.preset_changes.set_text(text)

    def _show_weight(self, checked: Checked) -> None:
        self.weight.update_figure(weight_figure(checked.weights, Options(dark=self.view.dark, words=self.words)))


def _build(view: View) -> None:
    _NewRun(view, view.query.get("file"))


PAGE = Page("/new", "New run", "add_circle", _build)

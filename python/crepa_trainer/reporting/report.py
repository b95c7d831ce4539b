"""`crepa-train report`: curves, samples and settings of runs as one HTML file that needs no server and no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crepa_kernels.regularizer.saving import replacing

from ..terminal import several
from .panels import Curves, Options, matrix_figure, panels
from .runs import Look, RunFolder, Sample, differing
from .words import LANGUAGES, translator

REPORT = "report.html"
# Bytes of clips that one report holds at most; of the others their strips of frames are shown, at most as many again.
MOST_VIDEO = 24 * 2**20
MOST_LOOKS = 12  # matrices of a run, evenly spread

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(folders: Sequence[Path], output: Path, language: str = "en") -> str:
    """Writes the report of one or several runs; returns a line that says where and what is left out.

    ValueError for a folder in which no run was, or a language that there is not.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language {language}: must be one of {', '.join(LANGUAGES)}")
    runs = [RunFolder(folder) for folder in folders]
    for run in runs:
        if not run.exists:
            raise ValueError(f"{run.path} is no run's output folder")
    html, left_out = render(runs, language)
    with replacing(output) as file:
        file.write_text(html, encoding="utf-8")
    return f"report in {output}" + (f"; {several(left_out, 'clip')} too many for one file" if left_out else "")


def render(runs: Sequence[RunFolder], language: str) -> tuple[str, int]:
    """The HTML, and how many clips have no place in it."""
    import jinja2
    from plotly.offline import get_plotlyjs

    words = translator(language)
    names = _names(runs)
    window = max(len(run.metrics().columns.get("flow_loss", ((), ()))[0]) for run in runs) // 30
    options = Options(window=window, words=words)
    curves = [Curves(name, run.metrics(), run.settings()) for name, run in zip(names, runs, strict=True)]
    figures = panels(curves, options)
    samples, left_out = _samples(runs, names)
    shown = [(name, look) for name, run in zip(names, runs, strict=True) for look in _spread(run.looks())]
    settings = [run.settings() for run in runs]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    html = template.render(
        language=language,
        names=names,
        words=words,
        runs=[_about(name, run) for name, run in zip(names, runs, strict=True)],
        figures=figures,
        samples=samples,
        looks=[{"run": name, "patches": _data(look.patches, "image/png")} for name, look in shown],
        differing=[(key, [_shown(value) for value in values]) for key, values in differing(settings)],
        plotly=get_plotlyjs(),
        figure_data=_script([figure for _, figure in figures]),
        look_data=_script([matrix_figure(look, options) for _, look in shown]),
    )
    return html, left_out


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """Each run's folder, with those above it where two have one name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _about(name: str, run: RunFolder) -> dict[str, Any]:
    state, about = run.state(), run.about()
    model = about.get("model")
    return {
        "name": name,
        "phase": state.phase or "unknown",
        "step": state.step,
        "total": state.total,
        "error": state.error,
        # A folder's name: where it lies is nobody's business.
        "model": Path(model).name if isinstance(model, str) else "",
        "settings": json.dumps(run.settings(), indent=2, ensure_ascii=False),
    }


def _samples(
    runs: Sequence[RunFolder], names: Sequence[str]
) -> tuple[list[tuple[str, list[tuple[int, list[dict[str, Any]]]]]], int]:
    """By prompt and step, the clips of all runs side by side; the newest as videos, as far as there is room."""
    found = [(name, sample) for name, run in zip(names, runs, strict=True) for sample in run.samples()]
    room, left_out = {"video": MOST_VIDEO, "strip": MOST_VIDEO}, 0
    by_place: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name, sample in sorted(found, key=lambda each: (-each[1].step, names.index(each[0]))):
        clip: dict[str, Any] = {"run": name, "seed": sample.seed, "video": None, "strip": None}
        for kind, mime in (("video", "video/mp4"), ("strip", "image/png")):
            size = _size(sample, kind)
            if size <= room[kind]:
                room[kind] -= size
                clip[kind] = _data(getattr(sample, kind), mime)
                break
        else:
            left_out += 1
        by_place.setdefault((sample.prompt, sample.step), []).append(clip)
    prompts = dict.fromkeys(sample.prompt for _, sample in found)
    grouped = [(p, [(step, clips) for (prompt, step), clips in by_place.items() if prompt == p]) for p in prompts]
    return grouped, left_out


def _size(sample: Sample, kind: str) -> int:
    path: Path = getattr(sample, kind)
    try:
        return path.stat().st_size
    except OSError:
        return MOST_VIDEO + 1


def _spread(looks: list[Look]) -> list[Look]:
    if len(looks) <= MOST_LOOKS:
        return looks
    return [looks[round(i * (len(looks) - 1) / (MOST_LOOKS - 1))] for i in range(MOST_LOOKS)]


def _data(path: Path | None, mime: str) -> str | None:
    try:
        return None if path is None else f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError:
        return None


def _shown(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _script(content: Any) -> str:
    """JSON within a script element: nothing in it ends the element."""
    text = json.dumps(content)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text

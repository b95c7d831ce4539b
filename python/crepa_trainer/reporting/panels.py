"""The curves of runs as figures: plain dicts for Plotly, which the web page and reports draw alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crepa_kernels.config import ConfigError, CrepaConfig

from .runs import Look, Metrics

Words = Callable[[str], str]
Figure = dict[str, Any]

POINTS = 1000  # of a curve at most, the least and the greatest of each stretch
COLORS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#e377c2", "#8c564b", "#17becf", "#bcbd22")
_DASHES = ("solid", "dash", "dot")
_GIB = 2.0**30
# A drag zooms anyway, and a keyboard should not have to pass by more buttons than it can use.
_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["zoom2d", "pan2d", "autoScale2d", "select2d", "lasso2d"],
}


@dataclass(frozen=True)
class Curves:
    """One run's curves. settings: as given; the threshold is read from them."""

    name: str
    metrics: Metrics
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """How curves are drawn. by_time: over hours since the first step instead of steps.

    window: steps over which a running mean is taken, with the values themselves thin behind it; 1 for none.
    """

    by_time: bool = False
    window: int = 1
    dark: bool = False
    words: Words = str


@dataclass(frozen=True)
class _Panel:
    title: str
    columns: Mapping[str, str]  # by name in metrics.jsonl, what the legend says
    unit: str = ""
    scale: float = 1.0
    is_smoothed: bool = True
    log: bool = False


PANELS = (
    _Panel("Diffusion loss", {"flow_loss": "flow matching"}),
    _Panel("CREPA loss", {"crepa_loss": "CREPA", "crepa_relational_loss": "relational", "layersync_loss": "LayerSync"}),
    _Panel(
        "Similarity",
        {
            "crepa_similarity": "crepa_similarity",
            "crepa_constant": "best constant",
            "layersync_similarity": "LayerSync",
        },
    ),
    _Panel("Weight", {"crepa_weight": "crepa_weight"}, is_smoothed=False),
    _Panel("Learning rate", {"learning_rate": "learning rate"}, is_smoothed=False),
    _Panel("Gradient norms", {"grad_norm_model": "model", "grad_norm_projector": "projector"}, log=True),
    _Panel("Seconds a step", {"seconds": "seconds"}, unit="s"),
    _Panel("Memory", {"memory": "memory"}, unit="GiB", scale=1 / _GIB, is_smoothed=False),
)


def panels(runs: Sequence[Curves], options: Options) -> list[tuple[str, Figure]]:
    """(title, figure) of everything that any of the runs logged, all of them over each other."""
    found = [(panel, _figure(panel, runs, options)) for panel in PANELS]
    return [(options.words(panel.title), figure) for panel, figure in found if figure["data"]]


def _figure(panel: _Panel, runs: Sequence[Curves], options: Options) -> Figure:
    data: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        for kind, (column, label) in enumerate(panel.columns.items()):
            x, y = _points(run.metrics, column, options)
            if not len(x):
                continue
            color = COLORS[(number if len(runs) > 1 else kind) % len(COLORS)]
            dash = _DASHES[kind % len(_DASHES)] if len(runs) > 1 else "solid"
            legend = " · ".join([run.name] * (len(runs) > 1) + [options.words(label)] * (len(panel.columns) > 1))
            # Of what is logged now and then the same stretch of steps.
            logged = len(run.metrics.columns.get("loss", ((), ()))[0])
            window = options.window * len(x) // max(1, logged) if panel.is_smoothed else 1
            data += _lines(x, y * panel.scale, legend or options.words(label), color, dash, window)
        if panel.title == "Similarity" and (threshold := similarity_threshold(run.settings)) is not None and data:
            ends = [data[-1]["x"][0], data[-1]["x"][-1]]
            name = " · ".join([run.name] * (len(runs) > 1) + [options.words("threshold")])
            line = {"color": COLORS[number % len(COLORS)] if len(runs) > 1 else "#777777", "dash": "dash", "width": 1.5}
            data.append({"x": ends, "y": [threshold] * 2, "name": name, "mode": "lines", "line": line})
    axis = {"type": "log"} if panel.log else {"rangemode": "tozero"} if not panel.is_smoothed else {}
    layout = _layout(options)
    layout["yaxis"] |= {**axis, "title": {"text": panel.unit}}
    layout["showlegend"] = sum(line.get("showlegend", True) for line in data) > 1
    return {"data": data, "layout": layout, "config": _CONFIG}


def _points(metrics: Metrics, column: str, options: Options) -> tuple[np.ndarray, np.ndarray]:
    steps, values = (np.asarray(each) for each in metrics.columns.get(column, ((), ())))
    if not options.by_time or not len(steps):
        return steps, values
    at, times = (np.asarray(each) for each in metrics.columns.get("time", ((), ())))
    if not len(times):
        return steps[:0], values[:0]
    return np.interp(steps, at, (times - times[0]) / 3600), values


def _lines(x: np.ndarray, y: np.ndarray, name: str, color: str, dash: str, window: int) -> list[dict[str, Any]]:
    both = {"mode": "lines", "connectgaps": False}
    raw = thinned(x, y)
    line = {"color": color, "dash": dash, "width": 1.8}
    if window < 2 or len(y) < 3:
        single = {"mode": "markers+lines"} if len(raw[0]) < 30 else {}
        return [{**both, **single, "x": raw[0], "y": raw[1], "name": name, "line": line}]
    thin = {"color": color, "width": 0.6}
    smooth = thinned(x, running_mean(y, window))
    return [
        {**both, "x": raw[0], "y": raw[1], "line": thin, "opacity": 0.4, "showlegend": False, "hoverinfo": "skip"},
        {**both, "x": smooth[0], "y": smooth[1], "name": name, "line": line},
    ]


def thinned(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[list[float], list[float | None]]:
    """At most `points` of a curve: the least and the greatest of each stretch, so that no peak is lost.

    What is not finite becomes None, a gap.
    """
    if len(x) > points:
        stretches = points // 3
        size = -(-len(x) // stretches)
        filled = np.full(stretches * size, np.nan)
        filled[: len(y)] = y
        table = filled.reshape(stretches, size)
        finite, starts = np.isfinite(table), np.arange(stretches) * size
        least, most = (starts + np.where(finite, sign * table, np.inf).argmin(1) for sign in (1, -1))
        gaps = (starts + finite.argmin(1))[~finite.all(1)]
        some = finite.any(1)
        kept = np.concatenate([[0, len(x) - 1], least[some], most[some], gaps])
        order = np.unique(kept[kept < len(x)])  # the last stretch is filled up
        x, y = x[order], y[order]
    return x.tolist(), [value if math.isfinite(value) else None for value in y.tolist()]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over `window` values around each, fewer at the ends; values that are not finite do not count."""
    half = max(1, window // 2)
    finite = np.isfinite(values)
    # Sums of differences: those of the values would make steps of what does not change.
    middle = float(values[finite].mean()) if finite.any() else 0.0
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values - middle, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    low = np.clip(np.arange(len(values)) - half, 0, None)
    high = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(middle + (sums[high] - sums[low]) / (counts[high] - counts[low]))


def similarity_threshold(settings: Mapping[str, Any]) -> float | None:
    """The threshold on `crepa_similarity`'s scale; None without one, or where the settings cannot be read."""
    try:
        config = CrepaConfig.from_dict({**settings, "crepa_block_index": settings.get("crepa_block_index", 0)})
    except ConfigError:
        return None
    elsewhere = config.threshold_on_other_scale()
    if elsewhere is None:
        return None
    return elsewhere[1] if elsewhere[0] == "similarity" else config.crepa_similarity_threshold


def matrix_figure(look: Look, options: Options) -> Figure:
    """s[f, k], student frame f against teacher frame k, with its diagonal marked."""
    words, frames = options.words, min(len(look.matrix), len(look.matrix[0]))
    values = [[value if math.isfinite(value) else None for value in row] for row in look.matrix]
    heat = {"type": "heatmap", "z": values, "colorscale": "Viridis", "colorbar": {"thickness": 10}}
    corners = [-0.5, frames - 0.5]
    # White under black is seen on every color.
    lines = {"color": "white", "width": 2}, {"color": "black", "width": 1, "dash": "dot"}
    at = {"x": corners, "y": corners, "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    layout = _layout(options)
    layout["xaxis"] |= {"title": {"text": words("teacher frame")}, "constrain": "domain", "dtick": 1}
    layout["yaxis"] |= {
        "title": {"text": words("student frame")},
        "scaleanchor": "x",
        "autorange": "reversed",
        "dtick": 1,
    }
    layout["title"] = {"text": f"{words('step')} {look.step} · {look.clip}", "font": {"size": 12}}
    layout["margin"]["t"] = 36
    return {
        "data": [heat, *({**at, "line": line} for line in lines)],
        "layout": layout,
        "config": _CONFIG,
    }


def weight_figure(weights: Sequence[tuple[int, float]], options: Options) -> Figure:
    """CREPA's weight over the steps of a run that is to come."""
    steps, values = zip(*weights, strict=True) if weights else ((), ())
    line = {"x": list(steps), "y": list(values), "mode": "lines", "line": {"color": COLORS[0]}}
    layout = _layout(options)
    layout["yaxis"] |= {"rangemode": "tozero", "fixedrange": True, "title": {"text": options.words("Weight")}}
    layout["xaxis"] |= {"fixedrange": True}
    return {"data": [line], "layout": layout, "config": {"displayModeBar": False, "responsive": True}}


def _layout(options: Options) -> dict[str, Any]:
    ink, grid = ("#dddddd", "#444444") if options.dark else ("#333333", "#e5e5e5")
    axis = {"color": ink, "gridcolor": grid, "zerolinecolor": grid}
    return {
        "margin": {"l": 56, "r": 12, "t": 8, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": ink},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "x unified",
        "xaxis": {**axis, "title": {"text": options.words("hours" if options.by_time else "step")}},
        "yaxis": dict(axis),
    }

"""Writes the measured tables of benches/results/ into docs/measured.md.

    make results
    python -m benches.table [--from build/gpu]

``--from`` first takes over what ``benches.gpu.hour`` measured there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benches.gpu.predicted import PREDICTED
from benches.gpu.results import MEASURED, write_whole

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/measured.md"
END = "<!-- end -->"
MEDIANS = "medians of interleaved rounds."
TAKEN_OVER = ("gpu-*.json", "choices-*.json", "resample-gpu.json", "gpu-*.png")


def loss_table(results: dict[str, Any]) -> str:
    """A Markdown table, one row a shape, from the JSON that ``make bench`` stores."""
    machine, commit = results["machine_info"], results["commit_info"]
    shapes: dict[str, dict[str, dict[str, Any]]] = {}
    for bench in results["benchmarks"]:
        info = bench["extra_info"]
        shapes.setdefault(bench["group"], {})[info["call"]] = info
    head = (
        "| shape | frames | transposed eager | reference | torch.compile | `torch` | faster "
        "| kept, of eager's | peak, of eager's |"
    )
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for shape, calls in shapes.items():
        eager, ours = calls["transposed"], calls["torch"]
        milliseconds = [f"{calls[name]['interleaved_median_s'] * 1e3:.0f} ms" for name in calls]
        lines.append(
            f"| {shape} | {ours['frames']} | {' | '.join(milliseconds)} | {ours['times_faster_than_transposed']:.2f}x "
            f"| {ours['kept_bytes'] / eager['kept_bytes']:.0%} | {ours['peak_bytes'] / eager['peak_bytes']:.0%} |"
        )
    cpu = machine["cpu"]
    source = (
        f"Forward + backward, medians of interleaved rounds. {cpu['brand_raw']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, Python {machine['python_version']}, commit {commit['id'][:10]}, "
        f"{results['datetime'][:10]}."
    )
    return "\n".join([*lines, "", source])


def gpu_tables(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table a device, from the JSON of ``benches.gpu``; what was predicted where nothing is measured.

    Raises:
        ValueError: for the results of a dry run.
    """
    if any(each["dry"] for each in results):
        raise ValueError("a dry run measured nothing to put in a table")
    return "\n\n".join(_gpu_table(each) for each in results) if results else _predictions()


def peers_table(results: dict[str, Any]) -> str:
    """A Markdown table, one row a peer, from the JSON of ``benches.peers``."""
    calls = results["calls"]
    eager = calls["eager"]
    lines = [
        "| | time | of eager's | peak | kept | the host waits | compared tokens are apart, of height and width |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in calls.items():
        down, across = row["position_error"]
        lines.append(
            f"| {name} | {row['median_ms']:.0f} ms | {row['median_ms'] / eager['median_ms']:.0%} | "
            f"{row['peak_bytes'] / 2**20:.0f} MiB | {row['kept_bytes'] / 2**20:.0f} MiB | {row['host_waits']} | "
            f"{down:.4f}, {across:.4f} |"
        )
    what = f"{results['shape']}, {results['frames']} frames; the last column: 30x52 against 37x37. "
    theirs = f"SimpleTuner {results['simpletuner']}, " if "simpletuner" in results else ""
    return "\n".join([*lines, "", f"Forward + backward, {MEDIANS} {what}{theirs}{_where(results)}"])


def step_table(results: dict[str, Any]) -> str:
    """A Markdown table, one row a family, from the JSON of ``benches.step``."""
    lines = [
        "| family | D | tokens | step without | + cached | + eager | + live | peak: without | cached | eager | live |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["families"]:
        times, peaks = row["median_ms"], row["peak_bytes"]
        added = [f"{times[call] - times['without']:+.0f} ms" for call in ("cached", "eager", "live")]
        cells = [f"{times['without']:.0f} ms", *added]
        cells += [f"{peaks[call] / 2**20:.0f} MiB" for call in ("without", "cached", "eager", "live")]
        tokens = " x ".join(map(str, row["tokens"]))
        lines.append(f"| {row['family']} | {row['hidden_size']} | {tokens} | {' | '.join(cells)} |")
    size = (
        f"{results['layers']} blocks, {results['heads']:.0%} of the heads, {results['frames']} frames of "
        f"{results['height']} x {results['width']}; DINOv2 {results['encoder']} at {results['image_size']} pixels. "
    )
    return "\n".join([*lines, "", f"A training step, {MEDIANS} {size}{_where(results)}"])


def resample_table(results: dict[str, Any]) -> str:
    """A Markdown table, one row a case, from the JSON of ``benches.bench_resample``."""
    lines = [
        "| | frames | grids, C | filter | type | time | of the view's | of copies' | of the copy rate |",
        "|---|--:|---|---|---|--:|--:|--:|--:|",
    ]
    for row in results["cases"]:
        times, grids = row["median_ms"], " -> ".join("x".join(map(str, row[side])) for side in ("source", "target"))
        shares = [f"{times['ours both'] / times[f'{peer} both']:.0%}" for peer in ("view", "transposed")]
        lines.append(
            f"| `{row['operator']}` | {row['frames']} | {grids}, {row['channels']} | "
            f"{'antialias' if row['antialias'] else 'plain'} | {row['dtype']} | {times['ours both']:.0f} ms | "
            f"{' | '.join(shares)} | {row['share_of_floor_both']:.0%} |"
        )
    return "\n".join([*lines, "", f"Forward + backward, {MEDIANS} {_where(results)}"])


def relational_table(results: dict[str, Any]) -> str:
    """A Markdown table, one row a case, from the JSON of ``benches.bench_relational``."""
    lines = [
        "| frames | tokens | D | E | margin | N x N | `all` | faster | memory, of N x N's |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["cases"]:
        times, margin = row["median_ms"], "squared" if row["margin"] is None else row["margin"]
        lines.append(
            f"| {row['frames']} | {'x'.join(map(str, row['grid']))} | {row['hidden_size']} | {row['feature_size']} | "
            f"{margin} | {times['eager']:.0f} ms | {times['all']:.0f} ms | {row['times_faster_than_eager']:.1f}x | "
            f"{row['peak_of_eagers']:.0%} |"
        )
    return "\n".join([*lines, "", f"Forward + backward, {MEDIANS} {_where(results)}"])


def growing_table(results: dict[str, Any]) -> str:
    """A Markdown table, one row a loss and shape, from the JSON of ``benches.bench_growing``."""
    lines = ["| shape | loss | time | tokens first | faster | kept, of tokens first |", "|---|---|--:|--:|--:|--:|"]
    for row in results["cases"]:
        times, kept = row["median_ms"], row["kept_bytes"]
        for name, faster in row["times_faster"].items():
            other = f"{name}, tokens first"
            lines.append(
                f"| {row['shape']} | {name} | {times[name]:.0f} ms | {times[other]:.0f} ms | {faster:.2f}x | "
                f"{kept[name] / kept[other]:.0%} |"
            )
    return "\n".join([*lines, "", f"Forward + backward, {MEDIANS} {_where(results)}"])


def _where(results: dict[str, Any]) -> str:
    """Of ``benches.measure.machine``, less what an older file lacks; a machine that had other work is said to."""
    busy = f", other work ran (load {results['load']})" if results.get("load", 0) >= 1 else ""
    known = [f"{name} {results[key]}" for key, name in (("python", "Python"), ("commit", "commit")) if key in results]
    torch = f"{results['threads']} threads, torch {results['torch']}"
    return f"{results['device']}{busy}, {', '.join([torch, *known])}."


def _gpu_table(results: dict[str, Any]) -> str:
    lines = [
        "| shape | `triton` | of the honest floor | predicted | with the (E, D) passes | of the physical floor "
        "| torch.compile bf16 | eager fp32 | extra peak, of eager's |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        calls = row["calls"]
        cells = [_milliseconds(calls.get("triton", {}))]
        cells += [_share(row.get("fraction_of_honest_floor")), row.get("predicted", "")]
        cells += [_share(row.get(f"fraction_of_{name}")) for name in ("honest_floor_with_weights", "physical_floor")]
        for peer in ("compiled bf16", "eager fp32"):
            faster = row.get("times_faster", {}).get(peer)
            cells.append(_milliseconds(calls.get(peer, {})) + ("" if faster is None else f", {faster:.2f}x ours"))
        ours, eager = (calls.get(name, {}).get("extra_bytes") for name in ("triton", "eager fp32"))
        cells.append(_share(ours / eager if ours is not None and eager else None))
        lines.append(f"| {row['shape']} | {' | '.join(cells)} |")
    machine = results["machine"]
    source = (
        f"Forward + backward in a CUDA graph on cold caches, medians. {machine['device']}, copy "
        f"{results['copy_rate'] / 1e12:.2f} TB/s, products {results['matrix_rate'] / 1e12:.0f} TFLOP/s, "
        f"{machine['runtime']}, torch {machine['torch']}, Triton {machine['triton']}, Python {machine['python']}, "
        f"commit {machine['commit']}."
    )
    return "\n".join([*lines, "", source])


def _milliseconds(call: dict[str, Any]) -> str:
    """A call's time, or in a word why there is none."""
    if "median_ms" in call:
        return f"{call['median_ms']:.3f} ms" + ("" if call["in_graph"] else " (no graph)")
    return "out of memory" if "out of memory" in call.get("failed", "") else "failed" if "failed" in call else "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _predictions() -> str:
    cards, shapes = list(PREDICTED), list(dict.fromkeys(shape for card in PREDICTED.values() for shape in card))
    lines = [f"| predicted, of the honest floor | {' | '.join(cards)} |", f"|---|{'--:|' * len(cards)}"]
    lines += [f"| {shape} | {' | '.join(str(PREDICTED[card].get(shape, '')) for card in cards)} |" for shape in shapes]
    return "\n".join(["Nothing measured yet on a GPU.", "", *lines])


def take_over(folder: Path) -> list[Path]:
    """Copies a GPU's measurements to benches/results; ValueError for those of a dry run, and if there are none."""
    found = [path for pattern in TAKEN_OVER for path in sorted(folder.glob(pattern))]
    if not found:
        raise ValueError(f"{folder} holds no measurements ({', '.join(TAKEN_OVER)})")
    for path in found:
        if path.suffix == ".json" and json.loads(path.read_text()).get("dry"):
            raise ValueError(f"{path} is of a dry run: nothing was measured")
    MEASURED.mkdir(exist_ok=True)
    for path in found:
        (MEASURED / path.name).write_bytes(path.read_bytes())
    return found


def replaced(text: str, name: str, table: str, kind: str = "measured") -> str:
    """``text`` with ``table`` between the marks of ``name``; ValueError unless they are there once."""
    start = f"<!-- {kind}: {name} -->"
    pattern = f"{re.escape(start)}.*?{re.escape(END)}"
    made, count = re.subn(pattern, lambda _: f"{start}\n{table}\n{END}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page must hold {start} ... {END} once, found {count}")
    return made


def rendered(page: str) -> str:
    """``page`` with every table as the stored results have it; what was not measured says how it would be."""

    def stored(kind: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(MEASURED.glob(f"{kind}-*.json"))]

    def several(kind: str, table: Callable[[dict[str, Any]], str], command: str) -> str:
        return "\n\n".join(map(table, stored(kind))) or f"Not measured yet: `python -m benches.{command}`."

    tables = {
        "loss-cpu": loss_table(json.loads((MEASURED / "loss-cpu.json").read_text())),
        "loss-gpu": gpu_tables(stored("gpu")),
        "peers": several("peers", peers_table, "peers"),
        "step": several("step", step_table, "step"),
        "resample": several("resample", resample_table, "bench_resample"),
        "relational": several("relational", relational_table, "bench_relational"),
        "growing": several("growing", growing_table, "bench_growing"),
    }
    for name, table in tables.items():
        page = replaced(page, name, table)
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.table", description=__doc__)
    parser.add_argument("--from", dest="folder", type=Path, help="folder of an hour on a GPU")
    parsed = parser.parse_args(arguments)
    if parsed.folder is not None:
        try:
            take_over(parsed.folder)
        except ValueError as error:
            parser.error(str(error))
    write_whole(PAGE, rendered(PAGE.read_text()))


if __name__ == "__main__":
    main()

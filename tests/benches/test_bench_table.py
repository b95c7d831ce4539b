"""The GPU's gate, tables and result files, without a GPU: dry, or through the interpreter."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benches import table as measured_table
from benches.eager import eager_neighbours, eager_transposed
from benches.gpu import choices, results
from benches.gpu.__main__ import AGAIN, CALLS, ENDED, TASKS, StartAgain, Table, entries, main, report
from benches.gpu.gate import CASES, GateError, check
from benches.gpu.measure import Dry, Gpu, commit, machine
from benches.gpu.plot import plot
from benches.shapes import ON_A_GPU, RESAMPLED, Shape
from crepa_kernels import CrepaProjector, crepa_loss
from crepa_kernels.backends.triton import projector, tiles
from crepa_kernels.backends.triton.clock import CaptureError, Clock, Step, Times
from crepa_kernels.shapes import ShapeClass
from crepa_kernels.tune import candidates, compare, steps_of, tune

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [Dry().shape(shape) for shape in (ON_A_GPU[0], replace(RESAMPLED[0], dtype="bfloat16"))]


class Interpreted(Dry):
    """Really runs, on a CPU."""

    dry = False
    launching = Gpu.launching


class Counting(Dry):
    """Dry, with times: a second, then two, and so on, of what was asked to be timed; ``fails`` gives errors instead."""

    def __init__(self, **fails: list[Exception]):
        self.fails, self.calls = fails, 0

    def compiled(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return function  # tracing it takes longer than all else, and the dry run does

    def _fail(self, name: str) -> None:
        if self.fails.get(name):
            raise self.fails[name].pop(0)

    def extra_memory(self, step: Step) -> int:
        self._fail("extra_memory")
        return super().extra_memory(step)

    def graphed(self, step: Step) -> Step:
        self._fail("graphed")
        return super().graphed(step)

    def interleaved(self, steps: Any, repeats: int = 25, warmup: int = 5) -> dict[str, Times]:
        times = {}
        for name in super().interleaved(steps):
            self.calls += 1
            times[name] = Times(float(self.calls), self.calls - 0.5, self.calls + 0.5)
        return times

    def copy_rate(self) -> float:
        return 3e12

    def matrix_rate(self) -> float:
        return 7e14

    def kernel_times(self, step: Step, repeats: int = 5) -> dict[str, float]:
        return dict.fromkeys(super().kernel_times(step), 1.0)


def new_table(path: Path, gpu: Gpu, seconds: float = 600) -> Table:
    """Goes on where the file stands."""
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine(gpu), "dry": True, "rows": []}
    return Table(gpu, found, path, time.monotonic() + seconds)


def stored(path: Path) -> dict[str, dict[str, Any]]:
    return {row["shape"]: row for row in json.loads(path.read_text())["rows"]}


def test_the_table_is_made_of_every_call_and_of_both_floors(tmp_path: Path) -> None:
    path = tmp_path / "dry-gpu.json"
    new_table(path, Counting()).run(SHAPES)
    rows = stored(path)
    assert list(rows) == [shape.id for shape in SHAPES]
    for row in rows.values():
        assert set(row["calls"]) == set(CALLS)
        assert all(entry["done"] for entry in entries({"rows": [row]}))
        floor, ours = row["floor"], row["calls"]["triton"]["median_ms"]
        assert row["fraction_of_honest_floor"] == pytest.approx(floor["honest_ms"] / ours)
        with_weights = floor["honest_ms"] + floor["weights_ms"]
        assert row["fraction_of_honest_floor_with_weights"] == pytest.approx(with_weights / ours)
        assert "bfloat16" in row["shape"]
        assert row["kernels"]["bottlenecks"]
        assert "% of the honest floor" in report(row)
    # W read and W' written, dW' and W read and dW written: 18 bytes a weight.
    assert rows[SHAPES[0].id]["floor"]["weights_ms"] == pytest.approx(18 * 64 * 32 / 3e12 * 1e3)


def test_the_file_is_there_after_every_call_and_goes_on_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "dry-gpu.json"
    gpu = Counting(extra_memory=[ValueError("illegal memory access\nmore")])
    with pytest.raises(StartAgain, match="illegal memory access"):
        new_table(path, gpu).run(SHAPES[:1])
    (row,) = stored(path).values()
    assert row["calls"]["triton"] == {"failed": "ValueError: illegal memory access"}
    assert row["floor"]["done"]
    floor = row["floor"]
    new_table(path, Counting()).run(SHAPES[:1])
    (row,) = stored(path).values()
    assert row["floor"] == floor  # not measured again
    assert row["calls"]["triton"] == {"failed": "ValueError: illegal memory access"}
    assert all(row["calls"][name]["done"] for name in CALLS if name != "triton")
    assert "illegal memory access" in report(row)


def test_a_killed_process_leaves_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "dry-gpu.json"
    with pytest.raises(KeyboardInterrupt):
        new_table(path, Counting(extra_memory=[KeyboardInterrupt()])).run(SHAPES[:1])
    assert stored(path)[SHAPES[0].id]["calls"]["triton"] == {"failed": ENDED}


def test_out_of_memory_is_a_rows_reason_and_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "dry-gpu.json"
    new_table(path, Counting(extra_memory=[torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB")])).run(SHAPES)
    first, second = stored(path).values()
    assert first["calls"]["triton"]["failed"].startswith("out of memory: OutOfMemoryError: CUDA out of memory")
    assert "not_captured" not in first["calls"]["triton"]
    assert "fraction_of_honest_floor" not in first
    assert first["calls"]["eager fp32"]["done"]
    assert second["calls"]["triton"]["done"]


def test_what_cannot_be_captured_is_timed_without_a_graph_by_a_new_process(tmp_path: Path) -> None:
    path = tmp_path / "dry-gpu.json"
    # The floor's four products are captured first.
    gpu = Counting()
    gpu.graphed = lambda step, made=[]: (
        made.append(0)
        or (  # type: ignore[method-assign]
            (_ for _ in ()).throw(CaptureError("a sync")) if len(made) == 5 else Counting.graphed(gpu, step)
        )
    )
    with pytest.raises(StartAgain, match="not captured"):
        new_table(path, gpu).run(SHAPES[:1])
    assert stored(path)[SHAPES[0].id]["calls"]["triton"]["not_captured"] == "a sync"
    new_table(path, Counting()).run(SHAPES[:1])
    call = stored(path)[SHAPES[0].id]["calls"]["triton"]
    assert call["done"]
    assert (call["in_graph"], call["not_captured"]) == (False, "a sync")
    assert stored(path)[SHAPES[0].id]["calls"]["eager fp32"]["in_graph"]


def test_a_time_limit_holds_inside_a_shape_and_leaves_out_the_peers(tmp_path: Path) -> None:
    path = tmp_path / "dry-gpu.json"

    class Slow(Counting):
        def kernel_times(self, step: Step, repeats: int = 5) -> dict[str, float]:
            made.deadline = time.monotonic()  # the time is up while the profiler runs
            return super().kernel_times(step)

    made = new_table(path, Slow())
    made.run(SHAPES)
    rows = stored(path)
    assert set(rows[SHAPES[0].id]["calls"]) == {"triton"}
    assert rows[SHAPES[0].id]["fraction_of_honest_floor"] > 0
    assert TASKS[-2:] == ("compiled bf16", "eager fp32")
    assert list(rows) == [SHAPES[0].id]
    assert made.open(SHAPES[0]) == [task for task in TASKS if task not in ("floor", "triton", "kernels")]


def test_a_dry_run_of_the_gate_the_table_and_the_choices(tmp_path: Path) -> None:
    """As the command line does it; every number of it that would be a measurement is NaN."""
    assert main(["--dry", "--out", str(tmp_path), "--shapes", "wan-14b-480p"]) == 0
    found = json.loads((tmp_path / "dry-gpu.json").read_text())
    assert found["dry"]
    assert len(found["rows"]) == 2
    for row in found["rows"]:
        assert all(call["median_ms"] != call["median_ms"] for call in row["calls"].values())
        assert row["floor"]["honest_ms"] != row["floor"]["honest_ms"]
    assert choices.main(["--dry", "--out", str(tmp_path), "--shapes", "ltx-2b", "--fields", "dx", "training"]) == 0
    rows = json.loads((tmp_path / "dry-choices.json").read_text())["rows"]
    assert {row["changed"] for row in rows} == {"dx", "training"}
    assert {"in use", "dx.n=128", "training=one_pass"} <= {row["alternative"] for row in rows}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dry-choices.json", "dry-gate.json", "dry-gpu.json"]


def test_a_dry_run_is_never_taken_for_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MEASURED", tmp_path / "results")
    monkeypatch.setattr(measured_table, "MEASURED", tmp_path / "results")
    (tmp_path / "results").mkdir()
    for command in (main, choices.main):
        with pytest.raises(SystemExit) as refused:
            command(["--dry", "--out", str(tmp_path / "results")])
        assert refused.value.code == 2
    dry = {"dry": True, "machine": {}, "rows": [], "copy_rate": 1.0, "matrix_rate": 1.0}
    for path in (tmp_path / "results" / "dry-gpu.json", tmp_path / "gpu-nvidia-h100.json"):
        with pytest.raises(ValueError, match="dry run"):
            results.write(path, dry)
    (tmp_path / "gpu-nvidia-h100.json").write_text(json.dumps(dry))
    with pytest.raises(ValueError, match="dry run"):
        measured_table.take_over(tmp_path)
    with pytest.raises(ValueError, match="dry run"):
        measured_table.gpu_tables([dry])
    with pytest.raises(ValueError, match="dry run"):
        plot(dry, tmp_path / "roof.png")
    with pytest.raises(ValueError, match="Out of range"):
        results.write(tmp_path / "gpu-nvidia-h100.json", {"dry": False, "time": float("nan")})
    assert list((tmp_path / "results").iterdir()) == []


def test_the_page_has_measurements_beside_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows as the table stores them, one without a time."""
    path = tmp_path / "dry-gpu.json"
    new_table(path, Counting(extra_memory=[torch.OutOfMemoryError("no")])).run(SHAPES[::-1])
    made = json.loads(path.read_text()) | {"dry": False}
    made["machine"]["device"] = "NVIDIA H200"
    made["rows"][1]["predicted"] = "84-88 %"
    text = measured_table.gpu_tables([made])
    failed, whole = (next(line for line in text.splitlines() if row["shape"] in line) for row in made["rows"])
    assert "| out of memory | - |" in failed
    row = made["rows"][1]
    assert (
        f"| {row['calls']['triton']['median_ms']:.3f} ms | {row['fraction_of_honest_floor']:.0%} | 84-88 % |" in whole
    )
    assert f", {row['times_faster']['compiled bf16']:.2f}x ours" in whole
    assert "NVIDIA H200, copy 3.00 TB/s, products 700 TFLOP/s" in text
    plot(made, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000
    nothing = measured_table.gpu_tables([])
    assert nothing.startswith("Nothing measured yet")
    assert "| wan-14b-480p | 83-87 % | 84-88 %, plan 2.466 ms |" in nothing
    before = "a <!-- measured: loss-gpu -->\nold\n<!-- end --> b"
    assert measured_table.replaced(before, "loss-gpu", "new") == before.replace("old", "new")
    with pytest.raises(ValueError, match="once, found 0"):
        measured_table.replaced("no marks", "loss-gpu", "new")


def test_the_page_is_what_the_table_makes() -> None:
    """ "Nothing measured yet" stands there exactly as long as no file does."""
    found = [json.loads(path.read_text()) for path in sorted(results.MEASURED.glob("gpu-*.json"))]
    assert measured_table.gpu_tables(found) in measured_table.PAGE.read_text()


def test_measured_files_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_table, "MEASURED", tmp_path / "results")
    with pytest.raises(ValueError, match="holds no measurements"):
        measured_table.take_over(tmp_path)
    (tmp_path / "gpu-nvidia-h100.json").write_text('{"dry": false}')
    (tmp_path / "hour.log").write_text("")
    measured_table.take_over(tmp_path)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["gpu-nvidia-h100.json"]


def test_results_of_other_sources_or_another_machine_are_not_gone_on_with(tmp_path: Path) -> None:
    head = {"device": "NVIDIA H100", "sources": "abc", "commit": "1"}
    path = results.result_path(tmp_path, "gpu", "nvidia-h100", dry=False)
    assert results.read_back(path, head) is None
    results.write(path, {"dry": False, "machine": head})
    assert results.read_back(path, {**head, "commit": "2"}) is not None
    assert results.read_back(path, {**head, "sources": "abd"}) is None
    assert results.read_back(path, {**head, "device": "NVIDIA H200"}) is None


def test_the_commit_is_asked_of_git_then_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benches.gpu import measure

    monkeypatch.setenv("CREPA_COMMIT", "0123abc")
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert commit() == "0123abc"
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")  # no git to ask
    assert commit() == "0123abc"
    monkeypatch.delenv("CREPA_COMMIT")
    assert commit() == "unknown"


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a GPU checks, on grids for an interpreter."""
    monkeypatch.setitem(CASES, "small", {"student_grid": (2, 3), "teacher_grid": (2, 3)})
    fewer = {"student_grid": (2, 3), "teacher_grid": (1, 2), "spatial_align": "teacher", "frame_mask": True}
    monkeypatch.setitem(CASES, "small-fewer", fewer)
    return ["small", "small-fewer"]


def test_the_gate_is_green_through_the_interpreter(small_cases: list[str]) -> None:
    (line,) = check(Interpreted(), small_cases, [(40, 24)], ["bfloat16"])
    assert line.startswith("bfloat16, D 40, E 24: 2 cases, at most 0.")


def test_the_gate_is_red_for_a_wrong_number(small_cases: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """2 % in what is added to p: more than twice eager's error in the bias's gradient or the loss."""
    fold = projector.fold_projector

    def wrong(*arguments: Any, **options: Any) -> Any:
        folded = fold(*arguments, **options)
        return folded._replace(weight=folded.weight * 1.02, offset=folded.offset * 0.5)

    monkeypatch.setattr("crepa_kernels.backends.triton.pipeline.fold_projector", wrong)
    with pytest.raises(GateError, match=r"small, bfloat16, D 40, E 24: error"):
        list(check(Interpreted(), small_cases, [(40, 24)], ["bfloat16"]))


def test_a_part_of_the_gate_lets_nothing_be_measured(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--dry", "--out", str(tmp_path), "--cases", "equal"])
    assert refused.value.code == 2
    assert main(["--dry", "--out", str(tmp_path), "--gate", "--cases", "equal"]) == 0
    assert not (tmp_path / "dry-gate.json").exists()
    assert set(CASES) >= {"equal", "masked"}


def test_a_failed_call_asks_for_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Dry, step: Step, repeats: int = 5) -> dict[str, float]:
        raise RuntimeError("no profiler")

    monkeypatch.setattr(Dry, "kernel_times", broken)
    command = ["--dry", "--out", str(tmp_path), "--shapes", "ltx-2b"]
    assert main(command) == AGAIN
    assert main([*command, "--again"]) == 1  # the rest is measured, and the failure stays
    (row,) = stored(tmp_path / "dry-gpu.json").values()
    assert row["kernels"] == {"failed": "RuntimeError: no profiler"}
    assert all(call["done"] for call in row["calls"].values())
    monkeypatch.undo()
    assert main(command) == 0  # tried again without --again
    assert stored(tmp_path / "dry-gpu.json")[row["shape"]]["kernels"]["done"]


@pytest.mark.parametrize("grids", [((4, 6), (4, 6)), ((4, 6), (3, 5)), ((4, 6), (7, 9))])
@pytest.mark.parametrize("antialias", [True, False])
def test_the_compiled_baseline_is_the_loss(grids: tuple[Any, Any], antialias: bool) -> None:
    torch.manual_seed(0)
    student, teacher = grids
    projector = CrepaProjector(24, 16)
    h = torch.randn(2, 4, student[0] * student[1], 24).requires_grad_()
    y = torch.randn(2, 4, teacher[0] * teacher[1], 16)
    for distance in (0, 1, 2):
        found = eager_neighbours(h, y, projector, student, teacher, antialias, distance, tau=1.5)
        expected = crepa_loss(
            h, y, projector, student_grid=student, teacher_grid=teacher, spatial_align="teacher", antialias=antialias,
            distance=distance, tau=1.5, backend="reference",
        ).loss  # fmt: skip
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, h)[0] for loss in (found, expected)))
    if student == teacher:
        torch.testing.assert_close(eager_transposed(h, y, projector, student, teacher, 2, 1.5), found)


def test_the_shapes_with_a_target_come_first() -> None:
    names = [(shape.name, shape.student_grid == shape.teacher_grid) for shape in ON_A_GPU]
    assert names[:5] == [
        ("wan-14b-480p", True), ("wan-1.3b-480p", True), ("ltx-2b", True), ("wan-14b-480p", False),
        ("wan-14b-720p", False),
    ]  # fmt: skip
    assert len(set(names)) == 13
    assert all(isinstance(shape, Shape) and shape.id.endswith("-bfloat16") for shape in ON_A_GPU)


SMALL = ShapeClass("small", 64, 3, 6, 32)


def _wide(choice: Any) -> bool:
    return choice.dx != tiles.VENDOR and choice.dx.n == 256


def test_choices_are_compared_in_turns_and_a_refused_one_has_its_reason() -> None:
    class Refusing(Counting):
        def graphed(self, step: Step) -> Step:
            if _wide(tiles.choose(self.device, 64, 32, torch.bfloat16)):
                raise RuntimeError("out of resource: shared memory\nat line 3")
            return super().graphed(step)

    gpu = Refusing()
    used = tiles.heuristic(64, 32, 2, 227 * 1024)
    train, _ = steps_of(SMALL, torch.bfloat16, gpu.device)
    options = candidates(used, SMALL, 227 * 1024, hip=False)["dx"]
    found = compare(train, options, gpu)
    assert len(found) == len(options)
    for option, times in zip(options, found, strict=True):
        if _wide(option):
            assert times == "RuntimeError: out of resource: shared memory"
        else:
            assert isinstance(times, Times)
    assert gpu.calls == sum(not _wide(option) for option in options)
    named = choices.alternatives(used, options)
    assert next(iter(named)) == "in use"
    assert "dx.n=128 dx.k=32 dx.warps=4" in named


def test_tune_keeps_the_fastest_of_each_field() -> None:
    """With clocks that run on, that is the first of each."""
    used = tiles.heuristic(64, 32, 2, 227 * 1024)
    entry = tune(SMALL, torch.bfloat16, used, 227 * 1024, False, Counting())
    options = candidates(used, SMALL, 227 * 1024, hip=False)
    chosen = tiles.Choice.from_dict(entry["choice"])
    for field in ("tokens", "rows", "dx", "one_pass", "training", "inference"):
        assert getattr(chosen, field) == getattr(options[field][0], field)
    assert entry["training_ms"] < entry["inference_ms"]


def test_times_are_the_median_and_the_fifths() -> None:
    assert Times.of([float(n) for n in range(1, 10)]) == Times(5.0, 2.0, 8.0)
    assert Clock.device == "cuda"

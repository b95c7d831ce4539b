"""Lag, reads, resuming: what a schedule keeps between steps."""

from __future__ import annotations

import json
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_runs import observe, run, schedule
from torch.utils._python_dispatch import TorchDispatchMode

from crepa_kernels.regularizer.schedule import CrepaSchedule, Decision
from crepa_kernels.transfer import HostCopy


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func.name())
        return func(*args, **(kwargs or {}))


READS = ("_local_scalar_dense", "item", "is_nonzero", "equal")


def test_no_operator_reads_a_tensor_into_python() -> None:
    crepa = schedule(crepa_similarity_threshold=0.5, crepa_threshold_mode="recoverable", crepa_probe_interval=2)
    metric, count = torch.tensor(0.9), torch.tensor(3)
    with Recorder() as recorder:
        cutoffs = []
        for step in range(20):
            decision = crepa.decide(step)
            cutoffs.append(decision.cutoff)
            if decision.run:
                crepa.observe(step, metric * count, count)
    assert any(cutoffs)
    assert not [name for name in recorder.operators if any(read in name for read in READS)]
    with Recorder() as recorder:
        float(metric)
    assert any("_local_scalar_dense" in name for name in recorder.operators)


def test_a_metric_is_read_only_when_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    crepa = schedule(crepa_similarity_threshold=0.5)
    reads: list[int] = []
    tolist = torch.Tensor.tolist

    def recorded(self: torch.Tensor) -> Any:
        reads.append(step)
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", recorded)
    for step in range(6):
        crepa.decide(step)
        observe(crepa, step, 0.1)
        observe(crepa, step, 0.1)
    assert reads == [2, 3, 4, 5]


def test_a_metric_is_sent_to_the_host_as_soon_as_the_next_step_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[float]] = []
    begin = HostCopy.__init__

    def seen(copy: HostCopy, numbers: torch.Tensor, **options: Any) -> None:
        sent.append(numbers.tolist())
        begin(copy, numbers, **options)

    monkeypatch.setattr(HostCopy, "__init__", seen)
    crepa = schedule(crepa_similarity_threshold=0.5)
    crepa.decide(0)
    observe(crepa, 0, 0.25)
    assert sent == []
    crepa.decide(1)
    assert sent == [[0.25, 1.0]]


def test_the_metric_keeps_no_graph() -> None:
    crepa = schedule(crepa_similarity_threshold=0.5)
    crepa.decide(0)
    metric = torch.tensor(0.5, requires_grad=True) * 2

    class InTheGraph:
        pass

    metric.grad_fn.metadata["held"] = held = InTheGraph()
    graph = weakref.ref(held)
    crepa.observe(0, metric, torch.tensor(2))
    del metric, held
    assert graph() is None
    assert crepa.state_dict()["under_way"] == [{"step": 0, "updates": 1, "sum": 1.0, "count": 2.0}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_host_never_waits_for_the_device_and_decides_as_on_the_cpu() -> None:
    settings: dict[str, Any] = {
        "crepa_similarity_threshold": 0.5,
        "crepa_threshold_mode": "recoverable",
        "crepa_probe_interval": 3,
    }
    values = [0.25, 0.5, 0.75, 0.75, 0.875, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] * 2
    on_device = torch.tensor(values, device="cuda", dtype=torch.float64)
    one = torch.ones((), device="cuda")
    warm, crepa = schedule(**settings), schedule(**settings)
    warm.decide(0)
    warm.observe(0, on_device[0], one)
    warm.decide(1)
    decisions = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(len(values)):
            decisions.append(crepa.decide(step))
            if decisions[-1].run:
                crepa.observe(step, on_device[step], one)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert decisions == run(schedule(**settings), values)


SETTINGS = st.fixed_dictionaries(
    {
        "crepa_similarity_threshold": st.floats(0.05, 1.0),
        "crepa_similarity_ema_decay": st.sampled_from([0.0, 0.3, 0.9, 0.99]),
        "crepa_threshold_mode": st.sampled_from(["permanent", "recoverable"]),
        "crepa_probe_interval": st.integers(1, 5),
        "crepa_warmup_steps": st.integers(0, 3),
        "crepa_scheduler": st.sampled_from(["constant", "cosine"]),
        "crepa_cutoff_step": st.sampled_from([0, 0, 25]),
    }
)
# Per step, the micro-batches' metrics and counts.
BATCHES = st.tuples(st.floats(-1.0, 1.0) | st.just(math.nan), st.integers(0, 5))
RUNS = st.lists(st.lists(BATCHES, min_size=1, max_size=3), min_size=1, max_size=40)


def step_through(
    crepa: CrepaSchedule, steps: list[list[tuple[float, int]]], first: int, last: int
) -> list[tuple[Decision, float | None]]:
    trace = []
    for step in range(first, last):
        for value, count in steps[step]:
            decision = crepa.decide(step)
            if decision.run:
                observe(crepa, step, value, count)
        trace.append((crepa.decide(step), crepa.ema))
    return trace


@settings(deadline=None)
@given(SETTINGS, RUNS, st.data())
def test_a_resumed_run_decides_bitwise_the_same(
    config: dict[str, Any], steps: list[list[tuple[float, int]]], data: st.DataObject
) -> None:
    whole = step_through(schedule(40, **config), steps, 0, len(steps))
    stop = data.draw(st.integers(0, len(steps)))
    first = schedule(40, **config)
    trace = step_through(first, steps, 0, stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = schedule(40, **config)
    second.load_state_dict(state)
    # repr, so that a NaN equals itself.
    assert repr(second.state_dict()) == repr(state)
    trace += step_through(second, steps, stop, len(steps))
    assert trace == whole


@settings(deadline=None)
@given(SETTINGS, RUNS.filter(lambda steps: any(len(step) > 1 for step in steps)), st.data())
def test_a_run_resumed_between_micro_batches_decides_bitwise_the_same(
    config: dict[str, Any], steps: list[list[tuple[float, int]]], data: st.DataObject
) -> None:
    whole = step_through(schedule(40, **config), steps, 0, len(steps))
    split = data.draw(st.sampled_from([step for step, batches in enumerate(steps) if len(batches) > 1]))
    halves = [*steps[:split], steps[split][:1]], [*steps[:split], steps[split][1:], *steps[split + 1 :]]
    first = schedule(40, **config)
    trace = step_through(first, halves[0], 0, split + 1)[:split]
    second = schedule(40, **config)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert trace + step_through(second, halves[1], split, len(steps)) == whole


def slow_trace(crepa: CrepaSchedule, steps: list[list[tuple[float, int]]]) -> list[Decision]:
    """The schedule's rules with everything on the host and the average computed anew at every step."""
    config = crepa.config
    decisions: list[Decision] = []
    means: list[tuple[int, float, int]] = []
    latched = False
    for step, batches in enumerate(steps):
        ema, above = None, False
        for measured, mean, updates in means:
            if measured > step - 2:
                continue
            kept = config.crepa_similarity_ema_decay**updates
            ema = mean if ema is None else mean + kept * (ema - mean)
            above = ema >= (config.crepa_similarity_threshold or 0.0)
            latched = latched or above
        off = latched if config.crepa_threshold_mode == "permanent" else above
        scheduled = crepa.weight(step)
        ran = [index for index, decision in enumerate(decisions) if decision.run]
        due = not ran or step - ran[-1] >= config.crepa_probe_interval
        probe = off and scheduled > 0 and due and config.crepa_threshold_mode == "recoverable"
        running = probe or (scheduled > 0 and not off)
        cutoff = off or 0 < config.crepa_cutoff_step <= step
        decisions.append(Decision(0.0 if off else scheduled, running, cutoff, probe))
        total = sum(value * count for value, count in batches)
        frames = sum(count for _, count in batches)
        if running and frames and math.isfinite(total):
            means.append((step, total / frames, config.crepa_probe_interval if probe else 1))
    return decisions


@settings(deadline=None)
@given(SETTINGS, RUNS)
def test_decisions_are_the_slow_definition(config: dict[str, Any], steps: list[list[tuple[float, int]]]) -> None:
    trace = step_through(schedule(40, **config), steps, 0, len(steps))
    assert [decision for decision, _ in trace] == slow_trace(schedule(40, **config), steps)


@settings(deadline=None)
@given(SETTINGS, RUNS)
def test_once_ended_nothing_runs_any_more(config: dict[str, Any], steps: list[list[tuple[float, int]]]) -> None:
    crepa = schedule(30, **config)
    assert not crepa.ended
    ended = False
    for step in range(len(steps)):
        ((decision, _),) = step_through(crepa, steps, step, step + 1)
        assert not (ended and decision.run)
        assert crepa.ended or not ended
        ended = crepa.ended
    for step in range(len(steps), 60):
        assert not (ended and crepa.decide(step).run)


@pytest.mark.parametrize(
    ("config", "values", "ended"),
    [
        ({}, [0.9] * 5, False),
        ({"crepa_lambda": 0.0}, [0.9] * 5, True),
        ({"crepa_lambda": 0.0, "crepa_lambda_end": 1.0, "crepa_scheduler": "linear"}, [0.9], False),
        (
            {"crepa_lambda": 0.0, "crepa_lambda_end": 1.0, "crepa_scheduler": "linear", "crepa_cutoff_step": 8},
            [0.9],
            False,
        ),
        ({"crepa_warmup_steps": 3}, [0.9], False),
        ({"crepa_cutoff_step": 4}, [0.9] * 4, False),
        ({"crepa_cutoff_step": 4}, [0.9] * 5, True),
        ({"crepa_cutoff_step": 4, "crepa_warmup_steps": 10}, [0.9] * 5, True),
        ({"crepa_scheduler": "linear", "crepa_decay_steps": 4}, [0.9] * 4, False),
        ({"crepa_scheduler": "linear", "crepa_decay_steps": 4}, [0.9] * 5, True),
        ({"crepa_similarity_threshold": 0.5}, [0.9] * 2, False),
        ({"crepa_similarity_threshold": 0.5}, [0.9] * 3, True),
        ({"crepa_similarity_threshold": 0.5, "crepa_warmup_steps": 10}, [0.9] * 4, True),
        ({"crepa_similarity_threshold": 0.5, "crepa_threshold_mode": "recoverable"}, [0.9] * 5, False),
    ],
)
def test_where_crepa_ends(config: dict[str, Any], values: list[float], ended: bool) -> None:
    crepa = schedule(**config)
    run(crepa, values)
    assert crepa.ended == ended
    resumed = schedule(**config)
    resumed.load_state_dict(crepa.state_dict())
    assert resumed.ended == ended


def test_a_run_may_start_and_skip_anywhere_but_not_go_back() -> None:
    crepa = schedule(crepa_similarity_threshold=0.5)
    crepa.decide(500)
    observe(crepa, 500, 0.9)
    assert crepa.decide(700).cutoff
    with pytest.raises(ValueError, match=r"step 699 comes after step 700"):
        crepa.decide(699)
    assert crepa.decide(700).cutoff


def test_a_loaded_state_may_be_an_earlier_step() -> None:
    crepa = schedule(crepa_similarity_threshold=0.5, crepa_similarity_ema_decay=0.5)
    run(crepa, [0.1] * 5)
    state = crepa.state_dict()
    run(crepa, [0.9] * 10, start=5)
    assert crepa.decide(15).cutoff
    crepa.load_state_dict(state)
    assert not crepa.decide(4).cutoff
    with pytest.raises(ValueError, match="step 3 comes after step 4"):
        crepa.decide(3)


def test_a_run_resumed_within_a_probe_goes_on_with_it() -> None:
    config: dict[str, Any] = {
        "crepa_similarity_threshold": 0.5,
        "crepa_threshold_mode": "recoverable",
        "crepa_probe_interval": 3,
    }
    crepa = schedule(**config)
    assert run(crepa, [0.9] * 5)[4].probe
    resumed = schedule(**config)
    resumed.load_state_dict(crepa.state_dict())
    assert resumed.decide(4) == crepa.decide(4)
    assert [resumed.decide(step).probe for step in range(5, 9)] == [False, False, True, False]


def test_a_state_with_a_cutoff_does_not_bind_a_run_without_a_threshold() -> None:
    crepa = schedule(crepa_similarity_threshold=0.5)
    run(crepa, [0.9] * 5)
    other = schedule()
    other.load_state_dict(crepa.state_dict())
    assert other.decide(5) == Decision(0.5, run=True, cutoff=False, probe=False)


def test_the_state_is_plain_data() -> None:
    crepa = schedule(crepa_similarity_threshold=0.5)
    run(crepa, [0.25] * 4)
    assert crepa.state_dict() == {
        "ema": 0.25,
        "similarity_cutoff": False,
        "step": 3,
        "last_run_step": 3,
        "under_way": [
            {"step": 2, "updates": 1, "sum": 0.25, "count": 1.0},
            {"step": 3, "updates": 1, "sum": 0.25, "count": 1.0},
        ],
    }


def a_state() -> dict[str, Any]:
    """Of a schedule at step 3, with a measurement under way, an average and a run before."""
    crepa = schedule(40, crepa_similarity_threshold=0.5)
    for step in range(4):
        crepa.decide(step)
        observe(crepa, step, 0.25)
    return crepa.state_dict()


ENTRY = {"step": 3, "updates": 1, "sum": 0.25, "count": 1.0}
BAD_STATES: dict[str, tuple[dict[str, Any], str]] = {
    "average of text": ({"ema": "x"}, r"ema must be .*'x'"),
    "average of NaN": ({"ema": math.nan}, r"ema must be .*nan"),
    "infinite average": ({"ema": math.inf}, r"ema must be .*inf"),
    "average of true": ({"ema": True}, r"ema must be .*True"),
    "flag of text": ({"similarity_cutoff": "no"}, r"similarity_cutoff must be .*'no'"),
    "flag of a number": ({"similarity_cutoff": 1}, r"similarity_cutoff must be .*1"),
    "no flag": ({"similarity_cutoff": None}, r"similarity_cutoff must be .*None"),
    "half a step": ({"step": 2.5}, r"step must be .*2\.5"),
    "negative step": ({"step": -1}, r"step must be .*-1"),
    "step of text": ({"step": "3"}, r"step must be .*'3'"),
    "step beyond 64 bits": ({"step": 2**63}, r"step must be .*9223372036854775808"),
    "ran after the last step": ({"last_run_step": 10**9}, r"last_run_step must be .*step = 3.*1000000000"),
    "ran before any step": ({"step": None, "under_way": []}, r"last_run_step must be None before the first step"),
    "ran at true": ({"last_run_step": True}, r"last_run_step must be .*True"),
    "under way is a mapping": ({"under_way": {}}, r"under_way must be a list"),
    "entry of a number": ({"under_way": [3]}, r"under_way\[0\] must be a mapping"),
    "entry without a count": ({"under_way": [{"step": 3, "updates": 1, "sum": 0.0}]}, r"under_way\[0\] .*'count'"),
    "entry of another step": ({"under_way": [ENTRY | {"step": 4}]}, r"under_way\[0\]\.step must be .*4"),
    "entries of one step": ({"under_way": [ENTRY, ENTRY]}, r"under_way\[1\]\.step must be .*after 3"),
    "no update": ({"under_way": [ENTRY | {"updates": 0}]}, r"under_way\[0\]\.updates must be .*0"),
    "sum of text": ({"under_way": [ENTRY | {"sum": "1"}]}, r"under_way\[0\]\.sum must be .*'1'"),
    "negative count": ({"under_way": [ENTRY | {"count": -1.0}]}, r"under_way\[0\]\.count must be .*-1\.0"),
    "count of NaN": ({"under_way": [ENTRY | {"count": math.nan}]}, r"under_way\[0\]\.count must be .*nan"),
    "unknown key": ({"lambda": 1.0}, r"must have the keys .*'lambda'"),
}


@pytest.mark.parametrize(("change", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_that_no_schedule_gave_is_refused_by_key(change: dict[str, Any], message: str) -> None:
    crepa = schedule(40, crepa_similarity_threshold=0.5)
    before = crepa.state_dict()
    with pytest.raises(ValueError, match=message):
        crepa.load_state_dict(a_state() | change)
    assert crepa.state_dict() == before
    crepa.load_state_dict(a_state())
    assert crepa.state_dict() == a_state()


def test_a_state_without_a_key_or_of_another_kind_is_refused() -> None:
    crepa, state = schedule(40), a_state()
    for key in state:
        with pytest.raises(ValueError, match="must have the keys"):
            crepa.load_state_dict({name: value for name, value in state.items() if name != key})
    with pytest.raises(ValueError, match=r"must be a mapping .* got list"):
        crepa.load_state_dict([])  # type: ignore[arg-type]

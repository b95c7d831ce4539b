"""What stands in docs/ is what benches/results/ holds, and what the benches count besides times."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benches.gpu.results import MEASURED
from benches.measure import host_waits
from benches.peers import OWN, Inputs, Peer, measure, missed, our_peers
from benches.table import PAGE, peers_table, rendered, replaced, step_table


def test_the_page_is_what_make_results_writes() -> None:
    page = PAGE.read_text()
    assert rendered(page) == page
    assert rendered(replaced(page, "peers", "by hand")) == page


def test_the_stored_peers_are_what_is_claimed() -> None:
    found = json.loads((MEASURED / "peers-cpu.json").read_text())
    calls = found["calls"]
    assert missed(calls) == []
    assert max(calls[f"{OWN}, ours: grid"]["position_error"]) < 0.002
    assert max(calls[OWN]["position_error"]) == pytest.approx(0.33, abs=0.01)
    assert calls[f"{OWN}, ours: grid"]["host_waits"] == 1


def test_a_miss_is_named() -> None:
    rows = {OWN: {"median_ms": 100.0, "kept_bytes": 100}, f"{OWN}, ours: line": {"median_ms": 50.0, "kept_bytes": 40}}
    assert missed(rows) == ["line: x2.00, at least x3.5 is wanted", "line: 40% kept, at most 35% is wanted"]
    assert missed({}) == []


def test_reads_of_tensors_are_counted() -> None:
    tensor = torch.tensor([1.0, 2.0])

    def reads() -> None:
        if tensor.sum() > 1:
            float(tensor[0])
        tensor.tolist()
        tensor.max().item()

    assert host_waits(reads) == 4
    assert host_waits(lambda: tensor * 2) == 0


@pytest.mark.usefixtures("one_thread")
def test_every_peer_has_a_row() -> None:
    inputs = Inputs.of(frames=2)
    # What the compiler makes of it takes a minute here.
    peers = {name: peer for name, peer in our_peers(inputs).items() if name in ("eager", "torch")}
    rows = measure(peers, inputs, "cpu", rounds=1)
    assert list(rows) == ["eager", "torch"]
    assert rows["torch"]["kept_bytes"] < 0.35 * rows["eager"]["kept_bytes"]
    assert all(row["peak_bytes"] > row["kept_bytes"] > 0 and row["host_waits"] == 0 for row in rows.values())
    assert peers["eager"].forward().item() == pytest.approx(peers["torch"].forward().item(), rel=1e-4)
    assert isinstance(peers["torch"], Peer)


MACHINE: dict[str, Any] = {
    "device": "a CPU", "load": 0.2, "threads": 2, "torch": "2.13", "python": "3.11", "commit": "abc",
}  # fmt: skip


@pytest.mark.parametrize(("load", "said"), [(0.2, "a CPU, 2 threads"), (3.0, "a CPU, other work ran (load 3.0), 2")])
def test_a_table_says_where_it_was_measured(load: float, said: str) -> None:
    row = {"median_ms": 4.0, "peak_bytes": 2**20, "kept_bytes": 2**20, "host_waits": 0, "position_error": [0.0, 0.1]}
    made = peers_table({**MACHINE, "load": load, "shape": "some", "frames": 5, "calls": {"eager": row}})
    assert "| eager | 4 ms | 100% | 1 MiB | 1 MiB | 0 | 0.0000, 0.1000 |" in made
    assert said in made


def test_a_step_s_row_has_what_is_added() -> None:
    times = {"without": 100.0, "cached": 103.0, "eager": 120.0, "live": 250.0}
    row = {
        "family": "wan", "hidden_size": 384, "tokens": [3, 12, 20], "median_ms": times,
        "peak_bytes": {call: 2**20 * round(value) for call, value in times.items()},
    }  # fmt: skip
    size = {"layers": 3, "heads": 0.25, "frames": 9, "height": 192, "width": 320, "encoder": "small", "image_size": 224}
    expected = "| wan | 384 | 3 x 12 x 20 | 100 ms | +3 ms | +20 ms | +150 ms | 100 MiB | 103 MiB | 120 MiB | 250 MiB |"
    assert expected in step_table({**MACHINE, **size, "families": [row]})

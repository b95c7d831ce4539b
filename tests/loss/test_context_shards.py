"""Tokens of a clip on two and three ranks, cut in the middle of a frame, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import shards
import torch

pytestmark = pytest.mark.usefixtures("one_thread")

# Sums in another order, of numbers of about 1.
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.fixture(scope="module", params=[2, 3])
def on_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shards")
    done = processes.run(shards.losses, folder, ranks=request.param)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", shards.calls())
def test_shards_add_up_to_the_whole_clips(on_ranks: list[dict[str, Any]], name: str) -> None:
    call = shards.calls()[name]
    whole, summed = shards.run(*call), shards.together([own[name] for own in on_ranks])
    assert whole.keys() == summed.keys()
    for key, value in whole.items():
        torch.testing.assert_close(summed[key], value, rtol=0, atol=CLOSE[call[-1]], msg=lambda m, k=key: f"{k}: {m}")
    assert all(own[name]["loss"] != whole["loss"] for own in on_ranks), "one rank had it all"

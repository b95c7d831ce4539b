"""A run that goes on from CrepaRegularizer's state is the run that was not stopped, bit for bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from tiny import is_captured, tiny_wan, wan_inputs

from crepa_kernels import CrepaRegularizer

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12
DECAY = {"crepa_warmup_steps": 2, "crepa_decay_steps": 6, "crepa_lambda_end": 0.1}
THRESHOLD = {"crepa_similarity_threshold": 0.3, "crepa_similarity_ema_decay": 0.5}
MODES: dict[str, dict[str, Any]] = {
    "constant": {},
    **{name: {"crepa_scheduler": name, **DECAY} for name in ("linear", "cosine", "polynomial")},
    "decay to nothing": {"crepa_scheduler": "linear", "crepa_decay_steps": 6},
    "cutoff step": {"crepa_cutoff_step": 6},
    "permanent": THRESHOLD,
    "permanent on the alignment score": {**THRESHOLD, "crepa_similarity_metric": "alignment_score"},
    "recoverable": {**THRESHOLD, "crepa_threshold_mode": "recoverable", "crepa_probe_interval": 2},
    "everything": {"crepa_scheduler": "cosine", **DECAY, **THRESHOLD, "crepa_cutoff_step": 10},
}


def features(step: int) -> torch.Tensor:
    """Easy to learn; after step 5 another direction, so that a cutoff can be recovered from."""
    direction = torch.linspace(-1, 1, 8) if step < 5 else torch.linspace(1, -1, 8).square() - 0.5
    return direction + 0.1 * torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(step))


class Run:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.transformer = tiny_wan(num_layers=2)
        torch.manual_seed(0)
        config = {"crepa_enabled": True, "crepa_block_index": 0, **settings}
        self.crepa = CrepaRegularizer(config, self.transformer, feature_size=8)
        self.optimizer = torch.optim.AdamW(self.transformer.parameters(), lr=2e-2)

    def train(self, steps: range) -> list[Any]:
        """Of each micro-batch: whether the block was captured, the loss, and the logs."""
        history = []
        for step in steps:
            for micro in range(2):
                prediction = self.transformer(**wan_inputs(seed=2 * step + micro))[0]
                captured = is_captured(self.crepa)
                aux, logs = self.crepa.loss(step=step, features=features(step))
                loss = prediction.square().mean() + aux
                loss.backward()
                self.crepa.release()
                history.append((captured, float(loss.detach()), {name: float(value) for name, value in logs.items()}))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return history

    def save(self) -> bytes:
        file = io.BytesIO()
        parts = {"model": self.transformer, "optimizer": self.optimizer, "crepa": self.crepa}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.transformer.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.crepa.load_state_dict(state["crepa"])


@pytest.mark.every(3)
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_bitwise_the_one_that_was_not_stopped(mode: str) -> None:
    whole = Run(MODES[mode])
    history, saved = [], {}
    for step in range(STEPS):
        history += whole.train(range(step, step + 1))
        saved[step + 1] = whole.save()
    cutoffs = [logs["crepa_cutoff"] for _, _, logs in history]
    assert any(cutoffs) == (mode in ("cutoff step", "everything") or "crepa_similarity_threshold" in MODES[mode])
    assert not all(cutoffs[-2:]) or mode != "recoverable"
    # Before, at and after the cutoff, with what decides about it still under way.
    cutoff = cutoffs.index(True) // 2 if any(cutoffs) else 6
    for stop in range(cutoff - 1, cutoff + 2):
        resumed = Run(MODES[mode])
        resumed.train(range(1))  # Whatever it was doing before.
        resumed.load(saved[stop])
        # repr, so that a NaN equals itself.
        assert repr(resumed.train(range(stop, STEPS))) == repr(history[2 * stop :])
        for name, weight in whole.transformer.state_dict().items():
            assert torch.equal(resumed.transformer.state_dict()[name], weight), name
        assert repr(resumed.crepa.state_dict()["schedule"]) == repr(whole.crepa.state_dict()["schedule"])


def test_a_run_resumed_after_its_end_captures_nothing_and_one_from_before_it_does() -> None:
    run = Run({"crepa_cutoff_step": 2})
    run.train(range(2))
    before = run.save()
    run.train(range(2, 4))
    after = run.save()
    for saved, step, captured in ((after, 4, False), (before, 2, True), (after, 4, False)):
        run.load(saved)
        assert run.train(range(step, step + 1))[0][0] == captured

"""What a training step costs once CREPA has been cut off for good: that of a step without CREPA."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_wan, wan_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from crepa_kernels import CrepaRegularizer

pytestmark = pytest.mark.usefixtures("one_thread")

CUTOFFS: dict[str, dict[str, Any]] = {
    "step": {"crepa_cutoff_step": 2},
    "similarity": {"crepa_similarity_threshold": 1e-6, "crepa_similarity_metric": "similarity"},
}


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        elements = out.numel() if isinstance(out, torch.Tensor) else 0
        self.seen[func.name(), elements] += 1
        return out


class Run:
    """Steps of a LoRA's training; with CREPA where there are settings."""

    def __init__(self, settings: dict[str, Any] | None, inputs: dict[str, torch.Tensor], **model: Any) -> None:
        self.inputs, self.crepa = inputs, None
        self.transformer = tiny_wan(**model)
        self.transformer.requires_grad_(False)
        torch.manual_seed(0)
        self.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        frames, height, width = inputs["hidden_states"].shape[2:]
        self.features = torch.ones(1, frames, height // 2, width // 2, 8)
        if settings is not None:
            config = {"crepa_enabled": True, "crepa_block_index": 1, **settings}
            self.crepa = CrepaRegularizer(config, self.transformer, feature_size=8)
            with torch.no_grad():  # A similarity of 1.
                self.crepa.projector[1].weight.zero_()
                self.crepa.projector[1].bias.fill_(1.0)
        self.optimizer = torch.optim.AdamW([p for p in self.transformer.parameters() if p.requires_grad], lr=1e-4)

    def gradients(self, step: int) -> dict[str, Any]:
        loss, logs = self.transformer(**self.inputs)[0].square().mean(), {}
        if self.crepa is not None:
            aux, logs = self.crepa.loss(step=step, features=self.features)
            loss = loss + aux
        loss.backward()
        return logs

    def step(self, step: int) -> dict[str, Any]:
        logs = self.gradients(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return logs


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_a_handful_of_operators_on_few_numbers_is_all_that_is_left(cutoff: str) -> None:
    inputs = wan_inputs()
    plain, cut = Run(None, inputs), Run(CUTOFFS[cutoff], inputs)
    for step in range(5):
        plain.step(step)
        assert cut.step(step).get("crepa_cutoff") == (step >= 2)
    seen = []
    for run in (plain, cut):
        with Operators() as operators:
            run.gradients(5)
        seen.append(operators.seen)
    assert seen[0] - seen[1] == Counter()
    more = seen[1] - seen[0]
    # A 0 is added to the prediction, whose gradient is a 0 for each of the projector's weights; aux, and the average.
    prediction, projector = inputs["hidden_states"].numel(), (32, 32, 8 * 32, 8)
    expected = Counter({("aten::add.Tensor", prediction): 1, ("aten::sum", 1): 1, ("aten::add.Tensor", 1): 1})
    expected.update(("aten::zeros", elements) for elements in (*projector, 1, 1))
    expected.update({("aten::full_like", 1): 1} if cutoff == "similarity" else {})
    detached = Counter(("aten::detach", elements) for elements in (*projector, *projector))
    assert more - detached == expected


@pytest.mark.slow
def test_the_time_of_a_step_is_that_without_crepa() -> None:
    model = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 4}
    inputs = wan_inputs(frames=5, height=16, width=24)
    plain, cut = Run(None, inputs, **model), Run({"crepa_cutoff_step": 1}, inputs, **model)
    for step in range(4):
        plain.step(step)
        cut.step(step)
    times: dict[Run, list[float]] = {plain: [], cut: []}
    for step in range(4, 64):
        for run in (plain, cut) if step % 2 else (cut, plain):
            # The processor's time: other processes on the machine take none of it.
            started = time.process_time()
            run.step(step)
            times[run].append(time.process_time() - started)
    # Of neighbours in time, so that a change of the clock's rate is in both.
    ratio = statistics.median(one / other for one, other in zip(times[cut], times[plain], strict=True))
    assert ratio <= 1.03, times

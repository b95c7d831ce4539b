"""NaN in the loss."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from tiny import tiny_wan, wan_inputs

from crepa_kernels import CrepaRegularizer
from crepa_kernels.regularizer.attach import CREPA
from crepa_kernels.regularizer.monitor import NonFiniteMonitor
from crepa_kernels.transfer import HostCopy


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("student", "from the transformer's hidden states: teacher and projector are finite (said once)"),
        ("teacher", "from the teacher's features (said once)"),
        ("projector", "from the projector's weights (said once)"),
        ("teacher and projector", "from the teacher's features and the projector's weights (said once)"),
    ],
)
def test_nan_stays_in_the_loss_and_its_side_is_said_once(
    side: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    transformer = tiny_wan()
    config = {"crepa_enabled": True, "crepa_block_index": 1}
    crepa = CrepaRegularizer(config, transformer, feature_size=8)
    clean = torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(6))
    broken = clean.clone()
    broken[0, 1, 2, 3] = float("nan")
    inputs = wan_inputs()
    if side == "student":
        inputs["hidden_states"][0, 0, 0, 0, 0] = float("nan")
    if "projector" in side:
        with torch.no_grad():
            crepa.projector[1].weight[0, 0] = float("nan")
    with caplog.at_level(logging.WARNING, "crepa_kernels"):
        for step in range(3):
            prediction = transformer(**inputs)[0]
            assert side == "student" or prediction.isfinite().all()
            aux, _ = crepa.loss(step=step, features=broken if "teacher" in side else clean)
            assert math.isnan(aux.detach())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert message in said[0]
    assert "step 0" in said[0]


def test_features_too_large_for_fp32_are_the_teacher_s(caplog: pytest.LogCaptureFixture) -> None:
    transformer = tiny_wan()
    crepa = CrepaRegularizer({"crepa_enabled": True, "crepa_block_index": 1}, transformer, feature_size=8)
    transformer(**wan_inputs())
    aux, _ = crepa.loss(step=0, features=torch.full((1, 3, 6, 8), 1e30))
    assert not math.isfinite(aux.detach())
    assert "from the teacher's features (said once)" in caplog.text


def test_what_has_not_arrived_is_said_when_waited_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = NonFiniteMonitor(CREPA)
    clean = torch.ones(2)
    broken = torch.tensor([math.nan, 1.0])
    # Still under way when it is asked, and there once it is waited for.
    monkeypatch.setattr(HostCopy, "arrived", False)
    for step, features in ((3, broken), (4, clean)):
        monitor.watch(step, features.sum(), features, clean.sum())
    assert caplog.records == []
    monitor.flush()
    assert [record.getMessage() for record in caplog.records] == [
        "the CREPA loss at step 3 is nan; it came from the teacher's features (said once)"
    ]


def test_after_another_state_is_loaded_it_is_said_again(caplog: pytest.LogCaptureFixture) -> None:
    transformer = tiny_wan()
    crepa = CrepaRegularizer({"crepa_enabled": True, "crepa_block_index": 1}, transformer, feature_size=8)
    state = crepa.state_dict()
    broken = torch.full((1, 3, 6, 8), float("nan"))
    for expected in (1, 2):
        crepa.load_state_dict(state)
        for step in range(2):
            transformer(**wan_inputs())
            crepa.loss(step=step, features=broken)
        assert len(caplog.records) == expected

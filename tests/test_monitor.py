"""NaN in the loss."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from tiny import tiny_wan, wan_inputs

from crepa_kernels import CrepaRegularizer


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("student", "from the transformer's hidden states (said once)"),
        ("teacher", "from the teacher's features (said once)"),
        ("both", "from the transformer's hidden states and the teacher's features (said once)"),
        ("projector", "from the projector"),
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
    if side in ("student", "both"):
        inputs["hidden_states"][0, 0, 0, 0, 0] = float("nan")
    if side == "projector":
        with torch.no_grad():
            crepa.projector[1].weight[0, 0] = float("nan")
    with caplog.at_level(logging.WARNING, "crepa_kernels"):
        for step in range(3):
            transformer(**inputs)
            aux, _ = crepa.loss(step=step, features=broken if side in ("teacher", "both") else clean)
            assert math.isnan(aux.detach())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert message in said[0]
    assert "step 0" in said[0]

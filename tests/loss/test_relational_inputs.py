"""Bad input to the relational loss: one clear ValueError with the numbers in it, before any work."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_loss_inputs import BAD, arguments

from crepa_kernels import CrepaProjector, relational_loss

NUMBERS = "margin .*at least 0"
OWN: dict[str, tuple[dict[str, Any], str]] = {
    "pairs": ({"pairs": "temporal"}, r"pairs must be one of frame, all, cross, neighbours, got 'temporal'"),
    "pairs as none": ({"pairs": None}, r"pairs .*None"),
    "negative margin": ({"margin": -0.1}, rf"{NUMBERS}.*-0\.1"),
    "nan margin": ({"margin": math.nan}, rf"{NUMBERS}.*nan"),
    "infinite margin": ({"margin": math.inf}, rf"{NUMBERS}.*inf"),
    "margin as text": ({"margin": "0.1"}, rf"{NUMBERS}.*'0\.1'"),
    "margin as bool": ({"margin": True}, rf"{NUMBERS}.*True"),
    "margin beyond any float": ({"margin": 10**400}, rf"{NUMBERS}.*1000"),
    "tokens without those that have the rest": ({"token_range": (0, 12)}, "token_range and context_group go together"),
    "a group without tokens": ({"context_group": object()}, "token_range and context_group go together"),
    "no group": ({"token_range": (0, 12), "context_group": 3}, "context_group must be .* process group of this rank"),
    "margin as a tensor": ({"margin": torch.tensor(0.1)}, rf"{NUMBERS}.*tensor"),
}
SHARED = {name: row for name, row in BAD.items() if "token_range" not in row[0]}


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", "auto"])
@pytest.mark.parametrize(("change", "message"), OWN.values(), ids=OWN)
def test_bad_options(change: dict[str, Any], message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        relational_loss(**{**arguments(), "backend": backend, **change})


@pytest.mark.parametrize(("change", "message"), SHARED.values(), ids=SHARED)
def test_bad_input_of_every_loss(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relational_loss(**{**arguments(), **change})


def test_valid_arguments_are_valid() -> None:
    """The tables change one thing of a call that works, whatever the backend is called."""
    given = arguments()
    found = [relational_loss(**given, backend=name) for name in ("reference", "torch", "triton", "auto")]
    assert found[1] == found[2] == found[3]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


def test_the_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    expected = relational_loss(**given, backend="reference")
    monkeypatch.setenv("CREPA_BACKEND", "reference")
    assert torch.equal(relational_loss(**given, backend="torch"), expected)
    monkeypatch.setenv("CREPA_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"CREPA_BACKEND must be 'auto'.*'cuda'"):
        relational_loss(**given)


def test_bad_input_costs_no_work() -> None:
    """The error comes before a projection or a resampling: on tensors without memory it is the same one."""
    given = {**arguments(), "projector": CrepaProjector(16, 8).to("meta")}
    given["hidden_states"] = torch.empty(2, 3, 10**9, 16, device="meta")
    given["teacher_features"] = torch.empty(2, 3, 6, 8, device="meta")
    with pytest.raises(ValueError, match="1000000000"):
        relational_loss(**given)

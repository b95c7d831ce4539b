"""The torch backend works on runs of frames: their length changes the memory it takes and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benches.measure import peak_bytes
from crepa_kernels import CrepaProjector, crepa_loss
from crepa_kernels.backends.torch.chunks import ChunkPolicy, chunked

FRAMES = 7


class CountResampled(TorchDispatchMode):
    """Counts the teacher frames that are resampled."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += function is torch.ops.crepa_kernels.resample_tokens.default
        return function(*args, **(kwargs or {}))


def gradients(limit: int, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    hidden_states = torch.randn(2, FRAMES, 6, 8, dtype=torch.float64, requires_grad=True)
    projector = CrepaProjector(8, 5).double()
    with chunked(ChunkPolicy(tokens=limit)):
        out = crepa_loss(
            hidden_states,
            torch.randn(2, FRAMES, 12, 5, dtype=torch.float64),
            projector,
            student_grid=(2, 3),
            teacher_grid=(3, 4),
            backend="torch",
            **options,
        )
    return [out.loss.detach(), *torch.autograd.grad(out.loss, [hidden_states, *projector.parameters()])]


@pytest.mark.parametrize("options", [{}, {"distance": 3, "cumulative": True}, {"distance": 0}, {"distance": 9}])
@pytest.mark.parametrize("limit", [1, 12, 24, 10**6])
def test_each_teacher_frame_is_made_once_whatever_the_chunk(limit: int, options: dict[str, Any]) -> None:
    expected = gradients(18, **options)
    with CountResampled() as counted:
        found = gradients(limit, **options)
    assert counted.calls == 2 * FRAMES
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)  # sums in another order, in float64


def test_the_chunk_off_the_cpu_keeps_the_peak_below_the_eager_loss() -> None:
    hidden_states = torch.randn(1, 8, 1024, 256, requires_grad=True)
    teacher, projector = torch.randn(1, 8, 1024, 256), CrepaProjector(256, 256)

    def step(backend: str) -> None:
        crepa_loss(
            hidden_states, teacher, projector, student_grid=(32, 32), teacher_grid=(32, 32), backend=backend
        ).loss.backward()

    with chunked(ChunkPolicy(tokens=ChunkPolicy().limit("cuda"))):
        assert peak_bytes(lambda: step("torch")) < peak_bytes(lambda: step("reference"))


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True, "many"])
def test_a_number_of_tokens_is_at_least_one(tokens: Any) -> None:
    with pytest.raises(ValueError, match=f"tokens must be None or an integer of at least 1, got {tokens!r}"):
        ChunkPolicy(tokens=tokens)

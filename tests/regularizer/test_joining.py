"""A loss that joins another's backward through a model's output."""

from __future__ import annotations

import pytest
import torch

from crepa_kernels import join_loss


def gradients(join: bool, micro_batches: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer, projector = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
    for inputs in torch.randn(micro_batches, 3, 4).unbind():
        output = layer(inputs)
        aux = projector(output).square().mean() / micro_batches
        main = (join_loss(output, aux) if join else output).square().mean() / micro_batches
        (main if join else main + aux).backward()
    assert layer.weight.grad is not None
    assert projector.weight.grad is not None
    return layer.weight.grad, projector.weight.grad


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_joined_loss_gives_the_gradients_of_the_sum(micro_batches: int) -> None:
    for joined, added in zip(gradients(True, micro_batches), gradients(False, micro_batches), strict=True):
        torch.testing.assert_close(joined, added)


def test_the_output_stays_as_it_was_with_a_loss_of_no_gradient_or_another_type() -> None:
    output = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    joined = join_loss(output, torch.zeros(()))
    assert torch.equal(joined, output)
    joined.sum().backward()
    assert torch.equal(output.grad, torch.ones_like(output))  # type: ignore[arg-type]
    with torch.no_grad():
        assert join_loss(output, torch.zeros(())) is output


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scalar loss, got one of shape \(3,\)"):
        join_loss(torch.zeros(2), torch.zeros(3))

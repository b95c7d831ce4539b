"""The regulariser's similarity matrix: of the same states, teacher and masks as the loss."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_dinov2, tiny_wan, wan_inputs

from crepa_kernels import CrepaRegularizer, similarity_matrix


def test_the_matrix_takes_what_the_loss_takes() -> None:
    transformer = tiny_wan()
    config = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder_image_size": 70}
    crepa = CrepaRegularizer(config, transformer, encoder=tiny_dinov2())
    states: list[torch.Tensor] = []
    transformer.blocks[1].register_forward_hook(lambda module, inputs, output: states.append(output))
    transformer(**wan_inputs(batch=2))
    torch.manual_seed(0)
    features = torch.randn(2, 3, 6, 32)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    given = {"features": features, "frame_mask": mask}
    crepa.loss(step=0, **given)
    found = crepa.similarity_matrix(**given)
    expected = similarity_matrix(
        states[0].unflatten(1, (3, 6)), features, crepa.projector, student_grid=(2, 3), teacher_grid=(2, 3)
    )
    assert not found[0, 0].any()
    torch.testing.assert_close(found[mask], expected[mask])
    crepa.release()
    with pytest.raises(ValueError, match="was not called before"):
        crepa.similarity_matrix(**given)


def test_frames_that_pad_a_clip_are_not_in_the_matrix() -> None:
    transformer = tiny_wan()
    config = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder_image_size": 70}
    crepa = CrepaRegularizer(config, transformer, encoder=tiny_dinov2())
    transformer(**wan_inputs(batch=2))
    pixels = torch.rand(2, 9, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    given = {"pixels": pixels, "num_frames": [5, 9]}
    crepa.loss(step=0, **given)
    found = crepa.similarity_matrix(**given)
    assert not found[0, 2].any()
    assert not found[0, :, 2].any()
    assert found[1].all()

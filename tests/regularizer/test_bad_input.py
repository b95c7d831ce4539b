"""Bad input to CrepaRegularizer: one clear error before anything is attached or run."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny import clip_pixels, tiny_dinov2, tiny_vae, tiny_wan, wan_inputs

from crepa_kernels import CrepaRegularizer, LayerSync

CONFIG: dict[str, Any] = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder_image_size": 70}
BLOCKS = {"layersync_enabled": True, "layersync_student_block": 0, "layersync_teacher_block": 1}


def regularizer(transformer: Any) -> CrepaRegularizer:
    return CrepaRegularizer(CONFIG, transformer, feature_size=8)


def features() -> torch.Tensor:
    return torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"crepa_block_index": 3}, {}, "crepa_block_index = 3: .*valid are 0 to 2"),
        (
            {"crepa_use_backbone_features": True, "crepa_teacher_block_index": 7},
            {},
            "crepa_teacher_block_index = 7: .*valid are 0 to 2",
        ),
        ({"crepa_lambda": -1}, {}, "crepa_lambda"),
        ({}, {"vae": 3}, "got int"),
        ({}, {"encoder": 3}, "got int"),
        ({}, {"encoder": tiny_dinov2}, "pass feature_size="),
        ({"crepa_encoder": "/no/such/encoder"}, {}, "crepa_encoder = /no/such/encoder: .*config.json"),
        ({"crepa_scheduler": "cosine"}, {}, "max_train_steps"),
        ({}, {"max_train_steps": 0}, "max_train_steps"),
        ({"crepa_drop_vae_encoder": True}, {"vae_encodes": True}, "crepa_drop_vae_encoder = true.*still encodes"),
        (
            {"crepa_use_backbone_features": True, "crepa_teacher_block_index": 2},
            {"feature_size": 8},
            "feature_size = 8: in backbone mode it is the transformer's, 32",
        ),
    ],
)
def test_a_wrong_construction_attaches_nothing(settings: dict[str, Any], options: dict[str, Any], message: str) -> None:
    transformer = tiny_wan()
    found = list(transformer.state_dict()), sorted(transformer.__dict__)
    with pytest.raises(ValueError, match=message):
        CrepaRegularizer({**CONFIG, **settings}, transformer, **options)
    assert (list(transformer.state_dict()), sorted(transformer.__dict__)) == found
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())


def test_an_unsupported_class_says_which_families_are_supported() -> None:
    with pytest.raises(ValueError, match=r"AutoencoderKLWan is not a supported transformer.*wan"):
        regularizer(tiny_vae())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (WanTransformer3DModel, "the class WanTransformer3DModel"),
        (
            SimpleNamespace(transformer=torch.nn.Linear(1, 1)),
            "which has one: give its .transformer",
        ),
        ("wan", "str"),
    ],
    ids=["class", "pipeline", "name"],
)
def test_what_is_no_model_is_named(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"must be given the transformer itself, got .*{message}"):
        regularizer(wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one of latents=, pixels= and features="),
        ({"features": torch.zeros(1, 3, 6, 16)}, r"width 16, .* for 8: pass CrepaRegularizer\(feature_size=16\)"),
        ({"features": torch.zeros(1, 4, 6, 8)}, "4 frames, the student 3"),
        ({"features": torch.zeros(1, 3, 5, 8)}, "5 tokens a frame"),
        ({"features": torch.zeros(1, 3, 5, 8), "feature_grid": (2, 3)}, r"teacher_grid \(2, 3\)"),
        (
            {"features": torch.zeros(1, 3, 6, 8), "feature_grid": (6,)},
            r"feature_grid must be \(height, width\), .*\[6\]",
        ),
        ({"features": torch.zeros(1, 3, 6, 8), "feature_grid": 6}, "feature_grid must be .* got 6"),
        ({"features": torch.zeros(1, 3, 6, 8), "feature_grid": "23"}, "feature_grid must be .* got '23'"),
        ({"features": torch.zeros(1, 3, 6, 8), "feature_grid": (2.0, 3.0)}, "feature_grid must be .* two positive"),
        ({"features": torch.zeros(1, 3, 2, 3, 8), "feature_grid": (3, 2)}, r"feature_grid = \(3, 2\), but .* on 2 x 3"),
        ({"features": features(), "num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"features": features(), "num_frames": [-3]}, r"num_frames must be at least 1, got \[-3\]"),
        ({"latents": 3}, "latents must be .* got int"),
        ({"latents": [0.0] * 2}, "latents must be .* got list"),
        ({"features": torch.zeros(2, 3, 6, 8)}, "B = 1"),
        ({"features": torch.zeros(1, 3, 6, 8, dtype=torch.int64)}, "floating-point .* got torch.int64"),
        ({"features": [0.0]}, "features must be .* got list"),
        ({"pixels": [0.0]}, "pixels must be .* got list"),
        ({"pixels": torch.zeros(1, 9, 3, 32, 48, dtype=torch.int32)}, "uint8, or floating point .* got torch.int32"),
        ({"latents": [0.0] * 1}, "latents must be .* got list"),
        ({"latents": torch.zeros(1, 4, 3, 4, 6, dtype=torch.int64)}, "latents must be .* got torch.int64"),
        ({"pixels": clip_pixels(), "num_frames": "nine"}, "num_frames must be an integer"),
        ({"features": features(), "frame_mask": torch.ones(1, 4, dtype=torch.bool)}, "frame_mask"),
        ({"features": features(), "teacher_mask": torch.ones(1, 3)}, "teacher_mask"),
        ({"pixels": torch.zeros(1, 9, 3, 32, 48) - 1}, r"\[0, 1\]"),
        ({"pixels": clip_pixels(2)}, "B = 1"),
        ({"pixels": clip_pixels(), "num_frames": 10}, "num_frames"),
        ({"pixels": clip_pixels(1, 10)}, "pixels have 10 frames, but the 3 latent frames .* made of 9: .* or 3 frames"),
        ({"pixels": clip_pixels(1, 5)}, "5 frames, but the 3 latent"),
        ({"pixels": clip_pixels(), "num_frames": 8}, "8 frames, but the 3 latent"),
        ({"pixels": clip_pixels(1, 8), "num_frames": [5]}, "8 frames, but the 3 latent"),
        ({"features": torch.zeros(1, 12, 6, 8), "num_frames": 12}, "features are of 12 frames, but the 3 latent"),
        ({"latents": torch.zeros(1, 4, 3, 4, 6)}, r"vae=\.\.\."),
        ({"latents": torch.zeros(2, 4, 3, 4, 6)}, "2 clips, the transformer's last forward had 1"),
        ({"latents": torch.zeros(1, 4, 5, 4, 6)}, r"\(3, 4, 6\)"),
    ],
)
def test_a_wrong_batch_is_one_clear_error(given: dict[str, Any], message: str) -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer)
    transformer(**wan_inputs())
    with pytest.raises(ValueError, match=message):
        crepa.loss(step=0, **given)


def test_an_encoder_of_another_width_than_announced_is_an_error() -> None:
    transformer = tiny_wan()
    crepa = CrepaRegularizer(CONFIG, transformer, encoder=tiny_dinov2, feature_size=8)
    transformer(**wan_inputs())
    with pytest.raises(ValueError, match="width 32, the projector was made for 8"):
        crepa.loss(step=0, pixels=clip_pixels())


def test_loss_before_forward_and_steps_that_go_back_are_errors() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer)
    with pytest.raises(ValueError, match="forward was not called before loss"):
        crepa.loss(step=0, features=features())
    transformer(**wan_inputs())
    crepa.loss(step=5, features=features())
    crepa.release()
    with pytest.raises(ValueError, match=r"forward was not called before loss\(\) since release\(\)"):
        crepa.loss(step=5, features=features())
    with pytest.raises(ValueError, match="step 4 comes after step 5"):
        crepa.loss(step=4, features=features())


def test_states_of_a_forward_that_raised_are_not_learned_from() -> None:
    transformer = tiny_wan()
    crepa, layersync = regularizer(transformer), LayerSync(BLOCKS, transformer)
    for _ in range(2):  # nothing before it, and after one that came to its end
        handle = transformer.blocks[2].register_forward_hook(_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            transformer(**wan_inputs())
        handle.remove()
        for loss in (partial(crepa.loss, step=0, features=features()), layersync.loss):
            with pytest.raises(ValueError, match=r"forward did not come to its end, .*: call it again"):
                loss()
        transformer(**wan_inputs())
        (crepa.loss(step=0, features=features())[0] + layersync.loss()[0]).backward()


def _out_of_memory(*args: Any) -> None:
    raise torch.OutOfMemoryError("no memory is left")


def test_a_block_that_was_replaced_is_named() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer)
    transformer.blocks[1] = copy.deepcopy(transformer.blocks[0])
    transformer(**wan_inputs())
    with pytest.raises(ValueError, match="block 1 was replaced after CrepaRegularizer was attached: attach after it"):
        crepa.loss(step=0, features=features())


def test_what_is_off_or_removed_has_no_matrix() -> None:
    transformer = tiny_wan()
    with pytest.raises(ValueError, match="CREPA is off: nothing is captured"):
        CrepaRegularizer({}, transformer).similarity_matrix(features=features())
    crepa = regularizer(transformer)
    transformer(**wan_inputs())
    crepa.remove()
    for ask in (crepa.captured, partial(crepa.similarity_matrix, features=features())):
        with pytest.raises(ValueError, match="this CrepaRegularizer was removed from its transformer"):
            ask()


def test_a_copy_of_the_regularizer_detaches_from_its_own_model() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer)
    for copied in (copy.deepcopy(crepa), pickle.loads(pickle.dumps(crepa))):
        copied.transformer(**wan_inputs())
        copied.loss(step=0, features=features())
        copied.remove()
        assert "crepa_projector" not in dict(copied.transformer.named_children())
    transformer(**wan_inputs())
    crepa.loss(step=0, features=features())[0].backward()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "not a CrepaRegularizer's state: NoneType"),
        ([], "not a CrepaRegularizer's state: list"),
        ({"projector": {}}, r"not a CrepaRegularizer's state: \['projector'\]"),
        ({"projector": None, "schedule": {}}, "does not hold a projector's weights"),
        ({"projector": {"0.weight": 1}, "schedule": {}}, "does not hold a projector's weights"),
    ],
)
def test_what_is_no_state_is_one_clear_error(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regularizer(tiny_wan()).load_state_dict(state)


def test_training_a_copy_is_an_error() -> None:
    transformer = tiny_wan()
    crepa = regularizer(transformer)
    copy.deepcopy(transformer)(**wan_inputs())
    with pytest.raises(ValueError, match="not a copy of it"):
        crepa.loss(step=0, features=features())

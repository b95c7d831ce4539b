"""Any frozen network as the teacher: what it is given, what of its answer is checked, and its key."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import clip_pixels, tiny_dinov2
from torch import nn

from crepa_kernels.teachers import FrozenEncoder, register_encoder
from crepa_kernels.teachers.encoders import weights_key
from crepa_kernels.teachers.encoding import FrameEncoder, encoder_of

CPU = torch.device("cpu")
GRID = (2, 3)


class Patches(nn.Module):
    """One convolution that does not overlap: 5 features of each patch of 8 pixels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.convolution = nn.Conv2d(3, 5, 8, 8)
        self.register_buffer("mean", torch.tensor(0.5), persistent=False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.convolution(frames - self.mean).permute(0, 2, 3, 1)


def answering(make: Callable[[torch.Tensor], Any], **said: Any) -> FrozenEncoder:
    return FrozenEncoder(lambda frames: make(frames), "mine", **said)


def blank(n: int = 2, height: int = 4, width: int = 4, size: int = 5) -> torch.Tensor:
    return torch.zeros(n, height, width, size)


def frames(count: int = 2) -> torch.Tensor:
    return clip_pixels(1, count, 32, 32)[0]


def test_frames_come_in_fp32_between_0_and_1_at_the_image_size() -> None:
    seen: list[torch.Tensor] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.permute(0, 2, 3, 1)

    found = FrameEncoder(encode, image_size=32).encode(frames(), GRID, CPU)
    assert torch.equal(torch.cat(seen), frames() / 255)
    assert seen[0].dtype == torch.float32
    assert found.grid == (32, 32)
    assert torch.equal(found.features, (frames() / 255).permute(0, 2, 3, 1).flatten(1, 2))
    # Any grid, not a square one alone: the image size is the square that it gets.
    other = FrameEncoder(lambda images: images.permute(0, 2, 3, 1)[:, ::2], image_size=40, frames_batch_size=1)
    assert other.encode(frames(3), GRID, CPU).grid == (20, 40)
    assert other.frames_encoded == 3


@pytest.mark.parametrize(("resize", "grid"), [("square", (4, 4)), ("grid", GRID)])
def test_an_encoder_with_a_patch_size_gets_whole_patches(resize: str, grid: tuple[int, int]) -> None:
    module = Patches()
    teacher = FrameEncoder(FrozenEncoder(module, patch_size=8), image_size=32, resize=resize)
    found = teacher.encode(frames(), GRID, CPU)
    assert found.grid == grid == teacher.grid(GRID)
    if resize == "square":
        with torch.no_grad():
            assert torch.equal(found.features, module(frames() / 255).flatten(1, 2))


def test_by_the_grid_an_encoder_without_a_patch_size_gets_squares_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher = FrameEncoder(Patches(), image_size=24, resize="grid")
    with caplog.at_level(logging.INFO, "crepa_kernels"):
        assert teacher.encode(frames(), GRID, CPU).grid == (3, 3)
        teacher.encode(frames(), GRID, CPU)
    assert teacher.grid(GRID) is None
    assert [record.getMessage() for record in caplog.records] == [
        "Patches says no patch size: frames are 24 x 24, not by the grid"
    ]


def test_it_is_frozen_and_ignores_autocast() -> None:
    module = Patches().train()
    expected = FrameEncoder(module, image_size=32).encode(frames(), GRID, CPU).features
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    weight = nn.Parameter(torch.eye(3))

    def products(images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 2, 3, 1) @ weight

    for source in (module, products):
        teacher = FrameEncoder(source, image_size=32)
        with torch.autocast("cpu", torch.bfloat16):
            found = teacher.encode(frames(), GRID, CPU).features
        assert found.dtype == torch.float32
        assert not found.requires_grad
    assert torch.equal(FrameEncoder(module, image_size=32).encode(frames(), GRID, CPU).features, expected)


def test_features_made_in_inference_mode_can_be_learned_from() -> None:
    found = FrameEncoder(torch.inference_mode()(lambda images: images.permute(0, 2, 3, 1)), image_size=16)
    features = found.encode(frames(), GRID, CPU).features
    assert not features.is_inference()


def test_the_feature_size_is_asked_once_and_only_where_it_is_not_said() -> None:
    asked: list[tuple[int, ...]] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(images.shape))
        return blank(len(images))

    teacher = FrameEncoder(encode, image_size=32)
    assert [teacher.feature_size(), teacher.feature_size()] == [5, 5]
    assert asked == [(1, 3, 32, 32)]
    assert FrameEncoder(FrozenEncoder(encode, feature_size=7), image_size=32).feature_size() == 7
    by_grid = FrameEncoder(FrozenEncoder(lambda images: blank(1, 1, 1), patch_size=40), image_size=32, resize="grid")
    assert by_grid.feature_size() == 5
    assert len(asked) == 1


def test_a_callable_that_needs_no_argument_loads_and_any_other_takes_frames() -> None:
    module, wrapped = Patches(), FrozenEncoder(Patches(), patch_size=8)

    def load(folder: str | None = None) -> nn.Module:
        return module

    for loader in (load, lambda: module, lambda: wrapped, Patches, tiny_dinov2):
        teacher = FrameEncoder(loader, image_size=56)
        assert teacher.feature_size() is None
        assert teacher.encode(frames(), GRID, CPU).features.shape[-1] == (32 if loader is tiny_dinov2 else 5)
    for encode in (lambda images: blank(len(images)), lambda images, size=5: blank(len(images), size=size)):
        assert FrameEncoder(encode, image_size=32).feature_size() == 5
    assert encoder_of(wrapped) is wrapped


def both(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first + second


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (both, r"a callable without arguments .*, got both\(first"),
        (3, "encoder must be a module or callable .* got int"),
        ({}, "got dict"),
        (lambda: torch.ones(1), r"loads must be a module or callable .* got Tensor"),
        (lambda: lambda: Patches(), r"loads must be a module or callable that maps frames"),
        (lambda: "dinov2_vits14", r"loads must be .* got str"),
    ],
)
def test_what_is_no_encoder_is_named(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameEncoder(source, image_size=28).load(CPU)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encode": 3}, "encode=.* must be a module or callable .* got int"),
        ({"encode": both}, r"encode=.* got both\(first"),
        ({"encode": Patches}, r"encode=.* got Patches\("),
        ({"encode": nn.Conv2d(3, 5, 8, device="meta")}, r"encoder Conv2d.* has no weights yet \(meta device\): load"),
        ({"encode": len, "name": 3}, r"name=\.\.\.\) must be text, got 3"),
        ({"encode": len, "key": 3}, r"key=\.\.\.\) must be text, got 3"),
        ({"encode": len, "feature_size": 0}, r"feature_size=\.\.\.\) must be an integer of at least 1, got 0"),
        ({"encode": len, "patch_size": 1.5}, r"patch_size=\.\.\.\) must be an integer of at least 1, got 1.5"),
        ({"encode": len, "patch_size": True}, r"patch_size=\.\.\.\) must be an integer of at least 1, got True"),
    ],
)
def test_a_record_that_cannot_be_is_one_clear_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenEncoder(**given)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (answering(lambda images: [1.0]), "must answer a tensor .* got list"),
        (answering(lambda images: blank()[0]), r"must answer features \(n, h, w, E\) with n = 2, got \(4, 4, 5\)"),
        (answering(lambda images: blank(3)), r"with n = 2, got \(3, 4, 4, 5\)"),
        (answering(lambda images: blank(height=0)), r"with n = 2, got \(2, 0, 4, 5\)"),
        (answering(lambda images: blank().to("meta")), "a dense tensor with values, got one on the meta device"),
        (answering(lambda images: blank().to_sparse()), "a dense tensor with values, got one of layout torch.sparse"),
        (answering(lambda images: blank().long()), r"floating-point features, got torch.int64"),
        (answering(lambda images: blank(), feature_size=6), "must answer E = 6 by its feature_size, got 5"),
        (answering(lambda images: blank(), patch_size=16), r"a grid of 2 x 2 by its patch_size = 16, got 4 x 4"),
        (answering(lambda images: blank(height=5), patch_size=8), r"a grid of 4 x 4 .* got 5 x 4: .*\(n, h, w, E\)"),
        (answering(torch.enable_grad()(lambda images: blank().requires_grad_())), "features with a gradient"),
        (answering(lambda images: blank(), patch_size=14), "crepa_encoder_image_size = 32 must be a multiple .* 14"),
    ],
)
def test_a_wrong_answer_names_the_encoder_and_the_rule(encoder: FrozenEncoder, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        FrameEncoder(encoder, image_size=32).encode(frames(), GRID, CPU)
    assert "mine" in str(error.value) or "patch size" in str(error.value)


@pytest.mark.parametrize("odd", [{"size": 6}, {"height": 5}], ids=str)
def test_answers_that_differ_between_batches_of_frames_are_an_error(odd: dict[str, int]) -> None:
    shapes = iter(({}, odd))
    teacher = FrameEncoder(lambda images: blank(len(images), **next(shapes)), image_size=32, frames_batch_size=1)
    with pytest.raises(ValueError, match=r"the encoder <lambda> must answer one \(h, w, E\) for frames of one size"):
        teacher.encode(frames(), GRID, CPU)


def test_an_encoder_that_says_another_width_than_before_is_an_error() -> None:
    sizes = iter((5, 6))
    teacher = FrameEncoder(lambda images: blank(len(images), size=next(sizes)), image_size=32)
    assert teacher.feature_size() == 5
    with pytest.raises(ValueError, match=r"must answer E = 5 .* got 6"):
        teacher.encode(frames(), GRID, CPU)


def test_the_key_is_that_of_a_modules_weights_or_the_callers() -> None:
    first, key = Patches(), FrozenEncoder(Patches()).content_key()
    assert key == FrozenEncoder(first).content_key() == weights_key(first)
    keys = {key, FrozenEncoder(Patches(seed=1)).content_key(), FrozenEncoder(Patches().bfloat16()).content_key()}
    with torch.no_grad():
        first.convolution.weight[0, 0, 0, 0] += 1
        keys.add(weights_key(first))
        first.mean += 1  # a buffer that no checkpoint has
        keys.add(weights_key(first))
    assert len(keys) == 5
    assert FrozenEncoder(first, key="mine").content_key() == "mine"
    for without in (nn.Identity(), lambda images: images):
        assert FrozenEncoder(without).content_key() is None
    assert FrozenEncoder(lambda images: images, key="v2").content_key() == "v2"


def test_a_key_is_of_every_byte_however_large_a_tensor_is(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_key(Patches())
    monkeypatch.setattr("crepa_kernels.teachers.encoders.PIECE", 7)
    assert weights_key(Patches()) == whole


def test_a_name_is_registered_for_the_settings() -> None:
    encoder = FrozenEncoder(Patches(), "patches of 8", feature_size=5)
    register_encoder(encoder)
    assert encoder_of("patches of 8") is encoder
    for name in ("dinov2_vits14", "dinov2_s", "efficientnet_lite0"):
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            register_encoder(FrozenEncoder(Patches(), name, feature_size=5))
    with pytest.raises(ValueError, match="the encoder mine must say its feature_size"):
        register_encoder(FrozenEncoder(Patches(), "mine"))
    with pytest.raises(ValueError, match="register_encoder takes a FrozenEncoder, got Patches"):
        register_encoder(Patches())  # type: ignore[arg-type]


class Moved(Patches):
    """Keeps where it was sent, and the types of devices that frames came on."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []
        self.saw: list[str] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.sent.append(str(args[0]))
        return super().to(*args, **kwargs)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        self.saw.append(frames.device.type)
        return super().forward(frames)


def test_an_encoder_can_work_on_a_device_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The meta device stands for the one that the model is on: it has shapes and no values."""
    tiny_dinov2(tmp_path)
    module, there = Moved(), torch.device("meta")
    encoder = FrameEncoder(FrozenEncoder(module, patch_size=8), image_size=32, device="cpu")
    with caplog.at_level(logging.WARNING):
        found = encoder.encode(frames(), GRID, there)
    assert (module.sent, module.saw) == (["cpu"], ["cpu"])
    assert found.features.device == there
    assert not caplog.records  # it was meant
    assert encoder.feature_size(there) == 5
    loaded = FrameEncoder(str(tmp_path), image_size=28, device="cpu").load(there)
    assert loaded.place(there) == CPU


def test_an_offloaded_encoder_is_on_the_cpu_between_its_uses() -> None:
    module = Moved()
    encoder = FrameEncoder(FrozenEncoder(module, patch_size=8), image_size=32, offload=True)
    plain = FrameEncoder(FrozenEncoder(Patches(), patch_size=8), image_size=32)
    for _ in range(2):
        found = encoder.encode(frames(), GRID, CPU)
    assert module.sent == ["cpu"] * 4  # to where the frames are, and back
    assert found.features.equal(plain.encode(frames(), GRID, CPU).features)


def test_an_encoder_that_was_given_is_left_where_it_is() -> None:
    module = Moved()
    FrameEncoder(FrozenEncoder(module, patch_size=8), image_size=32).encode(frames(), GRID, CPU)
    assert module.sent == []

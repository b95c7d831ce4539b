"""docs/scaling.md: its tables are those of what was counted, which is what a model has."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benches.published import MODELS
from benches.scaling import (
    GPUS,
    PAGE,
    all_reduced,
    by_gpus,
    count,
    cpu_rate,
    crepa_in_ddp,
    full_sharded,
    lora_sharded,
    lora_whole,
    rendered,
    stored,
)
from crepa_kernels.models.families import FAMILIES


def test_the_page_is_what_was_counted() -> None:
    page = PAGE.read_text()
    assert rendered(page, *stored()) == page
    blank = re.sub(r"(<!-- computed: [\w ]+ -->\n).*?<!-- end -->", r"\1<!-- end -->", page, flags=re.DOTALL)
    assert rendered(blank, *stored()) == page
    with pytest.raises(ValueError, match="computed: states"):
        rendered(page.replace("<!-- computed: states -->", ""), *stored())


def test_every_family_of_videos_is_in_it() -> None:
    models, _ = stored()
    assert [each.title for each in models] == [each.title for each in MODELS if each.scales]
    assert {each.family for each in MODELS if each.scales} == {row.name for row in FAMILIES if not row.images}


@pytest.mark.parametrize(
    "title",
    ["CogVideoX 2B", *(pytest.param(each.title, marks=pytest.mark.slow) for each in MODELS if each.scales)],
)
def test_a_model_is_counted_as_it_is_stored(title: str) -> None:
    (model,) = (each for each in MODELS if each.title == title)
    assert count(model) == next(each for each in stored()[0] if each.title == title)


def test_what_is_divided_is_divided_and_what_is_sent_is_what_a_ring_sends() -> None:
    first = stored()[0][0]
    whole = replace(first, block=0)
    assert [lora_sharded(whole, n) * n for n in GPUS] == pytest.approx([lora_whole(whole)] * len(GPUS))
    assert full_sharded(first, 1) == 16 * (first.parameters + first.projector)
    assert full_sharded(first, 4) == full_sharded(first, 1) / 4 + 2 * 2 * first.block
    # Each of two sends a half, and then the other half's sum.
    assert (all_reduced(1000, 1), all_reduced(1000, 2)) == (0, 4000)
    assert crepa_in_ddp(first, 2) == 4 * first.projector
    assert by_gpus([first], lambda _, n: n * 2**20, (1, 2)).splitlines()[2] == f"| {first.title} | 1 MiB | 2 MiB |"


def test_the_rate_of_the_cpu_is_of_the_stored_step() -> None:
    row = {"tokens": [3, 12, 20], "median_ms": {"live": 500.0, "cached": 250.0}}
    once = cpu_rate({"encoder": "small", "image_size": 224, "families": [row]})
    row = {"tokens": [3, 12, 20], "median_ms": {"live": 750.0, "cached": 250.0}}
    assert cpu_rate({"encoder": "small", "image_size": 224, "families": [row]}) == pytest.approx(once / 2)

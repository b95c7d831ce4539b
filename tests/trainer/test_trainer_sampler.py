"""The order of clips and their noise: every clip once an epoch, one bucket a batch, the same for any ranks."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from crepa_trainer.data.sampler import ClipOrder, Position, RankPositions, collate, draw_noise

BUCKETS = ["wide"] * 7 + ["tall"] * 4 + ["square"]


def batches(order: ClipOrder, number: int) -> list[list[int]]:
    """The first `number` batches of the stream, over all ranks."""
    places = itertools.product(range(number), range(order.accumulation), range(order.world))
    return [order.clips(Position(*place)) for place in itertools.islice(places, number)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 20])
def test_every_epoch_has_each_clip_once(batch_size: int) -> None:
    order = ClipOrder(BUCKETS, batch_size=batch_size, seed=5)
    stream = batches(order, 3 * order.batches_per_epoch)
    epochs = [stream[n : n + order.batches_per_epoch] for n in range(0, len(stream), order.batches_per_epoch)]
    for epoch in epochs:
        assert Counter(itertools.chain(*epoch)) == Counter(range(len(BUCKETS)))
    if batch_size < 20:
        assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_is_of_one_bucket_and_only_the_last_of_a_bucket_is_short() -> None:
    order = ClipOrder(BUCKETS, batch_size=3, seed=1)
    epoch = batches(order, order.batches_per_epoch)
    kinds = [{BUCKETS[index] for index in batch} for batch in epoch]
    assert all(len(kind) == 1 for kind in kinds)
    sizes = Counter((kind.pop(), len(batch)) for kind, batch in zip(kinds, epoch, strict=True))
    assert sizes == {("wide", 3): 2, ("wide", 1): 1, ("tall", 3): 1, ("tall", 1): 1, ("square", 1): 1}


def test_buckets_are_mixed_within_an_epoch() -> None:
    order = ClipOrder(["a"] * 20 + ["b"] * 20, batch_size=1, seed=0)
    firsts = [batch[0] for batch in batches(order, 20)]
    assert 4 < sum(index < 20 for index in firsts) < 16


@pytest.mark.parametrize(("world", "accumulation"), [(2, 2), (4, 1), (1, 4)])
def test_ranks_share_the_stream_that_one_process_has_alone(world: int, accumulation: int) -> None:
    alone = ClipOrder(BUCKETS, batch_size=2, accumulation=4, seed=3)
    shared = ClipOrder(BUCKETS, batch_size=2, accumulation=accumulation, world=world, seed=3)
    for step in range(9):
        ours = [Position(step, micro, rank) for micro in range(accumulation) for rank in range(world)]
        theirs = [Position(step, micro, 0) for micro in range(4)]
        assert [shared.clips(p) for p in ours] == [alone.clips(p) for p in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            shape = (len(shared.clips(mine)), 2, 3)
            noise, draw = draw_noise(shape, shared.generators(mine))
            expected, other_draw = draw_noise(shape, alone.generators(other))
            assert torch.equal(noise, expected)
            assert torch.equal(draw, other_draw)


def test_a_rank_that_starts_later_goes_on_where_it_would_have_been() -> None:
    order = ClipOrder(BUCKETS, batch_size=2, accumulation=3, world=2, seed=9)
    whole = [order.clips(position) for position, _ in itertools.islice(RankPositions(3, rank=1), 60)]
    again = ClipOrder(BUCKETS, batch_size=2, accumulation=3, world=2, seed=9)
    later = [again.clips(position) for position, _ in itertools.islice(RankPositions(3, rank=1, first_step=7), 39)]
    assert later == whole[21:]


def test_epochs_may_be_asked_for_in_any_order() -> None:
    order = ClipOrder(BUCKETS, batch_size=2, seed=4)
    steps = [0, 30, 1, 12, 11, 0]
    fresh = [ClipOrder(BUCKETS, batch_size=2, seed=4).clips(Position(step, 0, 0)) for step in steps]
    assert [order.clips(Position(step, 0, 0)) for step in steps] == fresh


def test_noise_differs_between_clips_places_and_seeds() -> None:
    draws = [
        draw_noise((1, 4), [generator])[0]
        for seed, step in itertools.product((0, 1), range(3))
        for generator in ClipOrder(["a"] * 4, batch_size=2, seed=seed).generators(Position(step, 0, 0))
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 12


def test_draws_for_the_noise_level_are_standard_normal() -> None:
    generators = ClipOrder(["a"] * 2000, batch_size=2000).generators(Position(0, 0, 0))
    _, draws = draw_noise((2000, 1), generators)
    # Mean and deviation of 2000 draws stray by 1/sqrt(2000) = 0.022 and half of that.
    assert abs(float(draws.mean())) < 0.1
    assert abs(float(draws.std()) - 1) < 0.06


def test_texts_of_different_lengths_are_filled_with_zeros_in_a_batch() -> None:
    items = [
        {"text": torch.full((length, 2), 1.0), "mask": torch.ones(length, dtype=torch.bool), "pooled": torch.ones(3)}
        for length in (1, 3)
    ]
    batch = collate(items)
    assert batch["text"][..., 0].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].tolist() == [[True, False, False], [True, True, True]]
    assert batch["pooled"].shape == (2, 3)


def test_no_clips_are_an_error() -> None:
    with pytest.raises(ValueError, match="no clip"):
        ClipOrder([], batch_size=1)

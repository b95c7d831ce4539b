"""Which clips each micro-batch of each rank takes, and their noise: pure functions of the seed and the position.

Nothing here has a state, so a run that goes on from a checkpoint sees what it would have seen, and two ranks see what
one process with twice their micro-batches sees.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Position:
    """One micro-batch of a run: optimiser step, micro-batch within it, and the rank that takes it."""

    step: int
    micro: int
    rank: int


class ClipOrder:
    """Batches of one bucket each: every epoch has each clip once, in an order of its own.

    In an epoch each bucket's clips are permuted and cut into batches, then the batches of all buckets are permuted.
    A bucket's last batch of an epoch may be shorter. Batches are dealt out in turn: micro-batch by micro-batch, and
    within one to rank after rank.

    Args:
        buckets: each clip's bucket; clips of one batch have the same.
        batch_size: clips of a micro-batch on each rank.
        accumulation: micro-batches of an optimiser step.
        world: number of ranks.
        seed: of the order and of the noise.

    Raises:
        ValueError: no clip at all.
    """

    def __init__(
        self, buckets: Sequence[Hashable], *, batch_size: int, accumulation: int = 1, world: int = 1, seed: int = 0
    ) -> None:
        if not buckets:
            raise ValueError("there is no clip to train on")
        members: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate(buckets):
            members.setdefault(bucket, []).append(index)
        self._buckets = [np.array(indices) for indices in members.values()]
        self.batch_size, self.accumulation, self.world, self.seed = batch_size, accumulation, world, seed
        self.batches_per_epoch = sum(-(-len(bucket) // batch_size) for bucket in self._buckets)
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def number(self, position: Position) -> int:
        """The batch's number in the one stream that all ranks take from."""
        return (position.step * self.accumulation + position.micro) * self.world + position.rank

    def clips(self, position: Position) -> list[int]:
        """Indices of the micro-batch's clips."""
        epoch, place = divmod(self.number(position), self.batches_per_epoch)
        return self._epoch(epoch)[place]

    def epoch(self, position: Position) -> float:
        """How often the data was seen before this micro-batch."""
        return self.number(position) / self.batches_per_epoch

    def generators(self, position: Position) -> list[torch.Generator]:
        """The generator on the CPU for each clip of the micro-batch: its noise depends on nothing else."""
        first = self.number(position) * self.batch_size
        return [self._generator(first + slot) for slot in range(len(self.clips(position)))]

    def _generator(self, slot: int) -> torch.Generator:
        (state,) = np.random.SeedSequence((self.seed, slot)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state))

    def _shuffled(self, epoch: int) -> list[list[int]]:
        # The third number tells these draws from those of the slots' generators.
        draw = np.random.default_rng((self.seed, epoch, 1))
        batches = []
        for bucket in self._buckets:
            order = draw.permutation(bucket).tolist()
            batches += [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[place] for place in draw.permutation(len(batches))]


class RankBatches:
    """The endless batch sampler of one rank's data loader, from the first micro-batch of `first_step` on."""

    def __init__(self, order: ClipOrder, rank: int, first_step: int = 0) -> None:
        self.order, self.rank, self.first_step = order, rank, first_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            for micro in range(self.order.accumulation):
                yield self.order.clips(Position(step, micro, self.rank))
            step += 1


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Noise of `shape` (B, ...) and a normal draw (B,) for the noise level, each clip's by its own generator."""
    draws, noises = [], []
    for generator in generators:
        draws.append(torch.randn((), generator=generator))
        noises.append(torch.randn(tuple(shape[1:]), generator=generator))
    return torch.stack(noises), torch.stack(draws)


def collate(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of clips of one bucket; of texts that differ in length the shorter end with zeros, masks with False."""
    return {name: _stacked([item[name] for item in items]) for name in items[0]}


def _stacked(tensors: list[Tensor]) -> Tensor:
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors)
    return pad_sequence(tensors, batch_first=True)

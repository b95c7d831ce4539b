"""Which clips each micro-batch of each rank takes, and their noise: pure functions of the seed and the position.

Nothing here has a state, so a run that goes on from a checkpoint sees what it would have seen, two ranks see what
one process with twice their micro-batches sees, and any number of worker processes makes the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..stopping import leave_signals_to_the_trainer

# Of an item, the teacher's side.
TEACHER_NAMES = ("pixels", "features", "feature_grid")
# Micro-batches that each worker makes ahead; all of them are in memory.
MADE_AHEAD = 2


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
        self._epochs: dict[int, list[list[int]]] = {}

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

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            # The ranks of one step may be on both sides of an epoch's end.
            last = {number: batches for number, batches in self._epochs.items() if number == epoch - 1}
            self._epochs = {**last, epoch: self._shuffled(epoch)}
        return self._epochs[epoch]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        # The third number tells these draws from those of the slots' generators.
        draw = np.random.default_rng((self.seed, epoch, 1))
        batches = []
        for bucket in self._buckets:
            order = draw.permutation(bucket).tolist()
            batches += [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[place] for place in draw.permutation(len(batches))]


class RankPositions(Sampler[tuple[Position, bool]]):
    """The endless sampler of one rank's loader: its positions from the first micro-batch of `first_step` on.

    Each comes with whether the teacher's side is wanted, which `without_teacher` says for all that are asked for from
    then on; a few are always under way.
    """

    def __init__(self, accumulation: int, rank: int, first_step: int = 0) -> None:
        self.accumulation, self.rank, self.first_step = accumulation, rank, first_step
        self.without_teacher = False

    def __iter__(self) -> Iterator[tuple[Position, bool]]:
        step = self.first_step
        while True:
            for micro in range(self.accumulation):
                yield Position(step, micro, self.rank), not self.without_teacher
            step += 1


class MicroBatch(NamedTuple):
    """What one micro-batch trains on.

    Attributes:
        clips: what the items have besides, with a batch axis, such as `latents` (B, C, T, h, w) and texts.
        teacher: what CREPA learns from, as arguments of `CrepaRegularizer.loss`; empty where it was not wanted.
        noise: of the latents' shape.
        time: (B,), noise levels in [0, 1].
    """

    clips: dict[str, Tensor]
    teacher: dict[str, Any]
    noise: Tensor
    time: Tensor


class MicroBatches(Dataset[MicroBatch | Exception]):
    """Micro-batches by their positions, with their noise, on the CPU: each a pure function of its position.

    Args:
        clips: items that `collate` makes batches of, with `latents` (C, T, h, w) each.
        order: which of them each position takes.
        noise_level: as `TrainingFamily.noise_level`.
    """

    def __init__(
        self,
        clips: Dataset[dict[str, Tensor]],
        order: ClipOrder,
        noise_level: Callable[[Tensor, Sequence[int]], Tensor],
    ) -> None:
        self.clips, self.order, self.noise_level = clips, order, noise_level

    def __getitem__(self, wanted: tuple[Position, bool]) -> MicroBatch | Exception:
        """The micro-batch of a position, with or without the teacher's side; or the error that a user can put right.

        As a value, because what is raised in a worker arrives with that process's traceback for a message.
        """
        try:
            return self._shared(self._made(*wanted))
        except (ValueError, OSError) as error:
            return error

    def _made(self, position: Position, with_teacher: bool) -> MicroBatch:
        clips: Any = self.clips
        clips.without_teacher = not with_teacher
        items = collate([clips[index] for index in self.order.clips(position)])
        teacher: dict[str, Any] = {name: items.pop(name) for name in TEACHER_NAMES if name in items}
        if "feature_grid" in teacher:
            teacher["feature_grid"] = tuple(teacher["feature_grid"][0].tolist())
        noise, draw = draw_noise(items["latents"].shape, self.order.generators(position))
        time = self.noise_level(draw, items["latents"].shape[1:])
        return MicroBatch(items, teacher if with_teacher else {}, noise, time)

    @staticmethod
    def _shared(batch: MicroBatch) -> MicroBatch:
        """In a worker, moved to the memory that it shares: where that is full, the thread that sends it is silent."""
        if get_worker_info() is None:
            return batch
        tensors = (*batch.clips.values(), *batch.teacher.values(), batch.noise, batch.time)
        try:
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    tensor.share_memory_()
        except RuntimeError as error:
            raise OSError(f"no shared memory for a batch ({error}): give it more, or lower workers") from error
        return batch


@contextmanager
def micro_batches(
    batches: MicroBatches, positions: RankPositions, *, workers: int, device: torch.device
) -> Iterator[Iterator[MicroBatch]]:
    """Gives the batches of `positions` in their order, made ahead by `workers` processes; by this one where it is 0.

    device: they are for; for a CUDA device they are in pinned memory, from which it copies without the host.

    Raises:
        ValueError, OSError: in the block, as reading a clip does; ChildProcessError where a worker was killed.
    """
    loader: DataLoader[MicroBatch | Exception] = DataLoader(
        batches,
        sampler=positions,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=MADE_AHEAD if workers else None,
        worker_init_fn=leave_signals_to_the_trainer,
        pin_memory=device.type == "cuda",
        # Of its own, so that starting it draws nothing from the state that checkpoints keep.
        generator=torch.Generator(),
    )
    try:
        # Closed at the end, and with it the workers.
        with closing(_without_errors(loader)) as made:
            yield made
    except RuntimeError as error:
        # torch raises it in whatever this process is at when a worker is gone.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise ChildProcessError(
            f"{str(error).rstrip(' .')}: workers = {workers} needs more memory than there is: lower it, 0 reads clips "
            "in the training process, and go on with --resume latest"
        ) from error


def _without_errors(loader: DataLoader[MicroBatch | Exception]) -> Generator[MicroBatch, None, None]:
    for batch in _while_workers_live(loader):
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _while_workers_live(loader: DataLoader[MicroBatch | Exception]) -> Generator[MicroBatch | Exception, None, None]:
    try:
        yield from loader
    except BaseException as error:
        # The workers end when nothing refers to the loader's iterator any more. What was raised inside it does, by its
        # frames: whoever keeps the error would keep the workers, and an interpreter that ends with one waits for them.
        raised: BaseException | None = error
        while raised is not None:
            clear_frames(raised.__traceback__)
            raised = raised.__cause__ or raised.__context__
        # Killed while it sent a batch, and not known to be gone yet. torch says "Caught" of what a worker raised.
        if loader.num_workers and isinstance(error, (EOFError, ConnectionError)) and "Caught" not in str(error):
            raise RuntimeError("DataLoader worker (pid unknown) is gone while it sent a batch") from error
        raise


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

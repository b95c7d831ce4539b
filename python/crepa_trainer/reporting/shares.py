"""What each of several processes keeps of a model under FSDP2, and what it gathers of the others' while it computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

# Of the blocks, the one that computes and the next one, which is on its way.
_BLOCKS_WHOLE = 2


@dataclass(frozen=True)
class Weight:
    """A parameter: bytes of a number, whether it is trained, and its block, None in none."""

    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    block: int | None = None

    def kept(self, processes: int) -> int:
        """Numbers of it on each process: it is cut along its first axis, and the shares are filled up to one size."""
        first, *others = self.shape or (1,)
        return -(-first // processes) * prod(others)


@dataclass(frozen=True)
class Shares:
    """Of a model on each process.

    Attributes:
        frozen: bytes of its share of frozen weights; `trained`: numbers in its share of the others, of which `model`
            are not the projector's.
        gathered: bytes of the weights that are whole in a forward and a backward: two blocks, and what is in none.
    """

    frozen: int
    trained: int
    model: int
    gathered: int

    @classmethod
    def of(cls, weights: Iterable[Weight], projector: Iterable[Weight], processes: int) -> Shares:
        """projector: CREPA's weights, which are gathered by themselves while no block is."""
        frozen = model = 0
        units: dict[int | None, int] = {None: 0}
        for each in weights:
            kept = each.kept(processes)
            frozen += 0 if each.trained else kept * each.itemsize
            model += kept if each.trained else 0
            units[each.block] = units.get(each.block, 0) + prod(each.shape) * each.itemsize
        rest = units.pop(None)
        blocks = sorted(units.values(), reverse=True)[:_BLOCKS_WHOLE]
        return cls(frozen, model + sum(each.kept(processes) for each in projector), model, rest + sum(blocks))

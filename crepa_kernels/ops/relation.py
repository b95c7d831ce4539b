"""``crepa_kernels::relate_frames``: the relational loss of one clip and its gradient, from rows of unit length.

With Z the student's rows, Y the teacher's and D = Z - Y, the differences of cosines of the tokens of frames f and k are
``A = Z_f Z_k' - Y_f Y_k' = Z_f D_k' + D_f Y_k'``, which loses nothing where Z is near Y, nor where it is near 0. No
matrix of all tokens by all tokens is made. There are two ways:

1. *By features*, for the square of A. From the E x E matrices m = Z'Z, q = D'Z, b = D'D of each frame, and their sums
   M_f, Q_f, B_f over the frames k that f is compared with, times w[f, k]::

       sum_k w |A|^2 = 2 <b_f, M_f - Q_f> + 2 <q_f, Q_f'> + <b_f, B_f - 2 Q_f>     (in the sum over all f)
       dZ_f          = 4 (D_f (M_f - Q_f) + Z_f Q_f)

   which are five products. Where all pairs of frames count alike, the clip is one frame.
2. *By tokens*: a tile of A is made, its part of the cost and of ``dZ_f = 2 sum_k w phi'(A) Z_k`` taken, and it is
   dropped. Both directions of a pair of frames are one tile. With a margin ``crepa_kernels::relate_tiles`` does the
   same by Triton kernels.

It is an operator so that a compiled loss has one node for a clip, and not one for every product of every tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .namespace import add_op_namespace_prefix, ops
from .register import define, keeps_type

# Numbers of a tile of A: what a CPU's caches hold, and what fills a GPU.
TILE = {"cpu": 1 << 20}
TILE_ELSEWHERE = 1 << 24

SCHEMA = "(Tensor z, Tensor d, int[] offsets, float[] weights, float? margin, Tensor(a!) gradient) -> Tensor"
define("relate_frames", SCHEMA)
keeps_type("relate_frames")
relate_frames_op = ops.relate_frames.default


@torch.library.impl(add_op_namespace_prefix("relate_frames"), "CompositeExplicitAutograd")
def _relate_frames(
    z: Tensor, d: Tensor, offsets: Sequence[int], weights: Sequence[float], margin: float | None, gradient: Tensor
) -> Tensor:
    """The sum over frames f and k of w[f, k] times the mean of phi(A), in fp32 (fp64 for fp64 rows).

    Args:
        z, d: (T, M, E), Z and D; frames outside the loss are zero in both.
        offsets, weights: each |k - f| of the pairs of frames once, and their w[f, k].
        margin: phi(a) = max(|a| - margin, 0); None: a squared.
        gradient: (T, M, E) in the type of the result, written: M times its gradient with respect to Z; or empty.
    """
    into = gradient.zero_() if gradient.numel() else None
    pairs = Pairs(dict(zip(offsets, weights, strict=True)), len(z))
    if margin is None and not prefers_tokens(z.shape[1:], pairs, into is not None):
        found = by_features(z, d, into, pairs)
    else:
        found = by_tokens(z, d, into, pairs, margin)
    return found / z.shape[1] ** 2


@torch.library.register_fake(add_op_namespace_prefix("relate_frames"))
def _relate_frames_fake(
    z: Tensor, d: Tensor, offsets: Sequence[int], weights: Sequence[float], margin: float | None, gradient: Tensor
) -> Tensor:
    return z.new_empty((), dtype=wide_type(z))


class Pairs:
    """Which of a clip's frames are compared: by the offset, w; and whether those are all, or all others, with w = 1."""

    def __init__(self, weights: dict[int, float], frames: int) -> None:
        self.weights = weights
        self.frames = frames
        alike = all(weight == 1 for weight in weights.values())
        self.all = alike and sorted(weights) == list(range(frames))
        self.all_others = alike and sorted(weights) == list(range(1, frames))
        self.own = frames if 0 in weights else 0
        self.apart = 2 * sum(frames - offset for offset in weights if offset)


def wide_type(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def tile_size(rows: Tensor) -> int:
    return TILE.get(rows.device.type, TILE_ELSEWHERE)


def prefers_tokens(frame: Sequence[int], pairs: Pairs, with_gradient: bool) -> bool:
    """Whether the squares take fewer multiplications by tokens than by features; ``frame``: (M, E)."""
    frames, (tokens, features) = pairs.frames, frame
    # A tile takes two products for both of its directions, a frame's own tile one; each direction has a gradient.
    by_tokens = (pairs.own + pairs.apart) * (2 if with_gradient else 1) * tokens**2 * features
    sums = 0 if pairs.all or pairs.all_others else 3 * (pairs.own + pairs.apart)
    by_features = (frames * tokens * (5 if with_gradient else 3) + sums) * features**2
    return by_tokens < by_features


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and written in fp32 (fp64)."""
    if a.dtype == wide_type(a):
        return a @ b
    if a.is_cuda:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=wide_type(a))
    return a.to(wide_type(a)) @ b.to(wide_type(a))


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b."""
    if a.dtype != out.dtype:
        out.add_(_product(a, b))
    elif a.dim() == 2:
        out.addmm_(a, b)
    else:
        out.baddbmm_(a, b)


class _Moments(NamedTuple):
    """m = Z'Z, q = D'Z and b = D'D of some rows, each (E, E)."""

    m: Tensor
    q: Tensor
    b: Tensor

    def plus(self, other: _Moments, weight: float = 1.0) -> _Moments:
        return _Moments(*(torch.add(one, two, alpha=weight) for one, two in zip(self, other, strict=True)))


def _moments(z: Tensor, d: Tensor) -> _Moments:
    return _Moments(gram(z), _product(d.t(), z), gram(d))


def gram(rows: Tensor) -> Tensor:
    """rows' rows, (E, E). Of its four quarters one is another's mirror image, where they are large enough to gain."""
    half = rows.shape[1] // 2
    if half < 128:
        return _product(rows.t(), rows)
    left, right = rows[:, :half], rows[:, half:]
    across = _product(left.t(), right)
    return torch.cat((torch.cat((gram(left), across), 1), torch.cat((across.t(), gram(right)), 1)))


def by_features(z: Tensor, d: Tensor, gradient: Tensor | None, pairs: Pairs) -> Tensor:
    """The sum of w |A|^2 over all pairs of frames."""
    frames, weights = z.shape[0], pairs.weights
    if pairs.all:
        clip = _moments(z.flatten(0, 1), d.flatten(0, 1))
        _add_gradient(gradient, z, d, clip, range(frames))
        return _cost(clip, clip)
    total = z.new_zeros((), dtype=wide_type(z))
    reach, held = max(weights), dict[int, _Moments]()
    whole: _Moments | None = None
    for frame in range(frames):
        for ahead in range(frame, min(frame + reach, frames - 1) + 1):
            if ahead not in held:
                held[ahead] = _moments(z[ahead], d[ahead])
        if pairs.all_others and whole is None:
            whole = held[0]
            for ahead in range(1, frames):
                whole = whole.plus(held[ahead])
        sums = _around(held, frame, weights) if whole is None else whole.plus(held[frame], -1.0)
        total += _cost(held[frame], sums)
        _add_gradient(gradient, z, d, sums, range(frame, frame + 1))
        held.pop(frame - reach, None)
    return total


def _around(held: dict[int, _Moments], frame: int, weights: dict[int, float]) -> _Moments:
    """The weighted sum of the moments of the frames that ``frame`` is compared with."""
    sums = _Moments(*(torch.zeros_like(matrix) for matrix in held[frame]))
    for offset, weight in weights.items():
        for at in sorted({frame - offset, frame + offset} & held.keys()):
            for matrix, term in zip(sums, held[at], strict=True):
                matrix.add_(term, alpha=weight)
    return sums


def _cost(own: _Moments, sums: _Moments) -> Tensor:
    rest = torch.add(sums.b, sums.q, alpha=-2).add_(sums.m - sums.q, alpha=2)
    return (own.b * rest).sum() + 2 * (own.q * sums.q.t()).sum()


def _add_gradient(gradient: Tensor | None, z: Tensor, d: Tensor, sums: _Moments, frames: range) -> None:
    """Adds dZ / M of ``frames``, which ``sums`` is of."""
    if gradient is None:
        return
    of_d, of_z = ((matrix * (4 / z.shape[1])).to(z.dtype) for matrix in (sums.m - sums.q, sums.q))
    for frame in frames:
        _add_product(gradient[frame], d[frame], of_d)
        _add_product(gradient[frame], z[frame], of_z)


class OfRank(NamedTuple):
    """Which of a clip's rows a rank has: ``rows`` of its flattened frames from ``first`` on, of ``frames`` in all."""

    group: dist.ProcessGroup
    first: int
    frames: int
    rows: slice


def relate_ranks(
    z: Tensor, d: Tensor, weights: dict[int, float], margin: float | None, gradient: Tensor, own: OfRank
) -> Tensor:
    """As ``relate_frames`` of a clip whose rows several ranks have: this rank's share, the shares add up to it.

    By features the moments are added up over the ranks, (E, E) each. By tokens the rows of all are brought together,
    each rank takes tiles of its own, and the gradients are added up.

    Args:
        z, d: (T', M, E), the frames of which this rank has rows; zero where another rank has them.
        gradient: (T', M, E), written: of this rank's rows the whole gradient, elsewhere zero. Or empty.
    """
    into = gradient.zero_() if gradient.numel() else None
    pairs = Pairs(weights, own.frames)
    if margin is None and not prefers_tokens(z.shape[1:], pairs, into is not None):
        found = _ranks_by_features(z, d, into, pairs, own)
    else:
        found = _ranks_by_tokens(z, d, into, pairs, margin, own)
    return found / z.shape[1] ** 2


def _ranks_by_features(z: Tensor, d: Tensor, gradient: Tensor | None, pairs: Pairs, own: OfRank) -> Tensor:
    if pairs.all:
        clip = _moments(z.flatten(0, 1), d.flatten(0, 1))
        sums = torch.stack(clip)
        dist.all_reduce(sums, group=own.group)
        of_all = _Moments(*sums)
        _add_gradient(gradient, z, d, of_all, range(len(z)))
        return _cost(clip, of_all)
    mine = {own.first + frame: _moments(z[frame], d[frame]) for frame in range(len(z))}
    sums = z.new_zeros(own.frames, 3, z.shape[2], z.shape[2], dtype=wide_type(z))
    for frame, moments in mine.items():
        torch.stack(moments, out=sums[frame])
    dist.all_reduce(sums, group=own.group)
    held = {frame: _Moments(*matrices) for frame, matrices in enumerate(sums)}
    whole = _Moments(*sums.sum(dim=0)) if pairs.all_others else None
    total = z.new_zeros((), dtype=wide_type(z))
    for frame, moments in mine.items():
        around = _around(held, frame, pairs.weights) if whole is None else whole.plus(held[frame], -1.0)
        total += _cost(moments, around)
        _add_gradient(gradient, z, d, around, range(frame - own.first, frame - own.first + 1))
    return total


def _ranks_by_tokens(
    z: Tensor, d: Tensor, gradient: Tensor | None, pairs: Pairs, margin: float | None, own: OfRank
) -> Tensor:
    mine = slice(own.first, own.first + len(z))
    # No two ranks have the same row: their sum is every row.
    rows = z.new_zeros(2, own.frames, *z.shape[1:])
    rows[0, mine], rows[1, mine] = z, d
    dist.all_reduce(rows, group=own.group)
    of_all = None if gradient is None else gradient.new_zeros(rows.shape[1:])
    share = dist.get_rank(own.group), dist.get_world_size(own.group)
    total = by_tokens(rows[0], rows[1], of_all, pairs, margin, share)
    if gradient is not None and of_all is not None:
        dist.all_reduce(of_all, group=own.group)
        gradient.flatten(0, 1)[own.rows] = of_all[mine].flatten(0, 1)[own.rows]
    return total


class Tile(NamedTuple):
    """The rows ``part`` of the frames ``left`` against all rows of the frames ``right``, one by one; all weigh w."""

    left: slice
    right: slice
    part: slice
    weight: float

    @property
    def own(self) -> bool:
        """Whether the frames are compared with themselves; others stand for both directions of a pair."""
        return self.left == self.right


def tiles(frames: int, tokens: int, weights: dict[int, float], size: int, multiple: int = 1) -> Iterator[Tile]:
    """All pairs of frames of every offset, in tiles of about ``size`` numbers whose sides ``multiple`` divides."""
    width = -(-tokens // multiple) * multiple
    rows = min(width, max(multiple, size // width // multiple * multiple))
    together = max(1, size // width**2)
    for offset, weight in weights.items():
        for first in range(0, frames - offset, together):
            left = slice(first, min(first + together, frames - offset))
            right = slice(left.start + offset, left.stop + offset)
            for start in range(0, tokens, rows):
                yield Tile(left, right, slice(start, min(start + rows, tokens)), weight)


def joined(
    z: Tensor, d: Tensor, gradient: Tensor | None, pairs: Pairs
) -> tuple[Tensor, Tensor, Tensor | None, dict[int, float]]:
    """The rows and the weights of their frames: one frame, where one tile can have every pair of a clip's tokens."""
    if not (pairs.all and (z.shape[0] * z.shape[1]) ** 2 <= tile_size(z)):
        return z, d, gradient, pairs.weights
    whole = None if gradient is None else gradient.flatten(0, 1)[None]
    return z.flatten(0, 1)[None], d.flatten(0, 1)[None], whole, {0: 1.0}


def by_tokens(
    z: Tensor,
    d: Tensor,
    gradient: Tensor | None,
    pairs: Pairs,
    margin: float | None,
    share: tuple[int, int] = (0, 1),
) -> Tensor:
    """The sum of w phi(A) over all pairs of frames; the gradient is divided by the tokens of a frame.

    share: (rank, ranks), of the tiles every one that is this rank's.
    """
    tokens = z.shape[1]
    z, d, gradient, weights = joined(z, d, gradient, pairs)
    total = z.new_zeros((), dtype=wide_type(z))
    for tile in islice(tiles(z.shape[0], z.shape[1], weights, tile_size(z)), share[0], None, share[1]):
        left, right, part, weight = tile
        cost, slope = _cost_and_slope(_tile(z, d, left, right, part), margin)
        total += cost.mul_(weight * (1 if tile.own else 2))
        if gradient is None:
            continue
        slope = slope.mul_(2 * weight / tokens).to(z.dtype)
        _add_product(gradient[left, part], slope, z[right])
        if not tile.own:
            _add_product(gradient[right], slope.mT, z[left, part])
    return total


def _tile(z: Tensor, d: Tensor, left: slice, right: slice, part: slice) -> Tensor:
    """A (frames, rows, M) of the rows ``part`` of the frames ``left`` against all rows of the frames ``right``."""
    if left == right and part == slice(0, z.shape[1]):
        half = _product(d[left], torch.sub(z[left], d[left], alpha=0.5).mT)
        return half + half.mT
    tile = _product(z[left, part], d[right].mT)
    _add_product(tile, d[left, part], (z[right] - d[right]).mT)
    return tile


def _cost_and_slope(tile: Tensor, margin: float | None) -> tuple[Tensor, Tensor]:
    """The sum of phi(a), and phi'(a) in place of a: 0 where |a| is the margin."""
    if margin is None:
        return (tile * tile).sum(), tile.mul_(2)
    excess = (tile.abs() - margin).clamp_min_(0)
    # The sign of NaN is 0: where the loss is NaN, so is the gradient.
    return excess.sum(), torch.where(excess > 0, tile.sign_(), excess * 0)

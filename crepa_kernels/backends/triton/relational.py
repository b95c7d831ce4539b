"""The relational loss with a margin by Triton kernels: ``crepa_kernels::relate_tiles``, and its call.

All but the pairs of tokens is the ``torch`` backend's, which has rows and gradients of the projector. Triton is
imported when the operator runs; it is there without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...inputs import LossInputs
from ...neighbours import Relation
from ...ops.namespace import add_op_namespace_prefix, ops
from ...ops.register import define, keeps_type
from ...ops.relation import SCHEMA, Pairs, joined
from ..torch.relational import relational_torch

define("relate_tiles", SCHEMA)
keeps_type("relate_tiles")
relate_tiles_op = ops.relate_tiles.default


def relational_triton(inputs: LossInputs, relation: Relation) -> Tensor:
    """The relational loss of ``inputs``; differentiable once. Squares are the same products by features everywhere.

    So are tiles of tokens that other ranks have, which are shared out among them.
    """
    if relation.margin is None or inputs.context_group is not None:
        return relational_torch(inputs, relation)
    return relational_torch(inputs, relation, relate_tiles_op, inputs.compute_dtype)


@torch.library.impl(add_op_namespace_prefix("relate_tiles"), "CompositeExplicitAutograd")
def _relate_tiles(
    z: Tensor, d: Tensor, offsets: Sequence[int], weights: Sequence[float], margin: float | None, gradient: Tensor
) -> Tensor:
    """As ``relate_frames`` with a margin, of rows in fp32, fp16 or bf16."""
    from .pair_tiles import relate

    if margin is None:
        raise ValueError("relate_tiles has no squares: they are relate_frames'")
    tokens = z.shape[1]
    into = gradient.zero_() if gradient.numel() else None
    z, d, into, of_offsets = joined(z, d, into, Pairs(dict(zip(offsets, weights, strict=True)), len(z)))
    with torch.cuda.device_of(z):
        return relate(z, d, into, of_offsets, margin, 2 / tokens) / tokens**2


@torch.library.register_fake(add_op_namespace_prefix("relate_tiles"))
def _relate_tiles_fake(
    z: Tensor, d: Tensor, offsets: Sequence[int], weights: Sequence[float], margin: float | None, gradient: Tensor
) -> Tensor:
    return z.new_empty((), dtype=torch.float32)

"""Which tensors come in parts for nothing: the results of matrix products whose weights are cut.

An offer is made by the first op (a product may have the rows of its weight cut in any way, and
attention works on its rank's heads) and holds for what is computed from it, element by element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from xdsl.ir import Operation

from ..ir import nn, paged, quant
from ..ir.dist_cut import CutAttr
from ..ir.types import dims_of
from .cut_rules import operand_dims, reshaped, reshaped_unit
from .scale_cuts import group_of

WORDS = 16
"""Columns of a weight that a PE multiplies at a time: blocks of multiples of them are no trouble
to it (docs/isa.md)."""
SPARE = 1 / 8
"""How much more than without blocks a rank may have so that blocks stay whole: the part of a block
has a scale of its own, which costs less than to have a rank do nothing."""


class Padding(IntEnum):
    """What an op makes of the zeros that fill up a rank's part."""

    ZERO = 0
    FINITE = 1
    """Some number, which a weight of zero takes out of a product."""
    UNDEFINED = 2
    """It may be no number, and 0 * NaN is NaN: the tensor can only be cut without padding."""


@dataclass(frozen=True)
class Offer:
    """How a tensor can be cut without an exchange."""

    dim: int
    unit: int = 1
    """Elements that stay together."""
    fixed: CutAttr | None = None
    """The only cut, if there is no choice."""
    padding: Padding = Padding.ZERO
    block: int = 1
    """Elements that had better stay together, because their weights share scales."""

    def cut(self, size: int, ranks: int) -> CutAttr:
        """The cut that is taken if nothing asks for another one."""
        if self.fixed is not None:
            return self.fixed
        return CutAttr.even(self.dim, size, ranks, unit=self._best_unit(size, ranks))

    def _best_unit(self, size: int, ranks: int) -> int:
        """Whole blocks, or the largest parts of them that do not give one rank much more."""
        parts = [part for part in range(self.block, 0, -1) if self.block % part == 0]
        parts = [part for part in parts if part % WORDS == 0] or parts
        units = [math.lcm(self.unit, part) for part in parts]
        most = (1 + SPARE) * _share(size, ranks, units[-1])
        return next(unit for unit in units if _share(size, ranks, unit) <= most)


def _share(size: int, ranks: int, unit: int) -> int:
    """What the rank with the most has of a tensor that is cut into units."""
    return math.ceil(math.ceil(size / unit) / ranks) * unit


def offer_through(op: Operation, offers: Sequence[Offer | None]) -> Offer | None:
    """What the op's result offers, if its operands offer this."""
    match op:
        case nn.ReshapeOp():
            passed = [None if offers[0] is None else _reshaped(op, offers[0])]
        case quant.QuantizeOp() | quant.DequantizeOp():
            passed = [None if offers[0] is None else _scaled(op, offers[0])]
        case _:
            passed = [
                None if offer is None else _passed(op, index, offer)
                for index, offer in enumerate(offers)
            ]
    made = _joined(offer for offer in passed if offer is not None)
    return made and replace(made, padding=_padding_after(op, made.padding))


def _passed(op: Operation, index: int, offer: Offer) -> Offer | None:
    for dim in range(len(dims_of(op.results[0]))):
        dims = operand_dims(op, dim)
        if dims is not None and dims[index] == offer.dim:
            fixed = offer.fixed and offer.fixed.at(dim)
            return replace(offer, dim=dim, fixed=fixed)
    return None


def _scaled(op: quant.QuantizeOp | quant.DequantizeOp, offer: Offer) -> Offer | None:
    """Groups that share a scale stay whole."""
    group = group_of(op.y, op.scale)
    if group is None or offer.dim < len(dims_of(op.y)) - 1:
        return offer
    if offer.fixed is not None:
        return None if offer.fixed.divided(group) is None else offer
    return replace(offer, unit=math.lcm(offer.unit, group))


def _reshaped(op: nn.ReshapeOp, offer: Offer) -> Offer | None:
    before, after = dims_of(op.x), dims_of(op.y)
    if offer.fixed is not None:
        fixed = reshaped(offer.fixed, before, after)
        if fixed is None:
            return None
        return replace(offer, dim=fixed.dim.data, fixed=fixed)
    moved = reshaped_unit(offer.dim, offer.unit, before, after)
    block = reshaped_unit(offer.dim, offer.block, before, after)
    return moved and block and replace(offer, dim=moved[0], unit=moved[1], block=block[1])


def _joined(offers: Iterable[Offer]) -> Offer | None:
    """One offer that all operands can follow; what they cannot is cut where it is used."""
    found = list(offers)
    if not found:
        return None
    first = next((offer for offer in found if offer.fixed is not None), found[0])
    same = [offer for offer in found if offer.dim == first.dim]
    return replace(
        first,
        unit=math.lcm(*(offer.unit for offer in same)),
        block=math.lcm(*(offer.block for offer in same)),
        padding=max(offer.padding for offer in same),
    )


_KEEPS_ZERO = (
    nn.NegOp | nn.SiluOp | nn.TanhOp | nn.GeluOp | nn.SinOp | nn.ScaleOp | nn.CastOp | nn.MulOp
)
_MOVES = (
    nn.ReshapeOp
    | nn.TransposeOp
    | nn.SliceOp
    | nn.RopeOp
    | nn.MeanOp
    | paged.LastTokenOp
    | paged.WriteOp
    | quant.QuantizeOp
    | quant.DequantizeOp
)
_KEEPS_FINITE = (
    nn.AddOp | nn.SubOp | nn.SigmoidOp | nn.CosOp | nn.OffsetOp | nn.ExpandOp | nn.ConcatOp
)


def _padding_after(op: Operation, padding: Padding) -> Padding:
    match op:
        case nn.SqrtOp() if padding == Padding.ZERO:
            return padding
        case nn.ExpOp() if padding == Padding.ZERO:
            return Padding.FINITE
        case nn.RmsNormOp() if op.eps.value.data > 0:
            return padding
        case _ if isinstance(op, _KEEPS_ZERO | _MOVES):
            return padding
        case _ if isinstance(op, _KEEPS_FINITE):
            return max(padding, Padding.FINITE)
        case _:
            return Padding.UNDEFINED

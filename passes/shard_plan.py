"""Which values of a program are cut over the ranks: decided here, done by shard-tensor-parallel.

Each function is walked twice. Forwards, `cut_offers` says which tensors come in parts for nothing.
Backwards, ops ask for what they can use: attention for its heads, a product for its columns if its
input is offered so, the host for logits; and ops in between pass the question on (`cut_rules`).
Weights, caches and constants are cut as asked. What is asked for whole but comes in parts is
gathered, and what is asked for in parts but is whole is cut on the spot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Final

from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import BlockArgument, Operation, SSAValue

from ..ir import nn, paged, quant
from ..ir.dist_cut import CutAttr, refined
from ..ir.types import dims_of
from ..ir.verification import callee_name
from .cut_offers import Offer, Padding, offer_through
from .cut_products import Product, columns, operands_by_columns, rows_offer, scale_reason
from .cut_rules import operand_cuts
from .head_cuts import HeadSplit, split_heads

Operand = tuple[Operation, int]
"""An op and which of its operands."""


@dataclass(frozen=True)
class Ask:
    """What an operand needs: a cut, or any (`cut` is None); an operand without one is whole."""

    cut: CutAttr | None
    why: str


CACHE, VALUES = 1, 2
"""Operands of `paged.attention` and of `nn.attention`."""
W_SCALE = 2
"""The operand of `quant.linear` after its weight."""

ANY: Final = Ask(None, "")
"""The host takes whatever comes."""


@dataclass(frozen=True)
class Interface:
    """What is known about a function from its callers."""

    parameters: frozenset[int] = frozenset()
    """Arguments that are parameters in every call."""
    inputs: frozenset[int] = frozenset()
    """Arguments that the host gives, in every call."""
    returned: frozenset[int] = frozenset()
    """Results that go to the host and nowhere else."""


@dataclass
class FunctionPlan:
    """The decisions for one function."""

    function: FuncOp
    ranks: int
    interface: Interface
    callees: Mapping[str, FunctionPlan] = field(default_factory=dict)
    offers: dict[SSAValue, Offer] = field(default_factory=dict)
    asks: dict[Operand, Ask] = field(default_factory=dict)
    placed: dict[SSAValue, Ask] = field(default_factory=dict)
    """Values that are cut, and why."""
    summed: set[Product] = field(default_factory=set)
    """Products over a cut dimension: each rank has a part of the sum."""
    compared: set[quant.DynamicScaleOp] = field(default_factory=set)
    """Scales of tokens of which each rank has a part: the largest rank's counts."""
    looked_up: set[nn.EmbeddingOp] = field(default_factory=set)
    """Lookups in tables that are cut by rows."""
    sliced: dict[nn.SliceOp, Ask] = field(default_factory=dict)
    """Slices of parameters along the dimension of the cut, with what is asked of the slice."""
    bounds: dict[nn.SliceOp, tuple[int, int]] = field(default_factory=dict)
    """The same slices of a rank's part."""

    def run(self) -> FunctionPlan:
        """Decide everything."""
        ops = list(self.function.body.block.ops)
        for op in ops:
            self._offer(op)
        for op in reversed(ops):
            if isinstance(op, ReturnOp):
                self.asks.update({(op, index): ANY for index in self.interface.returned})
            elif isinstance(op, CallOp):
                self._place_call(op)
            elif op.results and not isinstance(op, nn.GetParameterOp | nn.ConstantOp):
                self._place(op, self._chosen(op.results[0]))
        for value in self._parameters():
            self._settle_slices(value)
        for argument in self.function.args:
            self._settle_argument(argument)
        return self

    # --- what the outside sees ---

    @property
    def argument_asks(self) -> list[Ask | None]:
        """How each argument is cut."""
        return [self.placed.get(argument) for argument in self.function.args]

    @property
    def result_asks(self) -> list[Ask | None]:
        """How each result is cut."""
        last = self.function.body.block.last_op
        assert last is not None
        return [
            self.placed.get(operand) if index in self.interface.returned else None
            for index, operand in enumerate(last.operands)
        ]

    # --- forwards ---

    def _offer(self, op: Operation) -> None:
        if len(op.results) != 1 or isinstance(op, CallOp):
            return
        offers = [self.offers.get(operand) for operand in op.operands]
        match op:
            case nn.LinearOp() | quant.LinearOp():
                made = self._offer_of_product(op)
            case nn.AttentionOp() | paged.AttentionOp():
                made = self._offer_of_heads(op, offers)
            case _:
                made = offer_through(op, offers)
        if made is not None:
            self.offers[op.results[0]] = made

    def _offer_of_product(self, op: Product) -> Offer | None:
        """Any rows, if it does not take a part of its input."""
        if not self._is_parameter(op.w) or self._columns(op) is not None:
            return None
        return rows_offer(op)

    def _offer_of_heads(
        self, op: nn.AttentionOp | paged.AttentionOp, offers: Sequence[Offer | None]
    ) -> Offer:
        """Of zeros, if heads are padded by whole KV slots: these hold values of zero."""
        heads = self._heads(op)
        values = offers[VALUES] if isinstance(op, nn.AttentionOp) else offers[CACHE]
        if not all(offer is None or offer.padding < Padding.UNDEFINED for offer in offers):
            padding = Padding.UNDEFINED
        elif heads.has_full_slots and values is not None:
            padding = values.padding
        else:
            padding = Padding.FINITE
        return Offer(dim=2, fixed=heads.query_cut().at(2), padding=padding)

    def _columns(self, op: Product) -> CutAttr | None:
        """How the product can take its input in parts, which other ranks' sums complete."""
        return columns(op, self.offers.get(op.x), self.ranks)

    def _heads(self, op: nn.AttentionOp | paged.AttentionOp) -> HeadSplit:
        keys = op.k if isinstance(op, nn.AttentionOp) else op.cache
        sizes = _size(op.q, 1), _size(keys, 1), _size(op.q, 3)
        return split_heads(*sizes, self.ranks, full_slots=_is_measured(op.y))

    # --- backwards ---

    def _chosen(self, value: SSAValue) -> Ask | None:
        """How a value should come; None for whole."""
        asks = [self.asks.get((use.operation, use.index)) for use in value.uses]
        cuts = list(dict.fromkeys(ask.cut for ask in asks if ask is not None and ask.cut))
        offer = self.offers.get(value)
        if cuts:
            wanted = next(ask for ask in asks if ask is not None and ask.cut == cuts[0])
            alone = len(cuts) == 1 and None not in asks
            return wanted if alone or offer is not None else None
        if offer is not None and asks and all(ask is ANY for ask in asks):
            cut = offer.cut(_size(value, offer.dim), self.ranks)
            return Ask(cut, "rows; the host takes each rank's part of the result")
        return None

    def _place(self, op: Operation, wanted: Ask | None) -> None:
        match op:
            case nn.AttentionOp() | paged.AttentionOp():
                self._place_attention(op)
            case nn.LinearOp() | quant.LinearOp():
                self._place_product(op, wanted)
            case quant.DynamicScaleOp() if wanted is None:
                self._place_scale(op)
            case nn.EmbeddingOp() if self._is_parameter(op.table):
                cut = table_cut(op, self.ranks)
                self.looked_up.add(op)
                self._ask(op, 1, cut, "rows of the vocabulary, and zeros for those of other ranks")
            case nn.SliceOp() if wanted is not None and self._is_cut_across(op, wanted):
                self.sliced[op] = wanted
            case _ if wanted is not None and wanted.cut is not None:
                self._pass_on(op, wanted, wanted.cut)

    def _pass_on(self, op: Operation, wanted: Ask, cut: CutAttr) -> None:
        cuts = operand_cuts(op, cut)
        if cuts is None:
            return  # whole; who asked cuts it on the spot
        self.placed[op.results[0]] = wanted
        for index, one in enumerate(cuts):
            if one is not None:
                codes = op if isinstance(op, quant.LinearOp) and index == W_SCALE else None
                why = wanted.why if codes is None else scale_reason(codes, cut.at(0))
                self._ask(op, index, one, why)

    def _place_attention(self, op: nn.AttentionOp | paged.AttentionOp) -> None:
        heads = self._heads(op)
        keys = f"heads of keys and values: {heads.kv_slots} per rank"
        queries = f"heads of queries: {heads.query_slots} per rank"
        self._ask(op, 0, heads.query_cut(), queries)
        caches = 2 if isinstance(op, nn.AttentionOp) else 1
        for index in range(1, 1 + caches):
            self._ask(op, index, heads.kv_cut(), keys)
        self.placed[op.y] = Ask(heads.query_cut().at(2), queries)

    def _place_scale(self, op: quant.DynamicScaleOp) -> None:
        """The largest of all ranks' values, if others take the measured tensor in parts anyway."""
        last = len(dims_of(op.x)) - 1
        if dims_of(op.y)[last] != 1:
            return
        taken = (self.asks.get((use.operation, use.index)) for use in op.x.uses)
        cuts = (ask.cut for ask in taken if ask is not None and ask.cut is not None)
        cut = next((cut for cut in cuts if cut.dim.data == last), None)
        offer = self.offers.get(op.x)
        counts = offer is None or offer.padding > Padding.ZERO
        if cut is None or (cut.is_padded and counts):
            return
        self.compared.add(op)
        self._ask(op, 0, cut, "its ranks' largest values are compared")

    def _place_product(self, op: Product, wanted: Ask | None) -> None:
        last = len(dims_of(op.y)) - 1
        if wanted is not None and wanted.cut is not None and wanted.cut.dim.data == last:
            self._pass_on(op, wanted, wanted.cut)
        elif (cut := self._columns(op)) is not None:
            self.summed.add(op)
            asks = {value: Ask(part, why) for value, part, why in operands_by_columns(op, cut)}
            for index, operand in enumerate(op.operands):
                if operand in asks:
                    self.asks[op, index] = asks[operand]
        elif self._is_parameter(op.w):
            cut = self.offers[op.y].cut(_size(op.y, last), self.ranks)
            self._pass_on(op, Ask(cut, "rows; the result is gathered"), cut)

    def _place_call(self, op: CallOp) -> None:
        callee = self.callees.get(callee_name(op))
        if callee is None:
            return
        for index, ask in enumerate(callee.argument_asks):
            if ask is not None:
                self.asks[op, index] = ask
        for result, ask in zip(op.results, callee.result_asks, strict=True):
            if ask is not None:
                self.placed[result] = ask

    def _ask(self, op: Operation, index: int, cut: CutAttr, why: str) -> None:
        self.asks[op, index] = Ask(cut, why)

    # --- parameters and arguments ---

    def _parameters(self) -> list[SSAValue]:
        block = self.function.body.block
        got = [op.y for op in block.ops if isinstance(op, nn.GetParameterOp)]
        return [*got, *(argument for argument in block.args if self._is_parameter(argument))]

    def _is_parameter(self, value: SSAValue) -> bool:
        """Whether a value is a parameter, or a part of one."""
        if isinstance(value.owner, nn.SliceOp):
            return self._is_parameter(value.owner.x)
        if isinstance(value, BlockArgument):
            return value.index in self.interface.parameters
        return isinstance(value.owner, nn.GetParameterOp)

    def _is_cut_across(self, op: nn.SliceOp, wanted: Ask) -> bool:
        cut = wanted.cut
        same = cut is not None and cut.dim.data == op.dim.value.data
        return same and self._is_parameter(op.x) and not isinstance(op.x.owner, nn.SliceOp)

    def _settle_slices(self, value: SSAValue) -> None:
        """A parameter of which each rank has its part of each slice; or the whole parameter."""
        users = [use.operation for use in value.uses]
        slices = [op for op in users if isinstance(op, nn.SliceOp)]
        ordered = sorted(slices, key=lambda op: op.start.value.data)
        if len(slices) < len(users) or not any(op in self.sliced for op in slices):
            return
        if any((op, 0) in self.asks for op in slices):
            return  # parts that are wanted along another dimension
        if len({_dim(op) for op in ordered}) > 1 or not _cover(ordered, value):
            return
        asks = [self.sliced.get(op, Ask(None, "all of a slice")) for op in ordered]
        cuts = [
            ask.cut or _on_all_ranks(op, self.ranks) for op, ask in zip(ordered, asks, strict=True)
        ]
        joined = joined_slices(cuts, [op.start.value.data for op in ordered])
        start = 0
        for op, ask, cut in zip(ordered, asks, cuts, strict=True):
            self._ask(op, 0, joined, ask.why)
            self.bounds[op] = (start, start + cut.local_size)
            start += cut.local_size
            if ask.cut is not None:
                self.placed[op.y] = ask

    def _settle_argument(self, argument: BlockArgument) -> None:
        """An argument has one type: the cut that all its uses ask for, else it is whole."""
        known = self.interface.parameters | self.interface.inputs
        asks = [self.asks.get((use.operation, use.index)) for use in argument.uses]
        cuts = {None if ask is None else ask.cut for ask in asks if ask is not ANY}
        first = next((ask for ask in asks if ask is not None and ask is not ANY), None)
        if argument.index in known and len(cuts) == 1 and first is not None:
            self.placed[argument] = first


def _cover(ordered: Sequence[nn.SliceOp], value: SSAValue) -> bool:
    """Whether slices, in the order of their starts, are together all of a tensor."""
    end = 0
    for op in ordered:
        if op.start.value.data > end:
            return False
        end = max(end, op.end.value.data)
    return end == _size(value, _dim(ordered[0]))


def _on_all_ranks(op: nn.SliceOp, ranks: int) -> CutAttr:
    """All of a slice on each rank."""
    dim, size = _dim(op), _size(op.y, _dim(op))
    return CutAttr(dim, size, [[(0, size)]] * ranks)


def table_cut(op: nn.EmbeddingOp, ranks: int) -> CutAttr:
    """The rows of an embedding table, with a row of zeros after each rank's."""
    return CutAttr.even(0, _size(op.table, 0), ranks, spare=1)


def joined_slices(cuts: Sequence[CutAttr], offsets: Sequence[int]) -> CutAttr:
    """The cut of a tensor of slices that begin there, of which each rank has its part of each.

    Slices may overlap, as scales do if two layers of one weight have rows in the same block.
    """
    length = gcd(*(cut.length.data for cut in cuts))
    parts = [refined(cut, length) for cut in cuts]
    ranks = [
        [
            None if held is None else (held[0] + offset, held[1] + offset)
            for slots, offset in zip(parts, offsets, strict=True)
            for held in slots[rank]
        ]
        for rank in range(cuts[0].ranks)
    ]
    return CutAttr(cuts[0].dim.data, length, ranks)


def _size(value: SSAValue, dim: int) -> int:
    size = dims_of(value)[dim]
    assert isinstance(size, int), f"dimension {size} is not fixed yet"
    return size


def _dim(op: nn.SliceOp) -> int:
    return int(op.dim.value.data)


def _is_measured(value: SSAValue) -> bool:
    """Whether the largest magnitude of whole tokens is asked for."""
    users = [use.operation for use in value.uses]
    return any(
        _is_measured(op.y)
        if isinstance(op, nn.ReshapeOp)
        else isinstance(op, quant.DynamicScaleOp) and dims_of(op.y)[-1] == 1
        for op in users
    )

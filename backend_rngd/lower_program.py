"""A program's HBM regions and calls: what each call binds to its block's arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xdsl.dialects import func
from xdsl.ir import Operation, SSAValue

from ..ir import dist, nn, paged
from ..ir.types import shape_of
from .block_needs import Argument, Crossing, LoweredBlock, Need, Result, Scratch, whole_of
from .encode import content_attribute, region_content
from .isa.cut import Cut
from .isa.layout import Layout, features_per_slice, heads
from .isa.program import CacheIo, Relocation, TensorIo
from .isa.program import Region as HbmRegion
from .isa.rules import SLICES_PER_PE
from .kernels.rows import hidden_stride
from .rngd import CallOp, RegionOp
from .tokens import INDEX_BYTES, WORD_BYTES, TokenShape

# --- the program ---

LOGITS_RANK = 3
"""Dims of the results of @forward that are no caches: [B, T, V]."""
INPUTS = ("input_ids", "position_ids", "slot_mapping", "block_table", "lengths")
"""The first arguments of `@forward`; the layers' KV caches follow them."""


@dataclass
class ProgramLowering:
    """Regions and calls of the program, from `@forward`."""

    forward: func.FuncOp
    shape: TokenShape
    blocks: dict[str, list[LoweredBlock]]
    """The parts of each function, in the order of their calls."""
    regions: dict[object, RegionOp] = field(default_factory=dict)
    calls: list[CallOp] = field(default_factory=list)
    hidden: dict[SSAValue, RegionOp] = field(default_factory=dict)
    free: list[RegionOp] = field(default_factory=list)

    def run(self) -> None:
        arguments = self.forward.body.block.args
        for name, argument in zip(INPUTS, arguments, strict=False):
            self._input_region(name, argument)
        for op in self.forward.body.block.ops:
            if isinstance(op, func.CallOp):
                self._call(op)

    def _region(self, key: object, name: str, **content: object) -> RegionOp:
        if key not in self.regions:
            region = HbmRegion.model_validate({"name": name, **content})
            self.regions[key] = RegionOp(name, content_attribute(region))
        return self.regions[key]

    def _input_region(self, name: str, argument: SSAValue) -> RegionOp:
        element_bytes = {
            "input_ids": self.shape.id_bytes,
            "position_ids": WORD_BYTES,
            "lengths": WORD_BYTES,
        }.get(name, INDEX_BYTES)
        row_bytes = self.shape.row_bytes(name)
        if name == "lengths":
            row_bytes *= self.shape.sequences
        io = TensorIo(
            name=name,
            dtype="i32",
            shape=shape_of(argument),
            element_bytes=element_bytes,
            row_bytes=row_bytes,
        )
        return self._region(argument, name, input=io)

    def _call(self, op: func.CallOp) -> None:
        for lowered in self.blocks[op.callee.root_reference.data]:
            buffers = [self._bound(op, need).buffer for need in lowered.needs]
            call = CallOp(lowered.op.sym_name.data, buffers, lowered.starts)
            call.location = op.location
            self.calls.append(call)
        for value in op.operands:
            if value in self.hidden and _last_user(value) is op:
                self.free.append(self.hidden[value])

    def _bound(self, op: func.CallOp, need: Need) -> RegionOp:
        match need:
            case Argument():
                return self._argument_region(op.operands[need.number], need)
            case Result(logits=True):
                return self._output(need)
            case Result():
                result = op.results[need.number]
                if result not in self.hidden:
                    self.hidden[result] = self._scratch(need)
                return self.hidden[result]
            case Crossing():
                size = SLICES_PER_PE * hidden_stride(need.order, need.tokens)
                return self._region(need, f"crossing.{need.number}", scratch_bytes=size)
            case Scratch():
                return self._region(need, need.name, scratch_bytes=need.size_bytes)
            case _:
                return self._region(need, need.kind, derived=need)

    def _argument_region(self, value: SSAValue, need: Argument) -> RegionOp:
        if need.layout is not None:
            return self._parameter(value, need, need.layout)
        if value in self.hidden:
            return self.hidden[value]
        arguments = self.forward.body.block.args
        number = arguments.index(value)
        if number < len(INPUTS):
            return self.regions[value]
        return self._cache(value, number - len(INPUTS))

    def _parameter(self, value: SSAValue, need: Argument, layout: Layout) -> RegionOp:
        assert need.part is not None
        value, part = whole_of(value, need.part)
        source = value.owner
        assert isinstance(source, nn.GetParameterOp | dist.GetShardOp), source
        name = source.parameter.root_reference.data
        cut = source.cut if isinstance(source, dist.GetShardOp) else None
        relocation = Relocation(
            tensor=name,
            shape=shape_of(value) if cut is None else shape_of(cut.whole_type(value.type)),
            begin=part.begin,
            end=part.end,
            layout=layout,
            cut=_cut_table(cut),
        )
        return self._region(relocation, name, parameter=relocation)

    def _cache(self, value: SSAValue, layer: int) -> RegionOp:
        _, kv_heads, _, head_dim = shape_of(value)
        padded = heads(kv_heads, head_dim, rotary=False).padded
        dtype: Literal["bf16", "f8e4m3"] = "f8e4m3" if paged.holds_codes(value) else "bf16"
        io = CacheIo(layer=layer, kv_heads=kv_heads, head_dim=head_dim, padded=padded, dtype=dtype)
        return self._region(io, f"cache.{layer}", cache=io)

    def _output(self, need: Result) -> RegionOp:
        sequences = self.shape.sequences
        io = TensorIo(
            name="logits",
            dtype="f32",
            shape=(sequences, need.tokens // sequences, need.order.features),
            element_bytes=4,
            row_bytes=SLICES_PER_PE * features_per_slice(need.order) * 4,
            cut=_cut_table(self._logits_cut),
        )
        return self._region(io, "logits", output=io)

    @property
    def _logits_cut(self) -> dist.CutAttr | None:
        """How @forward's logits are cut over the ranks; caches are its other results."""
        _, cuts = dist.cuts_of(self.forward)
        returned = self.forward.body.block.last_op
        assert isinstance(returned, func.ReturnOp)
        pairs = zip(returned.operands, cuts, strict=True)
        return next(cut for value, cut in pairs if len(shape_of(value)) == LOGITS_RANK)

    def _scratch(self, need: Result) -> RegionOp:
        """A region that no value still to be read occupies: two serve any number of layers."""
        size = SLICES_PER_PE * hidden_stride(need.order, need.tokens)
        for region in self.free:
            if region_content(region).scratch_bytes == size:
                self.free.remove(region)
                return region
        name = f"hidden.{sum(region_content(r).scratch_bytes is not None for r in self._all())}"
        return self._region(name, name, scratch_bytes=size)

    def _all(self) -> list[RegionOp]:
        return list(self.regions.values())


def _last_user(value: SSAValue) -> Operation:
    users = {use.operation for use in value.uses}
    block = next(iter(users)).parent_block()
    assert block is not None
    last: Operation = [op for op in block.ops if op in users][-1]
    return last


def _cut_table(cut: dist.CutAttr | None) -> Cut | None:
    """A cut as the binary's header has it: a slot with nothing holds an empty range."""
    if cut is None:
        return None
    slots = tuple(tuple(r or (0, 0) for r in cut.ranges(rank)) for rank in range(cut.ranks))
    return Cut(dim=cut.dim.data, length=cut.length.data, slots=slots)

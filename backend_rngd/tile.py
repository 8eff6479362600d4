"""The `tile` pass: from tensors to commands on buffers.

Before: `@forward` calls functions of `nn` and `paged` ops, of one bucket.
After:  HBM regions, one `rngd.block` per function, one `rngd.call` per call; every buffer on chip
        is virtual.
Contract: budget; sums are in f32 and rounded once where PyTorch rounds each operator to bf16.
Raises: BCK001 (all unsupported operators at once), BCK003, BCK005, BCK006.

A function's tokens are worked on in chunks, as many at a time as data memory can hold, and each
chunk is a call of its own; chunks with the same code share a block. When there are several, a
decoder layer is cut at its attention: first all chunks write their keys to the cache, then all
attend, then come the operators after it. What crosses a cut stands in HBM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xdsl.context import Context
from xdsl.dialects import func
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass

from .. import errors
from ..ir import dist, nn, paged
from ..ir.types import shape_of
from ..models.config_types import Bucket
from .block_needs import Argument, Crossing, LoweredBlock, Need, Result, Scratch, whole_of
from .block_state import BlockState
from .encode import content_attribute, region_content
from .grouping import groupable
from .isa.container import CacheIo, Relocation, TensorIo
from .isa.container import Region as HbmRegion
from .isa.cut import Cut
from .isa.layout import Layout, features_per_slice, heads
from .isa.machine import load_machine
from .isa.rules import SLICES_PER_PE
from .kernels.rows import hidden_stride
from .lower_block import lower_block
from .place import assign_addresses
from .rngd import CallOp, DmaOp, ExecOp, ProgramOp, RegionOp, RepeatOp
from .supported import unsupported
from .tiling import Pins, ProductName, parse_pins, pinned
from .tiling_search import block_cycles
from .token_groups import GROUPS
from .tokens import INDEX_BYTES, SEQUENCE_CHUNK_TOKENS, WORD_BYTES, Chunk, TokenShape, chunks
from .value_uses import Linear, feature_orders, module_of, parts_of_modules, segments

CHUNK_TOKENS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Tokens that a block works on at a time: the first number whose buffers fit."""
MOST_COMMANDS = 280
"""Of a block that works on several chunks, at most."""


def lower_function(
    function: func.FuncOp,
    shape: TokenShape,
    logits: frozenset[int],
    pins: Pins,
    compare: bool,
    ranks: int,
) -> list[LoweredBlock]:
    """Blocks in the order of their calls, with as many tokens at a time as fit.

    Tokens that one block cannot take are worked on segment by segment (before attention,
    attention, after it), and in each segment chunk by chunk; chunks with the same code share it.
    Raises: BCK003, BCK006.
    """
    lowering = _FunctionLowering(function, shape, logits, pins, compare, ranks)
    if len(lowering.segments) > 1 and len(_chunks(lowering.ops, shape, CHUNK_TOKENS[0])) > 1:
        return [
            block
            for number, segment in enumerate(lowering.segments)
            for block in lowering.chunked(segment, f"_segment_{number}")
        ]
    return lowering.chunked(None, "")


@dataclass
class _FunctionLowering:
    """The blocks of one function."""

    function: func.FuncOp
    shape: TokenShape
    logits: frozenset[int]
    pins: Pins
    compare: bool
    ranks: int
    """That share the work, and exchange parts of it."""
    crossings: dict[SSAValue, Crossing] = field(default_factory=dict)

    @property
    def ops(self) -> list[Operation]:
        return list(self.function.body.block.ops)

    @property
    def segments(self) -> list[list[Operation]]:
        return segments(self.function.body.block)

    def chunked(self, segment: list[Operation] | None, suffix: str) -> list[LoweredBlock]:
        """A segment's chunks, or the whole function's. Raises: BCK003."""
        name = self.function.sym_name.data + suffix
        wanted = self._pinned_groups(segment or [])
        grouped = self._in_groups(segment, name) if segment and wanted != {1} else None
        if grouped is not None and wanted:
            return grouped
        alone = self._in_chunks(segment, name)
        if grouped is None or _cycles(alone, self.ranks) <= _cycles(grouped, self.ranks):
            return alone
        return grouped

    def _pinned_groups(self, segment: list[Operation]) -> set[int]:
        """The groups that pins ask for."""
        name, parts = self.function.sym_name.data, parts_of_modules(self.function.body.block)
        tokens = {part.count // GROUPS for part in self._parts_of_groups(segment)}
        products = [op for op in segment if isinstance(op, Linear)]
        pins = [
            pinned(self.pins, ProductName(name, module_of(op), parts.get(op, 0), count))
            for op in products
            for count in tokens
        ]
        return {tiling.groups for tiling in pins if tiling is not None}

    def _parts_of_groups(self, segment: list[Operation]) -> list[Chunk]:
        return _chunks(segment, self.shape, GROUPS * CHUNK_TOKENS[0])

    def _in_groups(self, segment: list[Operation], name: str) -> list[LoweredBlock] | None:
        """With the tokens divided over groups of slices; None if that is not possible."""
        parts = self._parts_of_groups(segment)
        orders = feature_orders(self.function.body.block)
        if not parts or not all(
            groupable(segment, orders, part.sequences, part.count) for part in parts
        ):
            return None
        try:
            return self._blocks(segment, name, [[part] for part in parts], GROUPS)
        except errors.MemoryFull:
            return None

    def _in_chunks(self, segment: list[Operation] | None, name: str) -> list[LoweredBlock]:
        full: errors.MemoryFull | None = None
        for limit in CHUNK_TOKENS:
            parts = _chunks(self.ops if segment is None else segment, self.shape, limit)
            try:
                blocks = self._lowered(segment, name, parts)
            except errors.MemoryFull as error:
                full = error
                continue
            if blocks:
                return blocks
        assert full is not None, name
        raise errors.block_does_not_fit(name, self.shape.bucket.name, full.cause)

    def _lowered(
        self, segment: list[Operation] | None, name: str, parts: list[Chunk]
    ) -> list[LoweredBlock]:
        """A block per chunk, or per few chunks of a segment; those with the same code share it.

        Raises: BCK004.
        """
        for together in self._chunks_together(segment, name, parts):
            groups = [parts[i : i + together] for i in range(0, len(parts), together)]
            try:
                return self._blocks(segment, name, groups)
            except errors.MemoryFull:
                if together == 1:
                    raise
        return []

    def _chunks_together(
        self, segment: list[Operation] | None, name: str, parts: list[Chunk]
    ) -> list[int]:
        """How many chunks a block may work on, the most first: all blocks on equally many.

        Commands of a block's chunks overlap, but take time to plan and room for code. Nothing
        overlaps across the fence of a repeat, so blocks with one work on a chunk each.
        """
        if segment is None or len(parts) == 1:
            return [1] if parts else []
        alone = self._block(segment, name, parts[-1:])
        ops = list(alone.op.body.block.ops)
        if any(isinstance(op, RepeatOp) for op in ops):
            return [1]
        commands = sum(isinstance(op, ExecOp | DmaOp) for op in ops)
        most = max(1, MOST_COMMANDS // commands)
        return [n for n in range(most, 0, -1) if len(parts) % n == 0]

    def _blocks(
        self,
        segment: list[Operation] | None,
        name: str,
        together: list[list[Chunk]],
        groups: int = 1,
    ) -> list[LoweredBlock]:
        blocks: list[LoweredBlock] = []
        for i, parts in enumerate(together):
            part_name = name if len(together) == 1 else f"{name}_part_{i}"
            found = self._block(segment, part_name, parts, groups)
            same = next((other for other in blocks if _same_code(found, other)), None)
            if same is not None:
                found.op = same.op
            else:
                assign_addresses(found.op.body.block)
            blocks.append(found)
        return blocks

    def _block(
        self, segment: list[Operation] | None, name: str, parts: list[Chunk], groups: int = 1
    ) -> LoweredBlock:
        return lower_block(
            BlockState(
                name,
                self.function,
                self.shape,
                parts,
                self.logits,
                self.pins,
                self.compare,
                segment,
                self.crossings,
                groups,
            )
        )


def _cycles(blocks: list[LoweredBlock], ranks: int) -> float:
    """What the calls of the blocks are predicted to cost each rank."""
    machine = load_machine()
    return sum(block_cycles(block.op.body.block, machine, ranks).score for block in blocks)


def _same_code(block: LoweredBlock, other: LoweredBlock) -> bool:
    bodies = block.op.body, other.op.body
    return block.needs == other.needs and bodies[0].is_structurally_equivalent(bodies[1])


def _chunks(ops: list[Operation], shape: TokenShape, limit: int) -> list[Chunk]:
    """The parts that blocks work on; none if the tokens cannot be cut to this limit."""
    if any(isinstance(op, paged.LastTokenOp) for op in ops):
        # From here on each sequence is one token, wherever it stands.
        firsts = range(0, shape.sequences, limit)
        return [Chunk(first, min(limit, shape.sequences - first), 0, 1) for first in firsts]
    attends = any(isinstance(op, paged.AttentionOp) for op in ops)
    parts = chunks(shape, limit, SEQUENCE_CHUNK_TOKENS if attends else 1)
    dealt = max((_ranks_dealt_to(op) for op in ops), default=1)
    return parts if all(part.count % dealt == 0 for part in parts) else []


def _ranks_dealt_to(op: Operation) -> int:
    """The ranks among which an operator divides its tokens."""
    if isinstance(op, dist.AllReduceOp) and op.algorithm == StringAttr("scatter_gather"):
        return op.mask.value.data + 1
    return 1


# --- the program ---

LOGITS_RANK = 3
"""Dims of the results of @forward that are no caches: [B, T, V]."""
INPUTS = ("input_ids", "position_ids", "slot_mapping", "block_table", "lengths")
"""The first arguments of `@forward`; the layers' KV caches follow them."""


@dataclass
class _ProgramLowering:
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


@dataclass(frozen=True)
class TilePass(ModulePass):
    """Lower one bucket's functions to commands on virtual buffers."""

    name = "tile"

    kind: str = "decode"
    """prefill or decode."""
    batch: int = 1
    """Sequences."""
    length: int = 1
    """Attended tokens per sequence, the new ones included."""
    pins: tuple[str, ...] = ()
    """Tilings that products must have: `pattern of module paths inside a block: record`."""
    compare: bool = False
    """Record the next best tilings too; it takes time to find them."""

    @staticmethod
    def for_bucket(bucket: Bucket, pins: tuple[str, ...] = (), compare: bool = False) -> TilePass:
        """The pass for `bucket`."""
        kind = "decode" if bucket.is_decode else "prefill"
        return TilePass(kind, bucket.batch_size, bucket.attention_size, pins, compare)

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        mesh = dist.mesh_of(op)
        ids_are_data = any(isinstance(inner, dist.LocalRowsOp) for inner in op.walk())
        shape = TokenShape(
            Bucket.parse(f"{self.kind}:{self.batch},{self.length}"),
            WORD_BYTES if ids_are_data else INDEX_BYTES,
        )
        functions = {f.sym_name.data: f for f in op.ops if isinstance(f, func.FuncOp)}
        forward = functions.pop("forward")
        _join_stages(forward)
        problems = [p for f in functions.values() for p in unsupported(f.body.block)]
        if problems:
            raise errors.unsupported_by_backend(problems)
        logits = _logits_results(forward)
        pins = parse_pins(self.pins, "pins")
        blocks = {
            name: lower_function(
                f,
                shape,
                logits.get(name, frozenset()),
                pins,
                self.compare,
                mesh.ranks if mesh else 1,
            )
            for name, f in functions.items()
        }
        program = _ProgramLowering(forward, shape, blocks)
        program.run()
        _replace_body(op, shape.bucket, mesh.ranks if mesh else 1, program)


def _join_stages(forward: func.FuncOp) -> None:
    """Stages are a matter of the call table, which the loader cuts: their exchanges go."""
    sends = [op for op in forward.body.block.ops if isinstance(op, dist.SendOp)]
    receives = [op for op in forward.body.block.ops if isinstance(op, dist.RecvOp)]
    for send, receive in zip(sends, receives, strict=True):
        receive.y.replace_all_uses_with(send.x)
    for op in (*sends, *receives):
        forward.body.block.erase_op(op)


def _cut_table(cut: dist.CutAttr | None) -> Cut | None:
    """A cut as the binary's header has it: a slot with nothing holds an empty range."""
    if cut is None:
        return None
    slots = tuple(tuple(r or (0, 0) for r in cut.ranges(rank)) for rank in range(cut.ranks))
    return Cut(dim=cut.dim.data, length=cut.length.data, slots=slots)


def _logits_results(forward: func.FuncOp) -> dict[str, frozenset[int]]:
    """For each function, the numbers of its results that `@forward` returns and are no caches."""
    found: dict[str, frozenset[int]] = {}
    for op in forward.body.block.ops:
        if isinstance(op, func.ReturnOp):
            for value in op.operands:
                call = value.owner
                if isinstance(call, func.CallOp) and len(shape_of(value)) == LOGITS_RANK:
                    name = call.callee.root_reference.data
                    number = call.results.index(value)
                    found[name] = found.get(name, frozenset()) | {number}
    return found


def _replace_body(module: ModuleOp, bucket: Bucket, ranks: int, program: _ProgramLowering) -> None:
    for op in reversed(list(module.ops)):
        module.body.block.erase_op(op, safe_erase=False)
    module.body.block.add_op(ProgramOp(bucket.name, ranks))
    for region in program.regions.values():
        module.body.block.add_op(region)
    for parts in program.blocks.values():
        for block in dict.fromkeys(lowered.op for lowered in parts):
            module.body.block.add_op(block)
    for call in program.calls:
        module.body.block.add_op(call)

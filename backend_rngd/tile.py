"""The `tile` pass: from tensors to commands on buffers.

Before: `@forward` calls functions of `nn` and `paged` ops, of one bucket.
After:  HBM regions, one `rngd.block` per function, one `rngd.call` per call; every buffer on chip
        is virtual.
Contract: budget; sums are in f32 and rounded once where PyTorch rounds each operator to bf16.
Raises: BCK001 (all unsupported operators at once), BCK002, BCK003, BCK005.

A function's tokens are worked on in chunks, as many at a time as data memory can hold. Chunks of
one sequence come in order, so that a chunk finds the keys of those before it in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xdsl.context import Context
from xdsl.dialects import func
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation, Region, SSAValue
from xdsl.passes import ModulePass

from .. import errors
from ..ir import nn, paged
from ..ir import provenance as locations
from ..ir.types import shape_of
from ..models.config_types import Bucket
from .emitter import Activation, Emitter, Ref
from .encode import content_attribute, region_content
from .isa.container import CacheIo, Relocation, TensorIo
from .isa.container import Region as HbmRegion
from .isa.dtypes import DType
from .isa.layout import (
    Derived,
    FeatureOrder,
    KeyIndex,
    Layout,
    RopeTable,
    RowsLayout,
    RowTableLayout,
    VectorLayout,
    Zeros,
    features_per_slice,
    heads,
    plain,
)
from .isa.plan import Memory
from .isa.rules import LANES, SLICES_PER_PE
from .kernels import elementwise, rows
from .kernels.attention import (
    VRF_ROWS,
    Inputs,
    PagedAttention,
    attention_rounds,
    key_count,
)
from .kernels.cache import write_cache
from .kernels.linear import linear
from .kernels.norm import rms_norm
from .kernels.rope import rope
from .place import assign_addresses
from .rngd import BlockOp, BufferType, CallOp, ProgramOp, RegionOp, WorkOp

CHUNK_TOKENS = (128, 64, 32, 16, 8, 4, 2, 1)
"""Tokens that a block works on at a time: the first number whose buffers fit."""
SEQUENCE_CHUNK_TOKENS = 64
"""Where there is attention, parts of one sequence are multiples of this, so that the keys before
a part's end are whole key blocks."""
PADDING_POSITION = 1
"""Position id of padding tokens (docs of the vendor's interface): a row of every RoPE table."""
INDEX_BYTES = 4
WORD_BYTES = 8
"""Positions and lengths also become data, and the data memory moves 8 bytes at least."""


@dataclass(frozen=True)
class TokenShape:
    """The tokens of a bucket as its binary sees them."""

    bucket: Bucket

    @property
    def sequences(self) -> int:
        return self.bucket.batch_size

    @property
    def tokens(self) -> int:
        """Tokens per sequence, padded to whole lanes when there are several."""
        new = self.bucket.input_ids_size
        return new if new == 1 else -(-new // LANES) * LANES

    @property
    def all_tokens(self) -> int:
        return self.sequences * self.tokens

    @property
    def table_row_bytes(self) -> int:
        return key_count(self.bucket.attention_size) * INDEX_BYTES

    def row_bytes(self, name: str) -> int:
        """Bytes of one sequence's row of a program input."""
        return {
            "input_ids": self.tokens * INDEX_BYTES,
            "position_ids": self.tokens * WORD_BYTES,
            "slot_mapping": self.tokens * INDEX_BYTES,
            "block_table": self.table_row_bytes,
            "lengths": WORD_BYTES,
        }[name]

    def attended(self, chunk: Chunk) -> int:
        """Keys that a chunk's tokens can see."""
        if self.bucket.is_decode:
            return self.bucket.attention_size
        return min(chunk.first_token + chunk.tokens, self.bucket.attention_size)

    def visible_pairs(self) -> int:
        """(query, key) pairs that causality leaves in one sequence."""
        new, past = self.bucket.input_ids_size, self.bucket.kv_cache_size
        return new * past + new * (new + 1) // 2


@dataclass(frozen=True)
class Chunk:
    """Tokens worked on at a time: several whole sequences, or a part of one."""

    first_sequence: int
    sequences: int
    first_token: int
    tokens: int

    @property
    def count(self) -> int:
        return self.sequences * self.tokens

    def first(self, shape: TokenShape) -> int:
        """The chunk's first token among all of the bucket's."""
        return self.first_sequence * shape.tokens + self.first_token


def chunks(shape: TokenShape, limit: int, unit: int) -> list[Chunk]:
    """The bucket's tokens in chunks of at most `limit`.

    Parts of a sequence are multiples of `unit`; empty if `limit` is not.
    """
    if shape.tokens <= limit:
        step = limit // shape.tokens
        return [
            Chunk(first, min(step, shape.sequences - first), 0, shape.tokens)
            for first in range(0, shape.sequences, step)
        ]
    if limit % unit:
        return []
    return [
        Chunk(sequence, 1, first, min(limit, shape.tokens - first))
        for sequence in range(shape.sequences)
        for first in range(0, shape.tokens, limit)
    ]


# --- what a block needs from its caller ---


@dataclass(frozen=True)
class Argument:
    """An argument of the function, as an HBM buffer; a parameter in one layout and one part."""

    number: int
    layout: Layout | None = None
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()


@dataclass(frozen=True)
class Result:
    """A result of the function: the hidden state, or logits."""

    number: int
    order: FeatureOrder
    tokens: int
    logits: bool


Need = Argument | Result | Derived


@dataclass
class LoweredBlock:
    """A block and what each of its HBM arguments stands for."""

    op: BlockOp
    needs: list[Need]


# --- one function ---


def feature_orders(body: Block) -> dict[SSAValue, FeatureOrder]:
    """The order that users ask of values: heads for attention, rotary order for RoPE."""
    asked: dict[SSAValue, FeatureOrder] = {}

    def ask(value: SSAValue, *, rotary: bool) -> None:
        _, count, _, head_dim = shape_of(value)
        asked.setdefault(value, heads(count, head_dim, rotary=rotary))

    for op in reversed(list(body.ops)):
        match op:
            case nn.RopeOp():
                ask(op.x, rotary=True)
            case paged.WriteOp():
                for value in (op.k, op.v):
                    if not isinstance(value.owner, nn.RopeOp):
                        ask(value, rotary=False)
            case paged.AttentionOp():
                if not isinstance(op.q.owner, nn.RopeOp):
                    ask(op.q, rotary=False)
            case _ if op.results and op.results[0] in asked and not isinstance(op, nn.LinearOp):
                for operand in op.operands:
                    if shape_of(operand)[-1] == shape_of(op.results[0])[-1] or _is_view(op):
                        asked.setdefault(operand, asked[op.results[0]])
    return asked


def _is_view(op: Operation) -> bool:
    return isinstance(op, nn.ReshapeOp | nn.TransposeOp | nn.CastOp)


def unsupported(body: Block) -> list[tuple[str, str]]:
    """(module path and operator, reason) for each op that has no kernel."""
    problems = []
    for op in body.ops:
        reason = _reason(op)
        if reason is not None:
            problems.append((locations.describe(op), reason))
    return problems


def _reason(op: Operation) -> str | None:
    match op:
        case nn.RopeOp():
            turning, head_dim = 2 * len(op.inv_freq.get_values()), shape_of(op.x)[-1]
            return None if turning == head_dim else f"only {turning} of {head_dim} features turn"
        case paged.AttentionOp() if op.window is not None:
            return "sliding windows shorter than the bucket are not supported"
        case nn.TransposeOp():
            dims = {op.dim0.value.data, op.dim1.value.data}
            return None if dims == {1, 2} else f"transpose of dims {sorted(dims)}"
        case nn.ReshapeOp():
            before, after = shape_of(op.x), shape_of(op.y)
            splits = len(before) + len(after) == 7 and before[:2] == after[:2]
            return None if splits else f"reshape from {list(before)} to {list(after)}"
        case nn.SliceOp():
            return None if _is_parameter(op.x) else "slices of activations"
        case (
            nn.LinearOp()
            | nn.EmbeddingOp()
            | nn.RmsNormOp()
            | nn.ScaleOp()
            | nn.CastOp()
            | paged.WriteOp()
            | paged.AttentionOp()
            | paged.LastTokenOp()
            | func.ReturnOp()
        ):
            return None
        case nn.ConstantOp():
            return None if _is_scalar(op.y) else "only scalar constants have a place"
        case nn.BinaryOp() if _is_scalar(op.b):
            return None if op.name in elementwise.SCALAR else "no kernel takes a scalar here"
        case _ if op.name in elementwise.BINARY:
            same = shape_of(op.operands[0]) == shape_of(op.operands[1])
            return None if same else "operands of different shape"
        case _ if op.name in elementwise.UNARY:
            return None
        case _:
            return "the backend has no kernel for it"


def _is_scalar(value: SSAValue) -> bool:
    """Whether a value is a constant of one element."""
    return isinstance(value.owner, nn.ConstantOp) and value.owner.to_numpy().size == 1


def _is_parameter(value: SSAValue) -> bool:
    """Whether a value is an argument of the function that only weights can be."""
    return isinstance(value.owner, Block)


@dataclass
class FunctionLowering:
    """One function's commands, for one way of cutting its tokens."""

    function: func.FuncOp
    shape: TokenShape
    logits: frozenset[int]
    """Numbers of the results that are logits."""
    limit: int
    needs: list[Need] = field(default_factory=list)
    block: Block = field(default_factory=Block)

    def __post_init__(self) -> None:
        self.body = self.function.body.block
        self.orders = feature_orders(self.body)
        self.emit = Emitter(self.block)
        self.wide = _wide_values(self.body, self.logits)
        self.caches: dict[SSAValue, Ref] = {}
        self.hidden: dict[SSAValue, FeatureOrder] = {}

    def run(self) -> LoweredBlock | None:
        """The block, or None if a sequence cannot be cut to this limit."""
        parts = self._chunks()
        self._count_work()
        for chunk in parts:
            _ChunkLowering(self, self.shape, chunk).run()
        name = self.function.sym_name.data
        return LoweredBlock(BlockOp(name, Region(self.block)), self.needs) if parts else None

    def _chunks(self) -> list[Chunk]:
        if any(isinstance(op, paged.LastTokenOp) for op in self.body.ops):
            # From here on each sequence is one token, wherever it stands.
            step, all_sequences = self.limit, self.shape.sequences
            firsts = range(0, all_sequences, step)
            return [Chunk(first, min(step, all_sequences - first), 0, 1) for first in firsts]
        attends = any(isinstance(op, paged.AttentionOp) for op in self.body.ops)
        return chunks(self.shape, self.limit, SEQUENCE_CHUNK_TOKENS if attends else 1)

    def need(self, need: Need) -> Ref:
        """The HBM buffer of the block that stands for `need`."""
        if need not in self.needs:
            self.needs.append(need)
            self.block.insert_arg(BufferType(Memory.HBM, 0), len(self.needs) - 1)
        return Ref(self.block.args[self.needs.index(need)])

    def argument(self, value: SSAValue) -> Ref:
        return self.need(Argument(self.body.args.index(value)))

    def parameter(self, value: SSAValue, layout: Layout) -> Ref:
        """A weight, or a slice of one, in the layout that a kernel reads."""
        begin, end = [0] * len(shape_of(value)), list(shape_of(value))
        while isinstance(value.owner, nn.SliceOp):
            start = value.owner.start.value.data
            dim = value.owner.dim.value.data
            begin[dim] += start
            end[dim] += start
            value = value.owner.x
        number = self.body.args.index(value)
        return self.need(Argument(number, layout, tuple(begin), tuple(end)))

    def _count_work(self) -> None:
        for op in self.body.ops:
            macs = useful_macs(op, self.shape)
            if macs:
                self.emit.location = op.location
                self.emit.append(WorkOp(macs))


def _wide_values(body: Block, logits: frozenset[int]) -> set[SSAValue]:
    """Values that stay in f32: logits, and what leads from the head's product to them."""
    wide: set[SSAValue] = set()
    for op in reversed(list(body.ops)):
        if isinstance(op, func.ReturnOp):
            wide |= {op.operands[i] for i in logits}
        elif op.results and op.results[0] in wide and not isinstance(op, nn.LinearOp):
            wide |= set(op.operands)
    return wide


def useful_macs(op: Operation, shape: TokenShape) -> int:
    """Products that an operator needs for the bucket's own tokens, without any padding."""
    match op:
        case nn.LinearOp():
            batch, tokens = shape_of(op.x)[:2]
            n, k = shape_of(op.w)
            return batch * tokens * n * k
        case paged.AttentionOp():
            batch, query_heads, _, head_dim = shape_of(op.q)
            return 2 * batch * query_heads * head_dim * shape.visible_pairs()
        case _:
            return 0


@dataclass
class _ChunkLowering:
    """The commands of one chunk; `values` holds what has been computed of each tensor."""

    whole: FunctionLowering
    shape: TokenShape
    chunk: Chunk
    values: dict[SSAValue, Activation] = field(default_factory=dict)

    def run(self) -> None:
        for op in self.whole.body.ops:
            self.whole.emit.location = op.location
            self._lower(op)

    @property
    def emit(self) -> Emitter:
        return self.whole.emit

    def _lower(self, op: Operation) -> None:
        match op:
            case nn.EmbeddingOp():
                self.values[op.y] = self._embedding(op)
            case nn.LinearOp():
                self.values[op.y] = self._linear(op)
            case nn.RmsNormOp():
                self.values[op.y] = self._rms_norm(op)
            case nn.RopeOp():
                self.values[op.y] = self._rope(op)
            case nn.ScaleOp():
                x, factor = self._of(op.x), op.factor.value.data
                self.values[op.y] = elementwise.with_scalar(self.emit, "nn.mul", x, factor, "scale")
            case paged.WriteOp():
                self._write(op)
            case paged.AttentionOp():
                self.values[op.y] = self._attention(op)
            case paged.LastTokenOp():
                self.values[op.y] = self._last_token(op)
            case nn.ReshapeOp() | nn.TransposeOp() | nn.CastOp():
                self.values[op.y] = self._of(op.x)
            case nn.SliceOp() | nn.ConstantOp():
                pass  # part of a parameter, or a scalar: named where it is used
            case func.ReturnOp():
                self._return(op)
            case nn.BinaryOp() if _is_scalar(op.b):
                assert isinstance(op.b.owner, nn.ConstantOp)
                x, scalar = self._of(op.a), float(op.b.owner.to_numpy().reshape(()))
                self.values[op.y] = elementwise.with_scalar(self.emit, op.name, x, scalar, "scale")
            case nn.BinaryOp():
                x, y = self._of(op.a), self._of(op.b)
                label = op.name.removeprefix("nn.")
                self.values[op.y] = elementwise.binary(self.emit, op.name, x, y, label)
            case _:
                assert isinstance(op, nn.UnaryOp), op
                label = op.name.removeprefix("nn.")
                self.values[op.y] = elementwise.unary(self.emit, op.name, self._of(op.x), label)

    def _of(self, value: SSAValue) -> Activation:
        """A computed value; a function's hidden argument is loaded at its first use."""
        if value not in self.values:
            order = self.whole.orders.get(value) or plain(shape_of(value)[-1])
            first = self.chunk.first(self.shape)
            self.values[value] = rows.load_rows(
                self.emit,
                self.whole.argument(value),
                order,
                self.shape.all_tokens,
                first,
                self.chunk.count,
            )
        return self.values[value]

    def _input(self, value: SSAValue, element_bytes: int, row_bytes: int) -> Ref:
        """A program input at the chunk's first sequence and token."""
        start = self.chunk.first_sequence * row_bytes + self.chunk.first_token * element_bytes
        return self.whole.argument(value).at(start)

    def _positions(self, value: SSAValue) -> Ref:
        return self._input(value, WORD_BYTES, self.shape.row_bytes("position_ids"))

    def _embedding(self, op: nn.EmbeddingOp) -> Activation:
        count, width = shape_of(op.table)
        order = plain(width)
        layout = RowTableLayout(order=order, per_slice=features_per_slice(order), rows=count)
        return rows.embedding(
            self.emit,
            self.whole.parameter(op.table, layout),
            order,
            self._input(op.ids, INDEX_BYTES, self.shape.row_bytes("input_ids")),
            INDEX_BYTES,
            self.chunk.count,
        )

    def _linear(self, op: nn.LinearOp) -> Activation:
        x = self._of(op.x)
        order = self.whole.orders.get(op.y) or plain(shape_of(op.w)[0])
        per_slice = features_per_slice(order)
        layout = RowsLayout(
            out=order, into=x.order, per_slice=per_slice, k_padded=x.slices_read * x.per_slice
        )
        bias = None
        if op.bias is not None:
            bias = self.whole.parameter(op.bias, VectorLayout(order=order, per_slice=per_slice))
        return linear(
            self.emit,
            x,
            self.whole.parameter(op.w, layout),
            order,
            label="product",
            bias=bias,
            dtype=DType.F32 if op.y in self.whole.wide else DType.BF16,
        )

    def _rms_norm(self, op: nn.RmsNormOp) -> Activation:
        x = self._of(op.x)
        per_head = shape_of(op.weight)[0] != x.order.features
        layout = VectorLayout(order=x.order, per_slice=x.per_slice, repeat=per_head)
        weight = self.whole.parameter(op.weight, layout)
        return rms_norm(
            self.emit, x, weight, op.eps.value.data, per_head=per_head, label="normalised"
        )

    def _rope(self, op: nn.RopeOp) -> Activation:
        x = self._of(op.x)
        table = RopeTable(
            rows=max(self.shape.bucket.attention_size, PADDING_POSITION + 1),
            order=x.order,
            per_slice=x.per_slice,
            inv_freq=tuple(float(v) for v in op.inv_freq.get_values()),
            scaling=op.attention_scaling.value.data,
        )
        positions = self._positions(op.position_ids)
        return rope(self.emit, x, self.whole.need(table), positions, WORD_BYTES, "rotated")

    def _write(self, op: paged.WriteOp) -> None:
        cache = self.whole.caches.get(op.cache) or self.whole.argument(op.cache)
        slots = self._input(op.slot_mapping, INDEX_BYTES, self.shape.row_bytes("slot_mapping"))
        write_cache(self.emit, self._of(op.k), self._of(op.v), cache, slots, INDEX_BYTES)
        self.whole.caches[op.y] = cache

    def _attention(self, op: paged.AttentionOp) -> Activation:
        q, chunk = self._of(op.q), self.chunk
        kv_heads = shape_of(op.cache)[1]
        attended = self.shape.attended(chunk)
        key_index = {
            (turn.splits, turn.keys): self.whole.need(KeyIndex(splits=turn.splits, keys=turn.keys))
            for turn in attention_rounds(chunk.sequences, kv_heads, attended, 4 * q.order.padded)
        }
        table_row = self.shape.table_row_bytes
        inputs = Inputs(
            cache=self.whole.caches.get(op.cache) or self.whole.argument(op.cache),
            block_table=self.whole.argument(op.block_table).at(chunk.first_sequence * table_row),
            table_row_bytes=table_row,
            lengths=self._input(op.lengths, 0, WORD_BYTES),
            length_bytes=WORD_BYTES,
            positions=self._positions(op.position_ids),
            position_bytes=WORD_BYTES,
        )
        zeros = self.whole.need(Zeros(size=_zero_bytes(q, self.whole.limit)))
        return PagedAttention(
            self.emit,
            q,
            kv_heads,
            chunk.sequences,
            attended,
            op.scale.value.data,
            inputs,
            key_index,
            zeros,
        ).run()

    def _last_token(self, op: paged.LastTokenOp) -> Activation:
        if self.shape.tokens == 1:
            return self._of(op.x)
        return rows.last_rows(
            self.emit,
            self.whole.argument(op.x),
            plain(shape_of(op.x)[-1]),
            self.shape.sequences,
            self.shape.tokens,
            self.chunk.first_sequence,
            self.chunk.sequences,
            self.whole.argument(op.lengths),
            WORD_BYTES,
        )

    def _return(self, op: func.ReturnOp) -> None:
        for number, value in enumerate(op.operands):
            if value in self.whole.caches:
                continue  # written in place
            if isinstance(value.owner, Operation):
                self.emit.location = value.owner.location
            x = self._of(value)
            logits = number in self.whole.logits
            tokens_per_sequence = 1 if shape_of(value)[1] == 1 else self.shape.tokens
            all_tokens = self.shape.sequences * tokens_per_sequence
            first = (
                self.chunk.first_sequence
                if tokens_per_sequence == 1
                else self.chunk.first(self.shape)
            )
            out = self.whole.need(Result(number, x.order, all_tokens, logits))
            if logits:
                rows.store_logits(self.emit, x, out, first)
            else:
                rows.store_rows(self.emit, x, out, all_tokens, first)


def _zero_bytes(q: Activation, tokens: int) -> int:
    """Enough zeros for a slice of attention's output, and for any tile of query rows."""
    order = heads(q.order.heads, q.order.head_dim, rotary=False)
    return 2 * max(tokens * features_per_slice(order), VRF_ROWS * order.padded)


def lower_function(
    function: func.FuncOp, shape: TokenShape, logits: frozenset[int]
) -> LoweredBlock:
    """The block with as many tokens at a time as fit. Raises: BCK002, BCK003."""
    full: errors.CompileError | None = None
    for limit in CHUNK_TOKENS:
        lowered = FunctionLowering(function, shape, logits, limit).run()
        if lowered is None:
            break
        try:
            assign_addresses(lowered.op.body.block)
        except errors.CompileError as error:
            full = error
            continue
        return lowered
    assert full is not None, function.sym_name.data
    raise errors.block_does_not_fit(function.sym_name.data, shape.bucket.name, full.cause)


# --- the program ---

INPUTS = ("input_ids", "position_ids", "slot_mapping", "block_table", "lengths")
"""The first arguments of `@forward`; the layers' KV caches follow them."""


@dataclass
class _ProgramLowering:
    """Regions and calls of the program, from `@forward`."""

    forward: func.FuncOp
    shape: TokenShape
    blocks: dict[str, LoweredBlock]
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
        wide = name in ("position_ids", "lengths")
        element_bytes = WORD_BYTES if wide else INDEX_BYTES
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
        lowered = self.blocks[op.callee.root_reference.data]
        buffers = [self._bound(op, need).buffer for need in lowered.needs]
        call = CallOp(op.callee.root_reference.data, buffers)
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
                region = self._scratch(need)
                self.hidden[op.results[need.number]] = region
                return region
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
        begin, end = list(need.begin), list(need.end)
        while isinstance(value.owner, nn.SliceOp):
            start, dim = value.owner.start.value.data, value.owner.dim.value.data
            begin[dim] += start
            end[dim] += start
            value = value.owner.x
        source = value.owner
        assert isinstance(source, nn.GetParameterOp), source
        name = source.parameter.root_reference.data
        relocation = Relocation(
            tensor=name,
            shape=shape_of(value),
            begin=tuple(begin),
            end=tuple(end),
            layout=layout,
        )
        return self._region(relocation, name, parameter=relocation)

    def _cache(self, value: SSAValue, layer: int) -> RegionOp:
        _, kv_heads, _, head_dim = shape_of(value)
        padded = heads(kv_heads, head_dim, rotary=False).padded
        io = CacheIo(layer=layer, kv_heads=kv_heads, head_dim=head_dim, padded=padded)
        return self._region(io, f"cache.{layer}", cache=io)

    def _output(self, need: Result) -> RegionOp:
        sequences = self.shape.sequences
        io = TensorIo(
            name="logits",
            dtype="f32",
            shape=(sequences, need.tokens // sequences, need.order.features),
            element_bytes=4,
            row_bytes=SLICES_PER_PE * features_per_slice(need.order) * 4,
        )
        return self._region(io, "logits", output=io)

    def _scratch(self, need: Result) -> RegionOp:
        """A region that no value still to be read occupies: two serve any number of layers."""
        size = SLICES_PER_PE * features_per_slice(need.order) * need.tokens * 2
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

    @staticmethod
    def for_bucket(bucket: Bucket) -> TilePass:
        """The pass for `bucket`."""
        kind = "decode" if bucket.is_decode else "prefill"
        return TilePass(kind, bucket.batch_size, bucket.attention_size)

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        shape = TokenShape(Bucket.parse(f"{self.kind}:{self.batch},{self.length}"))
        functions = {f.sym_name.data: f for f in op.ops if isinstance(f, func.FuncOp)}
        forward = functions.pop("forward")
        problems = [p for f in functions.values() for p in unsupported(f.body.block)]
        if problems:
            raise errors.unsupported_by_backend(problems)
        logits = _logits_results(forward)
        blocks = {
            name: lower_function(f, shape, logits.get(name, frozenset()))
            for name, f in functions.items()
        }
        program = _ProgramLowering(forward, shape, blocks)
        program.run()
        _replace_body(op, shape.bucket, program)


def _logits_results(forward: func.FuncOp) -> dict[str, frozenset[int]]:
    """For each function, the numbers of its results that `@forward` returns and are no caches."""
    found: dict[str, frozenset[int]] = {}
    for op in forward.body.block.ops:
        if isinstance(op, func.ReturnOp):
            for value in op.operands:
                call = value.owner
                if isinstance(call, func.CallOp) and len(shape_of(value)) == 3:
                    name = call.callee.root_reference.data
                    number = call.results.index(value)
                    found[name] = found.get(name, frozenset()) | {number}
    return found


def _replace_body(module: ModuleOp, bucket: Bucket, program: _ProgramLowering) -> None:
    for op in reversed(list(module.ops)):
        module.body.block.erase_op(op, safe_erase=False)
    module.body.block.add_op(ProgramOp(bucket.name))
    for region in program.regions.values():
        module.body.block.add_op(region)
    for lowered in program.blocks.values():
        module.body.block.add_op(lowered.op)
    for call in program.calls:
        module.body.block.add_op(call)

"""One block: a function's operators for a part of its tokens, as commands.

Activations stand in data memory between operators; the hidden state comes from HBM and goes back
there. A block's HBM arguments are collected on the way: what they stand for is in `needs`, and
`tile` binds them for each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from xdsl.dialects import func
from xdsl.ir import Block, Operation, Region, SSAValue

from ..ir import dist, nn, paged, quant
from ..ir.types import dtype_of, f32, shape_of
from .block_needs import (
    Argument,
    Crossing,
    LoweredBlock,
    Need,
    Part,
    Result,
    Scratch,
    whole_of,
)
from .emitter import Activation, Emitter, Ref
from .fusion import (
    Fusion,
    Gated,
    KeysValues,
    ReducedResidual,
    Residual,
    fusions,
    keys_values,
)
from .isa.dtypes import DType
from .isa.layout import (
    WEIGHT_TYPES,
    FeatureOrder,
    KeyIndex,
    Layout,
    RankNumbers,
    RopeTable,
    RowsLayout,
    RowTableLayout,
    VectorLayout,
    Zeros,
    features_per_slice,
    heads,
    plain,
)
from .isa.machine import load_machine
from .isa.plan import Memory
from .isa.rules import SLICES_PER_PE
from .kernels import elementwise, rows
from .kernels.attention import CacheScales, Inputs, PagedAttention
from .kernels.attention_tiling import attention_rounds, dealt_run
from .kernels.cache import write_cache, write_joined
from .kernels.exchange import AllReduce, Piece, Summand, pieces, put
from .kernels.linear import Product, linear
from .kernels.linear_groups import JoinedProduct, can_join, product_type
from .kernels.linear_limits import check_tiling
from .kernels.linear_tokens import gated
from .kernels.norm import rms_norm
from .kernels.rope import load_angles, rope
from .kernels.vocabulary import local_rows
from .lower_quant import ChunkScales, becomes_codes, block_of, scale_names, weight_dtype
from .rngd import BlockOp, BufferType, TilingOp, WorkOp
from .supported import is_scalar
from .tiling import MatmulTiling, Pins, ProductName, Role, pinned
from .tiling_search import ProductKey, predict, runner_up, search
from .tokens import INDEX_BYTES, WORD_BYTES, Chunk, TokenShape
from .value_uses import (
    HEADS_RANK,
    Linear,
    feature_orders,
    is_last_use,
    is_read_by_heads,
    is_returned,
    module_of,
    parts_of_modules,
    useful_macs,
    wide_values,
)

PADDING_POSITION = 1
"""Position id of padding tokens (docs of the vendor's interface): a row of every RoPE table."""


@dataclass
class _ChunkState:
    """What has been computed of one chunk."""

    chunk: Chunk
    scales: ChunkScales
    values: dict[SSAValue, Activation] = field(default_factory=dict)
    parked: set[SSAValue] = field(default_factory=set)
    """Residuals that stand in HBM until they are added."""
    angles: list[tuple[SSAValue, RopeTable, Ref]] = field(default_factory=list)
    """Rotary angles that are in data memory, with their positions and the table they are from."""
    summands: dict[SSAValue, Summand] = field(default_factory=dict)
    """Where values stand that are to be summed over ranks."""
    own_parts: dict[SSAValue, tuple[Piece, ...]] = field(default_factory=dict)
    """Of sums over ranks, what this rank has summed."""


@dataclass
class BlockLowering:
    """A function's commands for a few chunks, operator by operator."""

    name: str
    function: func.FuncOp
    shape: TokenShape
    chunks: Sequence[Chunk]
    logits: frozenset[int]
    """Numbers of the results that are logits."""
    pins: Pins = field(default_factory=dict)
    """Prescribed tilings by patterns of module paths."""
    compare: bool = False
    """Record the next best tilings too; it takes time to find them."""
    segment: Sequence[Operation] | None = None
    """The operators that this block is for; None: all of the function."""
    crossings: dict[SSAValue, Crossing] = field(default_factory=dict)
    """What earlier segments have left in HBM; this one adds its own."""
    groups: int = 1
    """Groups of slices that have a part of the chunk's tokens each."""
    needs: list[Need] = field(default_factory=list)
    block: Block = field(default_factory=Block)
    starts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.body = self.function.body.block
        self.emit = Emitter(self.block)
        self._states = [
            _ChunkState(chunk, ChunkScales(self.emit, self.parameter)) for chunk in self.chunks
        ]
        self._now = self._states[0]
        self.orders = feature_orders(self.body)
        self.wide = wide_values(self.body, self.logits)
        self.parts = parts_of_modules(self.body)
        self.fused = fusions(self.body)

    def run(self) -> LoweredBlock:
        """Emit the block."""
        ops = list(self.body.ops) if self.segment is None else self.segment
        fused = self.fused
        if self.groups > 1:
            fused = fused | keys_values(self.body)
        later = {part for fusion in fused.values() for part in fusion.parts[:-1]}
        for op in ops:
            for state in self._states:
                self._count_work(op, state.chunk)
        # Operator by operator, so that one chunk's long products hide another's short commands.
        for op in ops:
            for state in self._states:
                self._now, self.emit.location = state, op.location
                if op in fused:
                    self._fused(op, fused[op])
                elif op not in later:
                    self._lower(op)
        if self.segment is not None:
            for state in self._states:
                self._now = state
                self._leave(set(ops))
        return LoweredBlock(BlockOp(self.name, Region(self.block)), self.needs, self.starts)

    def _count_work(self, op: Operation, chunk: Chunk) -> None:
        macs = useful_macs(op, self.shape, chunk)
        if macs:
            self.emit.location = op.location
            self.emit.append(WorkOp(macs))

    @property
    def chunk(self) -> Chunk:
        """The chunk that is being worked on."""
        return self._now.chunk

    @property
    def values(self) -> dict[SSAValue, Activation]:
        """What has been computed so far of its values."""
        return self._now.values

    def need(self, need: Need, start: int = 0) -> Ref:
        """The place `start` bytes into the HBM buffer that stands for `need`.

        Where a buffer's first use begins is a matter of the call, so that calls for other tokens
        can share the block.
        """
        if need not in self.needs:
            self.needs.append(need)
            self.starts.append(start)
            self.block.insert_arg(BufferType(Memory.HBM, 0), len(self.needs) - 1)
        number = self.needs.index(need)
        return Ref(self.block.args[number]).at(start - self.starts[number])

    def argument(self, value: SSAValue, start: int = 0) -> Ref:
        return self.need(Argument(self.body.args.index(value)), start)

    def _cache(self, value: SSAValue) -> Ref:
        """The cache that operators write in place and return."""
        while isinstance(value.owner, paged.WriteOp):
            value = value.owner.cache
        return self.argument(value)

    def _leave(self, own: set[Operation]) -> None:
        """Store what later segments read."""
        for value, x in list(self.values.items()):
            here = isinstance(value.owner, Operation) and value.owner in own
            read = any(use.operation not in own for use in value.uses)
            if not (here and read) or isinstance(value.owner, func.ReturnOp):
                continue
            self._store_crossing(value, x)

    def _store_crossing(self, value: SSAValue, x: Activation) -> None:
        assert x.dtype == DType.BF16, x
        crossing = self.crossings.setdefault(
            value, Crossing(len(self.crossings), x.order, self.shape.all_tokens)
        )
        out = self.need(crossing, self.chunk.first(self.shape) * x.row_bytes)
        rows.store_rows(self.emit, x, out, self.shape.all_tokens, 0, x.slices_read)

    def parameter(self, value: SSAValue, layout: Layout) -> Ref:
        """A weight, or a slice of one, in the layout that a kernel reads."""
        value, part = whole_of(value, Part.all_of(value))
        return self.need(Argument(self.body.args.index(value), layout, part))

    def _lower(self, op: Operation) -> None:
        match op:
            case nn.EmbeddingOp():
                self.values[op.y] = self._embedding(op)
            case nn.LinearOp() | quant.LinearOp():
                self.values[op.y] = self._linear(op)
            case quant.DynamicScaleOp():
                self._now.scales.compute(op, self._of(op.x))
            case quant.QuantizeOp() | quant.DequantizeOp():
                self.values[op.y] = self._now.scales.apply(op, self._of(op.operands[0]))
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
            case dist.AllReduceOp() if op.is_sum:
                self.values[op.y] = self._all_reduce(op, op.y, None)
            case dist.AllReduceOp():
                self._now.scales.compare(op)
            case dist.LocalRowsOp():
                pass  # made where the table is read
            case nn.ReshapeOp() | nn.TransposeOp() | nn.CastOp():
                self.values[op.y] = self._of(op.x)
            case nn.SliceOp() | nn.ConstantOp():
                pass  # part of a parameter, or a scalar: named where it is used
            case func.ReturnOp():
                self._return(op)
            case nn.BinaryOp() if is_scalar(op.b):
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
            crossing = self.crossings.get(value)
            order = self.orders.get(value) or plain(shape_of(value)[-1])
            if crossing is not None:
                order = crossing.order
            start = self.chunk.first(self.shape) * features_per_slice(order) * 2
            used = -(-order.positions // features_per_slice(order))
            self.values[value] = rows.load_rows(
                self.emit,
                self.argument(value, start) if crossing is None else self.need(crossing, start),
                order,
                self.shape.all_tokens,
                0,
                self.chunk.count,
                SLICES_PER_PE if crossing is None else used + used % 2,
                self.groups,
            )
        return self.values[value]

    def _input(self, value: SSAValue, element_bytes: int, row_bytes: int) -> Ref:
        """A program input at the chunk's first sequence and token."""
        start = self.chunk.first_sequence * row_bytes + self.chunk.first_token * element_bytes
        return self.argument(value, start)

    def _positions(self, value: SSAValue) -> Ref:
        return self._input(value, WORD_BYTES, self.shape.row_bytes("position_ids"))

    def _embedding(self, op: nn.EmbeddingOp) -> Activation:
        count, width = shape_of(op.table)
        order = plain(width)
        layout = RowTableLayout(order=order, per_slice=features_per_slice(order), rows=count)
        ids, id_bytes = self._rows(op.ids, count)
        table = self.parameter(op.table, layout)
        return rows.embedding(self.emit, table, order, ids, id_bytes, self.chunk.count)

    def _rows(self, ids: SSAValue, count: int) -> tuple[Ref, int]:
        """The list of the table's rows, and the bytes of an entry; the table has `count` rows."""
        if not isinstance(ids.owner, dist.LocalRowsOp):
            row_bytes = self.shape.row_bytes("input_ids")
            return self._input(ids, self.shape.id_bytes, row_bytes), self.shape.id_bytes
        op, tokens = ids.owner, self.chunk.count
        assert self.shape.id_bytes == WORD_BYTES, "ids that become data have a word each"
        firsts = tuple(_first_row(op.cut, rank) for rank in range(op.cut.ranks))
        return local_rows(
            self.emit,
            self._input(op.ids, WORD_BYTES, self.shape.row_bytes("input_ids")),
            self.need(RankNumbers(numbers=firsts, count=WORD_BYTES // 4)),
            count - 1,
            tokens,
            self.need(Scratch("local_rows", tokens * WORD_BYTES)),
        ), WORD_BYTES

    def _reduction(self, value: SSAValue) -> AllReduce | None:
        """How a value is summed over ranks, if nothing else becomes of it."""
        users = [use.operation for use in value.uses]
        if len(users) != 1 or not isinstance(users[0], dist.AllReduceOp):
            return None
        op = users[0]
        assert op.algorithm is not None, "`lower-collectives` chooses one"
        residual = any(
            isinstance(fusion, ReducedResidual) and fusion.reduce is op
            for fusion in self.fused.values()
        )
        dtype = self._dtype_of(value)
        return AllReduce(op.algorithm.data, op.mask.value.data, dtype, residual)

    def _reserved(
        self, value: SSAValue, reduce: AllReduce, order: FeatureOrder, tokens: int
    ) -> Summand:
        """Where a value is to be written that is summed over ranks."""
        summand = reduce.reserve(self.emit, order, tokens, self.groups)
        self._now.summands[value] = summand
        return summand

    def _all_reduce(
        self, op: dist.AllReduceOp, y: SSAValue, residual: SSAValue | None
    ) -> Activation:
        """The value `y`: what `op` sums over ranks, and the residual."""
        reduce = self._reduction(op.x)
        assert reduce is not None, op
        if op.x not in self._now.summands:
            x = self._of(op.x)
            reserved = self._reserved(op.x, reduce, x.order, x.tokens)
            for source, slots in zip(pieces(x, len(reserved.slots)), reserved.slots, strict=True):
                put(self.emit, source, slots.first)
        summand = self._now.summands.pop(op.x)
        added = () if residual is None else self._added(residual, reduce)
        out = self._room(y, summand.order, summand.tokens)
        self._now.own_parts[y] = reduce.run(self.emit, summand, added, out)
        return out

    def _added(self, residual: SSAValue, reduce: AllReduce) -> tuple[Piece, ...]:
        """What this rank adds of a residual: no more than the tokens that it sums."""
        own = self._now.own_parts.get(residual)
        if own and reduce.scatters and self.groups > 1:
            return own
        if residual in self.values or self.groups == 1 or not reduce.scatters:
            return reduce.whole_residual(self.emit, self._of(residual))
        order = plain(shape_of(residual)[-1])
        first = self.chunk.first(self.shape) * features_per_slice(order) * 2
        return reduce.load_residual(
            self.emit,
            self.argument(residual, first),
            order,
            self.chunk.count // self.groups,
            self.groups,
            rows.hidden_stride(order, self.shape.all_tokens),
        )

    def _reduced_with_residual(self, op: Operation, fusion: ReducedResidual) -> bool:
        self.values[op.results[0]] = self._all_reduce(fusion.reduce, op.results[0], fusion.other)
        return True

    def _room(self, value: SSAValue, order: FeatureOrder, tokens: int) -> Activation:
        """Where a product or a sum over ranks is to be written."""
        reduce = self._reduction(value)
        if reduce is not None:
            return self._reserved(value, reduce, order, tokens)
        dtype = self._dtype_of(value)
        return self.emit.activation(order, tokens, "product", dtype, self.groups)

    def _linear(self, op: Linear) -> Activation:
        product = self._product(op, self._key(op), self._output(op))
        linear(product)
        return product.y

    def _fused(self, op: Operation, fusion: Fusion) -> None:
        """Emit operators as one product, or one by one where weights are the stream."""
        if isinstance(fusion, KeysValues):
            done = self._keys_values(op, fusion)
        elif isinstance(fusion, Gated):
            done = self._gated(op, fusion)
        elif isinstance(fusion, ReducedResidual):
            done = self._reduced_with_residual(op, fusion)
        else:
            done = self._with_residual(op, fusion)
        if not done:
            for part in fusion.parts:
                self.emit.location = part.location
                self._lower(part)

    def _gated(self, op: Operation, fusion: Gated) -> bool:
        keys = {x: self._key(x) for x in (fusion.gate, fusion.up)}
        first, second = (self._tiling(x, key) for x, key in keys.items())
        same = replace(first, predicted=None) == replace(second, predicted=None)
        if first.role != Role.TOKENS or not same or op.results[0] in self.wide:
            return False
        y = self._output(fusion.gate)
        gate, up = (self._product(x, key, y) for x, key in keys.items())
        self.emit.location = op.location
        gated(gate, up, fusion.activation.name)
        self.values[op.results[0]] = y
        return True

    def _keys_values(self, op: Operation, fusion: KeysValues) -> bool:
        assert isinstance(op, paged.WriteOp)
        keys = {x: self._key(x) for x in (fusion.keys, fusion.values)}
        first, second = (replace(self._tiling(x, key), predicted=None) for x, key in keys.items())
        orders = [(key.out.heads, key.out.padded) for key in keys.values()]
        y = self._output(fusion.keys)
        if not (first == second and orders[0] == orders[1] and orders[0][0] == 1 and can_join(y)):
            return False
        both, values = (self._product(x, key, replace(y, order=key.out)) for x, key in keys.items())
        product = JoinedProduct(
            self.emit,
            both.x,
            both.weight,
            y,
            both.tiling,
            location=both.location,
            second=values.weight,
        )
        linear(product)
        self.emit.location = fusion.rope.location
        rotated = rope(self.emit, y, self._angles(fusion.rope, y), "rotated")
        self.emit.location = op.location
        if isinstance(op.k.owner, quant.QuantizeOp) and isinstance(op.v.owner, quant.QuantizeOp):
            scales = self._now.scales
            rotated, y = scales.apply(op.k.owner, rotated), scales.apply(op.v.owner, y)
        slots = self._input(op.slot_mapping, INDEX_BYTES, self.shape.row_bytes("slot_mapping"))
        write_joined(self.emit, y, rotated, self._cache(op.cache), slots, INDEX_BYTES)
        return True

    def _with_residual(self, op: Operation, fusion: Residual) -> bool:
        key = self._key(fusion.linear)
        if self._tiling(fusion.linear, key).role != Role.TOKENS or op.results[0] in self.wide:
            return False
        residual = self._residual(fusion.other)
        if residual.order != key.out:
            return False
        # A tile of the sum takes the place of the residual's, if nobody else wants it.
        y = residual if is_last_use(fusion.other, op) else self._output(fusion.linear)
        product = self._product(fusion.linear, replace(key, residual=True), y)
        linear(replace(product, residual=residual))
        if self.groups > 1 and not is_returned(op.results[0]):
            self._now.parked.add(op.results[0])
        self.values[op.results[0]] = product.y
        return True

    def _residual(self, value: SSAValue) -> Activation:
        """A residual; one that stands in HBM comes when it is added."""
        first, parked = self.chunk.first(self.shape), value in self._now.parked
        if self.groups == 1 or (value in self.values and not parked):
            return self._of(value)
        if parked:
            x = self.values[value]
            self._store_crossing(value, x)
            source = self.need(self.crossings[value], first * x.row_bytes)
        else:
            order = plain(shape_of(value)[-1])
            tokens = self.chunk.count // self.groups
            x = self.emit.activation(order, tokens, "residual", groups=self.groups)
            source = self.argument(value, first * x.row_bytes)

        def fetch(unit: int, place: Ref) -> None:
            rows.load_unit(self.emit, source, x, self.shape.all_tokens, unit, place)

        return self.emit.fetched_activation(x, fetch, split=parked)

    def _key(self, op: Linear) -> ProductKey:
        x = self._of(op.x)
        return ProductKey(
            x.order,
            self._order_of(op),
            x.tokens,
            self._dtype_of(op.y),
            op.bias is not None,
            weight_dtype=weight_dtype(op),
            scales=scale_names(op),
            may_repeat=is_read_by_heads(op.y),
            groups=self.groups,
            block=block_of(op),
        )

    def _order_of(self, op: Linear) -> FeatureOrder:
        return self.orders.get(op.y) or plain(shape_of(op.w)[0])

    def _dtype_of(self, value: SSAValue) -> DType:
        return DType.F32 if value in self.wide or dtype_of(value) == f32 else DType.BF16

    def _output(self, op: Linear) -> Activation:
        return self._room(op.y, self._order_of(op), self._of(op.x).tokens)

    def _product(self, op: Linear, key: ProductKey, y: Activation) -> Product:
        """The product, and the record of its tiling: the caller emits it and no other."""
        self.emit.location = op.location
        tiling = self._tiling(op, key)
        other = runner_up(key, tiling, load_machine()) if self.compare else None
        name, next_best = str(self._product_name(op, key)), other.to_text() if other else None
        self.emit.append(TilingOp(name, tiling.to_text(), next_best))
        x = self._of(op.x)
        layout = RowsLayout(
            out=y.order,
            into=x.order,
            per_slice=y.per_slice,
            k_padded=x.slices_read * x.per_slice,
            parts=tiling.k_split,
            dtype=WEIGHT_TYPES[key.weight_dtype],
        )
        bias = None
        if op.bias is not None:
            bias = self.parameter(op.bias, VectorLayout(order=y.order, per_slice=y.per_slice))
        weight = self.parameter(op.w, layout)
        zeros = None if tiling.every_slice else self.need(Zeros(size=y.size_bytes))
        return product_type(tiling, blocks=key.block is not None)(
            self.emit,
            x,
            weight,
            y,
            tiling,
            bias,
            zeros=zeros,
            weight_dtype=key.weight_dtype,
            scales=self._now.scales.of_product(op, key, y),
            location=op.location,
        )

    def _tiling(self, op: Operation, key: ProductKey) -> MatmulTiling:
        """The product's pin if there is one, else what the search finds. Raises: BCK006."""
        machine, product = load_machine(), self._product_name(op, key)
        tiling = pinned(self.pins, product)
        if tiling is None:
            return search(key, machine)
        check_tiling(key.shape, tiling, product.module)
        return replace(tiling, predicted=predict(key, tiling, machine))

    def _product_name(self, op: Operation, key: ProductKey) -> ProductName:
        return ProductName(
            self.function.sym_name.data, module_of(op), self.parts.get(op, 0), key.tokens
        )

    def _rms_norm(self, op: nn.RmsNormOp) -> Activation:
        x = self._of(op.x)
        per_head = len(shape_of(op.x)) == HEADS_RANK
        layout = VectorLayout(order=x.order, per_slice=x.per_slice, repeat=per_head)
        weight = self.parameter(op.weight, layout)
        return rms_norm(
            self.emit, x, weight, op.eps.value.data, per_head=per_head, label="normalised"
        )

    def _rope(self, op: nn.RopeOp) -> Activation:
        x = self._of(op.x)
        return rope(self.emit, x, self._angles(op, x), "rotated")

    def _angles(self, op: nn.RopeOp, x: Activation) -> Ref:
        """Angles of the tokens; queries and keys share them if their heads lie alike in slices."""
        table = RopeTable(
            rows=max(self.shape.bucket.attention_size, PADDING_POSITION + 1),
            order=x.order,
            per_slice=x.per_slice,
            inv_freq=tuple(float(v) for v in op.inv_freq.get_values()),
            scaling=op.attention_scaling.value.data,
        )
        for positions, known, angles in self._now.angles:
            same = positions == op.position_ids and x.order.heads <= known.order.heads
            order = x.order.model_copy(update={"heads": known.order.heads})
            if same and table.model_copy(update={"order": order}) == known:
                return angles
        rows_of_table = self._positions(op.position_ids)
        angles = load_angles(self.emit, x, self.need(table), rows_of_table, WORD_BYTES)
        self._now.angles.append((op.position_ids, table, angles))
        return angles

    def _write(self, op: paged.WriteOp) -> None:
        cache = self._cache(op.cache)
        slots = self._input(op.slot_mapping, INDEX_BYTES, self.shape.row_bytes("slot_mapping"))
        write_cache(self.emit, self._of(op.k), self._of(op.v), cache, slots, INDEX_BYTES)

    def _attention(self, op: paged.AttentionOp) -> Activation:
        chunk, grouped = self.chunk, self.groups > 1
        q = self._dealt(op.q) if grouped else self._of(op.q)
        kv_heads = shape_of(op.cache)[1]
        attended = self.shape.attended(chunk)
        table_row = self.shape.table_row_bytes
        # Groups of slices that share a sequence work as on so many sequences with the same keys.
        sequences = self.groups if grouped else chunk.sequences
        rounds = attention_rounds(sequences, kv_heads, attended, table_row // INDEX_BYTES)
        key_index = {
            (turn.splits, turn.keys): self.need(KeyIndex(splits=turn.splits, keys=turn.keys))
            for turn in rounds
        }
        scales = None
        if op.k_scale is not None and op.v_scale is not None:
            keys, values = (self._now.scales.of(scale) for scale in (op.k_scale, op.v_scale))
            scales = CacheScales(keys.ref, values.ref)
        inputs = Inputs(
            cache=self._cache(op.cache),
            cache_dtype=DType.BF16 if scales is None else DType.F8E4M3,
            scales=scales,
            block_table=self.argument(op.block_table, chunk.first_sequence * table_row),
            table_row_bytes=0 if grouped else table_row,
            lengths=self._input(op.lengths, 0, WORD_BYTES),
            length_bytes=0 if grouped else WORD_BYTES,
            positions=self._positions(op.position_ids),
            position_bytes=WORD_BYTES,
            key_index=key_index,
            zeros=self.need(Zeros(size=_zero_bytes(q))),
        )
        return PagedAttention(
            self.emit,
            q,
            kv_heads,
            sequences,
            chunk.first_token,
            rounds,
            op.scale.value.data,
            inputs,
            is_read_everywhere=becomes_codes(op.y),
        ).run()

    def _dealt(self, value: SSAValue) -> Activation:
        """Query rows of an earlier segment, dealt to the groups of slices."""
        crossing, tokens = self.crossings[value], self.chunk.count // self.groups
        order = crossing.order
        return rows.load_rows(
            self.emit,
            self.need(crossing, self.chunk.first(self.shape) * features_per_slice(order) * 2),
            order,
            self.shape.all_tokens,
            0,
            self.chunk.count,
            groups=self.groups,
            deal=dealt_run(order, SLICES_PER_PE // self.groups, tokens),
        )

    def _last_token(self, op: paged.LastTokenOp) -> Activation:
        if self.shape.tokens == 1:
            return self._of(op.x)
        return rows.last_rows(
            self.emit,
            self.argument(op.x),
            plain(shape_of(op.x)[-1]),
            self.shape.sequences,
            self.shape.tokens,
            self.chunk.first_sequence,
            self.chunk.sequences,
            self.argument(op.lengths),
            WORD_BYTES,
        )

    def _return(self, op: func.ReturnOp) -> None:
        for number, value in enumerate(op.operands):
            if isinstance(value.owner, paged.WriteOp):
                continue  # written in place
            if isinstance(value.owner, Operation):
                self.emit.location = value.owner.location
            x = self._of(value)
            logits = number in self.logits
            tokens_per_sequence = 1 if shape_of(value)[1] == 1 else self.shape.tokens
            all_tokens = self.shape.sequences * tokens_per_sequence
            first = (
                self.chunk.first_sequence
                if tokens_per_sequence == 1
                else self.chunk.first(self.shape)
            )
            result = Result(number, x.order, all_tokens, logits)
            if logits:
                start = first * SLICES_PER_PE * x.row_bytes
                rows.store_logits(self.emit, x, self.need(result, start), 0)
            else:
                # Who loads it knows no order but this one.
                assert x.order == plain(x.order.features), x.order
                out = self.need(result, first * x.row_bytes)
                rows.store_rows(self.emit, x, out, all_tokens, 0)


def _first_row(cut: dist.CutAttr, rank: int) -> int:
    """The row of the whole table that a rank's part begins with; it may have none."""
    pieces = cut.pieces(rank)
    assert all(begin == 0 for begin, _ in pieces), "a rank has one run of rows"
    return pieces[0][1][0] if pieces else cut.whole_size


def _zero_bytes(q: Activation) -> int:
    """Enough zeros for a slice of attention's output."""
    order = heads(q.order.heads, q.order.head_dim, rotary=False)
    return 2 * q.tokens * features_per_slice(order)

"""The meaning of commands, element by element in plain Python: what fast execution must equal.

It follows the formulas of docs/isa.md one by one and shares no code with the simulator, decoding
and rounding of numbers included. Memories are u8 arrays; HBM is a list of them. Where the meaning
leaves a result open, it is a `Between`; `settle` holds what the simulator chose to it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import between
import exact_conversions as exact
import numpy as np
from between import Between, Value, to_f32
from scalar_numbers import (
    Number,
    as_float,
    as_int,
    cast,
    known_float,
    known_int,
    load,
    load_half,
    rectified,
    result_value,
    saturated,
    save,
    save_half,
    wrap,
)

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Birth,
    Comparison,
    Counter,
    Dma,
    Exec,
    Fate,
    Groups,
    Indirect,
    Op,
    Placement,
    Port,
    Reduce,
    Side,
    Sink,
    Source,
    Space,
    ValidDim,
    VectorOp,
)
from furiosa_llm.backend_rngd.isa.units import STAGE

DM_BYTES, TRF_BYTES, VRF_BYTES, SLICE_BYTES = 1 << 19, 1 << 16, 1 << 13, 1 << 22
REDUCER_AFTER = 3


class ScalarMachine:
    """Memories of `slices` slices; all start with the bytes that they are given."""

    def __init__(
        self, dm: np.ndarray, trf: np.ndarray, vrf: np.ndarray, hbm: Sequence[np.ndarray] = ()
    ) -> None:
        self.dm, self.trf, self.vrf, self.hbm = dm.copy(), trf.copy(), vrf.copy(), list(hbm)
        self.rank = 0
        self.ranks = [self]
        """All machines of the program; the one that executes is number `rank`."""
        self.open: list[tuple[int, int, DType, Between]] = []
        """Elements of data memory that are not decided: slice, half byte, type, ends."""

    def settle(self, dm: np.ndarray) -> None:
        """Take open elements from the data memory of the simulator, which must be allowed."""
        for s, place, dtype, value in self.open:
            found = load_half(dm[s], place, dtype)
            assert between.allows(value, found, dtype), (s, place // 2, found, value)
            if dtype.bits < 8:
                save_half(self.dm[s], place, int(found))
            else:
                at = slice(place // 2, place // 2 + dtype.bits // 8)
                self.dm[s][at] = dm[s][at]

    # --- passes ---

    def execute(self, c: Exec) -> None:
        """Fetch everything, compute everything, then write everything."""
        slices = range(c.valid_slices or 64 << c.group)
        if c.generate is not None:
            self.constants(c, slices)
            return
        if c.commit.sink != Sink.DM:
            stores = [
                (s, t, self.packet(c, c.a, 0, s, t)) for s in slices for t in steps(c.counters)
            ]
            for s, t, packet in stores:
                self.store(c, s, t, packet)
            return
        results = self.first_reduce(c, {s: self.stream(c, s) for s in slices})
        results = {s: self.vector(c, s, values) for s, values in results.items()}
        if c.vector.slice_placement == Placement.LAST:
            results = across_slices(c, results)
        for s, values in results.items():
            self.commit(c, s, values)

    def constants(self, c: Exec, slices: Sequence[int]) -> None:
        assert c.generate is not None
        for s in slices:
            for number, (*t, q) in enumerate(
                itertools.product(*(range(k.n) for k in c.counters), range(c.commit.columns))
            ):
                at = c.commit_port.base + q * c.commit.column_stride
                at += sum(i * k.commit for i, k in zip(t, c.counters, strict=True))
                size = c.commit_port.dtype.bits // 8
                value = c.generate.value + (number if c.generate.count_up else 0)
                raw = (value % (1 << 32)).to_bytes(4, "little")[:size]
                self.dm[s][at : at + size] = np.frombuffer(raw, np.uint8)

    def snooped(self, c: Exec, s: int, step: int) -> int:
        """The slice that bit number `step` of slice s's bitmap stands for."""
        assert c.switch.bitmap is not None
        bits = int.from_bytes(self.dm[s][c.switch.bitmap :][: max(8, c.switch.ring // 8)], "little")
        named = [r for r in range(c.switch.ring) if bits >> r & 1]
        return s - s % c.switch.ring + named[step]

    def source_slice(self, c: Exec, s: int, t: Sequence[int]) -> tuple[int, int]:
        """(source slice, bytes of fetch address that its digits add)."""
        if c.switch.bitmap is not None:
            brought = [i for k, i in zip(c.counters, t, strict=True) if k.birth == Birth.SLICE]
            return self.snooped(c, s, sum(brought)), 0
        source, extra = s - s % c.switch.ring, 0
        if c.switch.ring == 1:
            source = s
        for d in c.switch.digits:
            digit = (s >> d.shift) & ((1 << d.bits) - 1)
            source += digit * d.slices
            extra += digit * d.bytes
        for k, i in zip(c.counters, t, strict=True):
            if k.birth == Birth.SLICE:
                source += i * k.slices
        return source, extra

    def packet(self, c: Exec, port: Port, which: int, s: int, t: Sequence[int]) -> list[Number]:
        """F[s, t, ·] of port A or B."""
        source, at = self.source_slice(c, s, t)
        at += port.base
        for k, i in zip(c.counters, t, strict=True):
            if k.birth != Birth.REUSE:
                at += i * (k.b if which else k.a)
        st = c.stream
        half_bytes = port.dtype.bits // 4
        found: list[Number] = []
        for e in range(st.run * st.runs):
            place = 2 * (at + e // st.run * st.run_stride) + e % st.run * st.run_step * half_bytes
            value = load_half(self.dm[source], place, port.dtype)
            value = cast(value, port.dtype, st.cast)
            found.append(value if st.zero_point is None else int(value) - st.zero_point)
        return found + [0] * (max(len(found), st.pad) - len(found))

    def stream(self, c: Exec, s: int) -> dict[tuple[int, ...], list[Value]]:
        """O before the vector engine: (group, lane, counters that are not MSUM) -> columns."""
        if c.contraction is None:
            packets: dict[tuple[int, ...], list[Value]] = {}
            for t in steps(c.counters):
                packets[(0, 0, *t)] = [*self.packet(c, c.a, 0, s, t)]
                if c.stream.pair:
                    packets[(1, 0, *t)] = [*self.packet(c, c.b, 1, s, t)]
            return packets
        found: dict[tuple[int, ...], list[Number]] = {}
        for lane in range(c.commit.lanes):
            for t in steps(c.counters):
                key = (
                    0,
                    lane,
                    *(i for i, k in zip(t, c.counters, strict=True) if k.fate != Fate.MSUM),
                )
                sums = self.products(c, s, lane, t)
                old = found.get(key, [0] * len(sums))
                found[key] = [a + b for a, b in zip(old, sums, strict=True)]
        if not c.trf.dtype.is_float:
            return {key: [wrap(int(v)) for v in values] for key, values in found.items()}
        return {key: [*values] for key, values in found.items()}

    def products(self, c: Exec, s: int, lane: int, t: Sequence[int]) -> list[Number]:
        k = c.contraction
        assert k is not None
        packet = self.packet(c, c.a, 0, s, t)
        at = c.trf.base
        at += sum(i * counter.trf for i, counter in zip(t, c.counters, strict=True))
        half_bytes = c.trf.dtype.bits // 4
        columns: list[Number] = [0] * (len(packet) >> k.depth)
        for x, value in enumerate(packet):
            inside = x * half_bytes % (2 * k.trf_read)
            place = 2 * trf_byte(k.lanes, lane, at + inside // 2) + inside % 2
            row = load_half(self.trf[s], place, c.trf.dtype)
            columns[x >> k.depth] += value * row
        return columns

    # --- vector engine ---

    def first_reduce(
        self, c: Exec, results: dict[int, dict[tuple[int, ...], list[Value]]]
    ) -> dict[int, dict[tuple[int, ...], list[Value]]]:
        return across_slices(c, results) if c.vector.slice_placement == Placement.FIRST else results

    def vector(
        self, c: Exec, s: int, results: dict[tuple[int, ...], list[Value]]
    ) -> dict[tuple[int, ...], list[Value]]:
        """(lane, out counters) -> columns."""
        v = c.vector
        kept = [k for k in c.counters if k.fate != Fate.MSUM]
        split = sum(STAGE[op.alu] <= REDUCER_AFTER for op in v.ops)
        before, after = v.ops[:split], v.ops[split:]
        if v.reduce == Reduce.NONE:
            before, after = v.ops, ()
        stash: dict[tuple[int, ...], Value] = {}
        merged: dict[tuple[int, ...], list[Value]] = {}
        for (group, lane, *t), columns in results.items():
            if group == 1:
                continue
            others = results.get((1, lane, *t))
            merged[(lane, *t)] = [
                self.units(c, before, s, lane, kept, t, q, x, others, stash, 0)
                for q, x in enumerate(columns)
            ]
        if v.reduce != Reduce.NONE:
            merged = reduced(c, kept, merged, s)
            kept = [k for k in kept if k.fate == Fate.OUT]
        return {
            (lane, *t): [
                self.units(c, after, s, lane, kept, t, q, x, None, stash, 0)
                for q, x in enumerate(columns)
            ]
            for (lane, *t), columns in merged.items()
        }

    def units(
        self,
        c: Exec,
        ops: Sequence[VectorOp],
        s: int,
        lane: int,
        kept: Sequence[Counter],
        t: Sequence[int],
        q: int,
        x: Value,
        others: list[Value] | None,
        stash: dict[tuple[int, ...], Value],
        group: int,
    ) -> Value:
        """One element through `ops`; at a zip the other group's element goes the same way."""
        key = (lane, *t, q)
        tag = tag_of(c, x)
        for i, op in enumerate(ops):
            if op.stash:
                stash[key] = x
            if op.groups == (Groups.SECOND if group == 0 else Groups.FIRST):
                continue
            operands = []
            sources = [op.y, op.z]
            if op.y == Source.SELECT:
                matching = [
                    slot.source
                    for slot in c.vector.slots
                    if (tag & slot.mask == slot.value) != slot.negate
                ]
                if not matching:
                    continue
                sources[0] = matching[0]
            for source in sources:
                if source == Source.ZIP:
                    assert others is not None
                    other = self.units(c, ops[:i], s, lane, kept, t, q, others[q], None, stash, 1)
                    operands.append(other)
                elif source == Source.VRF:
                    v = c.vector
                    at = c.vrf.base + lane * v.vrf_lane + q * v.vrf_column + group * v.vrf_pair
                    at += sum(n * k.vrf for n, k in zip(t, kept, strict=True))
                    operands.append(load(self.vrf[s], at, DType.I32))
                elif source == Source.STASH:
                    operands.append(stash[key])
                elif source == Source.SELF:
                    operands.append(x)
                elif source != Source.NONE:
                    imm = c.vector.imm[(Source.IMM0, Source.IMM1, Source.IMM2).index(source)]
                    operands.append(wrap(imm))
            x = unit(op, x, operands)
        return x

    # --- writing ---

    def commit(self, c: Exec, s: int, results: dict[tuple[int, ...], list[Value]]) -> None:
        o = c.commit
        out = [k for k in c.counters if k.fate == Fate.OUT]
        for (lane, *t), columns in results.items():
            at = c.commit_port.base + lane * o.lane_stride
            at += sum(i * k.commit for i, k in zip(t, out, strict=True))
            for q in range(o.columns):
                value: Value = 0
                if q < len(columns):
                    value = result_value(c, columns[q])
                    if o.relu:
                        value = rectified(value)
                place = 2 * (at + q * o.column_stride)
                if c.commit_port.dtype == DType.I4:  # its strides count half bytes
                    place = c.commit_port.base + at + q * o.column_stride
                if isinstance(value, Between):
                    self.open.append((s, place, c.commit_port.dtype, value))
                elif c.commit_port.dtype == DType.I4:
                    save_half(self.dm[s], place, int(value))
                else:
                    save(self.dm[s], place // 2, value, c.commit_port.dtype)

    def store(self, c: Exec, s: int, t: Sequence[int], packet: Sequence[Number]) -> None:
        size = c.commit_port.dtype.bits // 8
        if c.commit_port.dtype == DType.I4:
            packed = [
                int(a) & 15 | (int(b) & 15) << 4
                for a, b in zip(packet[::2], packet[1::2], strict=True)
            ]
            signed = [v - 256 if v > 127 else v for v in packed]
            i8 = replace(c, commit_port=replace(c.commit_port, dtype=DType.I8))
            self.store(i8, s, t, signed)
            return
        if c.commit.sink == Sink.TRF:
            lane = sum(i * k.lanes for i, k in zip(t, c.counters, strict=True))
            at = c.commit_port.base + sum(i * k.trf for i, k in zip(t, c.counters, strict=True))
            for e, value in enumerate(packet):
                place = trf_byte(c.trf_lanes, lane, at + e * size)
                save(self.trf[s], place, value, c.commit_port.dtype)
            return
        at = c.commit_port.base + sum(i * k.vrf for i, k in zip(t, c.counters, strict=True))
        for e, value in enumerate(packet):
            save(self.vrf[s], at + e * size, value, c.commit_port.dtype)

    # --- transfers ---

    def transfer(self, c: Dma) -> None:
        """Every step of the loops in order; registers are zero, so bases are addresses."""
        moved = []
        for t in itertools.product(*map(range, c.n)):
            row = 0
            if c.index is not None:
                at = c.index.base + sum(i * v for i, v in zip(t, c.index.strides, strict=True))
                region, offset = at >> 40, at & (1 << 40) - 1
                row = int(load(self.hbm[region], offset, DType.I32)) * c.index.scale
            source = row if c.indirect == Indirect.SOURCE else 0
            target = row if c.indirect == Indirect.DESTINATION else 0
            content = [self.cell(c.source, t, source + e).copy() for e in range(c.run)]
            moved.append((t, target, content))
        for t, target, content in moved:
            for e, byte in enumerate(content):
                self.cell(c.destination, t, target + e)[...] = byte

    def cell(self, side: Side, t: Sequence[int], extra: int) -> np.ndarray:
        """The byte at a step, as an array of shape ()."""
        at = side.base + sum(i * v for i, v in zip(t, side.strides, strict=True)) + extra
        at += (self.rank ^ side.rank_mask) * side.rank_stride
        owner = self.ranks[self.rank ^ side.peer]
        if side.space == Space.DM:
            return owner.dm[at // SLICE_BYTES, at % SLICE_BYTES, ...]
        return owner.hbm[at >> 40][at & (1 << 40) - 1, ...]


def trf_byte(lanes: int, lane: int, byte: int) -> int:
    """Where byte `byte` of a lane lies: both halves hold a part of every lane."""
    part = TRF_BYTES // 2 // lanes
    return byte // part * (TRF_BYTES // 2) + lane * part + byte % part


def steps(counters: Sequence[Counter]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(k.n) for k in counters))


def reduced(
    c: Exec, kept: Sequence[Counter], results: dict[tuple[int, ...], list[Value]], s: int
) -> dict[tuple[int, ...], list[Value]]:
    """Fold the VSUM counters, and the columns if asked for; what is not valid is left out."""
    terms: dict[tuple[int, ...], list[list[Value]]] = {}
    kind = c.vector.reduce
    for (lane, *t), columns in results.items():
        key = (lane, *(i for i, k in zip(t, kept, strict=True) if k.fate == Fate.OUT))
        count = valid_count(c, kept, t, s)
        values = [v if q < count else neutral(kind) for q, v in enumerate(columns)]
        if c.vector.reduce_columns:
            terms.setdefault(key, [[]])[0].extend(values)
            continue
        for column, value in zip(terms.setdefault(key, [[] for _ in values]), values, strict=True):
            column.append(value)
    return {key: [fold_all(kind, column) for column in columns] for key, columns in terms.items()}


def valid_count(c: Exec, kept: Sequence[Counter], t: Sequence[int], s: int) -> int:
    """Valid columns of the packet of step `t` in slice `s`."""
    index = dict.fromkeys(ValidDim, 0)
    for i, k in zip(t, kept, strict=True):
        index[k.valid_dim] += i * k.valid_step
    for gate, dim in zip(c.vector.gates, list(ValidDim)[2:], strict=False):
        part = s & gate.mask
        inside = index[dim] < gate.bound
        if part > gate.slice_bound and not (gate.time_major and inside):
            return 0
        if part == gate.slice_bound and not inside:
            return 0
    clipper = c.vector.clipper
    if clipper is None:
        return 1 << 16
    return min(clipper.span, max(0, clipper.size - index[ValidDim.PACKET]))


def neutral(kind: Reduce) -> Number:
    return {
        Reduce.ADD: 0.0,
        Reduce.MAX: -math.inf,
        Reduce.MIN: math.inf,
        Reduce.IMAX: -(1 << 31),
        Reduce.IMIN: (1 << 31) - 1,
        Reduce.IADD_SAT: 0,
    }[kind]


class Undecided(Exception):
    """A comparison of something that rounding leaves open: a sum over slices before the units."""


def tag_of(c: Exec, x: Value) -> int:
    """The bits of the comparisons that hold; as the stream's type has it, or unsigned."""
    dtype = c.stream.cast or c.stream.lookup or c.a.dtype
    tag = 0
    for bit, comparator in enumerate(c.vector.comparators):
        pattern = wrap(comparator.boundary)
        if isinstance(x, Between):
            raise Undecided
        a: Number = as_float(x) if dtype.is_float else as_int(x)
        b: Number = as_float(pattern) if dtype.is_float else pattern
        if comparator.kind in (Comparison.LESS_UNSIGNED, Comparison.GREATER_UNSIGNED):
            a, b = as_int(x) % (1 << 32), comparator.boundary
        holds = {
            Comparison.FALSE: False,
            Comparison.TRUE: True,
            Comparison.EQUAL: a == b,
            Comparison.LESS: a < b,
            Comparison.LESS_UNSIGNED: a < b,
            Comparison.GREATER: a > b,
            Comparison.GREATER_UNSIGNED: a > b,
        }[comparator.kind]
        tag |= holds << bit
    return tag


def across_slices(
    c: Exec, results: dict[int, dict[tuple[int, ...], list[Value]]]
) -> dict[int, dict[tuple[int, ...], list[Value]]]:
    v = c.vector
    if v.slice_reduce == Reduce.NONE:
        return results
    found = {}
    for s in results:
        first = s - s % v.slice_group
        group = [results[r] for r in range(first, first + v.slice_group)]
        found[s] = {
            key: [
                fold_all(v.slice_reduce, [member[key][q] for member in group])
                for q in range(len(group[0][key]))
            ]
            for key in group[0]
        }
    return found


FOLDED: dict[Reduce, Callable[[int, int], int]] = {
    Reduce.IADD: lambda i, j: i + j,
    Reduce.IADD_SAT: lambda i, j: i + j,
    Reduce.IMAX: max,
    Reduce.IMIN: min,
}
"""Sums wrap or saturate once, at the end."""
FOLDED_FLOATS: dict[Reduce, Callable[[float, float], float]] = {
    Reduce.MUL: lambda x, y: to_f32(x * y),
    Reduce.MAX: lambda x, y: float(np.maximum(x, y)),
    Reduce.MIN: lambda x, y: float(np.minimum(x, y)),
}


def fold_all(kind: Reduce, values: Sequence[Value]) -> Value:
    """The reducer's result; the order of a sum is not specified."""
    if kind == Reduce.ADD:
        return between.total([known_float(v) for v in values])
    result = values[0]
    for value in values[1:]:
        if kind in FOLDED_FLOATS:
            operands = [known_float(result), known_float(value)]
            result = between.corners(FOLDED_FLOATS[kind], operands)
            continue
        first, second = known_int(result), known_int(value)
        if isinstance(first, Between) or isinstance(second, Between):
            op = Op.IMAX if kind in (Reduce.IMAX, Reduce.IMIN) else Op.IADD
            result = between.integers(op, FOLDED[kind], first, second)
        else:
            result = FOLDED[kind](first, second)
    if kind == Reduce.IADD_SAT:
        return between.clamped(known_int(result))
    return wrap(result) if isinstance(result, int) else result


def unit(op: VectorOp, x: Value, operands: Sequence[Value]) -> Value:
    """One unit on one element; integers are i32 patterns, floats f32."""
    integer: dict[Op, Callable[[int, int], int]] = {
        Op.AND: lambda a, b: a & b,
        Op.OR: lambda a, b: a | b,
        Op.XOR: lambda a, b: a ^ b,
        Op.SHL: lambda a, b: a << b if 0 <= b < 32 else 0,
        Op.SHR: lambda a, b: (a & 0xFFFFFFFF) >> b if 0 <= b < 32 else 0,
        Op.SAR: lambda a, b: a >> b if 0 <= b < 32 else a >> 31,
        Op.IADD: lambda a, b: a + b,
        Op.ISUB: lambda a, b: a - b,
        Op.IMUL: lambda a, b: a * b,
        Op.IMIN: min,
        Op.IMAX: max,
        Op.IADD_SAT: lambda a, b: saturated(a + b),
        Op.ISUB_SAT: lambda a, b: saturated(a - b),
        Op.SHL_SAT: lambda a, b: saturated(a << (b if 0 <= b < 32 else 32)),
        Op.MUL_FXP: lambda a, b: saturated(((a * b >> 30) + 1) >> 1),
        Op.SAR_ROUND: lambda a, b: (a + (1 << b >> 1)) >> b if 0 <= b < 32 else 0,
        Op.IABSMIN: lambda a, b: min(abs(a), abs(b)),
        Op.IABSMAX: lambda a, b: max(abs(a), abs(b)),
    }
    if op.op in integer:
        a, b = known_int(x), known_int(operands[0])
        if isinstance(a, Between) or isinstance(b, Between):
            return between.integers(op.op, integer[op.op], a, b)
        return wrap(integer[op.op](b, a) if op.reverse else integer[op.op](a, b))
    bits = 31 - op.int_width
    if op.op == Op.ITOF:
        return to_f32(float(as_int(x)) / 2**bits)
    if op.op == Op.FTOI:
        low, high = (exact.to_fixed(exact.f32_bits(v), bits) for v in between.ends(known_float(x)))
        return low if low == high else Between(low, high)
    values = [known_float(x), *map(known_float, operands)]
    if op.reverse:
        values[:2] = values[1::-1]
    if op.op in between.APPROXIMATE:
        return between.function(op.op, exact_float, values[0])
    return between.floats(op.op, float_unit, values)


def float_unit(op: Op, values: Sequence[float]) -> float:
    """Rounded once, but for FMA, which rounds its product too."""
    return to_f32(exact_float(op, values))


def exact_float(op: Op, values: Sequence[float]) -> float:
    """In f64."""
    x, y, z = (np.float64(v) for v in (*values, 0.0, 0.0)[:3])
    one: dict[Op, Callable[[], Any]] = {
        Op.SQRT: lambda: np.sqrt(x),
        Op.TANH: lambda: np.tanh(x),
        Op.SIGMOID: lambda: 1.0 / (1.0 + np.exp(-x)),
        Op.ERF: lambda: math.erf(x),
        Op.LOG: lambda: np.log(x),
        Op.SIN: lambda: np.sin(x),
        Op.COS: lambda: np.cos(x),
        Op.EXP: lambda: np.exp(x),
        Op.NEGEXP: lambda: np.exp(-x),
        Op.ADD: lambda: x + y,
        Op.SUB: lambda: x - y,
        Op.MUL: lambda: x * y,
        Op.DIV: lambda: x / y,
        Op.MIN: lambda: np.minimum(x, y),
        Op.MAX: lambda: np.maximum(x, y),
        Op.FMA: lambda: to_f32(x * y) + z,
        Op.ABSMIN: lambda: np.minimum(abs(x), abs(y)),
        Op.ABSMAX: lambda: np.maximum(abs(x), abs(y)),
    }
    with np.errstate(all="ignore"):
        return float(one[op]())

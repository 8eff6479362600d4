"""What the fields of an `Exec` command must satisfy together: capacities, order, alignment.

Each rule has a name that its error carries, and cites the section of `docs/isa.md` that explains
it. The decoder runs them all, so neither executor meets a command that the machine could not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ... import errors
from .dtypes import DType
from .instructions import (
    Birth,
    Context,
    Contraction,
    Counter,
    Exec,
    Fate,
    Fold,
    Generate,
    Op,
    Port,
    Reduce,
    Sink,
    Stream,
    Topology,
    ValidDim,
)
from .topology_rules import topology_violations
from .vector_rules import vector_violations

TRF_BYTES = 65536
TRF_HALF_BYTES = TRF_BYTES // 2
VRF_BYTES = 8192
DM_BYTES = 524288
ACCUMULATOR_CELLS = 1024
REDUCE_SLOTS = 8
SEQUENCER_ENTRIES = 8
FLIT_BYTES = 32
SLICES_PER_PE = 64
LANES = 8
TREE_DEPTH = {4: 7, 8: 6, 16: 5}
"""Levels of the adder tree by operand width in bits."""
TRANSPOSER_ROWS = {4: 16, 8: 8, 16: 4, 32: 2}
"""Elements that enter the transposer per cycle, by width in bits."""
TRANSPOSER_COLUMNS = 32


def check_exec(command: Exec, where: str) -> None:
    """Raises: VED011, naming the first rule that does not hold."""
    for rule, cause in _violations(command):
        raise errors.rule_broken(where, rule, cause)


def _violations(c: Exec) -> Iterator[tuple[str, str]]:
    yield from _counters(c)
    yield from _fetch(c)
    yield from _switch(c)
    if c.contraction is not None:
        yield from _contraction(c, c.contraction)
    yield from vector_violations(c)
    yield from _commit(c)


def _counters(c: Exec) -> Iterator[tuple[str, str]]:
    for i, counter in enumerate(c.counters):
        inner = c.counters[i + 1 :]
        if counter.birth == Birth.REUSE and c.contraction is None:
            yield "reuse-needs-contraction", f"counter {i} re-uses packets without a register file"
        if counter.birth == Birth.REUSE and any(k.birth != Birth.REUSE for k in inner):
            yield "reuse-innermost", f"counter {i} is re-use, but a fetched counter lies inside it"
        if counter.birth == Birth.REUSE and (counter.a or counter.b):
            yield "reuse-no-fetch", f"counter {i} is re-use and has a fetch stride"
        if (counter.birth == Birth.SLICE) != (counter.slices != 0):
            yield "slice-stride", f"counter {i}: a slice stride goes with birth = slice alone"
        if counter.birth == Birth.SLICE and (counter.a or counter.b):
            yield "slice-stride", f"counter {i}: every slice fetches from the same addresses"
        if counter.fate == Fate.MSUM and c.contraction is None:
            yield "msum-needs-contraction", f"counter {i} sums in a contraction that is not used"
        if counter.fate == Fate.VSUM and c.vector.reduce == Reduce.NONE:
            yield "vsum-needs-reducer", f"counter {i} folds in a reducer that is not used"
        if counter.fate != Fate.OUT and (counter.commit or counter.lanes):
            yield "summed-no-commit", f"counter {i} is summed and has a commit stride"
        if counter.fate == Fate.MSUM and counter.vrf:
            yield "msum-no-vrf", f"counter {i} is summed before the vector engine"
        if counter.valid_step and counter.valid_dim == ValidDim.NONE:
            yield "valid-dim", f"counter {i} has a step of a valid count that nothing follows"
        if counter.lanes and c.commit.sink != Sink.TRF:
            yield "lanes-only-to-trf", f"counter {i} steps lanes, but the sink is not the TRF"
    slots = _out_inside(c.counters, Fate.VSUM)
    if slots > REDUCE_SLOTS:
        yield "reduce-slots", f"{slots} results are open at once, the reducer has {REDUCE_SLOTS}"


def _out_inside(counters: tuple[Counter, ...], fate: Fate) -> int:
    """Results kept open by the outermost summing counter."""
    for i, counter in enumerate(counters):
        if counter.fate == fate:
            return math.prod(k.n for k in counters[i + 1 :] if k.fate == Fate.OUT)
    return 1


def _fetch(c: Exec) -> Iterator[tuple[str, str]]:
    s = c.stream
    entries = sum(k.birth == Birth.FETCH and k.n > 1 for k in c.counters) + 1 + (s.runs > 1)
    if entries > SEQUENCER_ENTRIES + 1:
        yield "sequencer-entries", f"{entries} entries, the sequencer has {SEQUENCER_ENTRIES}"
    strides = [v for k in c.counters for v in ((k.a, k.b) if s.pair else (k.a,))]
    strides += [s.run_stride] + [d.bytes for d in c.switch.digits]
    for port in (c.a, c.b) if s.pair else (c.a,):
        size = max(1, port.dtype.bits // 8)
        if port.base % size or any(v % size for v in strides):
            yield "fetch-alignment", f"a base or stride is not a multiple of {size} B"
        if port.dtype.bits < 8 and (s.run % 2 or s.run_step != 1):
            yield "nibbles", "two 4-bit elements share a byte: runs are even and have no repeats"
    if c.head.context == Context.SUB and c.generate is None:
        run_bytes = c.a.dtype.bytes_for(s.run)
        if c.a.base % 8 or any(v % 8 for v in strides) or run_bytes % 8:
            yield "sub-fetch-8B", "the sub context fetches aligned units of 8 B"
    yield from _adapter(c, s)
    read = s.lookup or c.a.dtype
    if s.cast is not None and (read, s.cast) not in _FETCH_CASTS:
        yield "fetch-cast", f"no fetch cast from {read.name} to {s.cast.name}"
    casts_b = s.pair and s.cast is not None and s.cast != c.b.dtype
    if casts_b and (c.b.dtype, s.cast) not in _FETCH_CASTS:
        yield "fetch-cast", f"no fetch cast from {c.b.dtype.name} to {s.cast}"
    if s.pair and (s.cast or c.b.dtype) != (s.cast or c.a.dtype):
        yield "pair-dtype", "both tensors of a pair must have one type after the cast"
    if s.pair and c.contraction is not None:
        yield "pair-no-contraction", "the contraction takes one stream"
    flit_elements = FLIT_BYTES * 8 // c.stream_dtype.bits
    if s.pad and s.pad % max(1, flit_elements // 4):
        yield "collect-pad", f"collect fills up to multiples of 8 B, not to {s.pad} elements"


def _adapter(c: Exec, s: Stream) -> Iterator[tuple[str, str]]:
    """Table lookup and zero point."""
    if s.lookup is not None:
        if c.head.context != Context.MAIN:
            yield "lookup-main-only", "the sub context has no table"
        if s.pair:
            yield "lookup", "a pair of streams has no table"
        if (c.a.dtype, s.lookup) not in _LOOKUPS:
            yield "lookup", f"no table from {c.a.dtype.name} to {s.lookup.name}"
    elif c.a.dtype == DType.F4E2M1 or (s.pair and c.b.dtype == DType.F4E2M1):
        yield "lookup", "f4e2m1 is read through a table"
    if s.zero_point is not None:
        if c.contraction is None:
            yield "zero-point", "what a zero point widens only goes to a contraction"
        bits = c.stream_dtype.bits
        if c.stream_dtype not in (DType.I4, DType.I8):
            yield "zero-point", f"{c.stream_dtype.name} has no zero point"
        elif not -(1 << (bits - 1)) <= s.zero_point < 1 << (bits - 1):
            yield "zero-point", f"{s.zero_point} is no number of {bits} bits"
    if c.generate is not None:
        yield from _generate(c, c.generate)


def _generate(c: Exec, g: Generate) -> Iterator[tuple[str, str]]:
    if c.head.context != Context.SUB:
        yield "generate", "only the sub context's commit makes constants"
    work = c.contraction is not None or c.vector.used or c.stream.pair or c.switch.ring > 1
    adapts = c.stream.cast or c.stream.lookup or c.commit.relu
    if work or adapts or c.commit.sink != Sink.DM:
        yield "generate", "constants go straight to data memory"
    if c.a != Port(dtype=c.commit_port.dtype):
        yield "generate", "nothing is fetched: port a only repeats the type of the results"
    if any(k.birth != Birth.FETCH or k.fate != Fate.OUT or k.a or k.b for k in c.counters):
        yield "generate", "nothing is fetched: counters only place results"
    if c.commit_port.dtype.bits < 8:
        yield "generate", "constants have whole bytes"
    if g.count_up and c.commit_port.dtype != DType.I32:
        yield "generate", "only i32 counts up"
    if c.commit.columns != c.stream.elements:
        yield "generate", "a packet of constants is committed whole"


_LOOKUPS = {
    (DType.F4E2M1, DType.F8E4M3),
    (DType.F4E2M1, DType.F8E5M2),
    (DType.F8E4M3, DType.BF16),
    (DType.F8E5M2, DType.BF16),
}
_FETCH_CASTS = {
    (DType.I4, DType.I32),
    (DType.I8, DType.I32),
    (DType.I16, DType.I32),
    (DType.F8E4M3, DType.F32),
    (DType.F8E5M2, DType.F32),
    (DType.BF16, DType.F32),
    (DType.F32, DType.BF16),
}


def _switch(c: Exec) -> Iterator[tuple[str, str]]:
    slices = SLICES_PER_PE << c.group
    ring = c.switch.ring
    if ring < 1 or ring & (ring - 1) or ring > slices:
        yield "ring-size", f"ring {ring} is not a power of two up to {slices}"
        return
    moves = bool(c.switch.digits) or any(k.birth == Birth.SLICE for k in c.counters)
    if (c.switch.topology == Topology.FORWARD) != (ring == 1) or (ring == 1 and moves):
        yield "ring-topology", "forwarding has ring 1 and moves nothing; all else has a ring"
    unit = max(ring, c.vector.slice_group)
    if c.valid_slices > slices or c.valid_slices % unit:
        yield "valid-slices", f"{c.valid_slices} is no multiple of {unit} up to {slices}"
    covered = 0
    for digit in c.switch.digits:
        mask = ((1 << digit.bits) - 1) << digit.shift
        if mask >= ring or mask & covered:
            yield "switch-digits", f"a digit leaves the ring of {ring} or overlaps another"
        covered |= mask
        if digit.bytes and c.switch.topology != Topology.INTER_TRANSPOSE:
            yield "switch-digits", "only an inter-transpose turns a slice digit into time"
    yield from topology_violations(c)


_MULTIPLIED = {DType.BF16, DType.F8E4M3, DType.F8E5M2, DType.I8, DType.I4}


def _contraction(c: Exec, k: Contraction) -> Iterator[tuple[str, str]]:
    if c.head.context != Context.MAIN:
        yield "contraction-main-only", "the sub context has no contraction engine"
    dtype = c.stream_dtype
    if dtype not in _MULTIPLIED:
        yield "contraction-dtype", f"{dtype.name} is not multiplied"
        return
    if dtype != c.trf.dtype:
        yield "contraction-dtype", f"{dtype.name} does not meet {c.trf.dtype.name}"
    if k.depth > TREE_DEPTH[dtype.bits]:
        yield "tree-depth", f"depth {k.depth} > {TREE_DEPTH[dtype.bits]} for {dtype.name}"
    packet = c.stream.elements
    if packet % (1 << k.depth) or packet * dtype.bits > FLIT_BYTES * 8 * k.pack:
        yield "packet-size", f"{packet} elements do not fill a packet of {k.pack} flits"
    read = k.trf_read * 8 // c.trf.dtype.bits
    if read == 0 or packet % read or any(v.trf % min(k.trf_read, 32) for v in c.counters):
        yield "trf-read", f"{k.trf_read} B reads do not divide the packet or the TRF strides"
    columns = packet >> k.depth
    if columns > 32:
        yield "tree-columns", f"{columns} columns, the accumulator has 32"
    inner = _out_inside(c.counters, Fate.MSUM)
    interleaved = k.fold == Fold.INTERLEAVED
    cells = LANES * inner * columns if interleaved else k.lanes * 32 * inner
    if cells > ACCUMULATOR_CELLS:
        yield "accumulator-cells", f"{cells} sums are open at once, there are {ACCUMULATOR_CELLS}"


def _commit(c: Exec) -> Iterator[tuple[str, str]]:
    o = c.commit
    size = max(1, c.commit_port.dtype.bits // 8)
    result = _result_dtype(c)
    if o.sink != Sink.DM and (c.contraction is not None or o.lanes != 1):
        yield "register-sink", "a store to a register file has no contraction and no lanes"
    if o.sink != Sink.DM and o.columns != c.stream.elements:
        yield "register-sink", "a store to a register file keeps the whole packet"
    if o.sink != Sink.DM and (c.vector.used or o.relu):
        yield "register-sink", "a store to a register file branches off before the vector engine"
    if o.sink == Sink.VRF and c.commit_port.dtype.bits != 32:
        yield "vrf-dtype", "the VRF holds 32-bit elements"
    steps = [k.lanes * (k.n - 1) for k in c.counters]
    low, high = sum(min(0, v) for v in steps), sum(max(0, v) for v in steps)
    if low < 0 or high >= c.trf_lanes:
        yield "store-lanes", f"a store to lanes {low} to {high} of {c.trf_lanes}"
    if o.sink == Sink.TRF and c.commit_port.dtype != c.stream_dtype:
        yield "trf-dtype", "the TRF keeps the stream's type"
    if result != c.commit_port.dtype:
        if c.head.context == Context.SUB:
            yield "sub-no-cast", "the sub context has no commit cast"
        if (result, c.commit_port.dtype) not in _COMMIT_CASTS:
            yield "commit-cast", f"no cast from {result.name} to {c.commit_port.dtype.name}"
    if c.contraction is not None and o.lanes > c.contraction.lanes:
        yield "commit-lanes", f"{o.lanes} lanes committed of {c.contraction.lanes}"
    transposed = o.transpose_rows > 0
    if transposed != (o.transpose_columns > 0):
        yield "transposer", "the transposer has rows and columns, or is bypassed"
    if o.sink != Sink.DM:
        yield from _injective(_store_axes(c), c.commit_port.dtype.bytes_for(o.columns))
        return
    most = TRANSPOSER_ROWS[c.commit_port.dtype.bits]
    if o.transpose_rows > most or o.transpose_columns > TRANSPOSER_COLUMNS:
        yield "transposer", f"{o.transpose_rows} x {o.transpose_columns} does not fit"
    rounds = result == DType.F32 and c.commit_port.dtype == DType.BF16
    if o.relu and (c.head.context != Context.MAIN or not rounds):
        yield "commit-relu", "the rectifier is a part of main's commit cast from f32 to bf16"
    # Strides of 4-bit results count half bytes.
    unit = 8 if c.commit_port.dtype.bits >= 8 else 16
    axes = _commit_axes(c)
    if not transposed and any(stride % unit for stride, _ in axes if stride != size):
        yield "commit-alignment", "commit strides are multiples of 8 B unless transposed"
    if c.commit_port.base % 8:
        yield "commit-alignment", "the commit base is a multiple of 8 B"
    if any(stride == 0 or stride % size for stride, _ in axes):
        yield "commit-stride", "a commit stride is zero or splits an element"
    yield from _injective(axes, size)


_COMMIT_CASTS = {
    (DType.F32, DType.BF16),
    (DType.F32, DType.F8E4M3),
    (DType.F32, DType.F8E5M2),
    (DType.I32, DType.I16),
    (DType.I32, DType.I8),
    (DType.I32, DType.I4),
}


def _injective(axes: list[tuple[int, int]], extent: int) -> Iterator[tuple[str, str]]:
    """No two of the writes, each `extent` bytes long, may meet."""
    for stride, n in sorted((abs(stride), n) for stride, n in axes):
        if stride < extent:
            yield "commit-injective", "two results of one pass have the same address"
        extent = stride * (n - 1) + extent


def _store_axes(c: Exec) -> list[tuple[int, int]]:
    """(stride in bytes, size) of every counter longer than one that a register store walks."""
    lane_bytes = TRF_BYTES // c.trf_lanes
    to_trf = c.commit.sink == Sink.TRF
    return [(k.trf + k.lanes * lane_bytes if to_trf else k.vrf, k.n) for k in c.counters if k.n > 1]


def _commit_axes(c: Exec) -> list[tuple[int, int]]:
    """(stride in bytes, size) of every axis longer than one that a commit to DM walks."""
    axes = [(k.commit, k.n) for k in c.counters if k.fate == Fate.OUT]
    axes += [(c.commit.lane_stride, c.commit.lanes), (c.commit.column_stride, c.commit.columns)]
    return [(stride, n) for stride, n in axes if n > 1]


def _result_dtype(c: Exec) -> DType:
    """The type that leaves the vector engine."""
    stream = c.stream_dtype
    if c.contraction is not None:
        stream = DType.F32 if stream.is_float else DType.I32
    for op in c.vector.ops:
        if op.op == Op.ITOF:
            stream = DType.F32
        elif op.op == Op.FTOI:
            stream = DType.I32
    return stream


result_dtype = _result_dtype

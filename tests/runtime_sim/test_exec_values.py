"""Random passes: fast execution equals the formulas, element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from scalar_machine import ScalarMachine, Undecided

from furiosa_llm import errors
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Alu,
    Birth,
    Clipper,
    Commit,
    Comparator,
    Comparison,
    Context,
    Contraction,
    Counter,
    Digit,
    Exec,
    Fate,
    Fold,
    Gate,
    Generate,
    Groups,
    Head,
    Op,
    Placement,
    Port,
    Reduce,
    Sink,
    Slot,
    Source,
    Stream,
    Switch,
    Topology,
    ValidDim,
    Vector,
    VectorOp,
)
from furiosa_llm.backend_rngd.isa.plan import plan_exec
from furiosa_llm.backend_rngd.isa.record_decoding import decode_exec
from furiosa_llm.backend_rngd.isa.record_encoding import encode_exec
from furiosa_llm.backend_rngd.isa.rules import TRF_HALF_BYTES, result_dtype
from furiosa_llm.backend_rngd.isa.units import (
    ALU_OPS,
    CONVERSIONS,
    REDUCE_STAGE,
    REVERSIBLE,
    STAGE,
    UNARY,
)
from furiosa_llm.runtime_sim.checks import check_exec
from furiosa_llm.runtime_sim.exec_values import bind_exec
from furiosa_llm.runtime_sim.memory import ChipMemory
from furiosa_llm.runtime_sim.weights import WeightCache

WINDOW = 4096
"""Bytes of data memory for each of A, B and the results."""
A, B, OUT, BITMAPS = 0, WINDOW, 2 * WINDOW, 3 * WINDOW
FLOATS = (DType.BF16, DType.F32, DType.F8E4M3, DType.F8E5M2)
MEMORY = ChipMemory(64)
WEIGHTS = WeightCache(0)

LOOKUPS = [
    (DType.I4, None, DType.I32),
    (DType.F4E2M1, DType.F8E4M3, None),
    (DType.F4E2M1, DType.F8E4M3, DType.F32),
    (DType.F4E2M1, DType.F8E5M2, DType.F32),
    (DType.F8E4M3, DType.BF16, None),
    (DType.F8E5M2, DType.BF16, DType.F32),
]
"""What is read, what a table makes of it, what it is cast to."""

small = st.sampled_from([1, 2, 3, 4])
sizes = st.sampled_from([1, 2, 2, 3, 5])


def values(rng: np.random.Generator, dtype: DType, count: int) -> np.ndarray:
    """Bytes of small numbers, whose sums and products are exact in f32."""
    if dtype.bits < 8:
        return rng.integers(0, 256, count // 2).astype(np.uint8)
    if dtype.is_float:
        return (rng.integers(-6, 7, count) / 2).astype(dtype.numpy).view(np.uint8)
    top = min(1 << (dtype.bits - 1), 1000)
    return rng.integers(-top, top, count).astype(dtype.numpy).view(np.uint8)


def fill(seed: int, a: DType, b: DType, trf: DType, vrf: DType) -> None:
    """New content for all memories; what passes leave alone must stay."""
    rng = np.random.default_rng(seed)
    MEMORY.shared[:] = False
    for memory, at, size, dtype in (
        (MEMORY.dm, A, WINDOW, a),
        (MEMORY.dm, B, WINDOW, b),
        (MEMORY.trf, 0, MEMORY.trf.shape[1], trf),
        (MEMORY.vrf, 0, MEMORY.vrf.shape[1], vrf),
    ):
        count = memory.shape[0] * size * 8 // dtype.bits
        memory[:, at : at + size] = values(rng, dtype, count).reshape(memory.shape[0], size)
    MEMORY.dm[:, OUT : OUT + WINDOW] = 0xAB


def put_bitmaps(command: Exec, seed: int) -> None:
    """As many source slices as the command walks over, chosen anew for each slice."""
    steps = math.prod(k.n for k in command.counters if k.birth == Birth.SLICE)
    rng = np.random.default_rng(seed)
    ring = command.switch.ring
    for s in range(64):
        named = np.zeros(64, np.uint8)
        named[rng.permutation(ring)[:steps]] = 1
        MEMORY.dm[s, BITMAPS : BITMAPS + 8] = np.packbits(named, bitorder="little")


def run_both(commands: Sequence[Exec]) -> ScalarMachine:
    """Run `commands` on both machines, as their bytes on ours; returns the scalar one."""
    scalar = ScalarMachine(MEMORY.dm[:, : 3 * WINDOW + 8], MEMORY.trf, MEMORY.vrf)
    for command in commands:
        plan = plan_exec(decode_exec(encode_exec(command), "test"), "test")
        addresses = [port.base for port in plan.ports]
        check_exec(plan, addresses, MEMORY.slices, lambda: "test")
        with np.errstate(all="ignore"):
            bind_exec(plan, addresses, MEMORY, WEIGHTS, lambda: "test")()
        try:
            scalar.execute(command)
        except Undecided:
            reject()
    return scalar


def assert_results_equal(scalar: ScalarMachine, command: Exec) -> None:
    """Equal bytes but for NaNs of any payload, zeros of any sign, and what is left open."""
    scalar.settle(MEMORY.dm)
    got, want = (dm[:, OUT : 3 * WINDOW].copy() for dm in (MEMORY.dm, scalar.dm))
    if np.array_equal(got, want):
        return
    dtype = command.commit_port.dtype
    assert dtype.is_float
    left, right = (dm.view(dtype.numpy).astype(np.float32) for dm in (got, want))
    assert np.array_equal(left, right, equal_nan=True)


# --- strategies: each draws fields that belong together; rules reject the rest ---


@st.composite
def switches(draw: st.DrawFn, slice_steps: int) -> tuple[Switch, int]:
    """A switch and the slices that work; `slice_steps`: room for a counter over slices."""
    ring = draw(st.sampled_from([1, 2, 4, 8]))
    if ring == 1 or slice_steps >= ring:
        return Switch(), draw(st.sampled_from([1, 2, 6]))
    bits = ring.bit_length() - 1
    digits: list[Digit] = []
    shift = draw(st.integers(0, bits - 1))
    width = draw(st.integers(1, bits - shift))
    slices = draw(st.integers(0, max(0, (ring - 1 - slice_steps) // ((1 << width) - 1))))
    if draw(st.booleans()):
        digits.append(Digit(shift, width, slices))
    bitmap = None
    if draw(st.integers(0, 2)) == 0:
        digits, bitmap = [], BITMAPS
    switch = Switch(Topology.CUSTOM, ring, tuple(digits), bitmap)
    return switch, ring * draw(st.sampled_from([1, 2, 3]))


@st.composite
def nested_strides(draw: st.DrawFn, axes: Sequence[int], size: int, unit: int) -> list[int]:
    """Strides that give every combination of `axes` its own place."""
    order = draw(st.permutations(range(len(axes))))
    strides = [0] * len(axes)
    extent = size
    for i in order:
        strides[i] = -(-extent // unit) * unit + draw(st.sampled_from([0, 0, unit]))
        extent = strides[i] * (axes[i] - 1) + extent if axes[i] > 1 else extent
    return strides


def fits(alu: Alu, op: Op, is_float: bool) -> bool:
    """Whether a unit sees numbers of its own type; other bits would be NaNs of any payload."""
    if alu in (Alu.CLIP_ADD, Alu.CLIP_MAX, Alu.CLIP_MIN):
        return is_float == (op in (Op.ADD, Op.MAX, Op.MIN, Op.ABSMAX, Op.ABSMIN))
    if alu == Alu.LOGIC_AND:
        return True
    return is_float == (
        alu in (Alu.FMA, Alu.FPU, Alu.EXP, Alu.MUL0, Alu.MUL1, Alu.FP_DIV, Alu.FP_TO_FXP)
    )


@st.composite
def unit_ops(
    draw: st.DrawFn, pair: bool, is_float: bool
) -> tuple[tuple[VectorOp, ...], bool, bool]:
    """Units in order with one VRF operand, a stash or a zip; the types at the reducer and after."""
    alus = sorted(draw(st.sets(st.sampled_from(list(Alu)), min_size=3 * pair, max_size=6)))
    ops: list[VectorOp] = []
    vrf = zipped = False
    at_reducer = is_float
    for alu in alus:
        possible = [op for op in ALU_OPS[alu] if fits(alu, op, is_float)]
        if not possible:
            continue
        op = draw(st.sampled_from(possible))
        operands: list[Source] = []
        for _ in range(0 if op in UNARY else 2 if op == Op.FMA else 1):
            choices = [Source.IMM0, Source.IMM1, Source.IMM2, Source.SELF]
            choices += [] if vrf else [Source.VRF] * 2
            choices += [Source.ZIP] * 3 if pair and not zipped else []
            operands.append(draw(st.sampled_from(choices)))
            vrf |= operands[-1] == Source.VRF
            zipped |= operands[-1] == Source.ZIP
        y, z = (*operands, Source.NONE, Source.NONE)[:2]
        reverse = op in REVERSIBLE and draw(st.booleans())
        width = draw(st.sampled_from([31, 31, 28, 16])) if op in CONVERSIONS else 31
        groups = Groups.BOTH
        if pair and not zipped and op not in CONVERSIONS:
            groups = draw(st.sampled_from([Groups.BOTH, *Groups]))
        ops.append(VectorOp(alu, op, y, z, reverse, int_width=width, groups=groups))
        is_float = op == Op.ITOF or (is_float and op != Op.FTOI)
        if STAGE[alu] < REDUCE_STAGE:
            at_reducer = is_float
    assume(zipped or not pair)
    names = {op.op for op in ops}
    # The last place of a large exponential would be far more than one when it is an integer.
    assume(Op.FTOI not in names or not names & {Op.EXP, Op.NEGEXP, Op.DIV})
    last_is_binary = bool(ops) and ops[-1].y not in (Source.NONE, Source.VRF)
    if len(ops) > 1 and not pair and last_is_binary and draw(st.booleans()):
        first = draw(st.integers(0, len(ops) - 2))
        if not any(op.op in (Op.ITOF, Op.FTOI) for op in ops[first:]):
            ops[first] = replace(ops[first], stash=True)
            ops[-1] = replace(ops[-1], y=Source.STASH)
    return tuple(ops), at_reducer, is_float


def folds_of(is_float: bool) -> st.SearchStrategy[Reduce]:
    kinds = [Reduce.ADD, Reduce.MAX, Reduce.MIN]
    return st.sampled_from(kinds if is_float else [Reduce.IADD_SAT, Reduce.IMAX, Reduce.IMIN])


@st.composite
def selections(draw: st.DrawFn, vector: Vector, is_float: bool) -> Vector:
    """Turn one unit's operand into a choice by tags, where that is allowed."""
    usable = [
        i
        for i, op in enumerate(vector.ops)
        if op.y in (Source.IMM0, Source.IMM1, Source.IMM2, Source.VRF)
        and (vector.reduce == Reduce.NONE or STAGE[op.alu] < REDUCE_STAGE)
    ]
    if not usable:
        return vector
    i = draw(st.sampled_from(usable))
    ops = list(vector.ops)
    port_free = not vector.reads_vrf or ops[i].y == Source.VRF
    ops[i] = replace(ops[i], y=Source.SELECT)
    sources = draw(st.permutations([Source.IMM0, Source.IMM1, Source.IMM2]))
    sources = sources[: draw(st.integers(1, 3))]
    if port_free and draw(st.booleans()):
        sources = [*sources, Source.VRF]
    slots = []
    for k, source in enumerate(sources):
        last = k == len(sources) - 1
        mask = draw(st.integers(0 if last else 1, 15))
        value = draw(st.integers(0, 15)) & mask
        slots.append(Slot(source, mask, value, mask > 0 and draw(st.booleans())))
    boundaries = [0, 1, 5, 0xFFFFFFFF, 0x80000000]
    if is_float:
        boundaries = [0, 0x3F800000, 0xBF000000, 0x40000000, 0x80000000]
    comparators = st.builds(Comparator, st.sampled_from(Comparison), st.sampled_from(boundaries))
    tags = tuple(draw(st.lists(comparators, min_size=1, max_size=4)))
    return replace(vector, ops=tuple(ops), slots=tuple(slots), comparators=tags)


@st.composite
def vectors(draw: st.DrawFn, pair: bool, folds: bool, is_float: bool) -> Vector:
    ops, at_reducer, at_end = draw(unit_ops(pair, is_float))
    placement = draw(st.sampled_from(Placement))
    across = Reduce.NONE
    if draw(st.integers(0, 2)) == 0:
        across = draw(folds_of(is_float if placement == Placement.FIRST else at_end))
    numbers = [1, 3, 5, 0xFFFFFFFF]
    if is_float:
        numbers = [0x3F800000, 0xC0400000, 0x40A00000, 0x3F000000]
    imm = draw(st.tuples(*[st.sampled_from(numbers)] * 3))
    vector = Vector(
        ops=ops,
        imm=(imm[0], imm[1], imm[2]),
        reduce=draw(folds_of(at_reducer)) if folds else Reduce.NONE,
        reduce_columns=folds and draw(st.booleans()),
        slice_reduce=across,
        slice_group=1 if across == Reduce.NONE else draw(st.sampled_from([2, 4])),
        slice_placement=placement,
        vrf_lane=draw(st.sampled_from([0, 4, 32])),
        vrf_column=draw(st.sampled_from([0, 4, 8])),
        vrf_pair=draw(st.sampled_from([0, 512])),
    )
    if not pair and draw(st.booleans()):
        vector = draw(selections(vector, is_float))
    return vector


@st.composite
def valid_counts(draw: st.DrawFn, command: Exec) -> Exec:
    """Gates and a clipper for a command whose reducer works."""
    if command.vector.reduce == Reduce.NONE or draw(st.booleans()):
        return command
    bound = st.integers(0, 6)
    gates = draw(st.lists(st.builds(Gate, bound, bound, bound, st.booleans()), max_size=3))
    clipper = None
    if command.vector.reduce_columns and command.contraction is None:
        clipper = draw(st.none() | st.builds(Clipper, bound, st.integers(1, 8)))
    dims = [ValidDim.NONE, *list(ValidDim)[2 : 2 + len(gates)]]
    dims += [ValidDim.PACKET] if clipper else []
    followed = []
    for k in command.counters:
        dim = draw(st.sampled_from(dims)) if k.fate != Fate.MSUM else ValidDim.NONE
        step = draw(st.integers(0, 3)) if dim != ValidDim.NONE else 0
        followed.append(replace(k, valid_dim=dim, valid_step=step))
    vector = replace(command.vector, gates=tuple(gates), clipper=clipper)
    return replace(command, counters=tuple(followed), vector=vector)


@st.composite
def counters(draw: st.DrawFn, contraction: bool, folds: bool, unit: int) -> list[Counter]:
    """Up to four counters without their commit strides."""
    found: list[Counter] = []
    fates = [Fate.OUT, Fate.OUT]
    fates += [Fate.MSUM] if contraction else []
    fates += [Fate.VSUM] if folds else []
    reuse = draw(st.booleans()) and contraction
    for i in range(draw(st.integers(0, 3)) + reuse):
        last = reuse and i == 0
        birth = (
            Birth.REUSE if last else draw(st.sampled_from([Birth.FETCH, Birth.FETCH, Birth.SLICE]))
        )
        fate = draw(st.sampled_from(fates))
        steps = st.sampled_from([-unit * 8, 0, unit, unit * 8, unit * 16])
        if birth == Birth.SLICE and any(k.birth != Birth.REUSE for k in found):
            birth = Birth.FETCH  # the slices come innermost
        found.append(
            Counter(
                n=draw(sizes),
                birth=birth,
                fate=fate,
                a=draw(steps) if birth == Birth.FETCH else 0,
                b=draw(steps) if birth == Birth.FETCH else 0,
                trf=draw(st.sampled_from([0, 64, 128])) if contraction else 0,
                vrf=0 if fate == Fate.MSUM else draw(st.sampled_from([0, 4, 64])),
                slices=int(birth == Birth.SLICE),
            )
        )
    return found[::-1]


def placed(command: Exec) -> Exec:
    """Move every port so that its lowest byte is the first of its window."""
    ports = {}
    plan = plan_exec(command, "test")
    names = ["a"] + ["b"] * command.stream.pair + ["trf"] * (command.contraction is not None)
    names += ["vrf"] * plan.uses_vrf + ["bitmap"] * (command.switch.bitmap is not None)
    names += ["commit_port"]
    starts = {"a": A, "b": B, "trf": 0, "vrf": 0, "commit_port": OUT}
    limits = {"a": WINDOW, "b": WINDOW, "commit_port": WINDOW, "vrf": 8192, "trf": 8192}
    for name, footprint in zip(names, plan.footprints, strict=True):
        if name == "bitmap":
            continue
        assume(footprint.high - footprint.low <= limits[name])
        base = starts[name] - footprint.low
        ports[name] = replace(getattr(command, name), base=base + -base % 8)
    return replace(command, **ports)


def accepted(command: Exec) -> Exec:
    """The command, if the decoder and the checks accept it."""
    try:
        command = placed(command)
        plan = plan_exec(command, "test")
        check_exec(plan, [port.base for port in plan.ports], 64, lambda: "test")
    except errors.FuriosaLLMError:
        assume(False)
    return command


@st.composite
def with_commit(draw: st.DrawFn, command: Exec, columns: int) -> Exec:
    """Give `command` a commit to data memory that keeps some columns and lanes apart."""
    result = result_dtype(command)
    choices = {
        DType.F32: [DType.F32, DType.BF16, DType.F8E4M3, DType.F8E5M2],
        DType.I32: [DType.I32, DType.I16, DType.I8, DType.I4],
    }.get(result, [result])
    dtype = draw(st.sampled_from(choices))
    size = max(1, dtype.bits // 8)
    unit = 8 if dtype.bits >= 8 else 16
    lanes = command.contraction.lanes if command.contraction else 1
    lanes = draw(st.integers(1, lanes))
    kept = draw(st.sampled_from([columns, columns, max(1, columns - 1), columns + 2]))
    out = [i for i, k in enumerate(command.counters) if k.fate == Fate.OUT]
    transposed = draw(st.booleans())
    axes = [command.counters[i].n for i in out] + [lanes, kept]
    strides = draw(nested_strides(axes, size, size if transposed else max(unit, size)))
    new = list(command.counters)
    for i, stride in zip(out, strides, strict=False):
        new[i] = replace(new[i], commit=stride)
    return replace(
        command,
        counters=tuple(new),
        commit_port=Port(dtype=dtype),
        commit=Commit(
            lanes=lanes,
            columns=kept,
            lane_stride=strides[-2],
            column_stride=strides[-1],
            transpose_rows=int(transposed),
            transpose_columns=8 * transposed,
            relu=(result, dtype) == (DType.F32, DType.BF16) and draw(st.booleans()),
        ),
    )


@st.composite
def stream_passes(draw: st.DrawFn) -> Exec:
    """Passes without contraction: moves, casts, pairs, vector work."""
    pair = draw(st.booleans())
    dtype = draw(st.sampled_from([DType.F32, DType.I32, *([] if pair else FLOATS)]))
    cast = None
    if draw(st.booleans()):
        cast = {DType.F32: DType.BF16, DType.I32: None}.get(dtype, DType.F32)
        cast = None if pair else cast
    small_dtype = draw(st.sampled_from([DType.I8, DType.I16]))
    lookup = None
    if not pair and draw(st.integers(0, 4)) == 0:
        dtype, cast = small_dtype, DType.I32
    if not pair and draw(st.integers(0, 3)) == 0:
        dtype, lookup, cast = draw(st.sampled_from(LOOKUPS))
    works = (cast or lookup or dtype) in (DType.F32, DType.I32)
    folds = works and draw(st.booleans())
    unit = max(dtype.bits // 8, 4)
    run = draw(st.sampled_from([1, 2, 4, 6] if dtype.bits >= 8 else [2, 4, 6]))
    stream = Stream(
        run=run,
        run_step=draw(st.sampled_from([0, 1, 1, 1])) if dtype.bits >= 8 else 1,
        runs=draw(st.sampled_from([1, 1, 2, 3])),
        run_stride=draw(st.sampled_from([unit * 8, run * dtype.bits // 8, -unit * 4])),
        pad=draw(st.sampled_from([0, 0, 8, 16])),
        lookup=lookup,
        cast=cast,
        pair=pair,
    )
    found = draw(counters(False, folds, unit))
    room = sum(abs(k.slices) * (k.n - 1) for k in found)
    switch, slices = draw(switches(room))
    vector = Vector()
    if works and (folds or pair or draw(st.booleans())):
        vector = draw(vectors(pair, folds, (cast or lookup or dtype).is_float))
    command = Exec(
        head=Head(Context.MAIN),
        counters=tuple(found),
        a=Port(dtype=dtype),
        b=Port(dtype=dtype),
        stream=stream,
        commit_port=Port(),
        commit=Commit(),
        switch=switch,
        valid_slices=slices,
        vector=vector,
    )
    columns = 1 if vector.reduce_columns else stream.elements
    return accepted(draw(valid_counts(draw(with_commit(command, columns)))))


MULTIPLIED = (DType.BF16, DType.F8E4M3, DType.F8E5M2, DType.I8, DType.I4)


@st.composite
def contractions(draw: st.DrawFn, types: Sequence[DType] = MULTIPLIED) -> Exec:
    """Passes with a contraction of floats or integers, and vector work behind it."""
    dtype = draw(st.sampled_from(types))
    source, lookup = dtype, None
    if dtype in (DType.F8E4M3, DType.F8E5M2) and draw(st.booleans()):
        source, lookup = DType.F4E2M1, dtype
    zero_point = draw(st.none() | st.integers(-8, 7)) if not dtype.is_float else None
    depth = draw(st.integers(0, 5))
    tree = 1 << depth
    elements = max(tree * draw(st.sampled_from([1, 2, 4])), 4)
    run = draw(st.sampled_from([elements, elements, elements // 2, max(1, elements - 1)]))
    if source.bits < 8:
        run = max(2, run // 2 * 2)
    stream = Stream(
        run=run,
        run_step=draw(st.sampled_from([0, 1, 1, 1])) if source.bits >= 8 else 1,
        runs=draw(st.sampled_from([1, 1, elements // run])),
        run_stride=draw(st.sampled_from([64, run * source.bits // 8])),
        pad=elements,
        lookup=lookup,
        zero_point=zero_point,
    )
    read = draw(st.sampled_from([2, 4, 8, 16, 32, 64]))
    folds = draw(st.booleans())
    found = draw(counters(True, folds, 4))
    room = sum(abs(k.slices) * (k.n - 1) for k in found)
    switch, slices = draw(switches(room))
    lanes = draw(st.sampled_from([1, 2, 4]))
    vector = Vector()
    if folds or draw(st.booleans()):
        vector = draw(vectors(False, folds, dtype.is_float))
    command = Exec(
        head=Head(Context.MAIN),
        counters=tuple(found),
        a=Port(dtype=source),
        trf=Port(dtype=dtype),
        stream=stream,
        commit_port=Port(),
        commit=Commit(),
        switch=switch,
        valid_slices=slices,
        contraction=Contraction(
            pack=2, lanes=lanes, trf_read=read, depth=depth, fold=draw(st.sampled_from(Fold))
        ),
        trf_lanes=lanes,
        vector=vector,
    )
    columns = 1 if vector.reduce_columns else stream.elements >> depth
    command = accepted(draw(valid_counts(draw(with_commit(command, columns)))))
    shift = draw(register_shifts(lanes))
    return replace(command, trf=replace(command.trf, base=command.trf.base + shift))


def register_shifts(lanes: int) -> st.SearchStrategy[int]:
    """First bytes of rows in a lane: at its start, across its halves, in the second one."""
    half = TRF_HALF_BYTES // lanes
    return st.sampled_from([0, 0, 8, 64, half - 64, half - 8, half])


@st.composite
def stores(draw: st.DrawFn, sink: Sink, broadcast: bool = False) -> Exec:
    """Stores to a register file, from main or sub."""
    dtypes = [DType.BF16, DType.I8, DType.I4] if sink == Sink.TRF else [DType.F32]
    dtype = draw(st.sampled_from(dtypes))
    elements = draw(st.sampled_from([8, 16])) * max(1, 16 // dtype.bits)
    lanes = draw(st.sampled_from([1, 2, 4, 8]))
    size = elements * dtype.bits // 8
    n = draw(small)
    over_lanes = sink == Sink.TRF and n <= lanes and draw(st.booleans())
    found = [
        Counter(
            n,
            a=draw(st.sampled_from([0, 8, size])),
            trf=0 if over_lanes or sink == Sink.VRF else size,
            vrf=size if sink == Sink.VRF else 0,
            lanes=int(over_lanes),
        )
    ]
    switch, slices = draw(switches(0))
    if broadcast:
        switch, slices = Switch(Topology.BROADCAST1, 64), 64
    command = Exec(
        head=Head(draw(st.sampled_from([Context.MAIN, Context.SUB]))),
        counters=tuple(found),
        a=Port(dtype=dtype),
        stream=Stream(run=elements),
        commit_port=Port(dtype=dtype),
        commit=Commit(sink=sink, columns=elements),
        switch=switch,
        valid_slices=slices,
        trf_lanes=lanes,
    )
    command = accepted(command)
    shift = draw(st.sampled_from([0, 8, 64]) if sink == Sink.VRF else register_shifts(lanes))
    return replace(command, commit_port=replace(command.commit_port, base=shift))


seeds = st.integers(0, 1 << 30)


def fill_for(command: Exec, seed: int) -> None:
    """Content whose types are those of the command's operands."""
    vrf = DType.F32 if command.stream_dtype.is_float else DType.I32
    fill(seed, command.a.dtype, command.b.dtype, command.trf.dtype, vrf)
    put_bitmaps(command, seed)


@settings(max_examples=120)
@given(stream_passes(), seeds)
def test_a_stream_pass(command: Exec, seed: int) -> None:
    fill_for(command, seed)
    scalar = run_both([command])
    assert_results_equal(scalar, command)
    assert np.array_equal(MEMORY.dm[:, :OUT], scalar.dm[:, :OUT])


@settings(max_examples=120)
@given(contractions(), seeds)
def test_a_contraction(command: Exec, seed: int) -> None:
    fill_for(command, seed)
    scalar = run_both([command])
    assert_results_equal(scalar, command)


@settings(max_examples=40)
@given(st.sampled_from([Sink.TRF, Sink.VRF]).flatmap(stores), seeds)
def test_a_store_to_a_register_file(command: Exec, seed: int) -> None:
    fill(seed, command.a.dtype, DType.BF16, DType.BF16, DType.F32)
    put_bitmaps(command, seed)
    scalar = run_both([command])
    assert np.array_equal(MEMORY.trf, scalar.trf)
    assert np.array_equal(MEMORY.vrf, scalar.vrf)


def has_no_bitmap(command: Exec) -> bool:
    return command.switch.bitmap is None


@settings(max_examples=40)
@given(st.data(), seeds)
def test_a_contraction_after_stores_that_some_slices_share(data: st.DataObject, seed: int) -> None:
    """Broadcast fills are kept once; whatever overlaps them must see the same bytes."""
    commands: list[Exec] = []
    for _ in range(data.draw(st.integers(1, 4))):
        store = stores(Sink.TRF, data.draw(st.booleans()))
        commands.append(data.draw(store.filter(has_no_bitmap)))
    last = data.draw(contractions([DType.BF16]).filter(has_no_bitmap))
    fill(seed, DType.BF16, DType.BF16, DType.BF16, DType.F32)
    commands = [c for c in commands if c.a.dtype == DType.BF16]
    scalar = run_both([*commands, last])
    assert_results_equal(scalar, last)


@settings(max_examples=30)
@given(st.data(), st.booleans(), st.sampled_from([DType.BF16, DType.I8, DType.F32, DType.I32]))
def test_constants(data: st.DataObject, count_up: bool, dtype: DType) -> None:
    """Memset, and numbers that count up."""
    dtype = DType.I32 if count_up else dtype
    size, columns = dtype.bits // 8, data.draw(st.sampled_from([1, 2, 8]))
    n = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    row = -(-size * columns // 8) * 8
    command = Exec(
        head=Head(Context.SUB),
        counters=(Counter(n[0], commit=row * n[1] + 8), Counter(n[1], commit=row)),
        a=Port(dtype=dtype),
        stream=Stream(columns),
        commit_port=Port(OUT, dtype),
        commit=Commit(columns=columns, column_stride=size),
        valid_slices=data.draw(st.sampled_from([0, 3])),
        generate=Generate(data.draw(st.integers(0, 2**32 - 1)), count_up),
    )
    fill(0, DType.BF16, DType.BF16, DType.BF16, DType.F32)
    scalar = run_both([command])
    assert np.array_equal(MEMORY.dm[:, : 3 * WINDOW], scalar.dm[:, : 3 * WINDOW])


def test_a_bitmap_that_names_too_many_slices_is_a_fault() -> None:
    command = Exec(
        head=Head(Context.MAIN),
        counters=(Counter(2, Birth.SLICE, slices=1, commit=32),),
        a=Port(0),
        stream=Stream(16),
        commit_port=Port(OUT),
        commit=Commit(columns=16, column_stride=2),
        switch=Switch(Topology.CUSTOM, 8, bitmap=BITMAPS),
    )
    MEMORY.dm[:, BITMAPS : BITMAPS + 8] = np.array([6, 0, 0, 0, 0, 0, 0, 0])
    MEMORY.dm[5, BITMAPS] = 7
    plan = plan_exec(command, "test")
    with pytest.raises(errors.SimulationFault) as fault:
        bind_exec(plan, [0, BITMAPS, OUT], MEMORY, WEIGHTS, lambda: "here")()
    assert fault.value.code == "SIM025"
    assert "slice 5 names 3 slices" in fault.value.message


def test_a_pass_may_write_where_it_reads() -> None:
    """All packets are fetched before the first result is written."""
    command = Exec(
        head=Head(Context.MAIN),
        counters=(Counter(8, a=32, commit=32),),
        a=Port(8, DType.F32),
        stream=Stream(8),
        commit_port=Port(0, DType.F32),
        commit=Commit(columns=8, column_stride=4),
    )
    fill(1, DType.F32, DType.F32, DType.BF16, DType.F32)
    scalar = run_both([command])
    assert np.array_equal(MEMORY.dm[:, : 3 * WINDOW], scalar.dm[:, : 3 * WINDOW])


def test_fused_pes_work_as_one_ring() -> None:
    """A pass of four PEs brings packets from slice 255 - s to slice s."""
    memory = ChipMemory(256)
    memory.dm[:, :64] = np.arange(256, dtype=np.uint8)[:, None]
    command = Exec(
        head=Head(Context.MAIN),
        counters=(),
        a=Port(0, DType.BF16),
        stream=Stream(32),
        commit_port=Port(OUT, DType.BF16),
        commit=Commit(columns=32, column_stride=2),
        group=2,
        switch=Switch(Topology.TRANSPOSE, 256, (Digit(0, 4, 16), Digit(4, 4, 1))),
    )
    plan = plan_exec(command, "test")
    bind_exec(plan, [0, OUT], memory, WEIGHTS, lambda: "test")()
    s = np.arange(256)
    assert np.array_equal(memory.dm[:, OUT], s % 16 * 16 + s // 16)
    with pytest.raises(errors.SimulationFault) as fault:
        check_exec(plan, [0, OUT], 64, lambda: "here")
    assert fault.value.code == "SIM015"
    assert math.prod(memory.dm.shape) == 256 << 19

"""Rules of the vector engine: units, operands, tags, reducers, valid counts."""

from __future__ import annotations

from collections.abc import Iterator

from .instructions import Exec, Fate, ValidDim
from .units import ALU_OPS, CONVERSIONS, REDUCE_STAGE, REVERSIBLE, STAGE, UNARY
from .vector_fields import Groups, Op, Reduce, Slot, Source, Vector, VectorOp

MAX_SLICES_PER_PE = 64
VALID_COLUMNS = 8
"""Columns that a valid count can tell apart: those of a flit of 32-bit elements."""
IMMEDIATES = (Source.IMM0, Source.IMM1, Source.IMM2)

Violations = Iterator[tuple[str, str]]


def vector_violations(c: Exec) -> Violations:
    """(rule, cause) of each rule that does not hold."""
    v = c.vector
    yield from _units(v)
    yield from _operands(c, v)
    yield from _tags(c, v)
    yield from _reducers(c, v)
    yield from _valid_counts(c, v)
    if c.contraction is None and v.used and c.stream_dtype.bits != 32:
        yield "vector-dtype", "the vector engine computes on i32 and f32"


def _units(v: Vector) -> Violations:
    units = [op.alu for op in v.ops]
    if len(set(units)) != len(units):
        yield "alu-once", "a unit works once per pass"
    stages = [STAGE[unit] for unit in units]
    if stages != sorted(stages):
        yield "alu-order", "units stand in pipeline order"
    for op in v.ops:
        if op.op not in ALU_OPS[op.alu]:
            yield "alu-op", f"{op.alu.name} has no {op.op.name}"
        if (op.y == Source.NONE) != (op.op in UNARY) or (op.z == Source.NONE) == (op.op == Op.FMA):
            yield "alu-operands", f"{op.op.name} has the wrong number of operands"
        if op.reverse and op.op not in REVERSIBLE:
            yield "alu-operands", f"{op.op.name} has no reverse form"
        if op.int_width != 31 and op.op not in CONVERSIONS:
            yield "int-width", f"{op.op.name} converts no fixed-point numbers"


def _operands(c: Exec, v: Vector) -> Violations:
    plain = [source for op in v.ops for source in (op.y, op.z)]
    sources = plain + [slot.source for slot in v.slots]
    if sources.count(Source.VRF) > 1 or sources.count(Source.STASH) > 1:
        yield "register-port", "one VRF and one stash operand per pass"
    yield from _stash(c, v)
    if (plain.count(Source.ZIP) == 1) != c.stream.pair:
        yield "zip", "a pair of streams is joined by exactly one zip operand"
    zip_at = next((i for i, op in enumerate(v.ops) if Source.ZIP in (op.y, op.z)), 0)
    for i, op in enumerate(v.ops):
        if op.groups != Groups.BOTH and i >= zip_at:
            yield "groups", "only a pair has groups, and only before it is one"
    if any(op.groups != Groups.BOTH and op.op in CONVERSIONS for op in v.ops):
        yield "groups", "both groups of a pair are converted"


def _stash(c: Exec, v: Vector) -> Violations:
    stashes = [i for i, op in enumerate(v.ops) if op.stash]
    reads = [i for i, op in enumerate(v.ops) if Source.STASH in _sources(v, op)]
    if len(stashes) != len(reads) or any(r < w for r, w in zip(reads, stashes, strict=False)):
        yield "stash", "the stash is written once and then read once"
    if any(
        STAGE[v.ops[w].alu] < REDUCE_STAGE < STAGE[v.ops[r].alu]
        for w, r in zip(stashes, reads, strict=False)
    ) and (v.reduce != Reduce.NONE):
        yield "stash", "the stash does not cross the reducer, which changes the packet"
    if stashes and c.stream.pair:
        yield "stash", "the stash does not exist in pair mode"


def _sources(v: Vector, op: VectorOp) -> list[Source]:
    """Operands of a unit, with what it selects from."""
    chosen = [slot.source for slot in v.slots] if op.y == Source.SELECT else []
    return [op.y, op.z, *chosen]


def _tags(c: Exec, v: Vector) -> Violations:
    selects = [op for op in v.ops if op.y == Source.SELECT]
    if len(selects) != bool(v.slots) or any(op.z == Source.SELECT for op in v.ops):
        yield "select", "slots are one unit's first operand"
    if v.comparators and not selects:
        yield "tags", "a tag without a unit that selects by it"
    if any(slot.mask >> len(v.comparators) for slot in v.slots):
        yield "tags", "a guard of tags that are not made"
    if selects and c.stream.pair:
        yield "tags", "a pair's groups have no tags"
    if selects and v.reduce != Reduce.NONE and STAGE[selects[0].alu] > REDUCE_STAGE:
        yield "tags", "tags end at the reducer, which makes new elements"
    yield from _slots(v.slots)


def _slots(slots: tuple[Slot, ...]) -> Violations:
    for i, slot in enumerate(slots):
        if slot.source not in (*IMMEDIATES, Source.VRF, Source.STASH):
            yield "slots", f"{slot.source.name} is no operand register"
        if slot.value & ~slot.mask:
            yield "slots", "a guard asks for bits that it does not look at"
        if slot.negate and not slot.mask:
            yield "slots", "a guard that no tag satisfies"
        last = i == len(slots) - 1
        if slot.unconditional and not last:
            yield "slots", "nothing comes behind a slot that every tag satisfies"
        if slot.source not in IMMEDIATES and not last:
            yield "slots", "the register port is the last slot"
    sources = [slot.source for slot in slots]
    if len(set(sources)) != len(sources):
        yield "slots", "an operand register is one slot"


def _reducers(c: Exec, v: Vector) -> Violations:
    if v.slice_group & (v.slice_group - 1) or v.slice_group > MAX_SLICES_PER_PE << c.group:
        yield "slice-group", f"{v.slice_group} slices are no power of two inside the group"
    if (v.slice_reduce == Reduce.NONE) != (v.slice_group == 1):
        yield "slice-group", "an inter-slice reduction has a group, and only it"
    if v.reduce in (Reduce.IADD, Reduce.MUL):
        yield "reduce-op", f"the reducer has no {v.reduce.name}: only the one across slices"
    if v.reduce_columns and v.reduce == Reduce.NONE:
        yield "columns-need-reducer", "columns fold in a reducer that is not used"
    if c.stream.pair and v.reduce != Reduce.NONE:
        zip_stage = next((STAGE[op.alu] for op in v.ops if Source.ZIP in (op.y, op.z)), 9)
        if zip_stage > REDUCE_STAGE:
            yield "zip", "the reducer takes one stream: zip before it"


def _valid_counts(c: Exec, v: Vector) -> Violations:
    dims = {k.valid_dim for k in c.counters}
    if (v.gates or v.clipper) and v.reduce == Reduce.NONE:
        yield "valid-count", "valid counts are the reducer's, which is not used"
    for dim in dims - {ValidDim.NONE, ValidDim.PACKET}:
        if dim - ValidDim.GATE0 >= len(v.gates):
            yield "valid-count", f"counters follow {dim.name.lower()}, which is not used"
    if any(gate.mask >= MAX_SLICES_PER_PE << c.group for gate in v.gates):
        yield "valid-count", "a gate looks at bits that no slice number has"
    if ValidDim.PACKET in dims and v.clipper is None:
        yield "valid-count", "counters follow the packet's axis, which nothing clips"
    if any(k.valid_dim != ValidDim.NONE and k.fate == Fate.MSUM for k in c.counters):
        yield "valid-count", "valid counts are made behind the contraction's sums"
    if v.clipper is None:
        return
    if not 1 <= v.clipper.span <= VALID_COLUMNS:
        yield "valid-count", f"{v.clipper.span} columns of a packet of {VALID_COLUMNS}"
    if c.contraction is not None or c.stream.elements > VALID_COLUMNS:
        yield "valid-count", f"columns are clipped in packets of {VALID_COLUMNS}"
    if not v.reduce_columns:
        yield "valid-count", "columns that are not folded are not left out"

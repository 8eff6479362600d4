"""The one way to write a command: fields that would have no effect are at their defaults.

`canonical(command)` means the same as `command`. Records hold canonical commands only: the encoder
writes them and the decoder refuses everything else, so that a changed field of a record is a
changed program or an error, never a difference that nobody sees.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from .instructions import (
    Commit,
    Control,
    Counter,
    Dma,
    Exec,
    Fate,
    Generate,
    Instruction,
    Port,
    Side,
    Sink,
    Stream,
    Switch,
    ValidDim,
)
from .rules import SLICES_PER_PE
from .units import REDUCE_STAGE, STAGE
from .vector_fields import (
    Comparator,
    Comparison,
    Gate,
    Groups,
    Placement,
    Reduce,
    Source,
    Vector,
)

T = TypeVar("T")
IMMEDIATES = (Source.IMM0, Source.IMM1, Source.IMM2)


def canonical(command: Instruction) -> Instruction:
    """The same command without settings that nothing looks at."""
    match command:
        case Exec():
            return canonical_exec(command)
        case Dma():
            return canonical_dma(command)
        case Control():
            return canonical_control(command)


def canonical_control(c: Control) -> Control:
    """A single iteration and steps of no bytes move no register."""
    return _with(c, steps=tuple(s for s in c.steps if s.bytes) if c.count > 1 else ())


def canonical_dma(c: Dma) -> Dma:
    """A loop of one step has no stride: it is left out. Ranks are told apart by a stride alone."""
    c = _with(c, source=_side(c.source), destination=_side(c.destination))
    kept = [i for i, n in enumerate(c.n) if n > 1]
    if len(kept) == len(c.n):
        return c

    def some(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[i] for i in kept)

    index = c.index and replace(c.index, strides=some(c.index.strides))
    return replace(
        c,
        n=some(c.n),
        source=replace(c.source, strides=some(c.source.strides)),
        destination=replace(c.destination, strides=some(c.destination.strides)),
        index=index,
    )


def _side(side: Side) -> Side:
    return _with(side, rank_mask=side.rank_mask if side.rank_stride else 0)


def canonical_exec(c: Exec) -> Exec:
    """Ports, strides and settings that no engine of the pass uses are left out."""
    reads_vrf = c.vector.reads_vrf
    slices = SLICES_PER_PE << c.group
    return _with(
        c,
        counters=_counters(c, reads_vrf),
        b=c.b if c.stream.pair else Port(),
        trf=c.trf if c.contraction is not None else Port(),
        # The units say what an operand's 32 bits are.
        vrf=_with(c.vrf, dtype=Port().dtype) if reads_vrf else Port(),
        stream=_stream(c.stream, c.generate),
        switch=_switch(c.switch),
        vector=_vector(c, reads_vrf),
        commit=_commit(c.commit),
        trf_lanes=c.trf_lanes if c.contraction or c.commit.sink == Sink.TRF else 8,
        valid_slices=0 if c.valid_slices == slices else c.valid_slices,
        generate=_generate(c),
    )


def _counters(c: Exec, reads_vrf: bool) -> tuple[Counter, ...]:
    """Without those of one step, and with strides for the ports in use only."""
    sink, pair = c.commit.sink, c.stream.pair
    to_trf = c.contraction is not None or sink == Sink.TRF
    to_vrf = reads_vrf or sink == Sink.VRF
    late = reads_vrf and _reads_vrf_behind_reducer(c.vector)
    found = []
    for k in c.counters:
        if k.n == 1:
            continue
        folded = late and k.fate == Fate.VSUM
        found.append(
            _with(
                k,
                b=k.b if pair else 0,
                trf=k.trf if to_trf else 0,
                vrf=k.vrf if to_vrf and not folded else 0,
                commit=k.commit if sink == Sink.DM else 0,
                valid_dim=k.valid_dim if k.valid_step else ValidDim.NONE,
            )
        )
    return c.counters if found == list(c.counters) else tuple(found)


def _stream(s: Stream, generate: Generate | None) -> Stream:
    fetches = generate is None
    return _with(
        s,
        run_step=s.run_step if fetches and s.run > 1 else 1,
        run_stride=s.run_stride if fetches and s.runs > 1 else 0,
        pad=s.pad if s.pad > s.valid else 0,
    )


def _switch(switch: Switch) -> Switch:
    """A digit that selects nothing is a part of the ring that the output slice may differ in."""
    return _with(switch, digits=tuple(d for d in switch.digits if d.slices or d.bytes))


def _commit(o: Commit) -> Commit:
    placed = o.sink == Sink.DM
    return _with(
        o,
        lane_stride=o.lane_stride if placed and o.lanes > 1 else 0,
        column_stride=o.column_stride if placed and o.columns > 1 else 0,
        transpose_rows=o.transpose_rows if placed else 0,
        transpose_columns=o.transpose_columns if placed else 0,
    )


def _generate(c: Exec) -> Generate | None:
    """A pattern has the bits of an element."""
    if c.generate is None:
        return None
    mask = (1 << min(32, c.commit_port.dtype.bits)) - 1
    return _with(c.generate, value=c.generate.value & mask)


def _vector(c: Exec, reads_vrf: bool) -> Vector:
    v = c.vector
    sources = {s for op in v.ops for s in (op.y, op.z)} | {slot.source for slot in v.slots}
    columns = c.stream.elements >> (c.contraction.depth if c.contraction else 0)
    across = v.slice_reduce != Reduce.NONE and bool(v.ops or v.reduce != Reduce.NONE)
    folds = v.reduce_columns and (columns > 1 or v.clipper is not None)
    lanes = c.commit.lanes if c.contraction else 1
    read = columns if folds else min(columns, c.commit.columns)
    late = folds and _reads_vrf_behind_reducer(v)
    i0, i1, i2 = (x if s in sources else 0 for x, s in zip(v.imm, IMMEDIATES, strict=True))
    return _with(
        v,
        imm=(i0, i1, i2),
        reduce_columns=folds,
        slice_placement=v.slice_placement if across else Placement.LAST,
        vrf_lane=v.vrf_lane if reads_vrf and lanes > 1 else 0,
        vrf_column=v.vrf_column if reads_vrf and read > 1 and not late else 0,
        vrf_pair=v.vrf_pair if reads_vrf and _second_group_reads_vrf(c) else 0,
        comparators=tuple(_comparator(comparator) for comparator in v.comparators),
        gates=tuple(_gate(gate) for gate in v.gates),
    )


def _comparator(comparator: Comparator) -> Comparator:
    constant = comparator.kind in (Comparison.TRUE, Comparison.FALSE)
    return _with(comparator, boundary=0 if constant else comparator.boundary)


def _gate(gate: Gate) -> Gate:
    """Without a mask no slice is beyond the bound."""
    return _with(gate, time_major=gate.time_major and gate.mask != 0)


def _reads_vrf_behind_reducer(v: Vector) -> bool:
    """Whether what is folded is one element when the VRF's operand meets it."""
    if v.reduce == Reduce.NONE:
        return False
    by_slot = any(slot.source == Source.VRF for slot in v.slots)
    return any(
        STAGE[op.alu] > REDUCE_STAGE
        for op in v.ops
        if Source.VRF in (op.y, op.z) or (by_slot and op.y == Source.SELECT)
    )


def _second_group_reads_vrf(c: Exec) -> bool:
    """Whether the VRF's operand is used before a pair's groups are one, and by the second."""
    for op in c.vector.ops if c.stream.pair else ():
        if Source.ZIP in (op.y, op.z):
            break
        if Source.VRF in (op.y, op.z):
            return op.groups != Groups.FIRST
    return False


def _with(part: T, **values: Any) -> T:
    """`part` with these fields; itself if nothing changes, which is the usual case and quick."""
    changed = {name: v for name, v in values.items() if getattr(part, name) != v}
    return replace(part, **changed) if changed else part  # type: ignore[type-var]

"""The bytes of a command: encoding. `record_types.py` has their layout.

What is written is the canonical form of a command (`canonical.py`).
"""

from __future__ import annotations

import numpy as np

from .canonical import canonical_control, canonical_dma, canonical_exec
from .instructions import Control, Dma, Exec, Head, Vector
from .record_types import (
    CONTROL,
    DMA,
    EXEC,
    KIND_CONTROL,
    KIND_DMA,
    KIND_EXEC,
    MAX_SIGNALS,
    MAX_WAITS,
    NO_REGISTER,
    NO_SEMAPHORE,
    Record,
)


def encode_exec(command: Exec) -> np.ndarray:
    """One `EXEC` record, shape ()."""
    command = canonical_exec(command)
    out = np.zeros((), EXEC)
    _put_head(out["head"], command.head, KIND_EXEC)
    out["head"]["group"] = command.group
    out["valid_slices"] = command.valid_slices
    out["head"]["n_counters"] = len(command.counters)
    out["head"]["n_ops"] = len(command.vector.ops)
    for name, port in (
        ("a", command.a),
        ("b", command.b),
        ("trf", command.trf),
        ("vrf", command.vrf),
        ("commit", command.commit_port),
    ):
        out[name] = (port.base, _register(port.register), port.dtype, (0,) * 6, port.limit)
    for i, c in enumerate(command.counters):
        out["counters"][i] = (
            *(c.n, c.birth, c.fate, c.slices, c.a, c.b, c.trf, c.vrf, c.commit, c.lanes),
            c.valid_step,
        )
        out["valid_dim"][i] = c.valid_dim
    s = command.stream
    zero = (0, 0) if s.zero_point is None else (1, s.zero_point)
    out["stream"] = (
        *(s.run, s.run_step, s.cast or 0, s.runs, s.pad, s.run_stride, s.pair, s.lookup or 0),
        *zero,
    )
    out["switch"]["topology"] = command.switch.topology
    out["switch"]["ring"] = command.switch.ring
    if command.switch.bitmap is not None:
        out["switch"]["bitmap_used"] = 1
        out["bitmap"] = command.switch.bitmap
    for i, digit in enumerate(command.switch.digits):
        out["switch"]["digits"][i] = (digit.shift, digit.bits, digit.slices, digit.bytes)
    k = command.contraction
    if k is None:
        out["contraction"]["lanes"] = command.trf_lanes
    else:
        out["contraction"] = (1, k.pack, k.lanes, k.trf_read, k.depth, k.fold, (0, 0))
    _put_vector(out["vector"], command.vector)
    _put_tags(out["tags"], command.vector)
    if command.generate is not None:
        out["generate_used"] = 1
        out["count_up"] = command.generate.count_up
        out["generated"] = command.generate.value
    o = command.commit
    out["out"] = (
        *(o.sink, o.relu, o.lanes, o.transpose_rows, o.columns, o.transpose_columns, 0),
        *(o.lane_stride, o.column_stride),
    )
    return out


def _put_vector(out: Record, vector: Vector) -> None:
    for i, op in enumerate(vector.ops):
        fraction_bits = 31 - op.int_width
        out["ops"][i] = (
            *(op.alu, op.op, op.y, op.z, op.reverse, op.stash, fraction_bits, op.groups),
        )
    out["imm"] = vector.imm
    for name in (
        "reduce",
        "reduce_columns",
        "slice_reduce",
        "slice_placement",
        "slice_group",
        "vrf_lane",
        "vrf_column",
        "vrf_pair",
    ):
        out[name] = getattr(vector, name)


def _put_tags(out: Record, vector: Vector) -> None:
    out["n_comparators"] = len(vector.comparators)
    for i, comparator in enumerate(vector.comparators):
        out["comparator_kind"][i] = comparator.kind
        out["comparator_boundary"][i] = comparator.boundary
    out["n_slots"] = len(vector.slots)
    for i, slot in enumerate(vector.slots):
        out["slots"][i] = (slot.source, slot.mask | slot.value << 4, slot.negate)
    out["n_gates"] = len(vector.gates)
    for i, gate in enumerate(vector.gates):
        out["gates"][i] = (gate.bound, gate.mask, gate.slice_bound, gate.time_major, 0)
    if vector.clipper is not None:
        out["clipper_used"] = 1
        out["clipper_size"] = vector.clipper.size
        out["clipper_span"] = vector.clipper.span


def encode_dma(command: Dma) -> np.ndarray:
    """One `DMA` record, shape ()."""
    command = canonical_dma(command)
    out = np.zeros((), DMA)
    _put_head(out["head"], command.head, KIND_DMA)
    out["head"]["n_counters"] = len(command.n)
    for name, side in (("source", command.source), ("destination", command.destination)):
        out[name]["base"] = side.base
        out[name]["space"] = side.space
        out[name]["register"] = _register(side.register)
        out[name]["limit"] = side.limit
        out[name]["peer"] = side.peer
        out[name]["rank_mask"] = side.rank_mask
        out[name]["rank_stride"] = side.rank_stride
        out[name]["strides"][: len(side.strides)] = side.strides
    out["n"][: len(command.n)] = command.n
    out["run"] = command.run
    out["indirect"] = command.indirect
    out["index_register"] = NO_REGISTER
    if command.index is not None:
        out["index_register"] = _register(command.index.register)
        out["index_base"] = command.index.base
        out["index_scale"] = command.index.scale
        out["index_bound"] = command.index.bound
        out["index_origin"] = command.index.origin
        out["index_strides"][: len(command.index.strides)] = command.index.strides
    return out


def encode_control(command: Control) -> np.ndarray:
    """One `CONTROL` record, shape ()."""
    command = canonical_control(command)
    out = np.zeros((), CONTROL)
    out["kind"] = KIND_CONTROL
    out["n_steps"] = len(command.steps)
    out["count"] = command.count
    out["length"] = command.length
    for i, step in enumerate(command.steps):
        out["register"][i] = step.register
        out["bytes"][i] = step.bytes
    return out


def _put_head(out: Record, head: Head, kind: int) -> None:
    assert len(head.waits) <= MAX_WAITS, head
    assert len(head.signals) + len(head.peer_signals) <= MAX_SIGNALS, head
    out["kind"] = kind
    out["context"] = head.context
    out["wait_semaphore"] = NO_SEMAPHORE
    out["signal_semaphore"] = NO_SEMAPHORE
    for i, wait in enumerate(head.waits):
        out["wait_semaphore"][i] = wait.semaphore
        out["wait_count"][i] = wait.count
        out["wait_peers"][i] = _peer_bits(wait.peers)
    out["signal_semaphore"][: len(head.signals)] = head.signals
    for i, signal in enumerate(head.peer_signals, len(head.signals)):
        out["signal_semaphore"][i] = signal.semaphore
        out["signal_peers"][i] = _peer_bits(signal.peers)
    out["provenance"] = head.provenance


def _peer_bits(peers: tuple[int, ...]) -> int:
    """Bit p stands for rank ^ p; bit 0 is the rank itself, whose signals have a form without."""
    return sum(1 << p for p in peers)


def _register(register: int | None) -> int:
    return NO_REGISTER if register is None else register

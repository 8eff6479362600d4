"""The bytes of a command: encoding and decoding. `record_types.py` has their layout.

`decode_*` accepts exactly what `encode_*` can write: a reserved byte that is not zero, a field
that has no effect and is not zero, an unknown code or a count out of range is a `BinaryError` that
names the record and the field, so `encode(decode(record)) == record` holds for every record that
is accepted. What is written is the canonical form of a command (`canonical.py`).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, TypeVar

import numpy as np

from ... import errors
from .canonical import canonical_control, canonical_dma, canonical_exec
from .dtypes import DType
from .instructions import (
    MAX_COUNTERS,
    MAX_LOOPS,
    MAX_RANKS,
    MAX_STEPS,
    REGISTERS,
    SEMAPHORES,
    Alu,
    Birth,
    Clipper,
    Commit,
    Comparator,
    Comparison,
    Context,
    Contraction,
    Control,
    Counter,
    Digit,
    Dma,
    Exec,
    Fate,
    Fold,
    Gate,
    Generate,
    Groups,
    Head,
    IndexList,
    Indirect,
    Op,
    PeerSignal,
    Placement,
    Port,
    Reduce,
    Side,
    Sink,
    Slot,
    Source,
    Space,
    Step,
    Stream,
    Switch,
    Topology,
    ValidDim,
    Vector,
    VectorOp,
    Wait,
)
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
)
from .vector_fields import MAX_COMPARATORS, MAX_GATES, MAX_SLOTS, MAX_VECTOR_OPS

Record = Any
"""One element of a structured array; numpy gives its fields no static types."""
E = TypeVar("E", bound=IntEnum)


# --- encoding ---


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


# --- decoding ---


def decode_exec(record: Record, where: str) -> Exec:
    """The command in one `EXEC` record. Raises: VED010 to VED013, naming `where` and the field."""
    head = _head(record["head"], KIND_EXEC, where)
    if head.context == Context.DMA:
        raise errors.bad_record_field(where, "context", int(head.context), "main or sub")
    n_counters = _in_range(record["head"]["n_counters"], 0, MAX_COUNTERS, where, "n_counters")
    n_ops = _in_range(record["head"]["n_ops"], 0, MAX_VECTOR_OPS, where, "n_ops")
    used = _flag(record["contraction"]["used"], where, "contraction.used")
    lanes = _one_of(record["contraction"]["lanes"], (1, 2, 4, 8), where, "contraction.lanes")
    command = Exec(
        head=head,
        counters=tuple(_counter(record, where, i) for i in range(n_counters)),
        a=_port(record["a"], where, "a"),
        b=_port(record["b"], where, "b"),
        trf=_port(record["trf"], where, "trf"),
        vrf=_port(record["vrf"], where, "vrf"),
        commit_port=_port(record["commit"], where, "commit"),
        stream=_stream(record["stream"], where),
        commit=_commit(record["out"], where),
        group=_in_range(record["head"]["group"], 0, 2, where, "group"),
        valid_slices=int(record["valid_slices"]),
        switch=_switch(record, where),
        contraction=_contraction(record["contraction"], where) if used else None,
        trf_lanes=lanes,
        vector=_vector(record, n_ops, where),
        generate=_generate(record, where),
    )
    _must_round_trip(record, encode_exec(command), where)
    return command


def decode_dma(record: Record, where: str) -> Dma:
    """The command in one `DMA` record. Raises: VED010 to VED013, naming `where` and the field."""
    head = _head(record["head"], KIND_DMA, where)
    if head.context != Context.DMA:
        raise errors.bad_record_field(where, "context", int(head.context), "dma")
    loops = _in_range(record["head"]["n_counters"], 0, MAX_LOOPS, where, "n_counters")
    n = tuple(_in_range(v, 1, 65535, where, "n") for v in record["n"][:loops])
    indirect = _enum(Indirect, record["indirect"], where, "indirect")
    index = None
    if indirect != Indirect.NONE:
        index = IndexList(
            base=int(record["index_base"]),
            strides=tuple(int(v) for v in record["index_strides"][:loops]),
            scale=int(record["index_scale"]),
            register=_maybe_register(record["index_register"], where, "index_register"),
            bound=int(record["index_bound"]),
            origin=int(record["index_origin"]),
        )
    command = Dma(
        head=head,
        n=n,
        run=_in_range(record["run"], 1, 1 << 22, where, "run"),
        source=_side(record["source"], loops, where, "source"),
        destination=_side(record["destination"], loops, where, "destination"),
        indirect=indirect,
        index=index,
    )
    _must_round_trip(record, encode_dma(command), where)
    return command


def decode_control(record: Record, where: str) -> Control:
    """The command in one `CONTROL` record. Raises: VED010 to VED013."""
    _one_of(record["kind"], (KIND_CONTROL,), where, "kind")
    n_steps = _in_range(record["n_steps"], 0, MAX_STEPS, where, "n_steps")
    command = Control(
        count=_in_range(record["count"], 1, 1 << 20, where, "count"),
        length=_in_range(record["length"], 1, 1 << 20, where, "length"),
        steps=tuple(
            Step(
                _in_range(record["register"][i], 0, REGISTERS - 1, where, "register"),
                int(record["bytes"][i]),
            )
            for i in range(n_steps)
        ),
    )
    _must_round_trip(record, encode_control(command), where)
    return command


def _head(record: Record, kind: int, where: str) -> Head:
    _one_of(record["kind"], (kind,), where, "kind")
    waits = tuple(
        Wait(
            _in_range(record["wait_semaphore"][i], 0, SEMAPHORES - 1, where, "wait_semaphore"),
            _in_range(record["wait_count"][i], 1, 65535, where, "wait_count"),
            _peers(record["wait_peers"][i], where, "wait_peers"),
        )
        for i in range(MAX_WAITS)
        if record["wait_semaphore"][i] != NO_SEMAPHORE
    )
    sent = [
        (
            _in_range(semaphore, 0, SEMAPHORES - 1, where, "signal_semaphore"),
            _peers(peers, where, "signal_peers"),
        )
        for semaphore, peers in zip(record["signal_semaphore"], record["signal_peers"], strict=True)
        if semaphore != NO_SEMAPHORE
    ]
    for named in ([w.semaphore for w in waits], [semaphore for semaphore, _ in sent]):
        if len(set(named)) != len(named):
            raise errors.bad_record_field(where, "semaphores", "repeated", "each named once")
    return Head(
        context=_enum(Context, record["context"], where, "context"),
        waits=waits,
        signals=tuple(semaphore for semaphore, peers in sent if not peers),
        provenance=int(record["provenance"]),
        peer_signals=tuple(PeerSignal(semaphore, peers) for semaphore, peers in sent if peers),
    )


def _peers(bits: Any, where: str, name: str) -> tuple[int, ...]:
    if int(bits) & 1:
        raise errors.bad_record_field(where, name, int(bits), "other ranks' bits")
    return tuple(p for p in range(1, MAX_RANKS) if int(bits) >> p & 1)


def _counter(exec_record: Record, where: str, i: int) -> Counter:
    name = f"counters[{i}]"
    record = exec_record["counters"][i]
    return Counter(
        n=_in_range(record["n"], 1, 65536, where, f"{name}.n"),
        birth=_enum(Birth, record["birth"], where, f"{name}.birth"),
        fate=_enum(Fate, record["fate"], where, f"{name}.fate"),
        valid_dim=_enum(ValidDim, exec_record["valid_dim"][i], where, f"{name}.valid_dim"),
        **{
            k: int(record[k])
            for k in ("a", "b", "trf", "vrf", "commit", "slices", "lanes", "valid_step")
        },
    )


def _port(record: Record, where: str, name: str) -> Port:
    return Port(
        base=int(record["base"]),
        dtype=_enum(DType, record["dtype"], where, f"{name}.dtype"),
        register=_maybe_register(record["register"], where, f"{name}.register"),
        limit=int(record["limit"]),
    )


def _stream(record: Record, where: str) -> Stream:
    cast, lookup = record["cast"], record["lookup"]
    zero_used = _flag(record["zero_used"], where, "stream.zero_used")
    return Stream(
        run=_in_range(record["run"], 1, 65535, where, "stream.run"),
        run_step=_one_of(record["run_step"], (0, 1), where, "stream.run_step"),
        runs=_in_range(record["runs"], 1, 65535, where, "stream.runs"),
        run_stride=int(record["run_stride"]),
        pad=int(record["pad"]),
        lookup=None if lookup == 0 else _enum(DType, lookup, where, "stream.lookup"),
        cast=None if cast == 0 else _enum(DType, cast, where, "stream.cast"),
        zero_point=int(record["zero_point"]) if zero_used else None,
        pair=_flag(record["pair"], where, "stream.pair"),
    )


def _switch(exec_record: Record, where: str) -> Switch:
    record = exec_record["switch"]
    bitmap_used = _flag(record["bitmap_used"], where, "switch.bitmap_used")
    return Switch(
        topology=_enum(Topology, record["topology"], where, "switch.topology"),
        ring=int(record["ring"]),
        digits=tuple(
            Digit(
                _in_range(d["shift"], 0, 7, where, "switch.shift"),
                _in_range(d["bits"], 1, 8, where, "switch.bits"),
                int(d["slices"]),
                int(d["bytes"]),
            )
            for d in record["digits"]
            if d["bits"]
        ),
        bitmap=int(exec_record["bitmap"]) if bitmap_used else None,
    )


def _contraction(record: Record, where: str) -> Contraction:
    return Contraction(
        pack=_one_of(record["pack"], (1, 2), where, "contraction.pack"),
        lanes=int(record["lanes"]),
        trf_read=_one_of(record["trf_read"], (1, 2, 4, 8, 16, 32, 64), where, "trf_read"),
        depth=_in_range(record["depth"], 0, 7, where, "contraction.depth"),
        fold=_enum(Fold, record["fold"], where, "contraction.fold"),
    )


def _generate(record: Record, where: str) -> Generate | None:
    if not _flag(record["generate_used"], where, "generate_used"):
        return None
    return Generate(int(record["generated"]), _flag(record["count_up"], where, "count_up"))


def _vector(exec_record: Record, n_ops: int, where: str) -> Vector:
    record = exec_record["vector"]
    ops = tuple(
        VectorOp(
            alu=_enum(Alu, r["alu"], where, "vector.alu"),
            op=_enum(Op, r["op"], where, "vector.op"),
            y=_enum(Source, r["y"], where, "vector.y"),
            z=_enum(Source, r["z"], where, "vector.z"),
            reverse=_flag(r["reverse"], where, "vector.reverse"),
            stash=_flag(r["stash"], where, "vector.stash"),
            int_width=31 - _in_range(r["fraction_bits"], 0, 31, where, "vector.fraction_bits"),
            groups=_enum(Groups, r["groups"], where, "vector.groups"),
        )
        for r in record["ops"][:n_ops]
    )
    imm = record["imm"]
    return Vector(
        ops=ops,
        imm=(int(imm[0]), int(imm[1]), int(imm[2])),
        reduce=_enum(Reduce, record["reduce"], where, "vector.reduce"),
        reduce_columns=_flag(record["reduce_columns"], where, "vector.reduce_columns"),
        slice_reduce=_enum(Reduce, record["slice_reduce"], where, "vector.slice_reduce"),
        slice_group=_in_range(record["slice_group"], 1, 256, where, "vector.slice_group"),
        slice_placement=_enum(Placement, record["slice_placement"], where, "slice_placement"),
        vrf_lane=int(record["vrf_lane"]),
        vrf_column=int(record["vrf_column"]),
        vrf_pair=int(record["vrf_pair"]),
        **_tags(exec_record["tags"], where),
    )


def _tags(record: Record, where: str) -> dict[str, Any]:
    """The vector engine's fields that stand in `TAGS`."""
    comparators = _in_range(record["n_comparators"], 0, MAX_COMPARATORS, where, "n_comparators")
    slots = _in_range(record["n_slots"], 0, MAX_SLOTS, where, "n_slots")
    gates = _in_range(record["n_gates"], 0, MAX_GATES, where, "n_gates")
    clipper = None
    if _flag(record["clipper_used"], where, "clipper_used"):
        clipper = Clipper(int(record["clipper_size"]), int(record["clipper_span"]))
    return {
        "comparators": tuple(
            Comparator(
                _enum(Comparison, record["comparator_kind"][i], where, "comparator_kind"),
                int(record["comparator_boundary"][i]),
            )
            for i in range(comparators)
        ),
        "slots": tuple(
            Slot(
                _enum(Source, r["source"], where, "slots.source"),
                int(r["tag"]) & 15,
                int(r["tag"]) >> 4,
                _flag(r["negate"], where, "slots.negate"),
            )
            for r in record["slots"][:slots]
        ),
        "gates": tuple(
            Gate(
                int(r["bound"]),
                int(r["mask"]),
                int(r["slice_bound"]),
                _flag(r["time_major"], where, "gates.time_major"),
            )
            for r in record["gates"][:gates]
        ),
        "clipper": clipper,
    }


def _commit(record: Record, where: str) -> Commit:
    return Commit(
        sink=_enum(Sink, record["sink"], where, "out.sink"),
        lanes=_in_range(record["lanes"], 1, 8, where, "out.lanes"),
        columns=_in_range(record["columns"], 1, 65535, where, "out.columns"),
        lane_stride=int(record["lane_stride"]),
        column_stride=int(record["column_stride"]),
        transpose_rows=int(record["transpose_rows"]),
        transpose_columns=int(record["transpose_columns"]),
        relu=_flag(record["relu"], where, "out.relu"),
    )


def _side(record: Record, loops: int, where: str, name: str) -> Side:
    return Side(
        space=_enum(Space, record["space"], where, f"{name}.space"),
        base=int(record["base"]),
        strides=tuple(int(v) for v in record["strides"][:loops]),
        register=_maybe_register(record["register"], where, f"{name}.register"),
        limit=int(record["limit"]),
        peer=_in_range(record["peer"], 0, MAX_RANKS - 1, where, f"{name}.peer"),
        rank_stride=int(record["rank_stride"]),
        rank_mask=_in_range(record["rank_mask"], 0, MAX_RANKS - 1, where, f"{name}.rank_mask"),
    )


def _maybe_register(value: Any, where: str, name: str) -> int | None:
    if value == NO_REGISTER:
        return None
    return _in_range(value, 0, REGISTERS - 1, where, name)


def _enum(kind: type[E], value: Any, where: str, name: str) -> E:
    try:
        return kind(int(value))
    except ValueError:
        choices = ", ".join(member.name.lower() for member in kind)
        raise errors.bad_record_field(where, name, int(value), choices) from None


def _in_range(value: Any, low: int, high: int, where: str, name: str) -> int:
    if not low <= int(value) <= high:
        raise errors.bad_record_field(where, name, int(value), f"{low} to {high}")
    return int(value)


def _one_of(value: Any, choices: tuple[int, ...], where: str, name: str) -> int:
    if int(value) not in choices:
        raise errors.bad_record_field(where, name, int(value), f"one of {choices}")
    return int(value)


def _flag(value: Any, where: str, name: str) -> bool:
    return bool(_one_of(value, (0, 1), where, name))


def _must_round_trip(record: Record, encoded: np.ndarray, where: str) -> None:
    """What has no effect must be zero; comparing bytes finds it wherever it hides."""
    got, expected = np.asarray(record).tobytes(), encoded.tobytes()
    if got != expected:
        at = next(i for i, (x, y) in enumerate(zip(got, expected, strict=True)) if x != y)
        raise errors.bad_record_field(where, f"byte {at}", got[at], f"{expected[at]} (reserved)")

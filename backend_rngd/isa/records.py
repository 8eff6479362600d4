"""The bytes of a command: numpy structured dtypes, encoding and decoding.

`decode_*` accepts exactly what `encode_*` can write: a reserved byte that is not zero, an
unknown code or a count out of range is a `BinaryError` that names the record and the field, so
`encode(decode(record)) == record` holds for every record that is accepted.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, TypeVar

import numpy as np

from ... import errors
from .dtypes import DType
from .instructions import (
    MAX_COUNTERS,
    MAX_LOOPS,
    MAX_STEPS,
    MAX_VECTOR_OPS,
    REGISTERS,
    SEMAPHORES,
    Alu,
    Birth,
    Commit,
    Context,
    Contraction,
    Control,
    Counter,
    Digit,
    Dma,
    Exec,
    Fate,
    Fold,
    Head,
    IndexList,
    Indirect,
    Op,
    Placement,
    Port,
    Reduce,
    Side,
    Sink,
    Source,
    Space,
    Step,
    Stream,
    Switch,
    Topology,
    Vector,
    VectorOp,
    Wait,
)

NO_REGISTER = 255
NO_SEMAPHORE = 255
MAX_WAITS = 3
MAX_SIGNALS = 2

HEAD = np.dtype(
    [
        ("kind", "u1"),
        ("context", "u1"),
        ("group", "u1"),
        ("flags", "u1"),
        ("wait_semaphore", "u1", MAX_WAITS),
        ("n_counters", "u1"),
        ("wait_count", "<u2", MAX_WAITS),
        ("n_ops", "u1"),
        ("reserved0", "u1"),
        ("signal_semaphore", "u1", MAX_SIGNALS),
        ("reserved1", "u1", 2),
        ("provenance", "<u4"),
        ("reserved2", "u1", 8),
    ]
)
PORT = np.dtype(
    [
        ("base", "<u4"),
        ("register", "u1"),
        ("dtype", "u1"),
        ("reserved", "u1", 6),
        ("limit", "<u4"),
    ]
)
COUNTER = np.dtype(
    [
        ("n", "<u4"),
        ("birth", "u1"),
        ("fate", "u1"),
        ("slices", "<i2"),
        ("a", "<i4"),
        ("b", "<i4"),
        ("trf", "<i4"),
        ("vrf", "<i4"),
        ("commit", "<i4"),
        ("lanes", "<i2"),
        ("reserved", "u1", 2),
    ]
)
STREAM = np.dtype(
    [
        ("run", "<u2"),
        ("run_step", "u1"),
        ("cast", "u1"),
        ("runs", "<u2"),
        ("pad", "<u2"),
        ("run_stride", "<i4"),
        ("pair", "u1"),
        ("reserved", "u1", 3),
    ]
)
DIGIT = np.dtype([("shift", "u1"), ("bits", "u1"), ("slices", "<i2"), ("bytes", "<i4")])
SWITCH = np.dtype([("topology", "u1"), ("reserved", "u1"), ("ring", "<u2"), ("digits", DIGIT, 2)])
CONTRACTION = np.dtype(
    [
        ("used", "u1"),
        ("pack", "u1"),
        ("lanes", "u1"),
        ("trf_read", "u1"),
        ("depth", "u1"),
        ("fold", "u1"),
        ("reserved", "u1", 2),
    ]
)
VECTOR_OP = np.dtype(
    [
        ("alu", "u1"),
        ("op", "u1"),
        ("y", "u1"),
        ("z", "u1"),
        ("reverse", "u1"),
        ("stash", "u1"),
        ("reserved", "u1", 2),
    ]
)
VECTOR = np.dtype(
    [
        ("ops", VECTOR_OP, MAX_VECTOR_OPS),
        ("imm", "<u4", 3),
        ("reduce", "u1"),
        ("reduce_columns", "u1"),
        ("slice_reduce", "u1"),
        ("slice_placement", "u1"),
        ("slice_group", "<u2"),
        ("reserved", "u1", 2),
        ("vrf_lane", "<i4"),
        ("vrf_column", "<i4"),
        ("vrf_pair", "<i4"),
    ]
)
COMMIT = np.dtype(
    [
        ("sink", "u1"),
        ("relu", "u1"),
        ("lanes", "u1"),
        ("transpose_rows", "u1"),
        ("columns", "<u2"),
        ("transpose_columns", "u1"),
        ("reserved", "u1"),
        ("lane_stride", "<i4"),
        ("column_stride", "<i4"),
    ]
)
EXEC = np.dtype(
    [
        ("head", HEAD),
        ("a", PORT),
        ("b", PORT),
        ("trf", PORT),
        ("vrf", PORT),
        ("commit", PORT),
        ("counters", COUNTER, MAX_COUNTERS),
        ("stream", STREAM),
        ("switch", SWITCH),
        ("contraction", CONTRACTION),
        ("vector", VECTOR),
        ("out", COMMIT),
        ("valid_slices", "<u2"),
        ("reserved", "u1", 98),
    ]
)
SIDE = np.dtype(
    [
        ("base", "<i8"),
        ("space", "u1"),
        ("register", "u1"),
        ("reserved", "u1", 6),
        ("limit", "<u8"),
        ("strides", "<i4", MAX_LOOPS),
    ]
)
DMA = np.dtype(
    [
        ("head", HEAD),
        ("source", SIDE),
        ("destination", SIDE),
        ("n", "<u2", MAX_LOOPS),
        ("run", "<u4"),
        ("indirect", "u1"),
        ("index_register", "u1"),
        ("reserved0", "u1", 2),
        ("index_base", "<i8"),
        ("index_scale", "<u4"),
        ("index_bound", "<u4"),
        ("index_strides", "<i4", MAX_LOOPS),
        ("index_origin", "<i4"),
        ("reserved1", "u1", 36),
    ]
)
CONTROL = np.dtype(
    [
        ("kind", "u1"),
        ("n_steps", "u1"),
        ("reserved", "u1", 2),
        ("count", "<u4"),
        ("length", "<u4"),
        ("register", "u1", MAX_STEPS),
        ("bytes", "<i4", MAX_STEPS),
        ("reserved1", "u1", 12),
    ]
)
assert (EXEC.itemsize, DMA.itemsize, CONTROL.itemsize) == (640, 256, 64)

KIND_EXEC, KIND_DMA, KIND_CONTROL = 1, 2, 3

Record = Any
"""One element of a structured array; numpy gives its fields no static types."""
E = TypeVar("E", bound=IntEnum)


# --- encoding ---


def encode_exec(command: Exec) -> np.ndarray:
    """One `EXEC` record, shape ()."""
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
            (0, 0),
        )
    s = command.stream
    out["stream"] = (s.run, s.run_step, s.cast or 0, s.runs, s.pad, s.run_stride, s.pair, (0,) * 3)
    out["switch"]["topology"] = command.switch.topology
    out["switch"]["ring"] = command.switch.ring
    for i, digit in enumerate(command.switch.digits):
        out["switch"]["digits"][i] = (digit.shift, digit.bits, digit.slices, digit.bytes)
    k = command.contraction
    if k is None:
        out["contraction"]["lanes"] = command.trf_lanes
    else:
        out["contraction"] = (1, k.pack, k.lanes, k.trf_read, k.depth, k.fold, (0, 0))
    _put_vector(out["vector"], command.vector)
    o = command.commit
    out["out"] = (
        *(o.sink, o.relu, o.lanes, o.transpose_rows, o.columns, o.transpose_columns, 0),
        *(o.lane_stride, o.column_stride),
    )
    return out


def _put_vector(out: Record, vector: Vector) -> None:
    for i, op in enumerate(vector.ops):
        out["ops"][i] = (op.alu, op.op, op.y, op.z, op.reverse, op.stash, (0, 0))
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


def encode_dma(command: Dma) -> np.ndarray:
    """One `DMA` record, shape ()."""
    out = np.zeros((), DMA)
    _put_head(out["head"], command.head, KIND_DMA)
    out["head"]["n_counters"] = len(command.n)
    for name, side in (("source", command.source), ("destination", command.destination)):
        out[name]["base"] = side.base
        out[name]["space"] = side.space
        out[name]["register"] = _register(side.register)
        out[name]["limit"] = side.limit
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
    assert len(head.signals) <= MAX_SIGNALS, head
    out["kind"] = kind
    out["context"] = head.context
    out["wait_semaphore"] = NO_SEMAPHORE
    out["signal_semaphore"] = NO_SEMAPHORE
    for i, wait in enumerate(head.waits):
        out["wait_semaphore"][i] = wait.semaphore
        out["wait_count"][i] = wait.count
    out["signal_semaphore"][: len(head.signals)] = head.signals
    out["provenance"] = head.provenance


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
        counters=tuple(_counter(record["counters"][i], where, i) for i in range(n_counters)),
        a=_port(record["a"], where, "a"),
        b=_port(record["b"], where, "b"),
        trf=_port(record["trf"], where, "trf"),
        vrf=_port(record["vrf"], where, "vrf"),
        commit_port=_port(record["commit"], where, "commit"),
        stream=_stream(record["stream"], where),
        commit=_commit(record["out"], where),
        group=_in_range(record["head"]["group"], 0, 2, where, "group"),
        valid_slices=int(record["valid_slices"]),
        switch=_switch(record["switch"], where),
        contraction=_contraction(record["contraction"], where) if used else None,
        trf_lanes=lanes,
        vector=_vector(record["vector"], n_ops, where),
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
        )
        for i in range(MAX_WAITS)
        if record["wait_semaphore"][i] != NO_SEMAPHORE
    )
    signals = tuple(
        _in_range(s, 0, SEMAPHORES - 1, where, "signal_semaphore")
        for s in record["signal_semaphore"]
        if s != NO_SEMAPHORE
    )
    if len({w.semaphore for w in waits}) != len(waits) or len(set(signals)) != len(signals):
        raise errors.bad_record_field(where, "semaphores", "repeated", "each named once")
    context = _enum(Context, record["context"], where, "context")
    return Head(context, waits, signals, int(record["provenance"]))


def _counter(record: Record, where: str, i: int) -> Counter:
    name = f"counters[{i}]"
    return Counter(
        n=_in_range(record["n"], 1, 65536, where, f"{name}.n"),
        birth=_enum(Birth, record["birth"], where, f"{name}.birth"),
        fate=_enum(Fate, record["fate"], where, f"{name}.fate"),
        **{k: int(record[k]) for k in ("a", "b", "trf", "vrf", "commit", "slices", "lanes")},
    )


def _port(record: Record, where: str, name: str) -> Port:
    return Port(
        base=int(record["base"]),
        dtype=_enum(DType, record["dtype"], where, f"{name}.dtype"),
        register=_maybe_register(record["register"], where, f"{name}.register"),
        limit=int(record["limit"]),
    )


def _stream(record: Record, where: str) -> Stream:
    cast = record["cast"]
    return Stream(
        run=_in_range(record["run"], 1, 65535, where, "stream.run"),
        run_step=_one_of(record["run_step"], (0, 1), where, "stream.run_step"),
        runs=_in_range(record["runs"], 1, 65535, where, "stream.runs"),
        run_stride=int(record["run_stride"]),
        pad=int(record["pad"]),
        cast=None if cast == 0 else _enum(DType, cast, where, "stream.cast"),
        pair=_flag(record["pair"], where, "stream.pair"),
    )


def _switch(record: Record, where: str) -> Switch:
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
    )


def _contraction(record: Record, where: str) -> Contraction:
    return Contraction(
        pack=_one_of(record["pack"], (1, 2), where, "contraction.pack"),
        lanes=int(record["lanes"]),
        trf_read=_one_of(record["trf_read"], (1, 2, 4, 8, 16, 32, 64), where, "trf_read"),
        depth=_in_range(record["depth"], 0, 7, where, "contraction.depth"),
        fold=_enum(Fold, record["fold"], where, "contraction.fold"),
    )


def _vector(record: Record, n_ops: int, where: str) -> Vector:
    ops = tuple(
        VectorOp(
            alu=_enum(Alu, r["alu"], where, "vector.alu"),
            op=_enum(Op, r["op"], where, "vector.op"),
            y=_enum(Source, r["y"], where, "vector.y"),
            z=_enum(Source, r["z"], where, "vector.z"),
            reverse=_flag(r["reverse"], where, "vector.reverse"),
            stash=_flag(r["stash"], where, "vector.stash"),
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
    )


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
    """What decoding ignores must be zero; comparing bytes finds it wherever it hides."""
    got, expected = np.asarray(record).tobytes(), encoded.tobytes()
    if got != expected:
        at = next(i for i, (x, y) in enumerate(zip(got, expected, strict=True)) if x != y)
        raise errors.bad_record_field(where, f"byte {at}", got[at], f"{expected[at]} (reserved)")

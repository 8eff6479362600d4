"""The command that bytes stand for: decoding. `record_types.py` has their layout.

`decode_*` accepts exactly what `encode_*` can write: a reserved byte that is not zero, a field
that has no effect and is not zero, an unknown code or a count out of range is a `BinaryError` that
names the record and the field, so `encode(decode(record)) == record` holds for every record that
is accepted.
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
from .record_encoding import encode_control, encode_dma, encode_exec
from .record_types import (
    KIND_CONTROL,
    KIND_DMA,
    KIND_EXEC,
    MAX_WAITS,
    NO_REGISTER,
    NO_SEMAPHORE,
    Record,
)
from .vector_fields import MAX_COMPARATORS, MAX_GATES, MAX_SLOTS, MAX_VECTOR_OPS

E = TypeVar("E", bound=IntEnum)


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

"""Every rule rejects a command that breaks it, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

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

f32 = Port(0, DType.F32)
f8 = Port(0, DType.F8E4M3)
flat = Contraction(depth=0)
plain = Exec(
    head=Head(Context.MAIN),
    counters=(Counter(4, a=32, commit=32),),
    a=f32,
    stream=Stream(8),
    commit_port=f32,
    commit=Commit(columns=8, column_stride=4),
)
multiply = Exec(
    head=Head(Context.MAIN),
    counters=(Counter(2, fate=Fate.MSUM, a=64, trf=64),),
    a=Port(0),
    stream=Stream(32),
    contraction=Contraction(),
    commit_port=f32,
    commit=Commit(lanes=8, lane_stride=8),
)
store = Exec(
    head=Head(Context.SUB),
    counters=(Counter(4, a=64, trf=64),),
    a=Port(0),
    stream=Stream(32),
    commit_port=Port(0),
    commit=Commit(sink=Sink.TRF, columns=32),
)
pair = replace(
    plain,
    stream=Stream(8, pair=True),
    b=f32,
    vector=Vector((VectorOp(Alu.FMA, Op.ADD, Source.ZIP),)),
)


memset = replace(
    plain,
    head=Head(Context.SUB),
    counters=(Counter(4, commit=32),),
    generate=Generate(0x3F800000),
)
ring = replace(
    plain,
    counters=(Counter(4, Birth.SLICE, slices=2, commit=32),),
    switch=Switch(Topology.BROADCAST1, 8, (Digit(0, 1, 1),)),
)
inter = replace(
    ring,
    counters=(
        Counter(2, Birth.SLICE, slices=4, commit=256),
        Counter(4, Birth.SLICE, slices=1, commit=32),
    ),
    switch=Switch(Topology.INTER_TRANSPOSE, 8, (Digit(0, 3, bytes=32),)),
)
fetched_inside = replace(inter, counters=(*inter.counters, Counter(2, a=256, commit=512)))
i4, i32 = Port(0, DType.I4), Port(0, DType.I32)
half_bytes = replace(plain, a=i4, stream=Stream(8, cast=DType.I32), commit_port=i32)


def units(*ops: VectorOp, **changes: Any) -> Vector:
    return Vector(ops, **changes)


ADD = VectorOp(Alu.FMA, Op.ADD, Source.IMM0)
MUL = VectorOp(Alu.MUL0, Op.MUL, Source.IMM0)
PICK = replace(ADD, y=Source.SELECT)
ANY = Slot(Source.IMM0)
TAGGED = (Comparator(Comparison.EQUAL, 0),)
DIV = VectorOp(Alu.FP_DIV, Op.DIV, Source.IMM0)

BROKEN: list[tuple[str, Exec, dict[str, Any]]] = [
    ("reuse-needs-contraction", plain, {"counters": (Counter(2, Birth.REUSE, commit=32),)}),
    (
        "reuse-innermost",
        multiply,
        {"counters": (Counter(2, Birth.REUSE, commit=8), Counter(2, fate=Fate.MSUM, a=64, trf=64))},
    ),
    ("reuse-no-fetch", multiply, {"counters": (Counter(2, Birth.REUSE, a=64, commit=64),)}),
    ("slice-stride", plain, {"counters": (Counter(2, Birth.SLICE, commit=32),)}),
    ("msum-needs-contraction", plain, {"counters": (Counter(2, fate=Fate.MSUM),)}),
    ("vsum-needs-reducer", plain, {"counters": (Counter(2, fate=Fate.VSUM),)}),
    (
        "summed-no-commit",
        multiply,
        {"counters": (Counter(2, fate=Fate.MSUM, trf=64, commit=8),)},
    ),
    ("msum-no-vrf", multiply, {"counters": (Counter(2, fate=Fate.MSUM, trf=64, vrf=4),)}),
    ("store-lanes", store, {"counters": (Counter(9, a=64, lanes=1),)}),
    ("lanes-only-to-trf", plain, {"counters": (Counter(2, commit=32, lanes=1),)}),
    (
        "reduce-slots",
        plain,
        {
            "counters": (Counter(2, fate=Fate.VSUM), Counter(9, a=32, commit=32)),
            "vector": Vector(reduce=Reduce.ADD),
        },
    ),
    ("fetch-alignment", plain, {"a": Port(2, DType.F32)}),
    (
        "sequencer-entries",
        plain,
        {"counters": (Counter(2),) * 8, "stream": Stream(4, runs=2, run_stride=32)},
    ),
    ("tree-columns", multiply, {"a": f8, "trf": f8, "stream": Stream(64), "contraction": flat}),
    ("sub-fetch-8B", store, {"a": Port(4)}),
    ("fetch-cast", plain, {"stream": Stream(8, cast=DType.I32)}),
    (
        "fetch-cast",
        pair,
        {"a": Port(0), "b": Port(0, DType.I8), "stream": Stream(8, pair=True, cast=DType.F32)},
    ),
    ("pair-dtype", pair, {"b": Port(0, DType.I32)}),
    ("pair-no-contraction", multiply, {"stream": Stream(32, pair=True)}),
    ("collect-pad", plain, {"stream": Stream(8, pad=9)}),
    ("ring-size", plain, {"switch": Switch(Topology.CUSTOM, 3)}),
    ("ring-topology", plain, {"switch": Switch(Topology.CUSTOM, 1)}),
    ("switch-digits", plain, {"switch": Switch(Topology.CUSTOM, 4, (Digit(1, 2, 1),))}),
    ("valid-slices", plain, {"valid_slices": 65}),
    ("contraction-main-only", multiply, {"head": Head(Context.SUB)}),
    ("contraction-dtype", multiply, {"trf": Port(0, DType.I8)}),
    ("tree-depth", multiply, {"contraction": Contraction(depth=6)}),
    ("packet-size", multiply, {"stream": Stream(48)}),
    ("trf-read", multiply, {"counters": (Counter(2, fate=Fate.MSUM, a=64, trf=2),)}),
    (
        "accumulator-cells",
        multiply,
        {"counters": (Counter(2, fate=Fate.MSUM, trf=64), Counter(129, a=64, commit=64))},
    ),
    ("alu-once", plain, {"vector": units(ADD, ADD)}),
    ("alu-order", plain, {"vector": units(DIV, ADD)}),
    ("alu-op", plain, {"vector": units(VectorOp(Alu.FMA, Op.EXP))}),
    ("alu-operands", plain, {"vector": units(VectorOp(Alu.FMA, Op.ADD))}),
    ("alu-operands", plain, {"vector": units(replace(ADD, reverse=True))}),
    (
        "register-port",
        plain,
        {"vector": units(replace(ADD, y=Source.VRF), replace(MUL, y=Source.VRF))},
    ),
    ("stash", plain, {"vector": units(replace(ADD, stash=True))}),
    ("stash", plain, {"vector": units(replace(ADD, y=Source.STASH), replace(MUL, stash=True))}),
    (
        "stash",
        plain,
        {
            "vector": units(
                replace(ADD, stash=True), replace(DIV, y=Source.STASH), reduce=Reduce.ADD
            )
        },
    ),
    ("zip", pair, {"vector": units(ADD)}),
    ("zip", pair, {"vector": units(replace(DIV, y=Source.ZIP), reduce=Reduce.ADD)}),
    ("vector-dtype", plain, {"a": Port(0), "commit_port": Port(0), "vector": units(ADD)}),
    ("slice-group", plain, {"vector": Vector(slice_reduce=Reduce.ADD, slice_group=3)}),
    ("slice-group", plain, {"vector": Vector(slice_group=2)}),
    ("columns-need-reducer", plain, {"vector": Vector(reduce_columns=True)}),
    ("register-sink", store, {"commit": replace(store.commit, columns=16)}),
    ("register-sink", store, {"commit": replace(store.commit, relu=True)}),
    ("vrf-dtype", store, {"commit": replace(store.commit, sink=Sink.VRF)}),
    ("trf-dtype", store, {"commit_port": f32}),
    ("sub-no-cast", plain, {"head": Head(Context.SUB), "commit_port": Port(0)}),
    ("commit-cast", plain, {"commit_port": Port(0, DType.I8)}),
    ("commit-cast", plain, {"a": Port(0, DType.I32), "commit_port": Port(0)}),
    ("commit-lanes", multiply, {"contraction": Contraction(lanes=4)}),
    ("transposer", plain, {"commit": replace(plain.commit, transpose_rows=2)}),
    (
        "transposer",
        plain,
        {"commit": replace(plain.commit, transpose_rows=4, transpose_columns=8)},
    ),
    ("commit-alignment", plain, {"commit": replace(plain.commit, column_stride=12)}),
    ("commit-alignment", plain, {"commit_port": Port(4, DType.F32)}),
    ("commit-stride", plain, {"counters": (Counter(4, a=32),)}),
    ("commit-injective", plain, {"counters": (Counter(4, a=32, commit=16),)}),
    ("commit-injective", store, {"counters": (Counter(4, a=64, trf=32),)}),
    ("slice-stride", ring, {"counters": (Counter(4, Birth.SLICE, slices=2, a=32, commit=32),)}),
    # --- fetch adapter ---
    ("nibbles", half_bytes, {"stream": Stream(7, cast=DType.I32)}),
    ("nibbles", half_bytes, {"stream": Stream(8, run_step=0, cast=DType.I32)}),
    ("lookup", plain, {"a": Port(0, DType.F4E2M1), "stream": Stream(8, cast=DType.F32)}),
    ("lookup", plain, {"stream": Stream(8, lookup=DType.BF16)}),
    ("lookup", pair, {"stream": Stream(8, pair=True, lookup=DType.BF16)}),
    (
        "lookup-main-only",
        store,
        {"a": f8, "stream": Stream(64, lookup=DType.BF16)},
    ),
    ("zero-point", plain, {"stream": Stream(8, zero_point=1)}),
    ("zero-point", multiply, {"stream": Stream(32, zero_point=1)}),
    (
        "zero-point",
        multiply,
        {"a": i4, "trf": i4, "stream": Stream(32, zero_point=8), "commit_port": i32},
    ),
    ("contraction-dtype", multiply, {"a": f8, "trf": Port(0, DType.F8E5M2)}),
    # --- topologies ---
    ("topology", ring, {"counters": (Counter(4, Birth.SLICE, slices=-2, commit=32),)}),
    ("topology", ring, {"counters": (*ring.counters, Counter(2, a=32, commit=128))}),
    ("topology", ring, {"switch": Switch(Topology.BROADCAST1, 8)}),
    ("topology", ring, {"switch": Switch(Topology.BROADCAST01, 8, (Digit(0, 1, 1),))}),
    ("topology", ring, {"switch": Switch(Topology.TRANSPOSE, 8, (Digit(0, 1, 1),))}),
    ("topology", ring, {"switch": Switch(Topology.INTER_TRANSPOSE, 8, (Digit(0, 1, 1),))}),
    ("topology", ring, {"switch": Switch(Topology.TRANSPOSED_BROADCAST1, 8)}),
    (
        "topology",
        inter,
        {
            "counters": (
                Counter(2, Birth.SLICE, slices=4, commit=256),
                Counter(2, Birth.SLICE, slices=1, commit=32),
            )
        },
    ),
    (
        "topology",
        plain,
        {
            "switch": Switch(Topology.CUSTOM, 8),
            "counters": (
                Counter(2, Birth.SLICE, slices=1, commit=32),
                Counter(2, Birth.SLICE, slices=4, commit=64),
            ),
        },
    ),
    ("bitmap", ring, {"switch": replace(ring.switch, bitmap=0)}),
    ("bitmap", plain, {"switch": Switch(Topology.CUSTOM, 8, bitmap=4)}),
    ("bitmap", pair, {"switch": Switch(Topology.CUSTOM, 8, bitmap=8)}),
    (
        "bitmap",
        ring,
        {"switch": Switch(Topology.CUSTOM, 8, bitmap=8)},
    ),
    # --- vector engine ---
    ("int-width", plain, {"vector": units(replace(ADD, int_width=16))}),
    ("groups", plain, {"vector": units(replace(ADD, groups=Groups.FIRST))}),
    ("select", plain, {"vector": units(replace(ADD, y=Source.SELECT))}),
    ("select", plain, {"vector": units(ADD, slots=(ANY,))}),
    ("tags", plain, {"vector": units(ADD, comparators=(Comparator(Comparison.TRUE),))}),
    ("tags", plain, {"vector": units(PICK, slots=(Slot(Source.IMM0, 1, 1),))}),
    (
        "tags",
        plain,
        {
            "vector": units(
                VectorOp(Alu.CLIP_ADD, Op.ADD, Source.SELECT), slots=(ANY,), reduce=Reduce.ADD
            )
        },
    ),
    ("slots", plain, {"vector": units(PICK, slots=(Slot(Source.SELF),))}),
    ("slots", plain, {"vector": units(PICK, slots=(Slot(Source.IMM0, 1, 2),), comparators=TAGGED)}),
    ("slots", plain, {"vector": units(PICK, slots=(Slot(Source.IMM0, 0, 0, True),))}),
    ("slots", plain, {"vector": units(PICK, slots=(ANY, Slot(Source.IMM1)))}),
    (
        "slots",
        plain,
        {"vector": units(PICK, slots=(Slot(Source.VRF, 1), ANY), comparators=TAGGED)},
    ),
    (
        "slots",
        plain,
        {"vector": units(PICK, slots=(Slot(Source.IMM0, 1), ANY), comparators=TAGGED)},
    ),
    ("reduce-op", plain, {"vector": Vector(reduce=Reduce.MUL)}),
    ("valid-dim", plain, {"counters": (Counter(4, a=32, commit=32, valid_step=1),)}),
    ("valid-count", plain, {"vector": Vector(gates=(Gate(1),))}),
    (
        "valid-count",
        plain,
        {
            "counters": (Counter(4, a=32, commit=32, valid_dim=ValidDim.GATE1),),
            "vector": Vector(reduce=Reduce.ADD, gates=(Gate(1),)),
        },
    ),
    (
        "valid-count",
        plain,
        {
            "counters": (Counter(4, a=32, commit=32, valid_dim=ValidDim.PACKET),),
            "vector": Vector(reduce=Reduce.ADD),
        },
    ),
    ("valid-count", plain, {"vector": Vector(reduce=Reduce.ADD, clipper=Clipper(3))}),
    (
        "valid-count",
        plain,
        {"vector": Vector(reduce=Reduce.ADD, reduce_columns=True, clipper=Clipper(3, 9))},
    ),
    # --- commit ---
    ("commit-relu", plain, {"commit": replace(plain.commit, relu=True)}),
    ("generate", plain, {"generate": Generate()}),
    ("generate", memset, {"a": Port(8, DType.F32)}),
    ("generate", memset, {"counters": (Counter(4, a=32, commit=32),)}),
    ("generate", memset, {"generate": Generate(0, count_up=True)}),
    ("generate", memset, {"stream": Stream(16)}),
    ("generate", memset, {"vector": units(ADD)}),
]


@pytest.mark.parametrize(
    "command", [plain, multiply, store, pair, memset, ring, inter, fetched_inside, half_bytes]
)
def test_the_commands_that_are_broken_below_are_right_as_they_stand(command: Exec) -> None:
    plan_exec(command, "here")


@pytest.mark.parametrize(("rule", "command", "change"), BROKEN)
def test_a_rule_rejects(rule: str, command: Exec, change: dict[str, Any]) -> None:
    with pytest.raises(errors.BinaryError) as error:
        plan_exec(replace(command, **change), "here")
    assert (error.value.code, error.value.at) == ("VED011", "here")
    assert f"`{rule}`" in error.value.message


def test_the_accumulator_has_the_documented_slots() -> None:
    """Golden test 19: sequential 32 with 1 lane and 4 with 8, interleaved 32 with 4 columns."""
    for fold, lanes, depth, slots in (
        (Fold.SEQUENTIAL, 1, 5, 32),
        (Fold.SEQUENTIAL, 8, 5, 4),
        (Fold.INTERLEAVED, 8, 3, 32),
    ):
        for n, accepted in ((slots, True), (slots + 1, False)):
            command = replace(
                multiply,
                counters=(Counter(2, fate=Fate.MSUM, trf=64), Counter(n, a=64, commit=512)),
                contraction=Contraction(lanes=lanes, depth=depth, fold=fold),
                commit=Commit(lanes=lanes, lane_stride=8, columns=4, column_stride=64),
            )
            if accepted:
                plan_exec(command, "here")
                continue
            with pytest.raises(errors.BinaryError, match="accumulator-cells"):
                plan_exec(command, "here")

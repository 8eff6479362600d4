"""Hypothesis strategies for commands: every field takes values that a record can hold."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
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
from furiosa_llm.backend_rngd.isa.vector_fields import (
    MAX_COMPARATORS,
    MAX_GATES,
    MAX_SLOTS,
    MAX_VECTOR_OPS,
)

signed = st.integers(-(2**31), 2**31 - 1)
unsigned = st.integers(0, 2**32 - 1)
short = st.integers(-(2**15), 2**15 - 1)
byte = st.integers(0, 255)
half = st.integers(0, 65535)
nibble = st.integers(0, 15)
registers = st.none() | st.integers(0, REGISTERS - 1)
semaphores = st.integers(0, SEMAPHORES - 1)
lane_counts = st.sampled_from([1, 2, 4, 8])

ranks = st.integers(0, MAX_RANKS - 1)
peers = st.sets(st.integers(1, MAX_RANKS - 1)).map(lambda found: tuple(sorted(found)))
waits = st.lists(
    st.builds(Wait, semaphores, st.integers(1, 65535), peers),
    max_size=3,
    unique_by=lambda wait: wait.semaphore,
).map(tuple)
signals = st.lists(st.tuples(semaphores, peers), max_size=2, unique_by=lambda sent: sent[0])


@st.composite
def heads(draw: st.DrawFn, *contexts: Context) -> Head:
    sent = draw(signals)
    return Head(
        draw(st.sampled_from(contexts)),
        draw(waits),
        tuple(semaphore for semaphore, to in sent if not to),
        draw(unsigned),
        tuple(PeerSignal(semaphore, to) for semaphore, to in sent if to),
    )


ports = st.builds(Port, unsigned, st.sampled_from(DType), registers, unsigned)
counters = st.builds(
    Counter,
    n=st.integers(1, 65536),
    birth=st.sampled_from(Birth),
    fate=st.sampled_from(Fate),
    a=signed,
    b=signed,
    trf=signed,
    vrf=signed,
    commit=signed,
    slices=short,
    lanes=short,
    valid_dim=st.sampled_from(ValidDim),
    valid_step=half,
)
streams = st.builds(
    Stream,
    run=st.integers(1, 65535),
    run_step=st.integers(0, 1),
    runs=st.integers(1, 65535),
    run_stride=signed,
    pad=st.integers(0, 65535),
    lookup=st.none() | st.sampled_from(DType),
    cast=st.none() | st.sampled_from(DType),
    zero_point=st.none() | st.integers(-128, 127),
    pair=st.booleans(),
)
digits = st.builds(Digit, st.integers(0, 7), st.integers(1, 8), short, signed)
switches = st.builds(
    Switch,
    st.sampled_from(Topology),
    st.integers(0, 65535),
    st.lists(digits, max_size=2).map(tuple),
    st.none() | unsigned,
)
contractions = st.builds(
    Contraction,
    pack=st.integers(1, 2),
    lanes=lane_counts,
    trf_read=st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    depth=st.integers(0, 7),
    fold=st.sampled_from(Fold),
)
vector_ops = st.builds(
    VectorOp,
    st.sampled_from(Alu),
    st.sampled_from(Op),
    st.sampled_from(Source),
    st.sampled_from(Source),
    st.booleans(),
    st.booleans(),
    st.integers(0, 31),
    st.sampled_from(Groups),
)
comparators = st.builds(Comparator, st.sampled_from(Comparison), unsigned)
slots = st.builds(Slot, st.sampled_from(Source), nibble, nibble, st.booleans())
gates = st.builds(Gate, half, half, half, st.booleans())
vectors = st.builds(
    Vector,
    ops=st.lists(vector_ops, max_size=MAX_VECTOR_OPS).map(tuple),
    imm=st.tuples(unsigned, unsigned, unsigned),
    reduce=st.sampled_from(Reduce),
    reduce_columns=st.booleans(),
    slice_reduce=st.sampled_from(Reduce),
    slice_group=st.integers(1, 256),
    slice_placement=st.sampled_from(Placement),
    vrf_lane=signed,
    vrf_column=signed,
    vrf_pair=signed,
    comparators=st.lists(comparators, max_size=MAX_COMPARATORS).map(tuple),
    slots=st.lists(slots, max_size=MAX_SLOTS).map(tuple),
    gates=st.lists(gates, max_size=MAX_GATES).map(tuple),
    clipper=st.none() | st.builds(Clipper, half, byte),
)
commits = st.builds(
    Commit,
    sink=st.sampled_from(Sink),
    lanes=st.integers(1, 8),
    columns=st.integers(1, 65535),
    lane_stride=signed,
    column_stride=signed,
    transpose_rows=byte,
    transpose_columns=byte,
    relu=st.booleans(),
)


@st.composite
def execs(draw: st.DrawFn) -> Exec:
    """Any `Exec` that its record can hold, whether or not the rules allow it."""
    contraction = draw(st.none() | contractions)
    return Exec(
        head=draw(heads(Context.MAIN, Context.SUB)),
        counters=draw(st.lists(counters, max_size=MAX_COUNTERS).map(tuple)),
        a=draw(ports),
        b=draw(ports),
        trf=draw(ports),
        vrf=draw(ports),
        commit_port=draw(ports),
        stream=draw(streams),
        commit=draw(commits),
        group=draw(st.integers(0, 2)),
        valid_slices=draw(st.integers(0, 256)),
        switch=draw(switches),
        contraction=contraction,
        trf_lanes=contraction.lanes if contraction else draw(lane_counts),
        vector=draw(vectors),
        generate=draw(st.none() | st.builds(Generate, unsigned, st.booleans())),
    )


@st.composite
def dmas(draw: st.DrawFn, *, valid: bool = False) -> Dma:
    """Any `Dma` that its record can hold; `valid` leaves out what the rules refuse."""
    loops = draw(st.integers(0, MAX_LOOPS))
    strides = st.tuples(*[signed] * loops)
    base, limit = st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1)
    sides = st.builds(
        Side, st.sampled_from(Space), base, strides, registers, limit, ranks, signed, ranks
    )
    lists = st.builds(IndexList, base, strides, unsigned, registers, unsigned, signed)
    indirect = draw(st.sampled_from(Indirect))
    source, destination = draw(sides), draw(sides)
    if valid and indirect == Indirect.SOURCE:
        source = replace(source, peer=0)
    if valid and (source.peer or indirect == Indirect.DESTINATION):
        destination = replace(destination, peer=0)
    return Dma(
        head=draw(heads(Context.DMA)),
        n=draw(st.tuples(*[st.integers(1, 65535)] * loops)),
        run=draw(st.integers(1, 1 << 22)),
        source=source,
        destination=destination,
        indirect=indirect,
        index=None if indirect == Indirect.NONE else draw(lists),
    )


controls = st.builds(
    Control,
    count=st.integers(1, 1 << 20),
    length=st.integers(1, 1 << 20),
    steps=st.lists(st.builds(Step, st.integers(0, REGISTERS - 1), signed), max_size=MAX_STEPS).map(
        tuple
    ),
)
commands = execs() | dmas() | controls


@st.composite
def dense_passes(draw: st.DrawFn) -> Exec:
    """A pass over [n, m] packets that puts its results one after the other."""
    dtype = draw(st.sampled_from([DType.F32, DType.I32, DType.BF16, DType.I8]))
    elements = draw(st.sampled_from([8, 16, 32, 64]))
    packet = dtype.bytes_for(elements)
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    ring = draw(st.sampled_from([1, 4, 64]))
    ops = (VectorOp(Alu.EXP, Op.EXP),) if dtype == DType.F32 and draw(st.booleans()) else ()
    born = Birth.FETCH if ring == 1 else Birth.SLICE
    return Exec(
        head=Head(draw(st.sampled_from([Context.MAIN, Context.SUB]))),
        counters=(
            Counter(n, a=packet, commit=m * packet),
            Counter(m, born, a=0 if ring > 1 else n * packet, commit=packet, slices=ring // 4),
        ),
        a=Port(dtype=dtype),
        stream=Stream(run=elements - draw(st.sampled_from([0, 4])), pad=elements),
        switch=Switch(Topology.BROADCAST01 if ring > 1 else Topology.FORWARD, ring),
        vector=Vector(ops=ops),
        commit_port=Port(base=65536, dtype=dtype),
        commit=Commit(columns=elements, column_stride=dtype.bytes_for(1)),
    )

"""Programs of several ranks: what each has, what they bring each other, and what comes out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar_ranks import ScalarRanks

from furiosa_llm import errors
from furiosa_llm.backend_rngd.isa.container import read_program, write_program
from furiosa_llm.backend_rngd.isa.cut import Cut
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Digit,
    Dma,
    Exec,
    Fate,
    Head,
    IndexList,
    Indirect,
    Instruction,
    PeerSignal,
    Port,
    Reduce,
    Side,
    Sink,
    Space,
    Stream,
    Switch,
    Topology,
    Vector,
    Wait,
)
from furiosa_llm.backend_rngd.isa.layout import RankNumbers, RowTableLayout, VectorLayout, plain
from furiosa_llm.backend_rngd.isa.ordering import check_order
from furiosa_llm.backend_rngd.isa.program import (
    Binding,
    Block,
    CacheIo,
    Call,
    Header,
    Program,
    Provenance,
    Region,
    Relocation,
    TensorIo,
)
from furiosa_llm.runtime_sim.device import Device

SLICE = 1 << 22
ROWS, COLUMNS = 10, 1024
ROW_BYTES = 2 * COLUMNS
BF16 = ml_dtypes.bfloat16


def program(commands: Sequence[Instruction], regions: Sequence[Region], ranks: int) -> Program:
    """One call; register i points at region i."""
    header = Header(
        model_name="model",
        bucket="decode:1,16",
        tensor_parallel_size=ranks,
        regions=tuple(regions),
        blocks=(
            Block(
                name="block",
                first=0,
                count=len(commands),
                provenance=(Provenance(path="layer"),),
            ),
        ),
        calls=(
            Call(
                block=0,
                prefix="",
                bindings=tuple(Binding(register_number=i, region=i) for i in range(len(regions))),
            ),
        ),
    )
    return read_program(write_program(Program(header, tuple(commands))))


def chain(*commands: Exec | Dma) -> list[Exec | Dma]:
    """Each waits for the one before it on its own rank, beside what it waits for already."""
    found = []
    for i, c in enumerate(commands):
        waits = (*c.head.waits, *((Wait(i - 1, 1),) if i else ()))
        signals = (i,) if i + 1 < len(commands) else ()
        found.append(replace(c, head=replace(c.head, waits=waits, signals=signals)))
    return found


def dma(
    n: tuple[int, ...], run: int, source: Side, destination: Side, head: Head | None = None
) -> Dma:
    return Dma(head or Head(Context.DMA), n, run, source, destination)


# --- parameters, tables, caches, outputs ---

weights = st.integers(1, 3).flatmap(
    lambda slots: st.lists(
        st.lists(
            st.tuples(st.integers(0, ROWS), st.integers(0, 3)), min_size=slots, max_size=slots
        ),
        min_size=2,
        max_size=2,
    )
)


@given(weights, st.integers(3, 4))
def test_a_cut_takes_and_indexes_the_same_elements(
    slots: list[list[tuple[int, int]]], length: int
) -> None:
    ranges = tuple(tuple((b, min(ROWS, b + n)) for b, n in own) for own in slots)
    cut = Cut(dim=0, length=length, slots=ranges)
    tensor = np.arange(1, ROWS + 1)
    for rank, own in enumerate(ranges):
        part = cut.take(tensor, rank)
        expected = [n for b, e in own for n in [*tensor[b:e], *[0] * (length - e + b)]]
        assert part.tolist() == expected
        index = cut.indices(rank)
        assert np.where(index < 0, 0, tensor[index]).tolist() == part.tolist()


@settings(max_examples=50)
@given(st.integers(1, 40), st.sampled_from([2, 4, 8]), st.integers(0, 3), st.integers(0, 1))
def test_parts_make_the_whole_again(size: int, ranks: int, spare: int, dim: int) -> None:
    cut = even(size, ranks, spare, dim)
    tensor = np.arange(size * 3).reshape((size, 3) if dim == 0 else (3, size))
    parts = [cut.take(tensor, rank) for rank in range(ranks)]
    assert {part.shape[dim] for part in parts} == {cut.local_size}
    assert np.array_equal(cut.assemble(parts), tensor)


def even(size: int, ranks: int, spare: int = 0, dim: int = 0) -> Cut:
    share = -(-size // ranks)
    slots = tuple(((min(r * share, size), min((r + 1) * share, size)),) for r in range(ranks))
    return Cut(dim=dim, length=share + spare, slots=slots)


def table(cut: Cut) -> Region:
    """Rows of a table, some on each rank."""
    rows = cut.local_size
    return Region(
        name="table",
        parameter=Relocation(
            tensor="w",
            shape=(ROWS, COLUMNS),
            begin=(0, 0),
            end=(rows, COLUMNS),
            layout=RowTableLayout(order=plain(COLUMNS), per_slice=16, rows=rows),
            cut=cut,
        ),
    )


def rows_output(rows: int, cut: Cut | None) -> Region:
    io = TensorIo(
        name="out",
        dtype="bf16",
        shape=(rows, COLUMNS),
        element_bytes=2,
        row_bytes=ROW_BYTES,
        cut=cut,
    )
    return Region(name="out", output=io)


W = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(BF16)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_copy_their_parts_and_the_whole_comes_out(ranks: int) -> None:
    """10 rows over 8 ranks: some have padding only, which is dropped."""
    cut = even(ROWS, ranks, spare=1)
    rows = cut.local_size
    copy = chain(
        dma((rows, 64), 32, Side(Space.HBM, 0, (ROW_BYTES, 32), 0), Side(Space.DM, 0, (32, SLICE))),
        dma((rows, 64), 32, Side(Space.DM, 0, (32, SLICE)), Side(Space.HBM, 0, (ROW_BYTES, 32), 1)),
    )
    made = program(copy, [table(cut), rows_output(rows, cut)], ranks)
    device = Device()
    device.load(made, {"w": W}.__getitem__)
    assert np.array_equal(device.execute(made, {})["out"], W)
    assert np.array_equal(device.execute(made, {})["out"], W)


def test_rows_of_a_cut_table_are_gathered_by_their_local_numbers() -> None:
    """The rank's own first row comes from a table; the row behind its part is zero."""
    cut = even(ROWS, 4, spare=1)
    ids = Region(
        name="numbers",
        derived=RankNumbers(numbers=(0, 1, 2, 3), count=2),
    )
    gather = Dma(
        head=Head(Context.DMA),
        n=(2, 64),
        run=32,
        source=Side(Space.HBM, 0, (0, 32), 0),
        destination=Side(Space.DM, 0, (32, SLICE)),
        indirect=Indirect.SOURCE,
        index=IndexList(0, (4, 0), ROW_BYTES, 1, cut.local_size),
    )
    out = dma((2, 64), 32, Side(Space.DM, 0, (32, SLICE)), Side(Space.HBM, 0, (ROW_BYTES, 32), 2))
    whole = Cut(dim=0, length=2, slots=tuple(((2 * r, 2 * r + 2),) for r in range(4)))
    made = program(chain(gather, out), [table(cut), ids, rows_output(2, whole)], 4)
    device = Device()
    device.load(made, {"w": W}.__getitem__)
    got = device.execute(made, {})["out"]
    share = cut.length - 1
    for rank in range(4):
        own = cut.take(W, rank)
        assert np.array_equal(got[2 * rank], own[rank])
    assert np.array_equal(got[6], np.zeros(COLUMNS, BF16)) == (share <= 3)


def test_caches_are_each_rank_s_own() -> None:
    """A vector's part goes into the rank's cache of the layer."""
    cut = even(2048, 2)
    vector = Region(
        name="v",
        parameter=Relocation(
            tensor="v",
            shape=(2048,),
            begin=(0,),
            end=(1024,),
            layout=VectorLayout(order=plain(1024), per_slice=16),
            cut=cut,
        ),
    )
    cache = Region(name="cache", cache=CacheIo(layer=3, kv_heads=2, head_dim=256, padded=256))
    put = dma((), ROW_BYTES, Side(Space.HBM, 0, (), 0), Side(Space.HBM, 0, (), 1))
    made = program([put], [vector, cache], 2)
    device = Device()
    v = np.arange(2048).astype(BF16)
    device.load(made, {"v": v}.__getitem__)
    device.allocate_caches(made, 4)
    device.execute(made, {})
    for rank in range(2):
        own = v[1024 * rank : 1024 * (rank + 1)]
        assert np.array_equal(device.cache(3, rank)[0].view(BF16), own)


WITH_A_GAP = Cut(dim=0, length=5, slots=(((0, 5),), ((6, 10),)))


@pytest.mark.parametrize(
    ("region", "place"),
    [
        (table(even(ROWS, 4)), "regions.0"),
        (table(even(ROWS + 4, 2)), "regions.0.parameter"),
        (Region(name="t", derived=RankNumbers(numbers=(0,), count=2)), "regions.0.derived"),
        (
            rows_output(5, Cut(dim=0, length=5, slots=(((0, 5),), ((6, 10),)))),
            "regions.0.output.cut",
        ),
        (rows_output(4, even(ROWS, 2)), "regions.0.output.cut"),
    ],
)
def test_what_a_region_says_of_ranks_must_hold(region: Region, place: str) -> None:
    with pytest.raises(errors.BinaryError) as caught:
        program([dma((), 8, Side(Space.HBM, 0), Side(Space.DM, 0))], [region], 2)
    assert caught.value.code == "VED004"
    assert place in str(caught.value)


# --- exchanges ---

FREE, ARRIVED = 60, 61


def input_region(name: str, shape: tuple[int, ...]) -> Region:
    io = TensorIo(name=name, dtype="f32", shape=shape, element_bytes=4, row_bytes=4 * shape[-1])
    return Region(name=name, input=io)


def all_reduce(ranks: int) -> list[Instruction]:
    """Each rank has 16 f32 numbers in every slice; all get the sum over ranks.

    Slot p receives from rank ^ p; slot 0 is the rank's own.
    """
    others = tuple(range(1, ranks))
    begin = dma(
        (64,),
        64,
        Side(Space.HBM, 0, (64,), 0, rank_stride=4096),
        Side(Space.DM, 0, (SLICE,)),
        Head(Context.DMA, (), (), 0, (PeerSignal(FREE, others),)),
    )
    pushes = [
        dma(
            (64,),
            64,
            Side(Space.DM, 0, (SLICE,)),
            Side(Space.DM, 64 * peer, (SLICE,), peer=peer),
            Head(Context.DMA, (Wait(FREE, 1, (peer,)),), (), 0, (PeerSignal(ARRIVED, (peer,)),)),
        )
        for peer in others
    ]
    fold = Exec(
        head=Head(Context.MAIN, (Wait(ARRIVED, 1, others),)),
        counters=(Counter(2, a=32, commit=32), Counter(ranks, fate=Fate.VSUM, a=64)),
        a=Port(0, DType.F32),
        stream=Stream(8),
        vector=Vector(reduce=Reduce.ADD),
        commit_port=Port(4096, DType.F32),
        commit=Commit(columns=8, column_stride=4),
    )
    out = dma((64,), 64, Side(Space.DM, 4096, (SLICE,)), Side(Space.HBM, 0, (64,), 1))
    return list(chain(begin, *pushes, fold, out))


def sums_output(ranks: int) -> Region:
    """All ranks' results one after the other."""
    cut = Cut(dim=0, length=64, slots=tuple(((64 * r, 64 * r + 64),) for r in range(ranks)))
    io = TensorIo(name="out", dtype="f32", shape=(64, 16), element_bytes=4, row_bytes=64, cut=cut)
    return Region(name="out", output=io)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_rotation_sums_over_all_ranks(ranks: int) -> None:
    x = np.random.default_rng(ranks).integers(-99, 99, (ranks * 64, 16)).astype(np.float32)
    regions = [input_region("x", x.shape), sums_output(ranks)]
    made = program(all_reduce(ranks), regions, ranks)
    got = Device().execute(made, {"x": x})["out"].reshape(ranks, 64, 16)
    assert np.array_equal(got, np.broadcast_to(x.reshape(ranks, 64, 16).sum(0), got.shape))


@pytest.mark.parametrize(("ranks", "group"), [(2, 1), (4, 1), (4, 2), (8, 2)])
def test_a_group_sums_through_the_switch(ranks: int, group: int) -> None:
    """Slices 64 apart are added: a counter over the group's PEs, in a ring of all its slices."""
    together = 1 << group
    load = dma(
        (64,), 64, Side(Space.HBM, 0, (64,), 0, rank_stride=4096), Side(Space.DM, 0, (SLICE,))
    )
    fold = Exec(
        head=Head(Context.MAIN),
        counters=(
            Counter(2, a=32, commit=32),
            Counter(together, Birth.SLICE, Fate.VSUM, slices=64),
        ),
        a=Port(0, DType.F32),
        stream=Stream(8),
        switch=Switch(Topology.BROADCAST1, 64 * together, (Digit(0, 6, 1),)),
        vector=Vector(reduce=Reduce.ADD),
        commit_port=Port(4096, DType.F32),
        commit=Commit(columns=8, column_stride=4),
        group=group,
    )
    out = dma((64,), 64, Side(Space.DM, 4096, (SLICE,)), Side(Space.HBM, 0, (64,), 1))
    x = np.random.default_rng(ranks).integers(-99, 99, (ranks * 64, 16)).astype(np.float32)
    regions = [input_region("x", x.shape), sums_output(ranks)]
    made = program(chain(load, fold, out), regions, ranks)
    got = Device().execute(made, {"x": x})["out"].reshape(-1, together, 64, 16)
    sums = x.reshape(-1, together, 64, 16).sum(1, keepdims=True)
    assert np.array_equal(got, np.broadcast_to(sums, got.shape))


def test_register_rows_that_a_rank_s_slices_share_hold_in_a_pass_of_two_ranks() -> None:
    """Each rank fills its file by a broadcast, which is stored once; then both multiply."""
    load = dma(
        (64,), 64, Side(Space.HBM, 0, (64,), 0, rank_stride=4096), Side(Space.DM, 0, (SLICE,))
    )
    fill = Exec(
        head=Head(Context.SUB),
        counters=(),
        a=Port(0),
        stream=Stream(32),
        switch=Switch(Topology.BROADCAST01, 64),
        commit_port=Port(0),
        commit=Commit(sink=Sink.TRF, columns=32),
    )
    multiply = Exec(
        head=Head(Context.MAIN),
        counters=(Counter(2, a=0, commit=8),),
        a=Port(0),
        trf=Port(0),
        stream=Stream(32),
        contraction=Contraction(),
        commit_port=Port(4096, DType.F32),
        commit=Commit(columns=2, column_stride=4),
        group=1,
    )
    out = dma((64,), 64, Side(Space.DM, 4096, (SLICE,)), Side(Space.HBM, 0, (64,), 1))
    x = np.random.default_rng(1).integers(-9, 9, (2, 64, 32)).astype(BF16)
    words = np.ascontiguousarray(x).view(np.float32).reshape(128, 16)
    clear = Exec(
        head=Head(Context.SUB),
        counters=(),
        a=Port(0, DType.F32),
        stream=Stream(16),
        commit_port=Port(4096, DType.F32),
        commit=Commit(columns=16, column_stride=4),
    )
    regions = [input_region("x", words.shape), sums_output(2)]
    made = program(chain(load, clear, fill, multiply, out), regions, 2)
    got = Device().execute(made, {"x": words})["out"].reshape(2, 64, 16)
    wide = x.astype(np.float32)
    expected = np.einsum("rsk,rk->rs", wide, wide[:, 0])
    assert np.array_equal(got[:, :, 0], expected)
    assert np.array_equal(got[:, :, 2], expected)


# --- any pace ---


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[int, list[Exec | Dma]]:
    """A few rounds of pushes and passes with their handshake, and perhaps something left out."""
    ranks = draw(st.sampled_from([2, 4]))
    commands: list[Exec | Dma] = []
    free, arrived, made, used = 0, 1, 2, 3

    def passes(head: Head) -> Exec:
        group = draw(st.integers(0, ranks // 2)) if draw(st.booleans()) else 0
        source, target = draw(st.permutations([0, 64, 128]))[:2]
        return Exec(
            head=head,
            counters=(Counter(2, a=8, commit=8),),
            a=Port(source, DType.F32),
            stream=Stream(2),
            commit_port=Port(target, DType.F32),
            commit=Commit(columns=2, column_stride=4),
            group=group,
            valid_slices=0 if group else 2,
        )

    peers = draw(st.lists(st.integers(1, ranks - 1), min_size=1, max_size=3))
    for peer in peers:
        commands.append(passes(Head(Context.MAIN, (), (made,), 0, (PeerSignal(free, (peer,)),))))
        target = draw(st.sampled_from([0, 64, 128]))
        side = Side(
            Space.DM, target, (SLICE,), peer=peer, rank_stride=draw(st.sampled_from([0, 8]))
        )
        source = Side(Space.DM, draw(st.sampled_from([0, 64, 128])), (SLICE,))
        waits = (Wait(made, 1), Wait(free, 1, (peer,)))
        head = Head(Context.DMA, waits, (used,), 0, (PeerSignal(arrived, (peer,)),))
        pull = draw(st.booleans())
        commands.append(
            dma((2,), 16, side, source, head) if pull else dma((2,), 16, source, side, head)
        )
        waits = (Wait(used, 1), Wait(arrived, 1, (peer,)))
        commands.append(passes(Head(Context.MAIN, waits)))
    for _ in range(draw(st.integers(0, 2))):
        i = draw(st.integers(0, len(commands) - 1))
        head = commands[i].head
        what = draw(st.sampled_from(["waits", "signals", "peer_signals"]))
        commands[i] = replace(commands[i], head=replace(head, **{what: getattr(head, what)[:-1]}))
    return ranks, commands


def test_what_the_check_accepts_is_the_same_at_any_pace() -> None:
    outcomes: set[str] = set()

    @settings(max_examples=150, deadline=None)
    @given(exchanges(), st.integers(0, 2**32))
    def run(case: tuple[int, list[Exec | Dma]], seed: int) -> None:
        ranks, commands = case
        try:
            check_order(program(commands, [], ranks))
        except errors.SimulationFault as fault:
            outcomes.add(fault.code)
            return
        outcomes.add("accepted")
        rng = random.Random(seed)
        memory = np.random.default_rng(seed).integers(0, 256, (64 * ranks, 256), np.uint8)
        expected = ScalarRanks(ranks, memory)
        expected.in_program_order(commands)
        for _ in range(3):
            other = ScalarRanks(ranks, memory)
            assert other.in_random_order(commands, rng)
            assert np.array_equal(other.dm, expected.dm)

    run()
    assert {"accepted", "SIM005", "SIM006", "SIM007", "SIM026"} <= outcomes

"""Random transfers: fast execution equals copying byte by byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scalar_machine import ScalarMachine

from furiosa_llm import errors
from furiosa_llm.backend_rngd.isa.expand import Issued, expand_commands
from furiosa_llm.backend_rngd.isa.instructions import (
    Context,
    Dma,
    Head,
    IndexList,
    Indirect,
    Side,
    Space,
)
from furiosa_llm.backend_rngd.isa.plan import DmaPlan
from furiosa_llm.runtime_sim.checks import check_dma
from furiosa_llm.runtime_sim.dma_values import Sides, Step, bind_dma
from furiosa_llm.runtime_sim.hbm import Buffer
from furiosa_llm.runtime_sim.memory import ChipMemory
from furiosa_llm.runtime_sim.ranks import Rank
from furiosa_llm.runtime_sim.weights import WeightCache

SLICES, WINDOW = 8, 4096
SLICE = 1 << 22
REGION = 1 << 40
DATA, ROWS, INDEX = 0, 1, 2
ROW_COUNT = 16


def make_regions(seed: int) -> list[Buffer]:
    """Two regions of bytes and a list of row numbers."""
    rng = np.random.default_rng(seed)
    regions = [
        Buffer(name, WINDOW, writable=True, tracked=False) for name in ("data", "rows", "index")
    ]
    for region in regions[:2]:
        region.content()[:] = rng.integers(0, 256, WINDOW)
    regions[INDEX].content().view(np.int32)[:] = rng.integers(0, ROW_COUNT, WINDOW // 4)
    return regions


def make_memory(seed: int) -> ChipMemory:
    memory = ChipMemory(SLICES)
    memory.dm[:, :WINDOW] = np.random.default_rng(seed + 1).integers(0, 256, (SLICES, WINDOW))
    return memory


def bind(command: Dma, regions: Sequence[Buffer], memory: ChipMemory) -> Step:
    issued: Issued = expand_commands([command], "block")[0]
    resolved = [a.resolve([0] * 64) for a in issued.addresses]
    check_dma(issued, 0, resolved, regions, SLICES, lambda: "here")
    assert isinstance(issued.plan, DmaPlan)
    sides = Sides.of(command, 0, [Rank(memory, regions)])
    return bind_dma(issued.plan, resolved, sides, WeightCache(0), lambda: "here")


def run_both(command: Dma, seed: int) -> None:
    regions, memory = make_regions(seed), make_memory(seed)
    hbm = [region.content().copy() for region in regions]
    scalar = ScalarMachine(memory.dm[:, :WINDOW], memory.trf, memory.vrf, hbm)
    bind(command, regions, memory)()
    scalar.transfer(command)
    assert np.array_equal(memory.dm[:, :WINDOW], scalar.dm)
    for got, want in zip(regions, scalar.hbm, strict=True):
        assert np.array_equal(got.content(), want)


@st.composite
def sides(draw: st.DrawFn, n: Sequence[int], run: int, write: bool) -> Side:
    """A side whose loops stay inside its window; a destination's never meet."""
    in_dm = draw(st.booleans())
    unit = 8 if in_dm and write else draw(st.sampled_from([1, 2, 8]))
    order = draw(st.permutations(range(len(n))))
    strides, slices_used, extent = [0] * len(n), False, run
    for i in order:
        if in_dm and not slices_used and n[i] <= SLICES and draw(st.booleans()):
            strides[i], slices_used = SLICE, True
            continue
        strides[i] = -(-extent // unit) * unit
        if not write:
            strides[i] = draw(st.sampled_from([strides[i], 0, -strides[i]]))
        extent += abs(strides[i]) * (n[i] - 1)
    low = -sum(min(0, v * (k - 1)) for v, k in zip(strides, n, strict=True))
    base = low + draw(st.sampled_from([0, 8, 24 if unit == 8 else 3]))
    base += -base % unit
    assume(extent + base <= WINDOW)
    space = Space.DM if in_dm else Space.HBM
    return Side(space, base if in_dm else DATA * REGION + base, tuple(strides))


loops = st.lists(st.sampled_from([1, 2, 3, 5]), max_size=3).map(tuple)
seeds = st.integers(0, 1 << 20)


@st.composite
def copies(draw: st.DrawFn) -> Dma:
    n = draw(loops)
    run = draw(st.sampled_from([1, 2, 6, 8, 16, 40]))
    destination = draw(sides(n, run, True))
    if destination.space == Space.DM:
        run = -(-run // 8) * 8
        destination = draw(sides(n, run, True).filter(lambda side: side.space == Space.DM))
    return Dma(Head(Context.DMA), n, run, draw(sides(n, run, False)), destination)


@settings(max_examples=200)
@given(copies(), seeds)
def test_a_transfer(command: Dma, seed: int) -> None:
    run_both(command, seed)


@st.composite
def indirect(draw: st.DrawFn, kind: Indirect) -> Dma:
    """A gather or scatter: rows of up to 64 B, walked by one or two of the loops."""
    n = (*draw(loops), draw(st.sampled_from([1, 2, 4])))
    run = draw(st.sampled_from([8, 16]))
    walked = draw(st.sets(st.integers(0, len(n) - 1), max_size=2))
    gather = kind == Indirect.SOURCE
    other = draw(sides(n, run, gather))
    assume(gather or other.space == Space.DM or other.base < REGION)
    strides, extent = [0] * len(n), run
    for i in range(len(n)):
        if i not in walked:
            strides[i] = extent if not gather else draw(st.sampled_from([0, extent]))
            extent += strides[i] * (n[i] - 1)
        elif gather:
            strides[i] = draw(st.sampled_from([0, 0, 16, -16]))
    scale = draw(st.sampled_from([0, 64, 72])) if gather else extent + -extent % 8
    assume(scale * ROW_COUNT + extent + 512 <= WINDOW)
    rows = Side(Space.HBM, ROWS * REGION + 256, tuple(strides))
    steps, stride = [0] * len(n), 4
    for i in walked:
        steps[i] = stride
        stride *= n[i]
    return Dma(
        head=Head(Context.DMA),
        n=n,
        run=run,
        source=rows if gather else other,
        destination=other if gather else rows,
        indirect=kind,
        index=IndexList(INDEX * REGION + 16, tuple(steps), scale, bound=ROW_COUNT),
    )


@settings(max_examples=150)
@given(st.sampled_from([Indirect.SOURCE, Indirect.DESTINATION]).flatmap(indirect), seeds)
def test_rows_of_an_index_list(command: Dma, seed: int) -> None:
    run_both(command, seed)


def gather(bound: int = ROW_COUNT) -> Dma:
    return Dma(
        head=Head(Context.DMA),
        n=(4,),
        run=64,
        source=Side(Space.HBM, ROWS * REGION, (0,)),
        destination=Side(Space.DM, 0, (SLICE,)),
        indirect=Indirect.SOURCE,
        index=IndexList(INDEX * REGION, (4,), 64, bound=bound),
    )


@pytest.mark.parametrize(("row", "bound"), [(16, 16), (-1, 16), (64, 0), (2**31 - 1, 0)])
def test_a_row_that_does_not_exist_is_a_fault_of_the_run(row: int, bound: int) -> None:
    """64 rows of 64 B fit into the region, whether or not the list has a bound."""
    regions, memory = make_regions(0), make_memory(0)
    step = bind(gather(bound), regions, memory)
    step()
    regions[INDEX].content().view(np.int32)[2] = row
    with pytest.raises(errors.SimulationFault) as fault:
        step()
    assert (fault.value.code, fault.value.at) == ("SIM013", "here")
    assert f"row {row}" in fault.value.message


def test_a_bound_beyond_the_rows_that_exist_is_a_fault() -> None:
    with pytest.raises(errors.SimulationFault) as fault:
        bind(gather(65), make_regions(0), make_memory(0))
    assert fault.value.code == "SIM013"


def transfer(**changes: object) -> Dma:
    plain = Dma(
        head=Head(Context.DMA),
        n=(8, 2),
        run=64,
        source=Side(Space.HBM, 0, (128, 64)),
        destination=Side(Space.DM, 0, (SLICE, 64)),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("SIM010", {"source": Side(Space.HBM, 4096 - 1024 + 8, (128, 64))}),
        ("SIM010", {"source": Side(Space.HBM, 8, (-128, 64))}),
        ("SIM010", {"source": Side(Space.HBM, 7 * REGION, (128, 64))}),
        ("SIM010", {"source": Side(Space.HBM, 0, (128, 64), limit=1000)}),
        ("SIM010", {"source": Side(Space.HBM, 0, (128, 64), limit=4097)}),
        ("SIM010", {"destination": Side(Space.DM, 0, (SLICE, 64), limit=64 * SLICE + 1)}),
        ("SIM010", {"destination": Side(Space.DM, (1 << 19) - 64, (SLICE, 64))}),
        ("SIM011", {"destination": Side(Space.DM, 4, (SLICE, 64))}),
        ("SIM011", {"run": 60}),
        ("SIM015", {"destination": Side(Space.DM, SLICE, (SLICE, 64))}),
        ("SIM016", {"destination": Side(Space.DM, 0, (SLICE, 32))}),
        ("SIM016", {"destination": Side(Space.DM, 0, (0, 64))}),
        ("SIM016", {"destination": Side(Space.DM, 0, (64, 64))}),
        ("SIM018", {"n": (65535,) * 4, "source": Side(Space.HBM, 0, (0,) * 4),
                    "destination": Side(Space.HBM, 0, (0,) * 4)}),
    ],
)  # fmt: skip
def test_a_transfer_that_breaks_a_rule_is_a_fault(code: str, changes: dict[str, object]) -> None:
    with pytest.raises(errors.SimulationFault) as fault:
        bind(transfer(**changes), make_regions(0), make_memory(0))
    assert (fault.value.code, fault.value.at) == (code, "here")


def test_a_region_that_is_only_read_is_not_written() -> None:
    regions = make_regions(0)
    regions[DATA].writable = False
    command = transfer(source=Side(Space.DM, 0, (SLICE, 64)), destination=transfer().source)
    with pytest.raises(errors.SimulationFault) as fault:
        bind(command, regions, make_memory(0))
    assert fault.value.code == "SIM014"
    assert "data" in fault.value.message


def test_a_transfer_inside_data_memory_reads_before_it_writes() -> None:
    run_both(
        Dma(
            head=Head(Context.DMA),
            n=(8,),
            run=2048,
            source=Side(Space.DM, 0, (SLICE,)),
            destination=Side(Space.DM, 1024, (SLICE,)),
        ),
        seed=3,
    )


def test_rows_of_the_index_list_may_repeat_and_the_last_one_stays() -> None:
    regions, memory = make_regions(0), make_memory(0)
    regions[INDEX].content().view(np.int32)[:4] = [5, 5, 1, 5]
    command = Dma(
        head=Head(Context.DMA),
        n=(4,),
        run=64,
        source=Side(Space.DM, 0, (SLICE,)),
        destination=Side(Space.HBM, ROWS * REGION, (0,)),
        indirect=Indirect.DESTINATION,
        index=IndexList(INDEX * REGION, (4,), 64, bound=16),
    )
    bind(command, regions, memory)()
    rows = regions[ROWS].content().reshape(-1, 64)
    assert np.array_equal(rows[5], memory.dm[3, :64])
    assert np.array_equal(rows[1], memory.dm[2, :64])

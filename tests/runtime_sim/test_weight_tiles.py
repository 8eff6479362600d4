"""Tiles of parameters are remembered instead of moved; nobody can tell the difference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar_machine import ScalarMachine

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Dma,
    Exec,
    Fate,
    Head,
    Port,
    Side,
    Space,
    Stream,
)
from furiosa_llm.backend_rngd.isa.layout import RowsLayout, plain
from furiosa_llm.backend_rngd.isa.plan import plan_dma, plan_exec
from furiosa_llm.backend_rngd.isa.program import Relocation
from furiosa_llm.runtime_sim import dma_values
from furiosa_llm.runtime_sim.dma_values import Sides, bind_dma
from furiosa_llm.runtime_sim.exec_values import bind_exec
from furiosa_llm.runtime_sim.hbm import Parameter, PlacedRoom
from furiosa_llm.runtime_sim.memory import Box, ChipMemory
from furiosa_llm.runtime_sim.ranks import Rank
from furiosa_llm.runtime_sim.weights import WeightCache

ROWS, COLUMNS = 16, 64
"""Rows of a slice and columns of each parameter: 2 KiB a slice, 128 B a row."""
ROW = COLUMNS * 2
SLICE, REGION = 1 << 22, 1 << 40
TOKENS, RESULTS, WINDOW = 8192, 12288, 16384


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dma_values, "TILE_BYTES", 1024)


def make_parameters() -> list[Parameter]:
    """Two weights of 40 rows: 24 of 64 slices · 16 rows would be padding, so most are zero."""
    rng = np.random.default_rng(0)
    room = PlacedRoom()
    found = []
    for number in range(2):
        values = (rng.integers(-4, 5, (40, COLUMNS)) / 2).astype(ml_dtypes.bfloat16)
        layout = RowsLayout(out=plain(40), into=plain(COLUMNS), per_slice=ROWS, k_padded=COLUMNS)
        relocation = Relocation(
            tensor=f"w{number}",
            shape=values.shape,
            begin=(0, 0),
            end=values.shape,
            layout=layout,
        )
        parameter = Parameter(number, relocation, 0, room)
        parameter.source = lambda name, values=values: values
        found.append(parameter)
    return found


def load(region: int, row: int, rows: int, target: int) -> Dma:
    """Rows of every slice of a parameter to data memory."""
    return Dma(
        head=Head(Context.DMA),
        n=(64,),
        run=rows * ROW,
        source=Side(Space.HBM, region * REGION + row * ROW, (ROWS * ROW,)),
        destination=Side(Space.DM, target, (SLICE,)),
    )


def multiply(base: int, rows: int, tokens: int, out: int) -> Exec:
    """`rows` rows at `base` times the register file's first tokens, in f32."""
    return Exec(
        head=Head(Context.MAIN),
        counters=(
            Counter(rows, a=ROW, commit=4 * tokens),
            Counter(COLUMNS // 32, fate=Fate.MSUM, a=64, trf=64),
            Counter(1, birth=Birth.REUSE, trf=ROW, commit=8),
        ),
        a=Port(base),
        stream=Stream(32),
        contraction=Contraction(lanes=8),
        commit_port=Port(out, DType.F32),
        commit=Commit(
            lanes=tokens,
            lane_stride=4,
            column_stride=8,
            transpose_rows=2,
            transpose_columns=8,
        ),
    )


def move(source: int, target: int, size: int) -> Exec:
    """Copy inside data memory: reads a tile's bytes, or overwrites them."""
    return Exec(
        head=Head(Context.MAIN),
        counters=(Counter(size // 32, a=32, commit=32),),
        a=Port(source),
        stream=Stream(16),
        commit_port=Port(target),
        commit=Commit(columns=16, column_stride=2),
    )


class Both:
    """The fast machine and the scalar one, on the same bytes."""

    def __init__(self, budget_bytes: int) -> None:
        self.memory = ChipMemory(64)
        self.weights = WeightCache(budget_bytes)
        self.regions = make_parameters()
        rng = np.random.default_rng(1)
        numbers = (rng.integers(-4, 5, (64, 8, COLUMNS)) / 2).astype(ml_dtypes.bfloat16)
        for lane in range(8):
            content = numbers[:, lane].view(np.uint8)
            self.memory.trf[:, lane * 4096 : lane * 4096 + ROW] = content
        self.memory.dm[:, :WINDOW] = 0
        hbm = [region.content().copy() for region in self.regions]
        self.scalar = ScalarMachine(
            self.memory.dm[:, :WINDOW], self.memory.trf, self.memory.vrf, hbm
        )

    def run(self, command: Dma | Exec) -> None:
        if isinstance(command, Dma):
            plan = plan_dma(command, "test")
            addresses = [command.source.base, command.destination.base]
            sides = Sides.of(command, 0, [Rank(self.memory, self.regions)])
            step = bind_dma(plan, addresses, sides, self.weights, str)
            self._copy_rows(command)
        else:
            pass_plan = plan_exec(command, "test")
            ports = [port.base for port in pass_plan.ports]
            step = bind_exec(pass_plan, ports, self.memory, self.weights, str)
            self.scalar.execute(command)
        step()

    def _copy_rows(self, command: Dma) -> None:
        """The scalar machine's transfer, a run at a time: bytes alone would take too long."""
        at = command.destination.base
        source = command.source.base % REGION
        region = self.scalar.hbm[command.source.base // REGION]
        for s in range(64):
            start = source + s * ROWS * ROW
            self.scalar.dm[s, at : at + command.run] = region[start : start + command.run]

    def agree(self) -> bool:
        """Compare all bytes, which makes remembered ones real."""
        self.memory.make_real(Box(0, WINDOW, 0, 64))
        return np.array_equal(self.memory.dm[:, :WINDOW], self.scalar.dm)


def test_a_contraction_uses_a_tile_without_moving_it() -> None:
    both = Both(1 << 30)
    both.run(load(0, 0, 4, 0))
    both.run(multiply(0, 4, 2, RESULTS))
    assert not both.memory.dm[:, : 4 * ROW].any()
    assert both.weights.bytes > 0
    results = slice(RESULTS, RESULTS + 32)
    assert np.array_equal(both.memory.dm[:, results], both.scalar.dm[:, results])
    assert both.agree()


def test_decoded_weights_leave_out_rows_of_zeros() -> None:
    """40 of 64 · 16 rows are there: the operand ends with the third slice."""
    both = Both(1 << 30)
    both.run(load(0, 0, ROWS, 0))
    both.run(multiply(0, ROWS, 1, RESULTS))
    assert both.weights.bytes == 3 * ROWS * COLUMNS * 4
    assert both.agree()


def test_the_same_tile_is_decoded_once() -> None:
    both = Both(1 << 30)
    for target in (0, 4096):
        both.run(load(0, 0, 4, target))
        both.run(multiply(target, 4, 1, RESULTS))
    assert both.weights.bytes == 3 * 4 * COLUMNS * 4
    both.run(load(1, 0, 4, 0))
    both.run(multiply(0, 4, 1, RESULTS))
    assert both.weights.bytes == 2 * 3 * 4 * COLUMNS * 4


def test_a_weight_that_is_overwritten_and_read_again_has_its_new_value() -> None:
    both = Both(1 << 30)
    both.run(load(0, 0, 4, 0))
    both.run(multiply(0, 4, 2, RESULTS))
    both.run(load(1, 4, 2, ROW))
    both.run(multiply(0, 4, 2, RESULTS + 512))
    both.run(multiply(ROW, 2, 2, RESULTS + 1024))
    assert both.agree()


@st.composite
def any_command(draw: st.DrawFn) -> Dma | Exec:
    kind = draw(st.integers(0, 3))
    row = draw(st.integers(0, 8))
    rows = draw(st.sampled_from([2, 4, 8]))
    target = draw(st.integers(0, 16)) * ROW
    if kind <= 1:
        return load(draw(st.integers(0, 1)), row, rows, target)
    if kind == 2:
        return multiply(target, draw(st.sampled_from([1, 2])), 1, RESULTS + 64 * row)
    source, size = draw(st.integers(0, 24)) * 64, draw(st.sampled_from([32, 128, 512]))
    return move(source, target + 32 * draw(st.integers(0, 3)), size)


@settings(max_examples=40)
@given(st.lists(any_command(), min_size=2, max_size=7), st.sampled_from([0, 1 << 30]))
def test_tiles_and_bytes_agree_after_any_mixture(
    commands: list[Dma | Exec], budget_bytes: int
) -> None:
    both = Both(budget_bytes)
    for command in commands:
        both.run(command)
    assert both.agree()

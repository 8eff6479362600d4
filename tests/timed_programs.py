"""Small programs of loads and additions, to time."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from furiosa_llm.backend_rngd.isa.cost import dma_cost, exec_cost
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Alu,
    Commit,
    Context,
    Control,
    Counter,
    Dma,
    Exec,
    Head,
    Instruction,
    Op,
    Port,
    Side,
    Source,
    Space,
    Step,
    Stream,
    Vector,
    VectorOp,
    Wait,
)
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.isa.plan import plan_dma, plan_exec
from furiosa_llm.backend_rngd.isa.program import (
    Binding,
    Block,
    Call,
    Header,
    Program,
    Provenance,
    Region,
)
from furiosa_llm.runtime_sim.timing import ProgramTiming

BOOK = load_machine("book")
SLICE = 1 << 22


def load(n: int = 64, **head: object) -> Dma:
    """Bring n rows of 256 B from HBM."""
    head_of = Head(Context.DMA, **head)  # type: ignore[arg-type]
    return Dma(head_of, (n,), 256, Side(Space.HBM, 0, (256,), 0), Side(Space.DM, 0, (SLICE,)))


def add(steps: int = 64, context: Context = Context.MAIN, **head: object) -> Exec:
    return Exec(
        head=Head(context, **head),  # type: ignore[arg-type]
        counters=(Counter(steps, a=32, commit=32),),
        a=Port(dtype=DType.F32),
        stream=Stream(run=8),
        vector=Vector(ops=(VectorOp(Alu.FMA, Op.ADD, y=Source.IMM0),)),
        commit_port=Port(base=65536, dtype=DType.F32),
        commit=Commit(columns=8, column_stride=4),
    )


def cycles(command: Exec | Dma) -> int:
    if isinstance(command, Exec):
        return exec_cost(plan_exec(command, "test"), BOOK).total_cycles
    return dma_cost(plan_dma(command, "test"), BOOK).total_cycles


def program(
    *commands: Instruction,
    paths: Sequence[str] = ("",),
    prefixes: Sequence[str] = ("layer",),
    macs: int = 0,
) -> Program:
    """One block with the given commands, called once for each prefix."""
    provenance = tuple(Provenance(path=path, macs=macs) for path in paths)
    header = Header(
        model_name="test",
        bucket="decode:1,16",
        regions=(Region(name="scratch", scratch_bytes=65536),),
        blocks=(Block(name="block", first=0, count=len(commands), provenance=provenance),),
        calls=tuple(
            Call(block=0, prefix=prefix, bindings=(Binding(register_number=0, region=0),))
            for prefix in prefixes
        ),
    )
    return Program(header, commands)


def block_cycles(timing: ProgramTiming) -> int:
    return timing.cycles - BOOK.control.launch_cycles - BOOK.control.finish_cycles


@st.composite
def bodies(draw: st.DrawFn, depth: int = 0) -> tuple[Instruction, ...]:
    """Straight code and repeats, with signals that balance where fences demand it."""
    out: list[Instruction] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["load", "add", "sub", "pair", "double", "repeat"]))
        size = draw(st.sampled_from([1, 16, 200, 900]))
        row = draw(st.integers(0, 2))
        if kind == "load":
            out.append(load(size, provenance=row))
        elif kind in ("add", "sub"):
            context = Context.MAIN if kind == "add" else Context.SUB
            out.append(add(size, context, provenance=row))
        elif kind == "pair":  # the addition waits for the load
            out.append(load(size, signals=(1,), provenance=row))
            out.append(add(16, waits=(Wait(1, 1),), provenance=(row + 1) % 3))
        elif kind == "double":  # two buffers: a load waits for the addition before the last
            out += [add(1, signals=(3,)), add(1, signals=(3,))]
            for _ in range(draw(st.integers(1, 5))):
                out.append(load(size, waits=(Wait(3, 1),), signals=(2,), provenance=row))
                out.append(add(64, waits=(Wait(2, 1),), signals=(3,), provenance=(row + 1) % 3))
            out.append(load(1, waits=(Wait(3, 2),)))
        elif depth < 2:
            inner = draw(bodies(depth + 1))
            out += [Control(draw(st.integers(1, 12)), len(inner), (Step(1, 64),)), *inner]
    return tuple(out) or (load(),)

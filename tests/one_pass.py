"""Raw elements through one pass of the tensor unit, whatever their number: for its conversions."""

from __future__ import annotations

import numpy as np

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Commit,
    Context,
    Contraction,
    Counter,
    Exec,
    Fold,
    Head,
    Port,
    Stream,
    Vector,
)
from furiosa_llm.backend_rngd.isa.plan import plan_exec
from furiosa_llm.runtime_sim.checks import check_exec
from furiosa_llm.runtime_sim.exec_values import bind_exec
from furiosa_llm.runtime_sim.memory import ChipMemory
from furiosa_llm.runtime_sim.weights import WeightCache

SLICES = 64
RUN = 8
OUT = 1 << 18
"""Where results go in data memory: at its middle."""


def through_pass(
    raw: np.ndarray,
    source: DType,
    target: DType,
    *,
    lookup: DType | None = None,
    cast: DType | None = None,
    vector: Vector | None = None,
    relu: bool = False,
    zero_point: int | None = None,
) -> np.ndarray:
    """The codes of `target` that main commits; `raw` are codes of `source`, one to an element.

    Types of 4 bits come in u8 or i8, and leave as u8 below 16. With a zero point, which only a
    contraction takes, elements are multiplied by one.
    """
    contraction, pad, depth = None, 0, 0
    memory = ChipMemory(SLICES)
    count = len(raw)
    if zero_point is not None:
        depth = int(source.bits < 8)  # 64 elements of 4 bits fill a flit, there are 32 columns:
        raw = np.repeat(raw, 1 + depth)  # each stands twice, times one and times zero
        memory.trf[:, : source.bytes_for(RUN)] = 1
        pad = 256 // source.bits
        contraction = Contraction(
            pack=1, lanes=1, trf_read=source.bytes_for(RUN), depth=depth, fold=Fold.INTERLEAVED
        )
    per_slice = -(-len(raw) // (SLICES * RUN)) * RUN
    padded = np.zeros(SLICES * per_slice, raw.dtype)
    padded[: len(raw)] = raw
    content = _packed(padded) if source.bits < 8 else padded.view(np.uint8)
    memory.dm[:, : source.bytes_for(per_slice)] = content.reshape(SLICES, -1)
    columns = RUN >> depth
    half_bytes = target.bits < 8  # strides of 4-bit results count half bytes, units of 8 B
    step = 16 if half_bytes else max(8, target.bytes_for(columns))
    command = Exec(
        head=Head(Context.MAIN),
        counters=(Counter(per_slice // RUN, a=source.bytes_for(RUN), commit=step),),
        a=Port(0, source),
        trf=Port(0, source),
        stream=Stream(RUN, pad=pad, lookup=lookup, cast=cast, zero_point=zero_point),
        contraction=contraction,
        trf_lanes=1,
        vector=vector or Vector(),
        commit_port=Port(OUT, target),
        commit=Commit(
            columns=columns, column_stride=1 if half_bytes else target.bits // 8, relu=relu
        ),
    )
    _execute(command, memory)
    row_bytes = step // 2 if half_bytes else step
    rows = memory.dm[:, OUT : OUT + per_slice // RUN * row_bytes].reshape(-1, row_bytes)
    flat = np.ascontiguousarray(rows[:, : target.bytes_for(columns)]).reshape(-1)
    if half_bytes:
        return np.stack([flat & 15, flat >> 4], axis=-1).reshape(-1)[:count]
    return flat.view(f"u{target.bits // 8}")[:count]


def _execute(command: Exec, memory: ChipMemory) -> None:
    plan = plan_exec(command, "test")
    addresses = [port.base for port in plan.ports]
    check_exec(plan, addresses, SLICES, lambda: "test")
    with np.errstate(all="ignore"):
        bind_exec(plan, addresses, memory, WeightCache(0), lambda: "test")()


def _packed(codes: np.ndarray) -> np.ndarray:
    """Two 4-bit elements to a byte, the first in its low half."""
    halves = codes.astype(np.uint8) & 15
    packed: np.ndarray = halves[::2] | halves[1::2] << 4
    return packed

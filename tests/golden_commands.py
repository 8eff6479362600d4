"""Commands on their way through bytes: encode, decode, plan, cost with `book.yaml`."""

from __future__ import annotations

from furiosa_llm.backend_rngd.isa.cost import DmaCost, ExecCost, dma_cost, exec_cost
from furiosa_llm.backend_rngd.isa.instructions import Context, Dma, Exec, Head, Side
from furiosa_llm.backend_rngd.isa.machine import Machine, load_machine
from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES, plan_dma, plan_exec
from furiosa_llm.backend_rngd.isa.record_decoding import decode_dma, decode_exec
from furiosa_llm.backend_rngd.isa.record_encoding import encode_dma, encode_exec

BOOK = load_machine("book")
SLICE = SLICE_ADDRESS_BYTES


def time_exec(command: Exec, machine: Machine = BOOK) -> ExecCost:
    """Cycles of the bytes of `command`."""
    decoded = decode_exec(encode_exec(command), "golden")
    return exec_cost(plan_exec(decoded, "golden"), machine)


def time_dma(command: Dma, machine: Machine = BOOK, sharers: int = 1) -> DmaCost:
    decoded = decode_dma(encode_dma(command), "golden")
    return dma_cost(plan_dma(decoded, "golden"), machine, sharers)


def dma(n: tuple[int, ...], source: Side, destination: Side, run: int = 256) -> Dma:
    return Dma(Head(Context.DMA), n, run, source, destination)

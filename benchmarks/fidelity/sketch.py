"""A kernel written by hand as `rngd` commands, taken through the backend's passes to bytes.

What `benchmarks/fidelity` prints comes from timing these bytes: nothing is computed beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block
from xdsl.ir import Region as IrRegion

from furiosa_llm.backend_rngd.emitter import Emitter, Index, Ref
from furiosa_llm.backend_rngd.encode import content_attribute, encode_program
from furiosa_llm.backend_rngd.isa.container import write_program
from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES, Memory
from furiosa_llm.backend_rngd.isa.program import Region
from furiosa_llm.backend_rngd.isa.rules import SLICES_PER_PE
from furiosa_llm.backend_rngd.place import PlacePass
from furiosa_llm.backend_rngd.rngd import BlockOp, BufferType, CallOp, ProgramOp, RegionOp, RepeatOp
from furiosa_llm.backend_rngd.schedule import SchedulePass
from furiosa_llm.backend_rngd.synchronise import SynchronisePass

LEVEL = 1
"""-O1: commands overlap inside a kernel."""
COMMAND_BYTES = 8192
"""What a DMA command brings to each slice, unless one row of a tensor is longer."""
BUCKET = "decode:1,1"
"""A binary names a bucket; timing does not look at it."""
UNIT_BYTES = 256
"""What HBM reads at a time."""


def rows_at_once(row_bytes: int) -> int:
    """Rows of a tensor that one command brings to each slice, in whole units of HBM if it can."""
    unit = UNIT_BYTES // math.gcd(row_bytes, UNIT_BYTES)
    fit = COMMAND_BYTES // row_bytes
    return fit // unit * unit or max(1, fit)


@dataclass
class Sketch:
    """One block under construction; its HBM buffers are scratch regions of the stated size."""

    name: str
    block: Block = field(default_factory=Block)
    regions: list[RegionOp] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.emit = Emitter(self.block)

    def hbm(self, name: str, size_bytes: int) -> Ref:
        """An HBM buffer that the block's call binds."""
        region = Region(name=name, scratch_bytes=size_bytes)
        self.regions.append(RegionOp(name, content_attribute(region)))
        self.block.insert_arg(BufferType(Memory.HBM, 0), len(self.block.args))
        return Ref(self.block.args[-1])

    def dm(self, size_bytes: int, label: str) -> Ref:
        return self.emit.alloc(Memory.DM, size_bytes, label)

    def copy_slices(
        self, source: Ref, destination: Ref, run_bytes: int, slices: int = SLICES_PER_PE
    ) -> None:
        """One run per slice, between DM and tiles that stand in HBM slice after slice."""
        inwards = source.buffer in self.block.args
        hbm, dm = run_bytes, SLICE_ADDRESS_BYTES
        strides = (hbm, dm) if inwards else (dm, hbm)
        self.emit.dma([(slices, *strides)], run_bytes, source, destination)

    @contextmanager
    def repeat(self, count: int) -> Iterator[Index]:
        """Commands emitted inside run `count` times, fenced."""
        outer, self.emit.block = self.emit.block, Block()
        yield Index(0, 0)
        body, self.emit.block = self.emit.block, outer
        self.emit.append(RepeatOp(count, IrRegion(body)))

    def binary(self, calls: int = 1) -> bytes:
        """The `.vedf` bytes of `calls` runs of the block, scheduled at -O1."""
        block = BlockOp(self.name, IrRegion(self.block))
        buffers = [region.buffer for region in self.regions]
        runs = [CallOp(self.name, buffers) for _ in range(calls)]
        module = ModuleOp([ProgramOp(BUCKET), *self.regions, block, *runs])
        for step in (SchedulePass(LEVEL), PlacePass(), SynchronisePass()):
            step.apply(Context(), module)
        module.verify()
        return write_program(encode_program(module, "silicon"))

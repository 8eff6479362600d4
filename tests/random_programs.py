"""Random straight programs on virtual buffers, as the backend's passes get them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from xdsl.context import Context as XdslContext
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Region

from furiosa_llm.backend_rngd.emitter import Emitter, Ref, bits
from furiosa_llm.backend_rngd.encode import content_attribute, encode_program
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Alu,
    Commit,
    Context,
    Counter,
    Op,
    Sink,
    Source,
    Stream,
    Vector,
    VectorOp,
)
from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES, Memory
from furiosa_llm.backend_rngd.isa.program import Program, TensorIo
from furiosa_llm.backend_rngd.isa.program import Region as HbmRegion
from furiosa_llm.backend_rngd.isa.rules import SLICES_PER_PE
from furiosa_llm.backend_rngd.place import PlacePass
from furiosa_llm.backend_rngd.rngd import BlockOp, BufferType, CallOp, ProgramOp, RegionOp
from furiosa_llm.backend_rngd.schedule import SchedulePass
from furiosa_llm.backend_rngd.synchronise import SynchronisePass
from furiosa_llm.ir import provenance

TENSORS = 3


@dataclass
class RandomProgram:
    """Loads, copies, sums in three contexts on `buffers` buffers of random sizes.

    Every buffer is written as a whole before it is read; some are then written in part.
    """

    seed: int
    commands: int
    buffers: int = 12
    largest_flits: int = 4000
    """Of 32 B in a slice: 4,000 make a quarter of data memory."""
    emit: Emitter = field(init=False)

    def module(self) -> ModuleOp:
        self.rng = random.Random(self.seed)
        block = Block(arg_types=[BufferType(Memory.HBM, 0)] * 2 * TENSORS)
        self.emit = Emitter(block)
        self.alive: list[tuple[Ref, int]] = []
        self.inputs = [Ref(argument) for argument in block.args[:TENSORS]]
        self.outputs = [Ref(argument) for argument in block.args[TENSORS:]]
        for number in range(self.commands):
            self.emit.location = provenance.make(f"kernel.{number // 7}")
            self._command()
        for number, out in enumerate(self.outputs):
            value, flits = self.alive[number % len(self.alive)]
            self._store(value, out, flits)
        regions = [
            RegionOp(name, content_attribute(HbmRegion.model_validate({"name": name, **content})))
            for name, content in self._regions().items()
        ]
        call = CallOp("block", [region.buffer for region in regions])
        code = BlockOp("block", Region(block))
        return ModuleOp([ProgramOp("decode:1,16"), *regions, code, call])

    def program(self, level: int) -> Program:
        module = self.module()
        for step in (SchedulePass(level), PlacePass(), SynchronisePass(level)):
            step.apply(XdslContext(), module)
            module.verify()
        return encode_program(module, "random")

    def values(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        shape = (SLICES_PER_PE, 8 * self.largest_flits)
        return {f"in{i}": rng.standard_normal(shape).astype(np.float32) for i in range(TENSORS)}

    def _regions(self) -> dict[str, dict[str, TensorIo]]:
        found = {}
        for kind in ("input", "output"):
            for i in range(TENSORS):
                name = f"{kind.removesuffix('put')}{i}"
                io = TensorIo(
                    name=name,
                    dtype="f32",
                    shape=(SLICES_PER_PE, 8 * self.largest_flits),
                    element_bytes=4,
                    row_bytes=32 * self.largest_flits,
                )
                found[name] = {kind: io}
        return found

    # --- commands ---

    def _command(self) -> None:
        kinds = [self._load, self._load]
        if self.alive:
            kinds += [self._copy, self._add, self._add, self._overwrite, self._through_registers]
        self.rng.choice(kinds)()
        if len(self.alive) > 3:
            self.alive.pop(self.rng.randrange(len(self.alive)))

    def _new(self, flits: int) -> Ref:
        buffer = self.emit.alloc(Memory.DM, 32 * flits, "x")
        self.alive.append((buffer, flits))
        return buffer

    def _load(self) -> None:
        flits = self.rng.randint(1, self.largest_flits)
        source = self.rng.choice(self.inputs).at(32 * self.rng.randint(0, 3))
        flits = min(flits, self.largest_flits - 3)
        row = 32 * self.largest_flits
        buffer = self._new(flits)
        self.emit.dma([(SLICES_PER_PE, row, SLICE_ADDRESS_BYTES)], 32 * flits, source, buffer)

    def _store(self, value: Ref, out: Ref, flits: int) -> None:
        """As often as it takes to fill the output."""
        row = 32 * self.largest_flits
        times, rest = divmod(self.largest_flits, flits)
        for count, first, size in ((times, 0, flits), (1, times * flits, rest)):
            if size:
                self.emit.dma(
                    [(SLICES_PER_PE, SLICE_ADDRESS_BYTES, row), (count, 0, 32 * flits)],
                    32 * size,
                    value,
                    out.at(32 * first),
                )

    def _pick(self) -> tuple[Ref, int]:
        return self.rng.choice(self.alive)

    def _copy(self) -> None:
        source, flits = self._pick()
        target = self._new(flits)
        half = SLICES_PER_PE // 2 * SLICE_ADDRESS_BYTES
        loops = [(SLICES_PER_PE // 2, SLICE_ADDRESS_BYTES, SLICE_ADDRESS_BYTES)]
        self.emit.dma(loops, 32 * flits, source, target.at(half))
        self.emit.dma(loops, 32 * flits, source.at(half), target)

    def _pass(self, source: Ref, target: Ref, flits: int, amount: float) -> None:
        context = self.rng.choice((Context.MAIN, Context.SUB))
        self.emit.exec(
            context,
            [Counter(flits, a=32, commit=32)],
            Stream(8),
            a=source,
            out=target,
            dtype=DType.F32,
            commit=Commit(columns=8, column_stride=4),
            vector=Vector((VectorOp(Alu.FMA, Op.ADD, y=Source.IMM0),), imm=(bits(amount), 0, 0)),
        )

    def _add(self) -> None:
        source, flits = self._pick()
        self._pass(source, self._new(flits), flits, self.rng.random())

    def _overwrite(self) -> None:
        """Part of one buffer onto part of another, or of itself."""
        (source, have), (target, room) = self._pick(), self._pick()
        flits = self.rng.randint(1, min(have, room))
        first = self.rng.randint(0, room - flits)
        if source.buffer is target.buffer:
            first = 0
        self._pass(source, target.at(32 * first), flits, 1.0)

    def _through_registers(self) -> None:
        """The first flits of a buffer into the vector registers, and added to another's."""
        (source, _), (other, flits) = self._pick(), self._pick()
        vrf = self.emit.alloc(Memory.VRF, self.rng.choice((32, 2048, 6000)), "r")
        self.emit.exec(
            Context.SUB,
            [],
            Stream(8),
            a=source,
            out=vrf,
            dtype=DType.F32,
            commit=Commit(Sink.VRF, columns=8),
        )
        target = self._new(flits)
        self.emit.exec(
            Context.MAIN,
            [Counter(flits, a=32, commit=32)],
            Stream(8),
            a=other,
            vrf=vrf,
            out=target,
            dtype=DType.F32,
            commit=Commit(columns=8, column_stride=4),
            vector=Vector((VectorOp(Alu.FMA, Op.ADD, y=Source.VRF),), vrf_column=4),
        )

"""Small correct programs that together use most of the instruction set, with inputs for them.

Their commands are assembler text without order: each is made to wait for the one before it. Input i
stands behind register i, the output behind the next one. `load REGISTER ADDRESS BYTES` brings so
many bytes of a tensor to each slice, `store ADDRESS BYTES` takes the output from the slices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from run_commands import make_program
from small_decoder import Decoder

from furiosa_llm.backend_rngd.isa.assembly import parse_command
from furiosa_llm.backend_rngd.isa.instructions import Control, Instruction, Wait
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.runtime_sim.device import Device

Array = np.ndarray[Any, Any]
SLOTS = 34
"""Of a KV cache."""


@dataclass(frozen=True)
class SmallProgram:
    """A program, and what it gets."""

    program: Program
    inputs: Mapping[str, Array]
    weights: Mapping[str, Array]

    def run(self, program: Program) -> bytes:
        """What `program` leaves in outputs and caches when it runs in place of the correct one."""
        device = Device()
        device.load(program, self.weights.__getitem__)
        device.allocate_caches(program, SLOTS)
        for io in program.caches:  # what earlier tokens have left
            values = _floats((SLOTS, io.slot_bytes // 2)).astype(ml_dtypes.bfloat16)
            device.cache(io.layer)[:] = values.view(np.uint8)
        outputs = device.execute(program, self.inputs)
        caches = [device.cache(io.layer).tobytes() for io in program.caches]
        return b"".join([*(outputs[name].tobytes() for name in sorted(outputs)), *caches])


@cache
def small_programs() -> dict[str, SmallProgram]:
    """All of them by name."""
    return {
        "prefill": _decoder(Bucket.prefill(1, 16), [13]),
        "decode": _decoder(Bucket.decode(2, 16), [16, 9]),
        **{name: _written(name, *program) for name, program in PROGRAMS.items()},
    }


def _decoder(bucket: Bucket, lengths: Sequence[int]) -> SmallProgram:
    """A layer between embedding and logits; sequences use the last slots and the last token."""
    decoder = Decoder(bucket, layers=1)
    rng = np.random.default_rng(0)
    rows, new = bucket.batch_size, bucket.input_ids_size
    slots = np.arange(1, SLOTS)[::-1][: rows * bucket.attention_size].reshape(rows, -1)
    table = np.where(np.arange(bucket.attention_size) < np.array(lengths)[:, None], slots, 0)
    inputs = {"block_table": table, "lengths": np.array(lengths)}
    ids = rng.permutation(decoder.vocabulary)[: rows * new].reshape(rows, new)
    ids[:, 0] = decoder.vocabulary - 1
    if bucket.is_prefill:
        inputs |= {"input_ids": ids, "position_ids": np.arange(new)[None], "slot_mapping": table}
    else:
        last = np.array(lengths)[:, None] - 1
        places = {"position_ids": last, "slot_mapping": np.take_along_axis(table, last, 1)}
        inputs |= {"input_ids": ids, **places}
    inputs = {name: values.astype(np.int32) for name, values in inputs.items()}
    return SmallProgram(decoder.program(), inputs, decoder.weights())


def _written(name: str, text: str, inputs: Mapping[str, Array], output: Array) -> SmallProgram:
    lines = re.split(r"\n +(?=(?:exec|dma|repeat|load|store) )", text.rstrip())[1:]
    commands = [parse_command(_expanded(" ".join(x.split()), len(inputs))) for x in lines]
    program = make_program(list(_ordered(commands)), inputs, {"y": output})
    return SmallProgram(program, inputs, {})


def _expanded(line: str, output: int) -> str:
    """`load` and `store` as the transfers that they stand for."""
    word, *numbers = line.split()
    if word not in ("load", "store"):
        return line
    register, address, size = numbers if word == "load" else (output, *numbers)
    hbm = f"(space=hbm base=0 strides={size} register={register})"
    dm = f"(space=dm base={address} strides=4194304)"
    ends = (hbm, dm) if word == "load" else (dm, hbm)
    return f"dma n=64 run={size} source{ends[0]} destination{ends[1]}"


def _ordered(commands: Sequence[Instruction]) -> Iterator[Instruction]:
    """Each command after the one before it; fences stand before and behind a repeat's body."""
    fences: set[int] = set()
    for i, command in enumerate(commands):
        if isinstance(command, Control):
            fences |= {i, i + 1, i + 1 + command.length}
    for i, command in enumerate(commands):
        if isinstance(command, Control):
            yield command
            continue
        here = command.head.context
        head = command.head
        before = commands[i - 1] if i and i not in fences else None
        if before is not None and not isinstance(before, Control) and before.head.context != here:
            head = replace(head, waits=(Wait(3 * before.head.context + here, 1),))
        after = commands[i + 1] if i + 1 < len(commands) and i + 1 not in fences else None
        if after is not None and not isinstance(after, Control) and after.head.context != here:
            head = replace(head, signals=(3 * here + after.head.context,))
        yield replace(command, head=head)


# --- the programs ---


def _numbers(shape: tuple[int, ...], make: Callable[[np.random.Generator], Any]) -> Array:
    """What `make` gives, as i32 of this shape; its bytes are what a program loads."""
    made = np.ascontiguousarray(make(np.random.default_rng(1)))
    return made.view(np.uint8).reshape(-1).view(np.int32).reshape(shape)


def _codes(shape: tuple[int, ...]) -> Array:
    return _numbers(shape, lambda rng: rng.integers(0, 256, (*shape, 4)).astype(np.uint8))


def _floats(shape: tuple[int, ...], seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _f8(rng: np.random.Generator) -> Array:
    return rng.standard_normal((64, 64)).astype(ml_dtypes.float8_e4m3fn)


def _bitmaps(rng: np.random.Generator) -> Array:
    """Two of a ring's eight slices for each slice."""
    named = np.zeros((64, 64), np.uint8)
    for row in named:
        row[rng.permutation(8)[:2]] = 1
    return np.packbits(named, axis=1, bitorder="little")


def _zeros(shape: tuple[int, ...], dtype: type = np.int32) -> Array:
    return np.zeros(shape, dtype)


PROGRAMS: dict[str, tuple[str, dict[str, Array], Array]] = {
    # i8 products with a zero point, transposed, then made i8 by the cast engine.
    "integers": (
        """
        load 0 0 512
        load 1 1024 512
        exec context=sub counter(n=8 a=64 lanes=1) a(base=1024 dtype=i8) stream(run=64)
          commit_port(dtype=i8) commit(sink=trf columns=64)
        exec context=main counter(n=8 a=64 commit=4) a(dtype=i8) stream(run=64 zero_point=3)
          trf(dtype=i8) contraction(depth=6) commit_port(base=2048 dtype=i32)
          commit(lanes=8 lane_stride=32 transpose_rows=2 transpose_columns=8)
        exec context=main counter(n=8 a=32 commit=8) a(base=2048 dtype=i32) stream(run=8)
          vector(op(alu=fxp_rshift op=sar y=imm0) imm=10,0,0) commit_port(base=4096 dtype=i8)
          commit(columns=8 column_stride=1)
        store 4096 64
        """,
        {"x": _codes((64, 128)), "w": _codes((64, 128))[::-1].copy()},
        _zeros((64, 16)),
    ),
    # 4-bit products of four lanes, rounded to 4 bits.
    "nibbles": (
        """
        load 0 0 256
        load 1 1024 256
        exec context=sub counter(n=4 a=64 lanes=1) counter(n=2 a=32 trf=32)
          a(base=1024 dtype=i4) stream(run=64) trf_lanes=4 commit_port(dtype=i4)
          commit(sink=trf columns=64)
        exec context=main counter(n=4 a=64 commit=4) counter(n=2 fate=msum a=32 trf=32)
          a(dtype=i4) stream(run=64) trf(dtype=i4)
          contraction(lanes=4 depth=6 trf_read=32) commit_port(base=2048 dtype=i32)
          commit(lanes=4 lane_stride=16 transpose_rows=2 transpose_columns=4)
        exec context=main a(base=2048 dtype=i32) stream(run=16)
          vector(op(alu=fxp_rshift op=sar_round y=imm0) imm=5,0,0) commit_port(base=4096 dtype=i4)
          commit(columns=16 column_stride=1)
        store 4096 8
        """,
        {"x": _codes((64, 64)), "w": _codes((64, 64))[::-1].copy()},
        _zeros((64, 2)),
    ),
    # Codes through tables, products of f8, the rectifier.
    "tables": (
        """
        load 0 0 128
        load 1 1024 64
        exec context=sub counter(n=2 a=32 lanes=1) a(base=1024 dtype=f8e4m3) stream(run=32)
          trf_lanes=2 commit_port(dtype=f8e4m3) commit(sink=trf columns=32)
        exec context=main counter(n=8 a=16 commit=8) a(dtype=f4e2m1)
          stream(run=32 pad=64 lookup=f8e4m3) trf(dtype=f8e4m3)
          contraction(lanes=2 depth=4 trf_read=32) commit_port(base=2048)
          commit(lanes=2 columns=4 lane_stride=64 column_stride=2 relu)
        exec context=main counter(n=16 a=8 commit=16) a(base=2048) stream(run=4 cast=f32)
          vector(op(alu=fma op=fma y=imm0 z=imm1) imm=0x3fc00000,0x40000000,0)
          commit_port(base=4096 dtype=f32) commit(columns=4 column_stride=4)
        store 4096 256
        """,
        {"x": _codes((64, 32)), "w": _numbers((64, 16), _f8)},
        _zeros((64, 64), np.float32),
    ),
    # Tags with guards, the stash, an operand from the vector registers.
    "tags": (
        """
        load 0 0 256
        load 1 1024 32
        exec context=sub a(base=1024 dtype=f32) stream(run=8) commit_port(dtype=f32)
          commit(sink=vrf columns=8)
        exec context=main counter(n=8 a=32 commit=32) a(dtype=f32) stream(run=8) vrf()
          vector(op(alu=fma op=mul y=select stash) op(alu=fp_div op=div y=imm2 reverse)
          op(alu=clip_max op=max y=stash) imm=0x40490fdb,0xbf000000,0x3f800000 vrf_column=4
          comparator(kind=less boundary=0x3f000000) comparator(kind=greater boundary=0xbf800000)
          slot(source=imm0 mask=3 value=3) slot(source=imm1 mask=1 value=1) slot(source=vrf))
          commit_port(base=2048 dtype=f32) commit(columns=8 column_stride=4)
        store 2048 256
        """,
        {"x": _floats((64, 64)), "w": _floats((64, 8), 2)},
        _zeros((64, 64), np.float32),
    ),
    # Sums and maxima of what valid counts leave, over steps, columns and slices.
    "counts": (
        """
        load 0 0 256
        exec context=sub counter(n=3 commit=32) a(dtype=f32) stream(run=8)
          commit_port(base=1024 dtype=f32) commit(columns=8 column_stride=4)
          generate(value=1065353216)
        exec context=main counter(n=2 a=128 commit=8)
          counter(n=4 fate=vsum a=32 valid_dim=gate0 valid_step=1) a(dtype=f32) stream(run=8)
          vector(reduce=max gate(bound=2 mask=7 slice_bound=4)) commit_port(base=1024 dtype=f32)
          commit(columns=2 column_stride=4)
        exec context=main counter(n=2 a=128 commit=8)
          counter(n=4 fate=vsum a=32 valid_dim=packet valid_step=6) a(dtype=f32) stream(run=8)
          vector(op(alu=fma op=add y=imm0) imm=0x3f800000,0,0 reduce=add reduce_columns
          slice_reduce=add slice_group=4 clipper(size=15 span=6)) commit_port(base=1040 dtype=f32)
          commit(columns=2 column_stride=4)
        exec context=main a(base=1024 dtype=f32) stream(run=8) valid_slices=32
          vector(op(alu=exp op=exp) slice_reduce=add slice_group=2)
          commit_port(base=1056 dtype=f32) commit(columns=8 column_stride=4)
        exec context=main counter(n=2 birth=slice a=0 commit=8 slices=32) a(dtype=f32)
          stream(run=2) switch(topology=broadcast1 ring=64 digit(shift=0 bits=5 slices=1))
          commit_port(base=1088 dtype=f32) commit(columns=2 column_stride=4)
        store 1024 96
        """,
        {"x": _floats((64, 64))},
        _zeros((64, 24), np.float32),
    ),
    # Packets of other slices by rules and by bitmaps, numbers made on chip, a pair of streams.
    "switches": (
        """
        load 0 0 128
        load 1 512 8
        exec context=main counter(n=4 a=32 commit=32) a(dtype=i32) stream(run=8)
          switch(topology=transpose ring=64 digit(shift=0 bits=3 slices=8)
          digit(shift=3 bits=3 slices=1)) commit_port(base=1024 dtype=i32)
          commit(columns=8 column_stride=4)
        exec context=main counter(n=4 birth=slice commit=32 slices=2) a(base=1024 dtype=i32)
          stream(run=8) switch(topology=inter_transpose ring=8 digit(shift=0 bits=1 slices=1)
          digit(shift=1 bits=2 bytes=32)) commit_port(base=1536 dtype=i32)
          commit(columns=8 column_stride=4)
        exec context=main counter(n=2 birth=slice commit=32 slices=1) a(base=1536 dtype=i32)
          stream(run=8) switch(topology=custom ring=8 bitmap=512)
          commit_port(base=2048 dtype=i32) commit(columns=8 column_stride=4)
        exec context=sub counter(n=2 commit=32) a(dtype=i32) stream(run=8)
          commit_port(base=2560 dtype=i32) commit(columns=8 column_stride=4)
          generate(value=5 count_up)
        exec context=main counter(n=2 a=32 b=32 commit=32) a(base=2048 dtype=i32)
          b(base=2560 dtype=i32) stream(run=8 pair)
          vector(op(alu=logic_xor op=xor y=imm0 groups=first) op(alu=fxp_add op=isub y=zip reverse)
          imm=0xff,0,0) commit_port(base=3072 dtype=i32) commit(columns=8 column_stride=4)
        store 3072 64
        """,
        {"x": _codes((64, 32)), "maps": _numbers((64, 2), _bitmaps)},
        _zeros((64, 16)),
    ),
    # Rows by number, between slices, from the slices in a loop, and by number again.
    "transfers": (
        """
        dma n=32 run=16 source(space=hbm base=0 strides=0 register=0)
          destination(space=dm base=0 strides=4194304) indirect=source
          index(base=0 strides=4 scale=16 register=1 bound=32 origin=1)
        dma n=4,8 run=16 source(space=dm base=0 strides=33554432,4194304)
          destination(space=dm base=264241216 strides=-4194304,-16777216)
        repeat count=4 length=1 step(register=3 bytes=33554432) step(register=2 bytes=128)
        dma n=8 run=16 source(space=dm base=134217792 strides=4194304 register=3)
          destination(space=hbm base=0 strides=16 register=2 limit=512)
        dma n=32 run=16 source(space=hbm base=0 strides=16 register=2)
          destination(space=hbm base=512 strides=0 register=2) indirect=destination
          index(base=0 strides=4 scale=16 register=1 bound=32 origin=1)
        """,
        {
            "table": _codes((32, 4)),
            "rows": np.random.default_rng(3).permutation(32).astype(np.int32) + 1,
        },
        _zeros((64, 4)),
    ),
}

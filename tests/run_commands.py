"""Run a few commands on the simulated device: encode, decode, execute, read results.

Register i points at tensor i, inputs first. Tensors are dense in HBM, rows after rows. With several
ranks all of them get the inputs, and each one has an equal part of the rows of the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from furiosa_llm.backend_rngd.isa.container import read_program, write_program
from furiosa_llm.backend_rngd.isa.cut import Cut
from furiosa_llm.backend_rngd.isa.instructions import Instruction
from furiosa_llm.backend_rngd.isa.program import (
    Binding,
    Block,
    Call,
    Header,
    Program,
    Provenance,
    Region,
    TensorIo,
)
from furiosa_llm.runtime_sim.device import Device

NAMES = {np.dtype(np.int32): "i32", np.dtype(np.float32): "f32"} | {
    np.dtype(ml_dtypes.bfloat16): "bf16"
}


def make_program(
    commands: Sequence[Instruction],
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    macs: int = 0,
    ranks: int = 1,
) -> Program:
    """One call of one block; `outputs` gives shapes and types."""
    regions = [
        *(Region(name=name, input=_tensor(name, array)) for name, array in inputs.items()),
        *(Region(name=name, output=_part(name, array, ranks)) for name, array in outputs.items()),
    ]
    bindings = tuple(Binding(register_number=i, region=i) for i in range(len(regions)))
    header = Header(
        model_name="test",
        bucket="decode:1,16",
        tensor_parallel_size=ranks,
        regions=tuple(regions),
        blocks=(
            Block(
                name="block",
                first=0,
                count=len(commands),
                provenance=(Provenance(path="commands", macs=macs),),
            ),
        ),
        calls=(Call(block=0, prefix="", bindings=bindings),),
    )
    return read_program(write_program(Program(header, tuple(commands))))


def run_program(program: Program, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return Device().execute(program, dict(inputs))


def _part(name: str, array: np.ndarray, ranks: int) -> TensorIo:
    """What one rank has of an output."""
    if ranks == 1:
        return _tensor(name, array)
    rows = len(array) // ranks
    slots = tuple(((rank * rows, (rank + 1) * rows),) for rank in range(ranks))
    cut = Cut(dim=0, length=rows, slots=slots)
    return _tensor(name, array[:rows]).model_copy(update={"cut": cut})


def _tensor(name: str, array: np.ndarray) -> TensorIo:
    size = array.dtype.itemsize
    return TensorIo.model_validate(
        {
            "name": name,
            "dtype": NAMES[array.dtype],
            "shape": array.shape,
            "element_bytes": size,
            "row_bytes": size * array.shape[-1],
        }
    )

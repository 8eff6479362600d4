"""A header whose tables contradict each other is refused before anything is laid out by it."""

from __future__ import annotations

from typing import Any

import pytest

from furiosa_llm.backend_rngd.isa.container import read_program, write_program
from furiosa_llm.backend_rngd.isa.instructions import Control
from furiosa_llm.backend_rngd.isa.layout import (
    RowsLayout,
    RowTableLayout,
    ScaleLayout,
    VectorLayout,
    plain,
)
from furiosa_llm.backend_rngd.isa.program import (
    Block,
    Call,
    Header,
    Program,
    Provenance,
    Region,
    Relocation,
    TensorIo,
)
from furiosa_llm.errors import BinaryError


def program_with(region: Region) -> bytes:
    block = Block(name="block", first=0, count=1, provenance=(Provenance(path="model"),))
    header = Header(
        model_name="tiny", bucket="decode:1,8", regions=(region,), blocks=(block,), calls=()
    )
    return write_program(Program(header, (Control(count=1, length=1),)))


ROWS = RowsLayout(out=plain(32), into=plain(64), per_slice=16, k_padded=64)
VECTOR = VectorLayout(order=plain(64), per_slice=16)
TABLE = RowTableLayout(order=plain(64), per_slice=16, rows=10)
SCALE = ScaleLayout(order=plain(64), per_slice=16, shape=(32, 1), rows=2)


@pytest.mark.parametrize(
    ("layout", "shape"), [(ROWS, (32, 64)), (VECTOR, (64,)), (TABLE, (10, 64)), (SCALE, (32, 1))]
)
def test_bounds_must_be_what_the_layout_places(layout: Any, shape: tuple[int, ...]) -> None:
    assert layout.tensor_shape == shape
    begin = (0,) * len(shape)
    fits = Relocation(tensor="w", shape=shape, begin=begin, end=shape, layout=layout)
    read_program(program_with(Region(name="w", parameter=fits)))
    shorter = fits.model_copy(update={"end": (*shape[:-1], shape[-1] - 1)})
    with pytest.raises(BinaryError, match="VED004"):
        read_program(program_with(Region(name="w", parameter=shorter)))


@pytest.mark.parametrize(
    ("shape", "element_bytes", "row_bytes"), [((), 4, 4), ((2, 4), 2, 16), ((2, 4), 4, 15)]
)
def test_elements_of_an_input_must_fit_in_their_rows(
    shape: tuple[int, ...], element_bytes: int, row_bytes: int
) -> None:
    io = TensorIo(
        name="x", dtype="i32", shape=shape, element_bytes=element_bytes, row_bytes=row_bytes
    )
    with pytest.raises(BinaryError, match="VED004"):
        read_program(program_with(Region(name="x", input=io)))


@pytest.mark.parametrize("successor", [None, 0])
def test_who_loads_for_a_successor_has_one(successor: int | None) -> None:
    entry = Provenance(path="q_proj", successor=True)
    block = Block(name="block", first=0, count=1, provenance=(entry,))
    call = Call(block=0, prefix="layers.0", bindings=(), successor=successor)
    header = Header(
        model_name="tiny", bucket="decode:1,8", regions=(), blocks=(block,), calls=(call,)
    )
    data = write_program(Program(header, (Control(count=1, length=1),)))
    if successor is not None:
        assert read_program(data).blocks[0].provenance[0].successor
        return
    with pytest.raises(BinaryError, match="VED004"):
        read_program(data)

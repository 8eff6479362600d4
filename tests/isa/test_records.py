"""Commands as bytes: what is encoded decodes to the same, and no other byte slips through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_commands import controls, dmas, execs

from furiosa_llm.backend_rngd.isa.canonical import canonical
from furiosa_llm.backend_rngd.isa.instructions import (
    Commit,
    Context,
    Control,
    Counter,
    Dma,
    Exec,
    Head,
    Instruction,
    Port,
    Side,
    Space,
    Step,
    Stream,
)
from furiosa_llm.backend_rngd.isa.record_decoding import decode_control, decode_dma, decode_exec
from furiosa_llm.backend_rngd.isa.record_encoding import encode_control, encode_dma, encode_exec
from furiosa_llm.backend_rngd.isa.record_types import CONTROL, DMA, EXEC
from furiosa_llm.errors import BinaryError

COPY = Exec(
    head=Head(Context.MAIN),
    counters=(Counter(8, a=32, commit=32),),
    a=Port(),
    stream=Stream(run=16),
    commit_port=Port(base=4096),
    commit=Commit(columns=16, column_stride=2),
)
CODECS: dict[type, tuple[Callable[[Any], np.ndarray], Callable[[Any, str], Instruction]]] = {
    Exec: (encode_exec, decode_exec),
    Dma: (encode_dma, decode_dma),
    Control: (encode_control, decode_control),
}


@given(execs() | dmas() | controls)
def test_bytes_read_back(command: Instruction) -> None:
    encode, decode = CODECS[type(command)]
    assert decode(encode(command), "test") == canonical(command)


@given(execs() | dmas() | controls)
def test_the_canonical_form_is_canonical(command: Instruction) -> None:
    assert canonical(canonical(command)) == canonical(command)


@given(execs() | dmas() | controls, st.integers(0), st.integers(1, 255))
def test_another_byte_is_another_command_or_an_error(
    command: Instruction, place: int, change: int
) -> None:
    encode, decode = CODECS[type(command)]
    record = encode(command)
    data = bytearray(record.tobytes())
    data[place % len(data)] ^= change
    changed = np.frombuffer(bytes(data), record.dtype)[0]
    try:
        other = decode(changed, "test")
    except BinaryError:
        return
    assert other != command
    assert encode(other).tobytes() == bytes(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("b", "base"), 8),
        (("vrf", "register"), 3),
        (("counters", 0, "trf"), 32),
        (("counters", 0, "n"), 1),  # a loop of one step is left out
        (("valid_dim", 0), 1),
        (("stream", "run_stride"), 32),
        (("stream", "pad"), 16),  # as many elements as are read
        (("switch", "digits", 0, "bits"), 2),
        (("contraction", "lanes"), 4),
        (("vector", "imm", 1), 7),
        (("vector", "slice_placement"), 0),
        (("out", "lane_stride"), 64),
        (("valid_slices",), 64),
        (("generated",), 7),
    ],
)
def test_a_field_without_effect_is_refused(path: tuple[str | int, ...], value: int) -> None:
    record = encode_exec(COPY)
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(BinaryError) as caught:
        decode_exec(record, "test")
    assert caught.value.code == "VED010"


def test_a_loop_of_one_step_is_left_out() -> None:
    one = Dma(
        Head(Context.DMA), (1, 8), 64, Side(Space.HBM, 0, (3, 64)), Side(Space.DM, 0, (5, 64))
    )
    decoded = decode_dma(encode_dma(one), "test")
    assert decoded == replace(
        one,
        n=(8,),
        source=replace(one.source, strides=(64,)),
        destination=replace(one.destination, strides=(64,)),
    )
    assert decode_control(encode_control(Control(1, 1, (Step(0, 8),))), "test") == Control(1, 1)


@pytest.mark.parametrize(
    ("field", "value", "at"),
    [("reserved1", 1, "byte 52"), ("kind", 9, "kind"), ("count", 0, "count")],
)
def test_errors_name_the_record_and_the_field(field: str, value: int, at: str) -> None:
    record = encode_control(Control(2, 1))
    record[field] = value
    with pytest.raises(BinaryError) as caught:
        decode_control(record, "tiny.vedf: control[3]")
    assert caught.value.code == "VED010"
    assert "control[3]" in str(caught.value)
    assert at in str(caught.value)


@pytest.mark.parametrize(("record", "size"), [(EXEC, 640), (DMA, 256), (CONTROL, 64)])
def test_records_have_the_documented_size(record: np.dtype[Any], size: int) -> None:
    assert record.itemsize == size

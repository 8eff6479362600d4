"""Commands as bytes: what is encoded decodes to the same, and no other byte slips through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_commands import controls, dmas, execs

from furiosa_llm.backend_rngd.isa.instructions import Control, Dma, Exec, Instruction
from furiosa_llm.backend_rngd.isa.record_types import CONTROL, DMA, EXEC
from furiosa_llm.backend_rngd.isa.records import (
    decode_control,
    decode_dma,
    decode_exec,
    encode_control,
    encode_dma,
    encode_exec,
)
from furiosa_llm.errors import BinaryError

CODECS: dict[type, tuple[Callable[[Any], np.ndarray], Callable[[Any, str], Instruction]]] = {
    Exec: (encode_exec, decode_exec),
    Dma: (encode_dma, decode_dma),
    Control: (encode_control, decode_control),
}


@given(execs() | dmas() | controls)
def test_bytes_read_back(command: Instruction) -> None:
    encode, decode = CODECS[type(command)]
    assert decode(encode(command), "test") == command


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

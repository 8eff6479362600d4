"""The GGUF container: it reads what the `gguf` library reads, and refuses every damaged file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf_zoo import write_gguf
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.gguf_file import GgufFile

METADATA = {
    "general.name": "tiny – Grüße",
    "general.alignment": 64,
    "some.flag": True,
    "some.numbers": [1, -2, 3],
    "some.strings": ["a", "", "ß"],
}


@pytest.fixture(scope="module")
def file(zoo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(zoo("llama"), path, GGMLQuantizationType.Q4_1, metadata=METADATA)


def test_reads_what_the_library_reads(file: Path) -> None:
    ours, theirs = GgufFile.open(file), GGUFReader(file)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert found.type == tensor.tensor_type
        stored = np.asarray(tensor.data).view(np.uint8)
        np.testing.assert_array_equal(ours.rows(tensor.name).ravel(), stored.ravel())


def test_data_is_mapped_and_not_copied(file: Path) -> None:
    assert not GgufFile.open(file).rows("blk.0.attn_q.weight").flags.owndata


@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(file: Path, kept: float) -> None:
    data = file.read_bytes()
    cut = file.with_name("cut.gguf")
    cut.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CompileError) as caught:
        GgufFile.open(cut)
    assert caught.value.code == "GGF001"
    assert caught.value.at == str(cut)


@given(st.integers(0, 3000), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(file: Path, place: int, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] = byte
    changed = file.with_name("changed.gguf")
    changed.write_bytes(data)
    try:
        opened = GgufFile.open(changed)
    except CompileError as error:
        code = error.code
    else:
        inside = all(tensor.end <= len(data) for tensor in opened.tensors.values())
        code = "GGF001" if inside else "beyond the file"
    assert code == "GGF001"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GGML" + bytes(60), "does not start with"),
        (b"GGUF\x01" + bytes(60), "version 1 is not"),
        (b"GGUF\x00\x00\x00\x03" + bytes(60), "little-endian"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 60, "the file ends at byte 68"),
    ],
)
def test_the_reason_is_told(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CompileError, match="corrupt") as caught:
        GgufFile.open(path)
    assert reason in caught.value.cause

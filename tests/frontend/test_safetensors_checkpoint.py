"""Safetensors checkpoints: what is read is what was written, and broken files say so."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from model_zoo import load_reference
from safetensors.numpy import save_file

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.safetensors_checkpoint import DTYPES, SafetensorsCheckpoint

WRITABLE = [dtype for dtype in DTYPES.values() if "fnuz" not in dtype.name]


def save(directory: Path, **tensors: np.ndarray[Any, Any]) -> SafetensorsCheckpoint:
    save_file(tensors, directory / "model.safetensors")
    return SafetensorsCheckpoint(directory)


def test_reads_what_transformers_reads(zoo: Callable[[str], Path]) -> None:
    checkpoint = SafetensorsCheckpoint(zoo("qwen2"))
    expected = load_reference(zoo("qwen2")).state_dict()
    del expected["lm_head.weight"]  # tied: stored once
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), ml_dtypes.bfloat16)
        assert info.stored == "BF16"
        assert info.nbytes == 2 * tensor.numel()
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), tensor.numpy())


@pytest.mark.parametrize("dtype", WRITABLE, ids=lambda dtype: dtype.name)
def test_every_type_keeps_its_bits(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    values = np.arange(6).reshape(3, 2).astype(dtype)
    read = save(tmp_path, values=values).read("values")
    assert read.dtype == dtype
    assert read.tobytes() == values.tobytes()


def test_rows_are_read_alone_and_nothing_is_copied(tmp_path: Path) -> None:
    values = np.arange(20, dtype=np.float32).reshape(5, 4)
    checkpoint = save(tmp_path, other=np.ones(3, np.float32), values=values)
    rows = checkpoint.read_rows("values", 1, 3)
    np.testing.assert_array_equal(rows, values[1:3])
    assert not rows.flags.owndata
    assert not rows.flags.writeable


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    scalar, empty = np.array(2.5, np.float32), np.zeros((0, 4), np.float32)
    checkpoint = save(tmp_path, scalar=scalar, empty=empty)
    assert checkpoint.read("scalar") == 2.5
    assert checkpoint.read("empty").shape == (0, 4)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Tensors a and b in the first file, c in the second."""
    one = np.ones(2, np.float32)
    save_file({"a": one, "b": 2 * one}, tmp_path / "first.safetensors")
    save_file({"c": 3 * one}, tmp_path / "second.safetensors")
    write_index(tmp_path, a="first.safetensors", b="first.safetensors", c="second.safetensors")
    return tmp_path


def write_index(directory: Path, **shard_of: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": shard_of})
    (directory / "model.safetensors.index.json").write_text(text)


def test_shards_are_one_checkpoint(sharded: Path) -> None:
    checkpoint = SafetensorsCheckpoint(sharded)
    assert {name: checkpoint.read(name)[0] for name in checkpoint.tensors} == {
        "a": 1,
        "b": 2,
        "c": 3,
    }


def test_every_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "first.safetensors").unlink()
    (sharded / "second.safetensors").unlink()
    with pytest.raises(CompileError) as caught:
        _ = SafetensorsCheckpoint(sharded).tensors
    assert caught.value.code == "CKP004"
    assert "first.safetensors is missing (it holds `a`)" in caught.value.cause
    assert "second.safetensors is missing (it holds `c`)" in caught.value.cause


def test_every_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    write_index(sharded, a="second.safetensors", d="first.safetensors")
    with pytest.raises(CompileError) as caught:
        _ = SafetensorsCheckpoint(sharded).tensors
    assert caught.value.code == "CKP004"
    assert "second.safetensors does not hold `a`" in caught.value.cause
    assert "first.safetensors does not hold `d`" in caught.value.cause


def test_tensors_that_the_index_does_not_list_are_there(sharded: Path) -> None:
    write_index(sharded, b="first.safetensors", c="second.safetensors")
    checkpoint = SafetensorsCheckpoint(sharded)
    assert list(checkpoint.tensors) == ["b", "c", "a"]
    assert checkpoint.read("a")[0] == 1


def test_a_tensor_in_two_shards_is_refused_by_name(sharded: Path) -> None:
    save_file({"c": np.ones(2, np.float32), "b": np.ones(2)}, sharded / "second.safetensors")
    with pytest.raises(CompileError) as caught:
        _ = SafetensorsCheckpoint(sharded).tensors
    assert caught.value.code == "CKP008"
    assert "`b` is in first.safetensors and in second.safetensors" in caught.value.cause


def test_two_checkpoints_in_one_directory_are_refused(sharded: Path) -> None:
    """transformers would take the single file, vLLM the shards."""
    save_file({"a": np.ones(2, np.float32)}, sharded / "model.safetensors")
    with pytest.raises(CompileError, match=r"model\.safetensors is there") as caught:
        _ = SafetensorsCheckpoint(sharded).tensors
    assert caught.value.code == "CKP008"
    write_index(sharded, a="model.safetensors")
    assert list(SafetensorsCheckpoint(sharded).tensors) == ["a"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CompileError) as caught:
        _ = SafetensorsCheckpoint(tmp_path).tensors
    assert caught.value.code == "CKP001"
    assert f"{name} would run code when read" in caught.value.cause
    assert "save_pretrained" in caught.value.next_step


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}'],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CompileError) as caught:
        _ = SafetensorsCheckpoint(tmp_path).tensors
    assert caught.value.code == "CKP003"


def test_an_index_cannot_leave_its_directory(tmp_path: Path) -> None:
    write_index(tmp_path, a="../secret.safetensors")
    with pytest.raises(CompileError, match="not a file name"):
        _ = SafetensorsCheckpoint(tmp_path).tensors


def with_header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """A file whose header was changed and its length mended."""

    def corrupt(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return corrupt


CORRUPTIONS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the length": lambda data: data[:7],
    "cut in the header": lambda data: data[:40],
    "cut in the data": lambda data: data[:-1],
    "longer than its header says": lambda data: data + b"x",
    "header longer than the file": lambda data: struct.pack("<Q", 1 << 40) + data[8:],
    "header is no JSON": lambda data: data[:8] + b"x" + data[9:],
    "tensors overlap": with_header(lambda h: h["a"].update(data_offsets=[0, 9])),
    "tensor beyond the file": with_header(lambda h: h["b"].update(data_offsets=[8, 1 << 30])),
    "size differs from the shape": with_header(lambda h: h["a"].update(shape=[3])),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=list(CORRUPTIONS))
def test_a_corrupt_file_is_refused_by_name(
    tmp_path: Path, corrupt: Callable[[bytes], bytes]
) -> None:
    checkpoint = save(tmp_path, a=np.ones(2, np.float32), b=np.ones(4, np.float32))
    file = tmp_path / "model.safetensors"
    file.write_bytes(corrupt(file.read_bytes()))
    with pytest.raises(CompileError) as caught:
        _ = checkpoint.tensors
    assert caught.value.code == "CKP002"
    assert caught.value.at == str(file)
    assert "download" in caught.value.next_step


def test_a_type_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, a=np.ones(4, np.uint8))
    file = tmp_path / "model.safetensors"
    change = with_header(lambda header: header["a"].update(dtype="F4", shape=[8]))
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CompileError) as caught:
        _ = checkpoint.tensors
    assert caught.value.code == "CKP007"
    assert "`a`" in caught.value.message


def test_an_unknown_name_is_refused(zoo: Callable[[str], Path]) -> None:
    checkpoint = SafetensorsCheckpoint(zoo("llama"))
    for read in (checkpoint.read, lambda name: checkpoint.read_rows(name, 0, 1)):
        with pytest.raises(CompileError) as caught:
            read("model.absent")
        assert caught.value.code == "CKP006"


def test_a_directory_without_weights_is_refused(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(zoo("llama") / "config.json", tmp_path)
    with pytest.raises(CompileError) as caught:
        _ = SafetensorsCheckpoint(tmp_path).tensors
    assert caught.value.code == "CKP001"
    assert "--weights skip" in caught.value.next_step

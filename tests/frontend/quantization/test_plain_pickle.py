"""qparam.npy: what `numpy.save` writes is read; whatever else it may hold executes nothing."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from furiosa_directory import quantizer
from refusals import refused

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.plain_pickle import NotPlain, read_plain_pickle
from furiosa_llm.frontend.quantization.qparam_file import (
    LARGEST_BYTES,
    quantizers_in,
    read_qparam,
)

RANGES = {
    "a.b._weight_quantizer": quantizer(amax=np.arange(1, 4, dtype=np.float32), ch=0),
    "matmul_3._input_1_quantizer": quantizer(max=np.float32(2.5), min=np.float64(-1)),
}


def saved(content: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(content, object), allow_pickle=True)
    return file.getvalue()


def with_pickle(data: bytes) -> bytes:
    """A .npy file whose object is this pickle."""
    whole = saved(None)
    return whole[: whole.index(b"\n") + 1] + data


def refusal(path: Path, content: bytes) -> CompileError:
    file = path / "qparam.npy"
    file.write_bytes(content)
    with pytest.raises(CompileError) as caught:
        read_qparam(file)
    assert (caught.value.code, caught.value.at) == ("QNT007", str(file))
    return caught.value


# --- what is read ---


def test_what_numpy_saves_is_read(tmp_path: Path) -> None:
    (tmp_path / "qparam.npy").write_bytes(saved(RANGES))
    read = read_qparam(tmp_path / "qparam.npy")
    assert list(read) == list(RANGES)
    for path, fields in RANGES.items():
        assert list(read[path]) == list(fields)
        for key, value in fields.items():
            assert type(read[path][key]) is type(value)
            np.testing.assert_array_equal(read[path][key], value)


VALUES: list[Any] = [
    None, True, False, 0, -1, 300, 70000, 2**40, -(2**70), 1.5, "text", "x" * 300, b"bytes",
    [], [1, [2, []]], {}, {"a": {"b": [1]}}, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4),
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_are_what_pickle_reads(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    if protocol < 3 and isinstance(value, bytes):
        with pytest.raises(NotPlain, match=r"_codecs\.encode"):
            read_plain_pickle(data)
    else:
        assert read_plain_pickle(data) == value


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    np.arange(3, dtype=">f4"),
    np.array(2.5),
    np.zeros((0, 4), np.float16),
    np.array([True, False]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype} {array.shape}")
@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_are_what_pickle_reads(array: Any, protocol: int) -> None:
    (read,) = read_plain_pickle(pickle.dumps([array], protocol))
    assert (read.dtype, read.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(read, array)


# --- what is refused ---


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_runs_nothing(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "witness"
    data = pickle.dumps({"a": Calls(os.system, f"touch {witness}")}, protocol)
    refusal(tmp_path, with_pickle(data))
    assert not witness.exists()
    pickle.loads(data)  # the same bytes do run it
    assert witness.exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (OrderedDict(a=1), "collections.OrderedDict"),
        (Path("x"), "pathlib"),
        (np.load, "numpy.load"),
        (Calls(eval, "1"), "builtins.eval"),
        (np.ndarray, "a name"),
        (np.dtype("f4"), "a name or an element type"),
        (np.array(["text"]), "element type 'U4'"),
        (np.array([1, None], object), "an array of several objects"),
        (np.zeros(2, "V9"), "element type 'V9'"),
        (np.zeros(2, [("a", "f4")]), "element type 'V4'"),
        (np.array(1, "datetime64[s]"), "element type 'M8'"),
        ({1: 2}, "a key that is no text"),
        ({1, 2}, "EMPTY_SET"),
        (((1,),), "a tuple in a tuple"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_things_are_refused_by_name(tmp_path: Path, value: Any, named: str) -> None:
    data = pickle.dumps({"a": {"amax": value}}, 4)
    assert named in refusal(tmp_path, with_pickle(data)).cause


def test_an_array_has_to_bring_its_bytes(tmp_path: Path) -> None:
    """A shape of 2^40 values, one with bytes for fewer, and an empty one with a huge dim."""
    array = pickle.dumps([np.zeros((5, 7), np.float32)], 4)
    shape = pickle.dumps((5, 7), 4)[-6:-2]  # K\x05K\x07
    assert array.count(shape) == 1
    too_many, huge, empty = b"K\xffK\xff", b"J\xff\xff\xff\x7f" * 2, b"K\x00J\xff\xff\xff\x7f"
    for changed in (too_many, huge, empty):
        with pytest.raises(NotPlain):
            read_plain_pickle(array.replace(shape, changed))


def huge_memo() -> bytes:
    return b"\x80\x04Nr\xff\xff\xff\xff."


def huge_bytes() -> bytes:
    return b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"short."


def huge_text() -> bytes:
    return b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"short."


def huge_integer() -> bytes:
    return b"\x80\x04\x8b" + struct.pack("<i", (1 << 31) - 1) + b"\x01."


def huge_array() -> bytes:
    """What an unpickler allocates before it has seen any bytes."""
    recipe = Calls(np.zeros(0).__reduce__()[0], np.ndarray, (1 << 40,), b"d")
    return pickle.dumps({"a": recipe}, 4)


@pytest.mark.parametrize(
    "make", [huge_memo, huge_bytes, huge_text, huge_integer, huge_array], ids=lambda m: m.__name__
)
def test_memory_stays_proportional_to_the_file(tmp_path: Path, make: Any) -> None:
    tracemalloc.start()
    refusal(tmp_path, with_pickle(make()))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_depth_does_not_matter() -> None:
    depth = 100_000
    read = read_plain_pickle(b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b".")
    for _ in range(depth - 1):
        (read,) = read
    assert read == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no .npy file"),
        (b"PK\x03\x04" + bytes(100), "no .npy file"),
        (b"\x93NUMPY\x01\x00\xff\xff", "no .npy file"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70_000, "its header has 65535 bytes"),
        (b"\x93NUMPY\x02\x00\xff\x0f\x00\x00" + b"(" * 5000, "its header is damaged"),
        (b"\x93NUMPY\x01\x00\x02\x00{}", "no scalar array of objects"),
        (b"\x93NUMPY\x01\x00\x02\x0011", "no scalar array of objects"),
        (saved(RANGES)[:-40], "the pickle is damaged"),
        (saved([1]), "no scalar array of objects"),
        (saved(None), "no dict of quantizers"),
        (saved({}), "no dict of quantizers"),
        (saved({"a": 1}), "`a` is no dict of fields"),
    ],
)
def test_a_file_that_is_no_qparam(tmp_path: Path, content: bytes, named: str) -> None:
    assert named in refusal(tmp_path, content).cause


def test_a_plain_array_is_no_qparam(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.ones(3))
    assert "no scalar array of objects" in refusal(tmp_path, file.getvalue()).cause


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        read_qparam(tmp_path)
    assert (caught.value.code, "Is a directory" in caught.value.cause) == ("QNT007", True)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    file = tmp_path / "qparam.npy"
    with file.open("wb") as sparse:
        sparse.truncate(LARGEST_BYTES + 1)
    with pytest.raises(CompileError) as caught:
        read_qparam(file)
    assert (caught.value.code, "more than" in caught.value.cause) == ("QNT007", True)


def test_10000_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    """Each with one to four bytes changed, cut, or repeated; every second one calls a function.

    Every tenth is a file on disk, which takes ten times as long; nothing but QNT007 gets out of it.
    """
    rng = random.Random(0)
    witness = tmp_path / "witness"
    hostile = {**RANGES, "c": {"amax": Calls(os.mkdir, str(witness))}}
    originals = saved(RANGES), saved(hostile)
    file = tmp_path / "qparam.npy"
    failures = 0
    for index in range(10_000):
        data = mutated(originals[index % 2], rng)
        is_refused = is_not_plain(data)
        if index % 20 < 2:
            file.write_bytes(data)
            error = refused(lambda: read_qparam(file))
            assert (error.code if error else None) == ("QNT007" if is_refused else None)
        failures += is_refused
    assert failures > 7500
    assert not witness.exists()


def is_not_plain(data: bytes) -> bool:
    try:
        quantizers_in(data)
    except NotPlain:
        return True
    return False


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0:
                changed[place] = rng.randrange(256)
            case 1:
                changed[place] ^= 1 << rng.randrange(8)
            case 2:
                del changed[place : place + rng.randint(1, 8)]
            case _:
                end = place + rng.randint(1, 16)
                changed[place:place] = changed[place:end]
    return bytes(changed)

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from small_artifact import ARRAYS, BF16, MemoryCheckpoint, specs_of

from furiosa_llm.artifact import parameter_files
from furiosa_llm.artifact.parameter_files import copy_parameters, link_parameters
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.frontend.checkpoint import Array
from furiosa_llm.frontend.parameters import BoundParameters, ParameterSpec, bind_parameters
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint, SafetensorsFile

DTYPES = [BF16, np.dtype(np.float32), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.int8)]


def bound(arrays: Mapping[str, Array]) -> BoundParameters:
    return bind_parameters(specs_of(arrays), MemoryCheckpoint(arrays))


def read_back(directory: Path, file_of: Mapping[str, str]) -> dict[str, Array]:
    return {name: SafetensorsFile(directory / file).read(name) for name, file in file_of.items()}


@given(
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    max_shard_bytes=st.integers(1, 200),
    chunk_bytes=st.integers(1, 64),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, ...]],
    dtype: np.dtype[np.generic],
    max_shard_bytes: int,
    chunk_bytes: int,
) -> None:
    directory = tmp_path_factory.mktemp("parameters")
    random = np.random.default_rng(0)
    arrays = {
        f"t{i}": random.integers(-8, 8, shape).astype(dtype) for i, shape in enumerate(shapes)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameter_files, "CHUNK_BYTES", chunk_bytes)
        stored = copy_parameters(directory, bound(arrays), max_shard_bytes)

    for name, array in read_back(directory, stored.file_of).items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, arrays[name])
    for name, entry in stored.files.items():
        data = (directory / name).read_bytes()
        assert entry.size_bytes == len(data)
        assert entry.sha256 == hashlib.sha256(data).hexdigest()


def test_shards_are_numbered_and_hold_parameters_by_name(tmp_path: Path) -> None:
    stored = copy_parameters(tmp_path, bound(ARRAYS), max_shard_bytes=64)
    assert stored.file_of == {
        "model.embed_tokens.weight": "params-00001-of-00002.safetensors",
        "model.norm.weight": "params-00002-of-00002.safetensors",
    }


def test_the_bytes_do_not_depend_on_the_order_of_the_checkpoint(tmp_path: Path) -> None:
    hashes = []
    for i, arrays in enumerate((ARRAYS, dict(reversed([*ARRAYS.items()])))):
        (tmp_path / str(i)).mkdir()
        stored = copy_parameters(tmp_path / str(i), bound(arrays))
        hashes.append([entry.sha256 for entry in stored.files.values()])
    assert hashes[0] == hashes[1]


def test_parameters_are_converted_to_the_declared_type(tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint({"w": np.array([[1.0, 2.5]], np.float32)})
    source = bind_parameters([ParameterSpec("w", (1, 2), BF16)], checkpoint)
    stored = copy_parameters(tmp_path, source)
    assert read_back(tmp_path, stored.file_of)["w"].dtype == BF16


def test_a_large_tensor_is_never_read_whole(tmp_path: Path) -> None:
    arrays = {"w": np.zeros((1000, 8), np.float32)}
    checkpoint = MemoryCheckpoint(arrays)
    reads: list[int] = []

    def read_rows(name: str, begin: int, end: int) -> Array:
        reads.append(end - begin)
        return arrays[name][begin:end]

    checkpoint.read_rows = read_rows  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameter_files, "CHUNK_BYTES", 320)
        copy_parameters(tmp_path, bind_parameters(specs_of(arrays), checkpoint))
    assert sum(reads) == 1000
    assert max(reads) == 10


def test_linked_files_are_the_checkpoints_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    save_file(dict(ARRAYS), tmp_path / "model" / "model.safetensors")
    source = bind_parameters(specs_of(ARRAYS), SafetensorsCheckpoint(tmp_path / "model"))
    stored = link_parameters(tmp_path / "out", source)
    assert set(stored.file_of.values()) == {"params-00001-of-00001.safetensors"}
    linked = tmp_path / "out" / "params-00001-of-00001.safetensors"
    assert linked.samefile(tmp_path / "model" / "model.safetensors")
    assert stored.files[linked.name].sha256 is None


def test_weights_of_another_type_cannot_be_linked(tmp_path: Path) -> None:
    save_file({"w": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    source = bind_parameters([ParameterSpec("w", (2, 2), BF16)], SafetensorsCheckpoint(tmp_path))
    with pytest.raises(FuriosaLLMError, match="BLD008") as caught:
        link_parameters(tmp_path, source)
    assert "`w`" in caught.value.cause
    assert "--weights copy" in caught.value.next_step


def test_weights_that_are_no_safetensors_cannot_be_linked(tmp_path: Path) -> None:
    with pytest.raises(FuriosaLLMError, match="BLD008"):
        link_parameters(tmp_path, bound(ARRAYS))


def test_links_do_not_cross_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    save_file(dict(ARRAYS), tmp_path / "model.safetensors")
    source = bind_parameters(specs_of(ARRAYS), SafetensorsCheckpoint(tmp_path))
    with pytest.raises(FuriosaLLMError, match="BLD008"):
        link_parameters(tmp_path, source)

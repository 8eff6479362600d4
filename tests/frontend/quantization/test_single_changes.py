"""Any change of one weight or scale shows: in an error, the description, the ledger or the values.

The one invariance is by name: quantizers of a Furiosa directory that belong to no known operand
(`matmul*._input_0_quantizer`) say nothing that is used, and the ledger says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from furiosa_directory import quantizers_of, write_furiosa_directory
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from memory_checkpoint import MemoryCheckpoint
from model_zoo import make_model
from numpy.typing import NDArray

from furiosa_llm.artifact.ledger import make_ledger
from furiosa_llm.artifact.schema import to_json
from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.checkpoint import Checkpoint
from furiosa_llm.frontend.quantization.codes import check_codes
from furiosa_llm.frontend.quantization.dequantize import dequantize
from furiosa_llm.frontend.quantization.furiosa import FuriosaDirectory
from furiosa_llm.frontend.quantization.furiosa import describe as describe_furiosa
from furiosa_llm.frontend.quantization.reader import read_quantization
from furiosa_llm.frontend.quantization.scales import (
    ReadScale,
    check_scale_values,
    described_scales,
    multipliers,
)
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint
from furiosa_llm.models.quantization import Quantization

Zoo = Callable[[str], Path]
Array = NDArray[Any]
KINDS = [
    "ct-tensor", "ct-channel", "ct-block", "ct-group", "ct-partial", "ct-fused", "ct-tied",
    "fine-grained", "fine-grained-e8m0", "autofp8", "autofp8-kv", "modelopt-fp8",
    "modelopt-fp8_kv", "modelopt-per_channel_per_token", "modelopt-block",
]  # fmt: skip


def outcome(describe: Callable[[], Quantization], checkpoint: Checkpoint, read: ReadScale) -> str:
    """The error, or everything that an import would use, in one text."""
    try:
        found = describe()
        check_scale_values(found, checkpoint.path, read)
        made = make_ledger(found, checkpoint.tensors, {}, check_codes(found, checkpoint))
    except CompileError as error:
        return str(error)
    digest = hashlib.sha256()
    for scale in described_scales(found).values():
        digest.update(multipliers(scale, read).tobytes())
    for linear in found.linears:
        if linear.codes_are_stored:
            codes = checkpoint.read(linear.weight)
            values = dequantize(codes, linear.scheme, multipliers(linear.scale, read))
            digest.update(values.tobytes())
    return f"{found}\n{to_json(made)}\n{digest.hexdigest()}"


def check_seen(name: str, said: str, said_before: str) -> None:
    """The outcome is another; if it is an error, it names what was changed, or its module."""
    assert said != said_before
    assert not said.startswith("error") or name.rpartition(".")[0] in said


# --- the changes ---


def times_1_7(array: Array) -> Array:
    """Codes stay in their range."""
    values = array.astype(np.float32) * np.float32(1.7)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        values = values.clip(-448, 448)
    return values.astype(array.dtype)


class Change(NamedTuple):
    """What happens to one tensor."""

    name: str
    what: str
    new_name: str
    new_rank: int
    """Of what is reshaped: a row, a column, with a dimension more, or flat."""


def changes(names: Iterable[str]) -> st.SearchStrategy[Change]:
    def change_of(name: str) -> st.SearchStrategy[Change]:
        return st.builds(
            Change,
            st.just(name),
            st.sampled_from(["delete", "rename", "reshape", "zero", "scale"]),
            st.sampled_from([f"{name}_", f"other.{name}", name.replace(".0.", ".7.")]),
            st.integers(0, 3),
        )

    return st.sampled_from(sorted(names)).flatmap(change_of)


def changed(arrays: Mapping[str, Array], change: Change) -> dict[str, Array]:
    """The same tensors but for one. Rejects changes without effect."""
    array = arrays[change.name]
    rest = {key: value for key, value in arrays.items() if key != change.name}
    match change.what:
        case "delete":
            return rest
        case "rename":
            assume(change.new_name not in arrays)
            return {**rest, change.new_name: array}
        case "reshape":
            shapes = [(1, array.size), (array.size, 1), (*array.shape, 1), (array.size,)]
            new = array.reshape(shapes[change.new_rank])
        case "zero":
            new = np.zeros(array.shape, array.dtype)
        case _:
            new = times_1_7(array)
    assume((new.shape, new.tobytes()) != (array.shape, array.tobytes()))
    return {**rest, change.name: new}


# --- checkpoints ---


def checkpoint_outcome(directory: Path, arrays: Mapping[str, Array]) -> str:
    checkpoint = MemoryCheckpoint(arrays)

    def describe() -> Quantization:
        found = read_quantization(directory, checkpoint)
        assert found is not None
        return found

    return outcome(describe, checkpoint, checkpoint.read)


@cache
def outcome_of_all(directory: Path) -> str:
    whole = MemoryCheckpoint.copy_of(SafetensorsCheckpoint(directory))
    return checkpoint_outcome(directory, whole.arrays)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_change_of_a_checkpoint_goes_unseen(
    quantized: Zoo, kind: str, data: st.DataObject
) -> None:
    directory = quantized(kind)
    whole = MemoryCheckpoint.copy_of(SafetensorsCheckpoint(directory))
    found = read_quantization(directory, whole)
    assert found is not None
    names = [*described_scales(found), *(linear.weight for linear in found.linears)]
    change = data.draw(changes(names))
    said = checkpoint_outcome(directory, changed(whole.arrays, change))
    check_seen(change.name, said, outcome_of_all(directory))


# --- Furiosa's directories ---


def furiosa_outcome(path: Path, ranges: Mapping[str, Array], model: SafetensorsCheckpoint) -> str:
    write_furiosa_directory(path, {name: {"amax": amax} for name, amax in ranges.items()})
    directory = FuriosaDirectory.open(path)
    return outcome(lambda: describe_furiosa(directory, model), model, directory.read)


def is_used(quantizer: str) -> bool:
    return not (quantizer.startswith("matmul") and quantizer.endswith("._input_0_quantizer"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsCheckpoint:
    return SafetensorsCheckpoint(make_model("llama", tmp_path_factory.mktemp("model")))


@given(data=st.data())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_change_of_a_furiosa_directory_goes_unseen(
    tmp_path: Path, model: SafetensorsCheckpoint, data: st.DataObject
) -> None:
    ranges = {name: np.asarray(q["amax"]) for name, q in quantizers_of(model, layers=2).items()}
    change = data.draw(changes(filter(is_used, ranges)))
    said = furiosa_outcome(tmp_path, changed(ranges, change), model)
    check_seen(change.name, said, furiosa_outcome(tmp_path, ranges, model))


def test_quantizers_of_no_known_operand_change_nothing(
    tmp_path: Path, model: SafetensorsCheckpoint
) -> None:
    ranges = {name: np.asarray(q["amax"]) for name, q in quantizers_of(model, layers=2).items()}
    unused = {name: amax * 2 for name, amax in ranges.items() if not is_used(name)}
    said = furiosa_outcome(tmp_path, ranges, model)
    assert furiosa_outcome(tmp_path, {**ranges, **unused}, model) == said
    assert f"{len(unused)} quantizers belong to no known operand" in said

"""Any change of one weight or scale shows: in an error, the description, the ledger or the values.

The one invariance is by name: quantizers of a Furiosa directory that belong to no known operand
(`matmul*._input_0_quantizer`) say nothing that is used, and the ledger says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

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


def reshaped(array: Array, how: int) -> Array:
    """As one row, as one column, with a dimension more, or flat."""
    shapes = [(1, array.size), (array.size, 1), (*array.shape, 1), (array.size,)]
    return array.reshape(shapes[how])


@st.composite
def changes(
    draw: st.DrawFn, arrays: Mapping[str, Array], names: list[str]
) -> tuple[str, dict[str, Array]]:
    """One of the names, and the same tensors but for that one, which is missing, renamed, reshaped,
    zero or 1.7 times as large."""
    name = draw(st.sampled_from(names))
    array, rest = arrays[name], {key: value for key, value in arrays.items() if key != name}
    match draw(st.sampled_from(["delete", "rename", "reshape", "zero", "scale"])):
        case "delete":
            return name, rest
        case "rename":
            other = draw(st.sampled_from([f"{name}_", f"other.{name}", name.replace(".0.", ".7.")]))
            assume(other not in arrays)
            return name, {**rest, other: array}
        case "reshape":
            changed = reshaped(array, draw(st.integers(0, 3)))
        case "zero":
            changed = np.zeros(array.shape, array.dtype)
        case _:
            changed = times_1_7(array)
    assume((changed.shape, changed.tobytes()) != (array.shape, array.tobytes()))
    return name, {**rest, name: changed}


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
    name, changed = data.draw(changes(whole.arrays, names))
    check_seen(name, checkpoint_outcome(directory, changed), outcome_of_all(directory))


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
    name, changed = data.draw(changes(ranges, [name for name in ranges if is_used(name)]))
    said = furiosa_outcome(tmp_path, changed, model)
    check_seen(name, said, furiosa_outcome(tmp_path, ranges, model))


def test_quantizers_of_no_known_operand_change_nothing(
    tmp_path: Path, model: SafetensorsCheckpoint
) -> None:
    ranges = {name: np.asarray(q["amax"]) for name, q in quantizers_of(model, layers=2).items()}
    unused = {name: amax * 2 for name, amax in ranges.items() if not is_used(name)}
    said = furiosa_outcome(tmp_path, ranges, model)
    assert furiosa_outcome(tmp_path, {**ranges, **unused}, model) == said
    assert f"{len(unused)} quantizers belong to no known operand" in said

"""A change of any one tensor of a quantised model shows in what its artifact computes, or stops it.

Binaries depend on names, shapes and types alone, so one artifact without weights serves all
changes. `tests/frontend/quantization/test_single_changes.py` has the same for what a build reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from compressed_tensors.quantization import preset_name_to_scheme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_zoo import FP8_CACHE, WEIGHTS_FILE, write_compressed_tensors
from safetensors.numpy import save_file
from sequences import prefill_inputs

from furiosa_llm import ArtifactBuilder
from furiosa_llm.artifact.reader import Artifact, read_artifact
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint
from furiosa_llm.llm.device import SimulatedDevice
from furiosa_llm.models.config_types import Bucket

Array = np.ndarray[Any, Any]

PROMPT = [5, 17, 20, 13, 8]
BUCKET = Bucket.prefill(1, 16)
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-30,  # so small that a norm takes every factor out of its input
}
ATTENTION = "model.layers.0.self_attn"


class Given(NamedTuple):
    artifact: Artifact
    tensors: Mapping[str, Array]
    logits: bytes


@pytest.fixture(scope="module", params=["FP8", "FP8_DYNAMIC"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Keys and queries of Qwen3 pass norms; inputs are static or dynamic, caches hold codes."""
    path = tmp_path_factory.mktemp("changes")
    groups = {"group_0": preset_name_to_scheme(request.param, ["Linear"])}
    model = write_compressed_tensors(
        path / "model", groups, kind="qwen3", kv_cache_scheme=FP8_CACHE, **SIZES
    )
    builder = ArtifactBuilder(
        model, prefill_buckets=[(1, 16)], calculate_logit_only_for_last_token=False
    )
    builder.build(path / "artifact", weights="skip")
    artifact = read_artifact(path / "artifact")
    stored = SafetensorsCheckpoint(model)
    tensors = {name: np.array(stored.read(name)) for name in stored.tensors}
    return Given(artifact, tensors, logits(artifact, model))


def logits(artifact: Artifact, weights: Path) -> bytes:
    """Of every token of the prompt. Raises: what `Artifact.parameters` does."""
    source = artifact.parameters(weights)
    device = SimulatedDevice(artifact, source, slots=17, machine=None)
    found = device.run(BUCKET, prefill_inputs(PROMPT, 16))
    return found[0, : len(PROMPT)].tobytes()


def outcome(built: Given, tensors: Mapping[str, Array], directory: Path) -> bytes | FuriosaLLMError:
    """Logits with these tensors, or why there are none."""
    save_file(dict(tensors), directory / WEIGHTS_FILE)
    try:
        return logits(built.artifact, directory)
    except FuriosaLLMError as error:
        return error


def times(array: Array, factor: float) -> Array:
    """Codes stay in their range."""
    values = array.astype(np.float32) * np.float32(factor)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        values = values.clip(-448, 448)
    return values.astype(array.dtype)


CHANGES: Mapping[str, Callable[[str, Array], Mapping[str, Array]]] = {
    "deleted": lambda name, array: {},
    "renamed": lambda name, array: {f"other.{name}": array},
    "reshaped": lambda name, array: {name: array.reshape(-1, 1, 1)},
    "zero": lambda name, array: {name: np.zeros_like(array)},
    "times 1.7": lambda name, array: {name: times(array, 1.7)},
}


@given(data=st.data(), change=st.sampled_from(sorted(CHANGES)))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_change_of_a_tensor_goes_unseen(
    built: Given, tmp_path: Path, change: str, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(built.tensors)))
    rest = {key: array for key, array in built.tensors.items() if key != name}
    changed = {**rest, **CHANGES[change](name, built.tensors[name])}
    found = outcome(built, changed, tmp_path)
    assert found != built.logits
    if isinstance(found, FuriosaLLMError):
        assert f"`{name}`" in found.cause
    else:
        assert change in ("zero", "times 1.7")


INVARIANCES = (f"{ATTENTION}.q_proj.weight_scale", f"{ATTENTION}.k_proj.weight_scale")
"""Scales of what nothing reads but a norm: it takes out every factor that rounds nothing."""


@pytest.mark.parametrize("name", INVARIANCES)
def test_a_power_of_two_before_a_norm_changes_nothing(
    built: Given, tmp_path: Path, name: str
) -> None:
    changed = {**built.tensors, name: times(built.tensors[name], 4)}
    assert outcome(built, changed, tmp_path) == built.logits

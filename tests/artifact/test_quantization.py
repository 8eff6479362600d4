"""Which description of quantised weights a build works with, and that it refuses what it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from furiosa_directory import quantizers_of, write_furiosa_directory
from model_zoo import make_model

from furiosa_llm.artifact.builder import ArtifactBuilder
from furiosa_llm.artifact.quantization import open_directory, open_quantization
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.frontend.source import open_model

LAYERS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("zoo") / "tiny-llama")


@pytest.fixture(scope="module")
def directory(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Furiosa directory about `model`."""
    quantizers = quantizers_of(open_model(model).checkpoint, LAYERS)
    return write_furiosa_directory(tmp_path_factory.mktemp("furiosa"), quantizers)


@pytest.fixture(scope="module")
def config_only(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config-only")
    (path / "config.json").write_bytes((model / "config.json").read_bytes())
    return path


def test_a_plain_model_has_no_description(model: Path, config_only: Path) -> None:
    assert open_quantization(open_model(model), None) is None
    assert open_quantization(open_model(config_only, weights=False), None) is None


def test_a_directory_beside_the_model_says_how(model: Path, directory: Path) -> None:
    found = open_quantization(open_model(model), open_directory(directory))
    assert found is not None
    assert found.format == "furiosa"
    assert len(found.linears) == 7 * LAYERS
    assert len(found.caches) == LAYERS


def test_without_weights_it_says_the_same(model: Path, config_only: Path, directory: Path) -> None:
    beside = open_directory(directory)
    with_weights = open_quantization(open_model(model), beside)
    without = open_quantization(open_model(config_only, weights=False), beside)
    assert with_weights is not None
    assert without is not None
    assert set(without.linears) == set(with_weights.linears)  # files have an order of their own
    assert without.caches == with_weights.caches


def test_a_directory_of_another_model_is_refused(
    model: Path, directory: Path, tmp_path: Path
) -> None:
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FuriosaLLMError, match="QNT003"):
        open_quantization(open_model(tmp_path, weights=False), open_directory(directory))


def test_quantised_weights_do_not_become_plain_ones_in_silence(
    model: Path, directory: Path, tmp_path: Path
) -> None:
    builder = ArtifactBuilder(
        model, prefill_buckets=[(1, 16)], quantize_artifact_path=str(directory)
    )
    with pytest.raises(FuriosaLLMError, match="FRO006") as caught:
        builder.build(tmp_path / "out", weights="skip")
    assert caught.value.at == str(directory)
    assert not (tmp_path / "out").exists()

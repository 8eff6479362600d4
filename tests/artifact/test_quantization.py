"""Which description of quantised weights a build works with, and that it refuses what it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import preset_name_to_scheme
from furiosa_directory import quantizers_of, write_furiosa_directory
from model_zoo import make_model
from quantized_zoo import edit_config, write_autofp8, write_compressed_tensors
from safetensors.torch import load_file, save_file

from furiosa_llm.artifact.builder import ArtifactBuilder
from furiosa_llm.artifact.ledger import check_complete, check_losses, show_losses
from furiosa_llm.artifact.quantization import ModelTensors, open_directory, open_tensors
from furiosa_llm.artifact.reader import read_artifact
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.frontend.parameters import BoundParameters, ParameterSpec
from furiosa_llm.frontend.source import open_model
from furiosa_llm.models.quantization import Quantization, QuantizedLinear

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
    assert open_tensors(open_model(model), None).described is None
    assert open_tensors(open_model(config_only, weights=False), None).described is None


def test_a_directory_beside_the_model_says_how(model: Path, directory: Path) -> None:
    found = open_tensors(open_model(model), open_directory(directory))
    assert found.described is not None
    assert found.compiled is not None
    assert found.described.format == "furiosa"
    assert len(found.described.linears) == 7 * LAYERS
    assert len(found.described.caches) == LAYERS
    assert all(linear.codes_are_stored for linear in found.compiled.linears)


def by_module(quantization: Quantization | None) -> tuple[dict[str, QuantizedLinear], Any, Any]:
    """A file has its tensors in another order than the model."""
    assert quantization is not None
    linears = {linear.module: linear for linear in quantization.linears}
    return linears, quantization.caches, quantization.assumptions


def test_without_weights_it_says_the_same(model: Path, config_only: Path, directory: Path) -> None:
    beside = open_directory(directory)
    with_weights = open_tensors(open_model(model), beside)
    without = open_tensors(open_model(config_only, weights=False), beside)
    assert by_module(without.described) == by_module(with_weights.described)
    assert by_module(without.compiled) == by_module(with_weights.compiled)


def test_a_directory_of_another_model_is_refused(
    model: Path, directory: Path, tmp_path: Path
) -> None:
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FuriosaLLMError, match="QNT003"):
        open_tensors(open_model(tmp_path, weights=False), open_directory(directory))


def test_a_model_is_not_quantised_twice(directory: Path, tmp_path: Path) -> None:
    source = open_model(write_autofp8(tmp_path / "model"))
    with pytest.raises(FuriosaLLMError, match="already, as autofp8") as caught:
        open_tensors(source, open_directory(directory))
    assert caught.value.code == "QNT004"


def test_a_tied_head_with_codes_of_its_own_is_refused(tmp_path: Path) -> None:
    """As compressed-tensors writes it: with embeddings that are other numbers."""
    groups = {"group_0": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])}
    path = write_compressed_tensors(tmp_path / "model", groups, kind="llama_tied", ignore=())
    with pytest.raises(
        FuriosaLLMError, match=r"says it is `model\.embed_tokens\.weight`"
    ) as caught:
        open_tensors(open_model(path), None)
    assert caught.value.code == "QNT004"
    assert "`tie_word_embeddings` to false" in caught.value.next_step
    edit_config(path, tie_word_embeddings=False)
    found = open_tensors(open_model(path), None).described
    assert found is not None
    assert "lm_head" in by_module(found)[0]


# --- the ledger of a build ---


def parameters_of(tensors: ModelTensors) -> BoundParameters:
    """As a model that uses every tensor declares them."""
    infos = tensors.checkpoint.tensors.values()
    return tensors.bind([ParameterSpec(info.name, info.shape, info.dtype) for info in infos])


def test_every_tensor_has_a_row(tmp_path: Path) -> None:
    tensors = open_tensors(open_model(write_autofp8(tmp_path / "model")), None)
    ledger = tensors.ledger(parameters_of(tensors))
    check_complete(ledger, tensors.checkpoint.tensors, "memory")
    assert {row.verdict for row in ledger.rows} == {"exact"}
    assert check_losses(ledger, []) == ()


def test_a_directory_beside_the_model_is_unverified(model: Path, directory: Path) -> None:
    tensors = open_tensors(open_model(model), open_directory(directory))
    ledger = tensors.ledger(parameters_of(tensors))
    check_complete(ledger, tensors.source.checkpoint.tensors, "memory")
    (line,) = show_losses(check_losses(ledger, []))
    assert line.startswith("14 tensors are unverified (BF16, such as model.layers.0.mlp.down_proj")


def test_a_bad_scale_stops_the_build(tmp_path: Path) -> None:
    path = write_autofp8(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"] *= 0
    save_file(tensors, path / "model.safetensors")
    opened = open_tensors(open_model(path), None)
    with pytest.raises(FuriosaLLMError, match=r"up_proj\.weight_scale` is zero") as caught:
        opened.ledger(parameters_of(opened))
    assert caught.value.code == "QNT005"


def test_a_build_writes_the_ledger(model: Path, tmp_path: Path) -> None:
    builder = ArtifactBuilder(model, prefill_buckets=[(1, 16)])
    builder.build(tmp_path / "out")
    ledger = read_artifact(tmp_path / "out").ledger
    assert ledger is not None
    assert ledger.source == "plain"
    check_complete(ledger, open_model(model).checkpoint.tensors, "out")

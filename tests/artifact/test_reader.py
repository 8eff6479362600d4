from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_artifact import ARRAYS, BUCKETS, write_artifact

from furiosa_llm.artifact.reader import read_artifact, running_version
from furiosa_llm.artifact.schema import FORMAT_VERSION
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.models.config_types import Bucket

Change = Callable[[dict[str, Any]], object]


def edit_json(path: Path, change: Change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    artifact = read_artifact(write_artifact(tmp_path / "a"))
    assert artifact.buckets == BUCKETS
    assert artifact.vocabulary_size == 8
    assert {bucket.name for bucket in artifact.buckets} == {
        program.bucket for program in artifact.programs().values()
    }
    assert artifact.runtime_config.decode_buckets == ((1, 32), (4, 32))
    source = artifact.parameters()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(source(name), array)


def test_descriptions_follow_the_2025_1_schema(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    artifact = json.loads((path / "artifact.json").read_text())
    assert set(artifact) == {
        "metadata",
        "devices",
        "generator_config",
        "hf_config",
        "model_metadata",
        "model_rewriting_config",
        "parallel_config",
        "pipelines",
        "pipeline_metadata_list",
        "max_prompt_len",
    }
    assert [pipeline["name"] for pipeline in artifact["pipelines"]] == [
        "transformers.TinyForCausalLM-kv0-b1-attn16",
        "transformers.TinyForCausalLM-kv31-b1-attn32",
        "transformers.TinyForCausalLM-kv31-b4-attn32",
    ]
    assert artifact["pipelines"][1]["blobs"] == {"decode-1-32": None}
    assert artifact["pipeline_metadata_list"] == [{"output_logits_size": 1}] * 3
    assert artifact["max_prompt_len"] == 16
    assert set(json.loads((path / "runtime_config.json").read_text())) == {
        "npu_queue_limit",
        "max_processing_samples",
        "spare_blocks_ratio",
        "is_offline",
        "paged_attention_num_blocks",
        "prefill_buckets",
        "decode_buckets",
        "prefill_chunk_size",
    }


def test_two_builds_of_the_same_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = write_artifact(tmp_path / "a"), write_artifact(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_the_id_follows_the_contents(tmp_path: Path) -> None:
    with_weights = read_artifact(write_artifact(tmp_path / "a"))
    without = read_artifact(write_artifact(tmp_path / "b", weights="skip"))
    ids = {a.description.metadata.artifact_id for a in (with_weights, without)}
    assert len(ids) == 2


def test_the_manifest_lists_every_other_file(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    listed = set(read_artifact(path).manifest.files)
    assert {file.name for file in path.iterdir()} == listed | {"manifest.json"}


@pytest.mark.parametrize("make", [lambda path: None, Path.touch, Path.mkdir])
def test_what_is_no_artifact_is_said_so(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "a")
    with pytest.raises(FuriosaLLMError, match="ART001"):
        read_artifact(tmp_path / "a")


def test_an_artifact_of_another_format_names_both_versions(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    edit_json(
        path / "manifest.json",
        lambda content: content.update(format_version=99, built_by="other 9", new_key=1),
    )
    with pytest.raises(FuriosaLLMError, match="ART005") as caught:
        read_artifact(path)
    assert caught.value.message == (
        f"the artifact was built by other 9, you run {running_version()}"
    )


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "{}", f'{{"format_version": {FORMAT_VERSION}, "built_by": "x"}}'],
)
def test_a_broken_manifest_is_a_coded_error(tmp_path: Path, text: str) -> None:
    path = write_artifact(tmp_path / "a")
    (path / "manifest.json").write_text(text)
    with pytest.raises(FuriosaLLMError, match="ART006"):
        read_artifact(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["binaries"][0].update(bucket="prefill:x"),
        lambda content: content["parameters"]["model.norm.weight"].update(dtype="float3"),
    ],
)
def test_manifest_values_without_a_meaning_are_a_coded_error(
    tmp_path: Path, change: Change
) -> None:
    path = write_artifact(tmp_path / "a")
    edit_json(path / "manifest.json", change)
    with pytest.raises(FuriosaLLMError, match="ART006"):
        read_artifact(path)


def test_a_flipped_bit_in_a_binary_is_found(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    binary = path / "decode-1-32.vedf"
    data = bytearray(binary.read_bytes())
    data[100] ^= 1
    binary.write_bytes(data)
    artifact = read_artifact(path)
    artifact.program(Bucket.prefill(1, 16))  # other files are still of use
    with pytest.raises(FuriosaLLMError, match="ART007") as caught:
        artifact.program(Bucket.decode(1, 32))
    assert caught.value.at == str(binary)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"short")])
def test_missing_and_truncated_files_are_found(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    path = write_artifact(tmp_path / "a")
    damage(path / "params-00001-of-00001.safetensors")
    with pytest.raises(FuriosaLLMError, match="ART007"):
        read_artifact(path).parameters()


def test_a_bucket_that_was_not_built_is_refused_with_those_that_were(tmp_path: Path) -> None:
    artifact = read_artifact(write_artifact(tmp_path / "a"))
    with pytest.raises(FuriosaLLMError, match="ART008") as caught:
        artifact.program(Bucket.decode(2, 32))
    assert "decode:4,32" in caught.value.cause


def test_without_weights_parameters_come_from_elsewhere(tmp_path: Path) -> None:
    artifact = read_artifact(write_artifact(tmp_path / "a", weights="skip"))
    with pytest.raises(FuriosaLLMError, match="RUN006") as caught:
        artifact.parameters()
    assert "--weights-from" in caught.value.next_step

    (tmp_path / "model").mkdir()
    save_file(dict(ARRAYS), tmp_path / "model" / "model.safetensors")
    with_weights = write_artifact(tmp_path / "b")
    for directory in (tmp_path / "model", with_weights):
        source = artifact.parameters(directory)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(source(name), array)


def test_weights_that_do_not_fit_are_refused_with_all_reasons(tmp_path: Path) -> None:
    artifact = read_artifact(write_artifact(tmp_path / "a", weights="skip"))
    (tmp_path / "model").mkdir()
    other = {"model.norm.weight": np.zeros(5, np.float32)}
    save_file(other, tmp_path / "model" / "model.safetensors")
    with pytest.raises(FuriosaLLMError, match="CKP005") as caught:
        artifact.parameters(tmp_path / "model")
    assert "model.embed_tokens.weight" in caught.value.cause
    assert "[5]" in caught.value.cause


def test_a_tied_parameter_may_be_stored_under_its_other_name(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a", weights="skip")
    embedding = "model.embed_tokens.weight"
    edit_json(
        path / "manifest.json", lambda content: content.update(tied={"lm_head.weight": embedding})
    )
    (tmp_path / "model").mkdir()
    stored = {("lm_head.weight" if n == embedding else n): array for n, array in ARRAYS.items()}
    save_file(stored, tmp_path / "model" / "model.safetensors")
    source = read_artifact(path).parameters(tmp_path / "model")
    np.testing.assert_array_equal(source(embedding), ARRAYS[embedding])

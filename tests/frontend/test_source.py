"""Opening a model: every kind of place, and a coded error for every way to get it wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from gguf_zoo import write_gguf
from tokenizers import Tokenizer

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.block_count import declared_blocks
from furiosa_llm.frontend.source import open_model


def test_a_directory_opens(zoo: Callable[[str], Path]) -> None:
    source = open_model(zoo("qwen3"))
    assert source.kind == "huggingface"
    assert source.config.architectures == ["Qwen3ForCausalLM"]
    assert source.config.dtype == torch.bfloat16
    assert "model.norm.weight" in source.checkpoint.tensors
    assert {"config.json", "generation_config.json"} == set(source.config_files)
    assert {"tokenizer.json", "tokenizer_config.json"} == set(source.tokenizer_files)


def test_a_gguf_file_opens_under_any_name(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("model.gguf", "blob"):
        source = open_model(write_gguf(zoo("llama"), tmp_path / name))
        assert source.kind == "gguf"
        assert set(source.config_files) == {"config.json", "generation_config.json"}


def test_the_number_of_blocks_is_known_from_the_description(
    zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    assert declared_blocks(zoo("llama")) == open_model(zoo("llama")).config.num_hidden_layers
    gguf = write_gguf(zoo("llama"), tmp_path / "model.gguf")
    assert declared_blocks(gguf) == open_model(gguf).config.num_hidden_layers


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"num_hidden_layers": "four"}'])
def test_a_description_without_a_number_of_blocks_gives_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert declared_blocks(tmp_path) is None


def test_a_source_knows_what_is_tied(zoo: Callable[[str], Path]) -> None:
    assert open_model(zoo("llama")).tied == {}
    expected = {"lm_head.weight": "model.embed_tokens.weight"}
    assert open_model(zoo("llama_tied")).tied == expected


@pytest.fixture
def config(zoo: Callable[[str], Path], tmp_path: Path) -> Path:
    """A directory with only a config.json."""
    shutil.copy(zoo("llama") / "config.json", tmp_path)
    return tmp_path / "config.json"


def test_a_config_alone_is_a_model(config: Path) -> None:
    source = open_model(config.parent)
    assert not source.has_weights
    assert source.tokenizer_files == {}
    with pytest.raises(CompileError) as caught:
        _ = source.checkpoint
    assert caught.value.code == "CKP001"


def change(config: Path, **fields: Any) -> None:
    """Set fields of config.json; None removes one."""
    changed = {**json.loads(config.read_text()), **fields}
    config.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))


def test_without_a_dtype_a_model_is_bf16(config: Path) -> None:
    change(config, dtype=None)
    assert open_model(config.parent).config.dtype == torch.bfloat16


def test_without_architectures_the_model_type_counts(config: Path) -> None:
    change(config, architectures=None)
    assert open_model(config.parent).config.architectures == ["LlamaForCausalLM"]


def test_reading_weights_needs_no_torch(zoo: Callable[[str], Path]) -> None:
    """An artifact can be given a checkpoint where nothing can be compiled."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from furiosa_llm.frontend import parameters, source\n"
        "from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint\n"
        "SafetensorsCheckpoint(Path(sys.argv[1])).read('model.norm.weight')\n"
        "print({'torch', 'transformers', 'xdsl'} & set(sys.modules))\n"
    )
    arguments = [sys.executable, "-c", program, str(zoo("llama"))]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


# --- hub ids ---


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_id_is_taken_from_the_cache(zoo: Callable[[str], Path], hub_cache: Path) -> None:
    cached = hub_cache / "models--owner--tiny-model"
    shutil.copytree(zoo("llama"), cached / "snapshots" / "abc123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc123")
    source = open_model("owner/tiny-model")
    assert source.name == "owner/tiny-model"
    assert source.has_weights


def test_a_hub_id_that_cannot_be_reached_is_named(hub_cache: Path) -> None:
    with pytest.raises(CompileError) as caught:
        open_model("owner/no-such-model")
    assert caught.value.code == "FRO002"
    assert caught.value.at == "owner/no-such-model"
    assert "local directory" in caught.value.next_step


# --- errors ---


@pytest.mark.parametrize("model", ["no-such-directory", "./no/such", "/a/b/c", "a/b/c", ""])
def test_what_is_no_model_is_refused(model: str, tmp_path: Path) -> None:
    path = model and str(tmp_path / "absent") if model.startswith("/") else model
    with pytest.raises(CompileError) as caught:
        open_model(path or str(tmp_path / "absent"))
    assert caught.value.code == "FRO001"


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"\x00" * 8)
    with pytest.raises(CompileError) as caught:
        open_model(file)
    assert caught.value.code == "FRO001"


def test_a_truncated_gguf_is_refused(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_gguf(zoo("llama"), tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CompileError) as caught:
        open_model(file)
    assert caught.value.code == "GGF001"


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        open_model(tmp_path)
    assert caught.value.code == "FRO003"


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"', "\xff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CompileError) as caught:
        open_model(tmp_path)
    assert caught.value.code == "FRO004"


@pytest.mark.parametrize("fields", [{"hidden_size": "many"}, {"num_attention_heads": 5}])
def test_a_config_with_impossible_values_is_refused(config: Path, fields: dict[str, Any]) -> None:
    change(config, **fields)
    with pytest.raises(CompileError) as caught:
        open_model(config.parent)
    assert caught.value.code == "FRO004"
    assert caught.value.at == str(config)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "frobnicator", "architectures": ["FrobForCausalLM"]}, "FrobForCausalLM"),
        ({"model_type": None, "architectures": None}, "None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "vit", "architectures": None}, "vit"),
    ],
)
def test_what_is_no_known_text_decoder_is_refused(
    config: Path, fields: dict[str, Any], named: str
) -> None:
    change(config, **fields)
    with pytest.raises(CompileError) as caught:
        open_model(config.parent)
    assert caught.value.code == "FRO005"
    assert f"`{named}`" in caught.value.message


def test_the_config_is_that_of_the_unquantised_model(config: Path) -> None:
    plain = open_model(config.parent).config
    change(config, quantization_config={"quant_method": "gptq", "bits": 4})
    found = open_model(config.parent).config
    assert not hasattr(found, "quantization_config")
    assert found.to_dict() == plain.to_dict()


# --- tokenizers ---


def test_an_older_tokenizer_becomes_a_tokenizer_json(config: Path) -> None:
    """GPT-2's vocab.json and merges.txt."""
    vocabulary = {token: index for index, token in enumerate(["a", "b", "ab", "<|endoftext|>"])}
    (config.parent / "vocab.json").write_text(json.dumps(vocabulary))
    (config.parent / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = json.dumps({"tokenizer_class": "GPT2Tokenizer"})
    (config.parent / "tokenizer_config.json").write_text(settings)
    files = open_model(config.parent).tokenizer_files
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).encode("abb").ids == [2, 1]


def test_a_tokenizer_that_cannot_be_read_is_refused(config: Path) -> None:
    (config.parent / "tokenizer.model").write_bytes(b"not a sentencepiece model")
    with pytest.raises(CompileError) as caught:
        _ = open_model(config.parent).tokenizer_files
    assert caught.value.code == "FRO009"

"""Tiny Llama models through GGUF and back: config, weights and refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from gguf_zoo import write_gguf
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import LLAMA3_ROPE, make_model
from transformers import AutoConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.checkpoint import Checkpoint
from furiosa_llm.frontend.gguf_config import llama3_divisors
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint
from furiosa_llm.frontend.source import ModelSource, open_model

Llama3 = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama_tied", {}),
    "head_dim": ("llama_head_dim", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": Llama3, "head_dim": 64}),
    "linear": ("llama", {"rope_parameters": {**Llama3, "rope_type": "linear", "factor": 2.0}}),
}


def convert(directory: Path, kind: str) -> tuple[Path, ModelSource]:
    """The Hugging Face directory, and the same model opened as GGUF."""
    zoo_kind, overrides = MODELS[kind]
    model = make_model(zoo_kind, directory / "model", **overrides)
    settings, tensors = {}, {}
    if kind == "linear":
        settings = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    if kind == "llama3":
        tensors["rope_freqs.weight"] = rope_divisors(model)
    path = write_gguf(model, directory / "model.gguf", settings=settings, tensors=tensors)
    return model, open_model(path)


def rope_divisors(model: Path) -> np.ndarray[Any, Any]:
    """By which transformers divides the frequencies: the tensor that llama.cpp stores."""
    config = AutoConfig.from_pretrained(model)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    dim = config.head_dim
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
    divisors: np.ndarray[Any, Any] = (plain / scaled).numpy().round(5)
    return divisors


@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_model_computes_the_same(tmp_path: Path, kind: str) -> None:
    model, source = convert(tmp_path, kind)
    original = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    restored: Any = LlamaForCausalLM(source.config)
    restored.to(torch.float32)
    load(restored, source.checkpoint)
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        found, expected = restored(ids).logits, original(ids).logits
    # The same f32 program but for RoPE's frequencies, whose divisors a file may have rounded.
    # Logits are below 1: 16 roundings of 2**-24.
    torch.testing.assert_close(found, expected, rtol=0, atol=2.0**-20)


def load(model: Any, checkpoint: Checkpoint) -> None:
    state = {n: torch.tensor(checkpoint.read(n).astype(np.float32)) for n in checkpoint.tensors}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()


@pytest.mark.parametrize("kind", MODELS)
def test_the_config_is_restored(tmp_path: Path, kind: str) -> None:
    model, source = convert(tmp_path, kind)
    expected, found = AutoConfig.from_pretrained(model).to_dict(), source.config.to_dict()
    ours = {key for key in expected if expected[key] != found[key]}
    # A GGUF file has no such fields, or takes the ids from its tokenizer, which is missing here.
    ours -= {"bos_token_id", "eos_token_id", "_name_or_path"}
    rope = ("rope_type", "rope_theta", "factor")
    if kind == "linear":
        ours -= {"rope_parameters"}  # which holds llama3's fields beside its own
    assert ours == set()
    for key in rope:
        assert found["rope_parameters"].get(key) == expected["rope_parameters"].get(key)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised_rows_are_put_back(tmp_path: Path, name: str) -> None:
    """Dequantised by the library, rows in the Hugging Face order, rounded to bf16."""
    kind = GGMLQuantizationType[name]
    model = make_model("llama", tmp_path / "model")
    checkpoint = open_model(write_gguf(model, tmp_path / "m.gguf", kind)).checkpoint
    original = SafetensorsCheckpoint(model)
    for tensor, info in checkpoint.tensors.items():
        values = original.read(tensor).astype(np.float32)
        if values.ndim == 2:
            assert info.stored == name
            values = dequantize(quantize(values, kind), kind)
        np.testing.assert_array_equal(checkpoint.read(tensor), values.astype(ml_dtypes.bfloat16))


NAMES = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.bias"]


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("biases")
    model = make_model("llama", directory / "model", attention_bias=True)
    return open_model(write_gguf(model, directory / "m.gguf")).checkpoint


@given(st.sampled_from(NAMES), st.integers(0, 32), st.integers(0, 32))
def test_rows_are_rows_of_the_whole(with_biases: Checkpoint, name: str, a: int, b: int) -> None:
    begin, end = min(a, b), max(a, b)
    rows = with_biases.read_rows(name, begin, end)
    np.testing.assert_array_equal(rows, with_biases.read(name)[begin:end])


# --- refusals ---


def refused(tmp_path: Path, model: Path, **changes: Any) -> CompileError:
    with pytest.raises(CompileError) as caught:
        _ = open_model(write_gguf(model, tmp_path / "m.gguf", **changes)).checkpoint.tensors
    assert caught.value.at == str(tmp_path / "m.gguf")
    return caught.value


def test_another_architecture_is_refused(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    error = refused(tmp_path, zoo("llama"), architecture="gemma2")
    assert error.code == "GGF002"
    assert "`gemma2`" in error.cause


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"expert_count": 8}, "`llama.expert_count` = 8"),
        ({"attention.sliding_window": 4096}, "`llama.attention.sliding_window` = 4096"),
        ({"rope.scaling.type": "yarn"}, "`llama.rope.scaling.type` = 'yarn'"),
        ({"rope.dimension_count": 8}, "differs from the head size 16"),
        ({"attention.value_length": 32}, "differs from the head size 16"),
        ({"attention.head_count_kv": [2, 1]}, "not one number for all layers"),
        ({"block_count": 0}, "is not positive"),
        ({"logit_scale": 0.5}, "the setting `llama.logit_scale` = 0.5 is unknown"),
    ],
)
def test_a_setting_that_cannot_be_represented_is_refused(
    zoo: Callable[[str], Path], tmp_path: Path, settings: Mapping[str, Any], reason: str
) -> None:
    error = refused(tmp_path, zoo("llama"), settings=settings)
    assert error.code == "GGF002"
    assert reason in error.cause


def test_all_settings_are_refused_at_once(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    settings = {"expert_count": 8, "pooling_type": 1, "rope.scaling.type": "longrope"}
    error = refused(tmp_path, zoo("llama"), settings=settings)
    assert all(key in error.cause for key in settings)


def test_other_rope_factors_than_llama3s_are_refused(
    zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    factors = np.linspace(1, 4, 8, dtype=np.float32)
    error = refused(tmp_path, zoo("llama"), tensors={"rope_freqs.weight": factors})
    assert error.code == "GGF002"
    assert "rope_freqs.weight" in error.cause


def test_every_unknown_tensor_is_named(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    one = np.ones(4, np.float32)
    extra = {"blk.0.ffn_gate_inp.weight": one, "v.patch_embd.weight": one}
    error = refused(tmp_path, zoo("llama"), tensors=extra)
    assert error.code == "GGF004"
    assert all(name in error.cause for name in extra)


def test_an_unknown_tensor_name_is_refused(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_model(write_gguf(zoo("llama"), tmp_path / "m.gguf"))
    with pytest.raises(CompileError) as caught:
        source.checkpoint.read("model.absent")
    assert caught.value.code == "CKP006"


def test_without_a_tokenizer_there_are_no_tokenizer_files(
    zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_model(write_gguf(zoo("llama"), tmp_path / "m.gguf"))
    assert source.tokenizer_files == {}
    assert source.has_weights


@pytest.mark.parametrize(("model", "pre"), [("llama", "default"), ("gpt2", "qwen2")])
def test_an_unknown_tokenizer_is_refused(
    zoo: Callable[[str], Path], tmp_path: Path, model: str, pre: str
) -> None:
    metadata = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": ["a b"],
    }
    error = refused(tmp_path, zoo("llama"), metadata=metadata)
    assert error.code == "GGF003"
    assert f"`{model if model != 'gpt2' else pre}`" in error.cause


@pytest.mark.parametrize(
    "lists",
    [
        {},
        {"tokens": ["a", "a"], "merges": ["a a"]},
        {"tokens": ["a"]},
        {"tokens": ["a", "b"], "merges": ["a b"]},
        {"tokens": ["a", "b"], "merges": ["ab"]},
    ],
)
def test_a_broken_tokenizer_is_refused(
    zoo: Callable[[str], Path], tmp_path: Path, lists: Mapping[str, list[str]]
) -> None:
    metadata = {"model": "gpt2", "pre": "smollm", **lists}
    named = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    assert refused(tmp_path, zoo("llama"), metadata=named).code == "GGF003"


def test_llama3_divisors_are_those_of_transformers() -> None:
    """At both ends and in between."""
    scaling = {k: v for k, v in Llama3.items() if k not in ("rope_type", "rope_theta")}
    divisors = llama3_divisors(500000.0, 128, **scaling)  # type: ignore[arg-type]
    assert divisors.min() == 1.0
    assert divisors.max() == 8.0
    assert ((divisors > 1.01) & (divisors < 7.99)).any()

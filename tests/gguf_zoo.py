"""Write a tiny Llama directory as a GGUF file, the way llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from furiosa_llm.frontend.gguf_checkpoint import BLOCK_NAMES, MODEL_NAMES
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint

MODULES = {name: gguf for gguf, name in {**MODEL_NAMES, **BLOCK_NAMES}.items()}


def write_gguf(
    model: Path,
    path: Path,
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    architecture: str = "llama",
    settings: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """Matrices in `quantization`, the rest in f32; no tokenizer unless `metadata` has one.

    `settings` are `llama.*` keys, `tensors` more tensors under GGUF names.
    """
    config = json.loads((model / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    for key, value in {**_settings(config), **(settings or {})}.items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    checkpoint = SafetensorsCheckpoint(model)
    for name in checkpoint.tensors:
        values = checkpoint.read(name).astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            kind = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            values = _interleave(values, config[kind])
        stored = quantization if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), quantize(values, stored), raw_dtype=stored)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    module, _, kind = name.rpartition(".")
    if module in MODULES:
        return f"{MODULES[module]}.{kind}"
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{MODULES[inner]}.{kind}"


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
        "vocab_size": config["vocab_size"],
    }


def _interleave(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The two halves of each head's rows, one from each in turn."""
    rows, *rest = values.shape
    halves = values.reshape(heads, 2, rows // heads // 2, *rest)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if key == "general.alignment":
        writer.add_custom_alignment(value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)

"""Configs as publishers write them: each is imported exactly, or refused by name.

The fields are those of published `config.json` files; tensors are one layer, two blocks wide.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from memory_checkpoint import MemoryCheckpoint
from small_linears import ATTENTION, E4M3, Arrays, causes, linear

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.reader import read_quantization

BF16, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu
WIDTH, BLOCK = 256, 128
MODULES = tuple(f"{ATTENTION}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))

Fields = dict[str, Any]


def one(*shape: int, dtype: type = np.float32) -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


def quantized(**scales: np.ndarray[Any, Any]) -> Arrays:
    """Four linears with these scales each, and what no publisher quantises."""
    tensors: Arrays = {
        "model.embed_tokens.weight": one(WIDTH, WIDTH, dtype=BF16),
        "model.layers.0.input_layernorm.weight": one(WIDTH, dtype=BF16),
        "lm_head.weight": one(WIDTH, WIDTH, dtype=BF16),
    }
    for module in MODULES:
        tensors |= linear(module, (WIDTH, WIDTH), **scales)
    return tensors


STATIC_BF16 = quantized(weight_scale=one(1, dtype=BF16), input_scale=one(1, dtype=BF16))
CHANNEL = quantized(weight_scale=one(WIDTH, 1, dtype=BF16))
BLOCKS = quantized(weight_scale=one(2, 2, dtype=BF16))
BLOCKS_INV = quantized(weight_scale_inv=one(2, 2, dtype=BF16))
STATIC = quantized(weight_scale=one(), input_scale=one())
KV = {f"{ATTENTION}.k_proj.k_scale": one(), f"{ATTENTION}.v_proj.v_scale": one()}
KV_ONE = {f"{ATTENTION}.kv_scale": one(1)}
KV_HEADS = {f"{ATTENTION}.{name}_scale": one(2, 1, 1, dtype=BF16) for name in "qkv"}

# --- compressed-tensors: Neural Magic, Red Hat ---

ARGS: Fields = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "num_bits": 8,
    "observer": "minmax",
    "observer_kwargs": {},
    "strategy": "tensor",
    "symmetric": True,
    "type": "float",
}
PER_CHANNEL = {**ARGS, "strategy": "channel"}
PER_TOKEN = {**ARGS, "dynamic": True, "observer": None, "strategy": "token"}
NEWER = {"scale_dtype": None, "zp_dtype": None}
PER_BLOCK = {**ARGS, **NEWER, "strategy": "block", "block_structure": [BLOCK, BLOCK]}
PER_GROUP = {**ARGS, **NEWER, "dynamic": True, "strategy": "group", "group_size": BLOCK}
OLD = {key: value for key, value in ARGS.items() if key != "actorder"} | {"observer": "memoryless"}
LOCAL = {**ARGS, "num_bits": 4, "dynamic": "local", "strategy": "tensor_group", "group_size": 16}
PER_HEAD = {**ARGS, "strategy": "attn_head"}


def group(weights: Fields | None, inputs: Fields | None, target: str = "Linear") -> Fields:
    return {
        "input_activations": inputs,
        "output_activations": None,
        "targets": [target],
        "weights": weights,
    }


def compressed(*groups: Fields, **fields: Any) -> Fields:
    return {
        "config_groups": {f"group_{number}": one for number, one in enumerate(groups)},
        "format": "float-quantized",
        "global_compression_ratio": 1.239290831149584,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "frozen",
        **fields,
    }


DENSE = {"format": "dense", "global_sparsity": 0.12, "ignore": [], "targets": []}
SIMPLE = {"num_bits": 8, "strategy": "tensor", "type": "float"}

# --- AutoFP8, transformers, ModelOpt ---

AUTOFP8 = {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"}
DEEPSEEK = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
QWEN = {**DEEPSEEK, "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"]}
MINISTRAL = {
    "activation_scheme": "static",
    "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "lm_head"],
    "quant_method": "fp8",
    "weight_block_size": None,
}
NVIDIA = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
E4M3_ARGS = {"dynamic": False, "num_bits": 8, "type": "float"}
NVIDIA_EMBEDDED = {
    "config_groups": {"group_0": group(E4M3_ARGS, E4M3_ARGS)},
    "ignore": ["lm_head"],
    "kv_cache_scheme": E4M3_ARGS,
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quant_algo": "FP8",
    "quant_method": "modelopt",
}


class Published(NamedTuple):
    config: Fields
    tensors: Arrays
    expected: str
    """How weights and inputs are quantised, and the caches; or a code and what it names."""
    file: Fields | None = None
    """`quantization` of `hf_quant_config.json`."""


def quantization(config: Fields) -> Fields:
    return {"quantization_config": config}


PUBLISHED = {
    "Meta-Llama-3.1-8B-Instruct-FP8 of Neural Magic": Published(
        {"compression_config": compressed(group(OLD, OLD))},
        STATIC_BF16,
        "tensor, static tensor, no caches",
    ),
    "Meta-Llama-3.1-8B-Instruct-FP8-hf": Published(
        quantization(compressed(group(SIMPLE, SIMPLE), format="naive-quantized")),
        STATIC_BF16,
        "tensor, static tensor, no caches",
    ),
    "FP8-dynamic of Red Hat": Published(
        quantization(
            compressed(
                group(PER_CHANNEL, PER_TOKEN),
                quantization_status="compressed",
                sparsity_config={},
                transform_config={},
                version="0.12.2",
            )
        ),
        CHANNEL,
        "channel, dynamic token, no caches",
    ),
    "FP8-dynamic, not sparse": Published(
        quantization(compressed(group(PER_CHANNEL, PER_TOKEN), sparsity_config=DENSE)),
        CHANNEL,
        "channel, dynamic token, no caches",
    ),
    "FP8-block of Red Hat": Published(
        quantization(compressed(group(PER_BLOCK, PER_GROUP))),
        BLOCKS,
        "block, dynamic group, no caches",
    ),
    "queries, keys and values per head": Published(
        quantization(
            compressed(
                {**group(None, PER_HEAD, "Qwen3Attention"), "format": "dense"},
                {**group(PER_BLOCK, PER_GROUP), "format": "float-quantized"},
            )
        ),
        {**BLOCKS, **KV_HEADS},
        "QNT001: quantised queries of attention (target `Qwen3Attention`)",
    ),
    "caches per head": Published(
        quantization(compressed(group(ARGS, ARGS), kv_cache_scheme=PER_HEAD)),
        {**STATIC_BF16, **KV_HEADS},
        "QNT001: FP8 KV cache, static, a scale per attn_head",
    ),
    "inputs with scales of scales": Published(
        quantization(compressed(group(PER_CHANNEL, LOCAL))), CHANNEL, "QNT001: FP4 activations"
    ),
    "FP8 that is called integers": Published(
        quantization(compressed(group(OLD, OLD), format="int-quantized")),
        STATIC_BF16,
        "QNT001: compressed-tensors int-quantized",
    ),
    "Meta-Llama-3-8B-Instruct-FP8": Published(
        quantization(AUTOFP8), STATIC, "tensor, static tensor, no caches"
    ),
    "Meta-Llama-3-8B-Instruct-FP8-KV": Published(
        quantization(
            {
                **AUTOFP8,
                "kv_cache_scheme": "static",
                "kv_cache_quant_targets": ["k_proj", "v_proj"],
            }
        ),
        {**STATIC, **KV_ONE},
        "tensor, static tensor, caches",
    ),
    "AutoFP8, dynamic": Published(
        quantization({**AUTOFP8, "activation_scheme": "dynamic"}),
        quantized(weight_scale=one()),
        "QNT001: AutoFP8 with dynamic activations",
    ),
    "Qwen3-8B-FP8": Published(quantization(QWEN), BLOCKS_INV, "block, dynamic group, no caches"),
    "Qwen3, no list": Published(
        quantization({**QWEN, "modules_to_not_convert": None}),
        BLOCKS_INV,
        "block, dynamic group, no caches",
    ),
    "Qwen3, a list without the head": Published(
        quantization({**QWEN, "modules_to_not_convert": []}),
        BLOCKS_INV,
        "QNT004: `lm_head.weight` is BF16, the config quantises it",
    ),
    "in the part that writes text": Published(
        {"text_config": quantization(QWEN)}, BLOCKS_INV, "block, dynamic group, no caches"
    ),
    "DeepSeek-V3.1": Published(
        quantization({**DEEPSEEK, "scale_fmt": "ue8m0"}),
        quantized(weight_scale_inv=one(2, 2)),
        "block, dynamic group, no caches",
    ),
    "DeepSeek-V4": Published(
        quantization({**DEEPSEEK, "scale_fmt": "ue8m0"}),
        quantized(scale=one(2, 2, dtype=E8M0)),
        "block, dynamic group, no caches",
    ),
    "Ministral 3": Published(
        quantization(MINISTRAL),
        quantized(weight_scale_inv=one(dtype=BF16), activation_scale=one(dtype=BF16)),
        "tensor, static tensor, no caches",
    ),
    "Llama-3.1-8B-Instruct-FP8 of NVIDIA": Published(
        {}, {**STATIC, **KV}, "tensor, static tensor, caches", NVIDIA
    ),
    "Llama-3.1-8B-Instruct-FP8, said twice": Published(
        quantization(NVIDIA_EMBEDDED), {**STATIC, **KV}, "tensor, static tensor, caches", NVIDIA
    ),
    "Llama-3.1-8B-Instruct-FP8, in config.json": Published(
        quantization(NVIDIA_EMBEDDED), {**STATIC, **KV}, "tensor, static tensor, caches"
    ),
    "NVIDIA, scales of caches left out": Published(
        {}, STATIC, f"QNT003: `{ATTENTION}.k_scale` is missing", NVIDIA
    ),
    "NVIDIA, nothing excluded by name": Published(
        {},
        {name: array for name, array in STATIC.items() if "head" not in name},
        "tensor, static tensor, no caches",
        {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": None},
    ),
    "NVIDIA, NVFP4": Published(
        quantization(NVIDIA_EMBEDDED),
        {**STATIC, **KV, f"{MODULES[0]}.weight_scale_2": one()},
        f"QNT001: NVFP4: `{MODULES[0]}.weight`",
    ),
    "NVIDIA, INT8 caches": Published(
        {}, STATIC, "QNT001: modelopt KV cache INT8", {**NVIDIA, "kv_cache_quant_algo": "INT8"}
    ),
    "NVIDIA, one weight for three layers": Published(
        {},
        {
            **linear(f"{ATTENTION}.qkv_proj", weight_scale=one(), input_scale=one()),
            f"{ATTENTION}.qkv_proj.k_scale": one(),
            f"{ATTENTION}.qkv_proj.v_scale": one(),
        },
        "tensor, static tensor, caches",
        NVIDIA,
    ),
    "NVIDIA, caches alone": Published(
        {},
        {**{f"{module}.weight": one(4, 4, dtype=BF16) for module in MODULES}, **KV},
        "caches",
        {**NVIDIA, "quant_algo": None},
    ),
    "NVIDIA, nothing at all": Published(
        {}, STATIC, "QNT002: `quant_algo` is None", {"quant_algo": None}
    ),
    "405B-Instruct-FP8 of Meta": Published(
        quantization({"activation_scale_ub": 1200.0, "quant_method": "fbgemm_fp8"}),
        quantized(weight_scale=one(WIDTH, 1)),
        "QNT001: fbgemm_fp8",
    ),
    "quantised when loaded": Published(
        quantization({"quant_method": "fp8", "activation_scheme": "dynamic"}),
        {f"{MODULES[0]}.weight": one(4, 4, dtype=BF16)},
        f"QNT004: `{MODULES[0]}.weight` is BF16, the config quantises it",
    ),
    "an empty config": Published(quantization({}), BLOCKS, "QNT002: `quant_method` is None"),
    "a config that is null": Published(
        {"quantization_config": None}, BLOCKS, f"QNT004: `{MODULES[0]}.weight` is F8_E4M3"
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_imported_or_refused_by_name(name: str, tmp_path: Path) -> None:
    config, tensors, expected, file = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if file is not None:
        content = {"producer": {"name": "modelopt", "version": "0.15.1"}, "quantization": file}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    assert outcome(tmp_path, tensors).startswith(expected)


def outcome(directory: Path, tensors: Arrays) -> str:
    """Weights, inputs and caches in words, and nothing else; or the code and the first cause."""
    try:
        found = read_quantization(directory, MemoryCheckpoint(tensors))
    except CompileError as error:
        return f"{error.code}: {(causes(error) or [error.cause])[0]}"
    assert found is not None
    assert {x.weight for x in found.linears} == {x for x in tensors if is_quantized(tensors[x])}
    kinds = {
        f"{x.scheme.granularity}, {x.activation.mode} {x.activation.granularity}"
        for x in found.linears
    }
    return ", ".join([*kinds, "caches" if found.caches else "no caches"])


def is_quantized(array: np.ndarray[Any, Any]) -> bool:
    return bool(array.dtype == E4M3)

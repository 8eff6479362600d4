"""The cells of docs/quantization.md: small checkpoints of each format, described but not made.

A checkpoint here is a config, and the types and shapes of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

ATTENTION = "model.layers.0.self_attn"
MODULES = tuple(f"{ATTENTION}.{name}" for name in ("q_proj", "k_proj", "v_proj"))
ROWS, COLUMNS = 256, 384

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> type as safetensors calls it, and shape."""


class Kind(NamedTuple):
    """One way to quantise: what it adds to the config and to the tensors."""

    label: str
    config: Mapping[str, Any] = {}
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = {}


class Cell(NamedTuple):
    """One checkpoint: how it is quantised, in the words of the table, and what is in its files."""

    format: str
    weights: str
    inputs: str
    cache: str
    config: Mapping[str, Any]
    tensors: Tensors


def each(
    suffix: str, dtype: str, *shape: int, of: tuple[str, ...] = MODULES
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same tensor in each of the linear layers."""
    return {f"{module}.{suffix}": (dtype, shape) for module in of}


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Tables in tables are merged, too; later values win."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


# --- compressed-tensors ---

FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float"}
CT = {"quant_method": "compressed-tensors", "format": "float-quantized"}


def ct_group(**fields: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], **fields}}}


def ct_weights(label: str, dtype: str, shape: tuple[int, ...], **args: Any) -> Kind:
    tensors = each("weight", dtype, ROWS, COLUMNS) | each("weight_scale", "BF16", *shape)
    return Kind(label, ct_group(weights=args), tensors)


def ct_inputs(label: str, tensors: Tensors | None = None, **args: Any) -> Kind:
    return Kind(label, ct_group(input_activations=args), tensors or {})


def kv_scales(key: str, value: str, dtype: str, *shape: int) -> Tensors:
    return {f"{ATTENTION}.{name}": (dtype, shape) for name in (key, value)}


def ct_cache(label: str, **args: Any) -> Kind:
    tensors = kv_scales("k_scale", "v_scale", "BF16", 1)
    return Kind(label, {"kv_cache_scheme": args}, tensors)


CT_WEIGHTS = [
    ct_weights("per tensor", "F8_E4M3", (1,), **FLOAT8, strategy="tensor"),
    ct_weights("per channel", "F8_E4M3", (ROWS, 1), **FLOAT8, strategy="channel"),
    ct_weights(
        "per group of 128", "F8_E4M3", (ROWS, 3), **FLOAT8, strategy="group", group_size=128,
    ),
    ct_weights(
        "per block of 128 x 128", "F8_E4M3", (2, 3), **FLOAT8, strategy="block",
        block_structure=[128, 128],
    ),
    ct_weights(
        "per block of 160 x 256 (partial ones at the edges)", "F8_E4M3", (2, 2), **FLOAT8,
        strategy="block", block_structure=[160, 256],
    ),
]  # fmt: skip
CT_INPUTS = [
    Kind("not quantised"),
    ct_inputs("static, per tensor", each("input_scale", "BF16", 1), **FLOAT8, strategy="tensor"),
    ct_inputs("dynamic, per token", **FLOAT8, strategy="token", dynamic=True),
    ct_inputs("dynamic, per group", **FLOAT8, strategy="group", group_size=128, dynamic=True),
    ct_inputs("dynamic, per tensor", **FLOAT8, strategy="tensor", dynamic=True),
]
CT_CACHES = [
    Kind("bf16"),
    ct_cache("fp8", **FLOAT8, strategy="tensor"),
    ct_cache("fp8, dynamic", **FLOAT8, strategy="tensor", dynamic=True),
    ct_cache("fp8, per head", **FLOAT8, strategy="attn_head"),
    ct_cache("int8", num_bits=8, type="int", strategy="tensor"),
]
INT8 = {"num_bits": 8, "type": "int"}
PACKED = each("weight_packed", "I32", ROWS, COLUMNS // 8) | each("weight_scale", "BF16", ROWS, 1)
CT_OTHERS = [
    ct_weights("int8, per channel", "I8", (ROWS, 1), **INT8, strategy="channel"),
    Kind(
        "int4, packed",
        {"format": "pack-quantized", **ct_group(weights={"num_bits": 4, "type": "int"})},
        PACKED,
    ),
    ct_weights(
        "per channel, with zero points", "F8_E4M3", (ROWS, 1), **FLOAT8, strategy="channel",
        symmetric=False,
    ),
]  # fmt: skip

# --- fine-grained FP8, AutoFP8 ---


def fp8(scale: str, dtype: str, *shape: int) -> Tensors:
    return each("weight", "F8_E4M3", ROWS, COLUMNS) | each(scale, dtype, *shape)


def fine_weights(label: str, dtype: str, *grid: int, **config: Any) -> Kind:
    return Kind(label, config, fp8("weight_scale_inv", dtype, *grid))


FINE = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FINE_STATIC = Kind(
    "static, per tensor", {"activation_scheme": "static"}, each("activation_scale", "F32")
)
FINE_GROUP, FINE_TOKEN = Kind("dynamic, per group"), Kind("dynamic, per token")
FINE_BLOCKS = fine_weights("per block of 128 x 128", "F32", 2, 3, weight_block_size=[128, 128])
FINE_E8M0 = fine_weights(
    "per block of 128 x 128, e8m0 scales", "F8_E8M0", 2, 3, weight_block_size=[128, 128]
)
FINE_ROWS_PARTIAL = fine_weights(
    "per block of 160 x 128 (partial ones in the last rows)",
    "F32",
    2,
    3,
    weight_block_size=[160, 128],
)
FINE_COLUMNS_PARTIAL = fine_weights(
    "per block of 128 x 256 (partial ones in the last columns)",
    "F32", 2, 2, weight_block_size=[128, 256],
)  # fmt: skip
FINE_TENSOR = fine_weights("per tensor", "F32")
FINE_BYTES = fine_weights("per block of 1 x 32, MXFP8", "U8", ROWS, 12, weight_block_size=[1, 32])
FINE_ROWS = [
    (FINE_BLOCKS, FINE_GROUP),
    (FINE_E8M0, FINE_GROUP),
    (FINE_ROWS_PARTIAL, FINE_GROUP),
    (FINE_COLUMNS_PARTIAL, FINE_GROUP),
    (FINE_BYTES, FINE_GROUP),
    *((weights, FINE_STATIC) for weights in (FINE_BLOCKS, FINE_TENSOR)),
    (FINE_TENSOR, FINE_TOKEN),
]
AUTO_WEIGHTS = Kind("per tensor", {"quant_method": "fp8"}, fp8("weight_scale", "F32"))
AUTO_INPUTS = [
    Kind("static, per tensor", {"activation_scheme": "static"}, each("input_scale", "F32", 1)),
    Kind("dynamic", {"activation_scheme": "dynamic"}),
]
AUTO_CACHES = [
    Kind("bf16"),
    Kind(
        "fp8", {"kv_cache_scheme": "static"}, kv_scales("k_scale", "v_scale", "F32", 1)
    ),
    Kind("fp8, one scale for K and V", {}, {f"{ATTENTION}.kv_scale": ("F32", ())}),
]  # fmt: skip

# --- ModelOpt ---

MODELOPT = {"quant_method": "modelopt", "ignore": ["lm_head", "model.embed*"]}
MODELOPT_ROWS = [
    (
        Kind("per tensor", {"quant_algo": "FP8"}, fp8("weight_scale", "F32")),
        Kind("static, per tensor", {}, each("input_scale", "F32")),
    ),
    (
        Kind(
            "per channel",
            {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
            fp8("weight_scale", "F32", ROWS),
        ),
        Kind("dynamic, per token"),
    ),
    (
        Kind(
            "per block of 128 x 128",
            {"quant_algo": "FP8_PB_WO"},
            fp8("weight_scale", "F32", 2, 1, 3, 1),
        ),
        Kind("not quantised"),
    ),
    (
        Kind(
            "int8, per channel (SmoothQuant)",
            {"quant_algo": "W8A8_SQ_PER_CHANNEL"},
            each("weight", "I8", ROWS, COLUMNS)
            | each("weight_scale", "F32", ROWS)
            | each("pre_quant_scale", "BF16", COLUMNS),
        ),
        Kind("int8, static", {}, each("input_scale", "F32")),
    ),
    (
        Kind(
            "NVFP4",
            {"quant_algo": "NVFP4"},
            each("weight", "U8", ROWS, COLUMNS // 2)
            | each("weight_scale", "F8_E4M3", ROWS, COLUMNS // 16)
            | each("weight_scale_2", "F32"),
        ),
        Kind("NVFP4", {}, each("input_scale", "F32")),
    ),
    (
        Kind("several kinds", {"quant_algo": "MIXED_PRECISION"}, fp8("weight_scale", "F32")),
        Kind("several kinds", {}, each("input_scale", "F32")),
    ),
]  # fmt: skip
MODELOPT_SCALES = kv_scales("k_proj.k_scale", "v_proj.v_scale", "F32")
MODELOPT_CACHES = [
    Kind("bf16"),
    Kind("fp8", {"kv_cache_scheme": {**FLOAT8, "dynamic": False}}, MODELOPT_SCALES),
    Kind("NVFP4", {"kv_cache_quant_algo": "NVFP4"}, MODELOPT_SCALES),
]

# --- Furiosa's directories: qformat.yaml has the config, qparam.npy the ranges ---

PLAIN = each("weight", "BF16", ROWS, COLUMNS)


def furiosa_kind(label: str, option: str, dtype: str, quantizer: str = "", *shape: int) -> Kind:
    tensors = each(quantizer, "F32", *shape) if quantizer else {}
    return Kind(label, {option: dtype}, tensors)


FURIOSA = "Furiosa's quantisation directories"
FURIOSA_WEIGHTS = [
    furiosa_kind("per channel", "weight_dtype", "fp8-E4M3", "_weight_quantizer", ROWS),
    furiosa_kind("per tensor", "weight_dtype", "fp8-E4M3", "_weight_quantizer", 1),
    furiosa_kind("int8", "weight_dtype", "int8", "_weight_quantizer", ROWS),
]
FURIOSA_INPUTS = [
    furiosa_kind("static, per tensor", "act_dtype", "fp8-E4M3", "_input_quantizer", 1),
    furiosa_kind("static, per channel", "act_dtype", "fp8-E4M3", "_input_quantizer", COLUMNS),
    furiosa_kind("bf16", "act_dtype", "bf16"),
]
PRODUCTS: Tensors = {f"{name}._input_1_quantizer": ("F32", (1,)) for name in ("matmul", "matmul_1")}
FURIOSA_CACHES = [
    Kind("bf16", {"kv_dtype": "bf16"}),
    Kind("fp8", {"kv_dtype": "fp8-E4M3"}, PRODUCTS),
    Kind("int8", {"kv_dtype": "int8"}, PRODUCTS),
]


def cells() -> Iterator[Cell]:
    """Every cell of every table, row by row."""
    no_inputs = Kind("not quantised")
    ct_rows = [(weights, inputs) for weights in CT_WEIGHTS for inputs in CT_INPUTS]
    ct_rows += [(weights, no_inputs) for weights in CT_OTHERS]
    auto_rows = [(AUTO_WEIGHTS, inputs) for inputs in AUTO_INPUTS]
    furiosa_rows = [(weights, inputs) for weights in FURIOSA_WEIGHTS for inputs in FURIOSA_INPUTS]
    tables: list[tuple[str, Mapping[str, Any], list[tuple[Kind, Kind]], list[Kind]]] = [
        ("compressed-tensors", CT, ct_rows, CT_CACHES),
        ("fine-grained FP8 (transformers)", FINE, FINE_ROWS, [Kind("bf16")]),
        ("AutoFP8", {}, auto_rows, AUTO_CACHES),
        ("ModelOpt", MODELOPT, MODELOPT_ROWS, MODELOPT_CACHES),
        (FURIOSA, {}, furiosa_rows, FURIOSA_CACHES),
    ]
    for name, base, rows, caches in tables:
        for weights, inputs in rows:
            for cache in caches:
                config = merged(base, weights.config, inputs.config, cache.config)
                tensors = {**weights.tensors, **inputs.tensors, **cache.tensors}
                yield Cell(name, weights.label, inputs.label, cache.label, config, tensors)

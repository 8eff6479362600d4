"""Write docs/quantization.md: `make docs`. Each cell is what the code makes of a small checkpoint.

A checkpoint here is a config, and the types and shapes of its tensors: readers need no data.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from furiosa_llm.artifact.ledger import ALLOWS_ITSELF, check_losses, make_ledger
from furiosa_llm.errors import CompileError, quantization_not_compiled
from furiosa_llm.frontend.checkpoint import Array, Checkpoint, TensorInfo
from furiosa_llm.frontend.quantization.furiosa import FuriosaDirectory
from furiosa_llm.frontend.quantization.furiosa import describe as describe_furiosa
from furiosa_llm.frontend.quantization.quantizing import quantizing
from furiosa_llm.frontend.quantization.reader import read_quantization
from furiosa_llm.frontend.quantization.refused import MARKS
from furiosa_llm.frontend.safetensors_checkpoint import DTYPES
from furiosa_llm.models.quantization import Quantization
from furiosa_llm.models.quantization_support import (
    ACTIVATIONS,
    STORAGES,
    WEIGHTS,
    unsupported,
)

ATTENTION = "model.layers.0.self_attn"
MODULES = tuple(f"{ATTENTION}.{name}" for name in ("q_proj", "k_proj", "v_proj"))
ROWS, COLUMNS = 48, 64

Tensors = dict[str, tuple[str, tuple[int, ...]]]
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
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


class Shapes(NamedTuple):
    """A checkpoint without data."""

    tensors: Mapping[str, TensorInfo]
    path: str = "checkpoint"

    def read(self, name: str) -> Array:
        raise NotImplementedError(f"{name} has no data")

    def read_rows(self, name: str, begin: int, end: int) -> Array:
        raise NotImplementedError(f"{name} has no data")


def each(suffix: str, dtype: str, *shape: int, of: tuple[str, ...] = MODULES) -> Tensors:
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
    ct_weights("per channel", "F8_E4M3", (48, 1), **FLOAT8, strategy="channel"),
    ct_weights("per group of 32", "F8_E4M3", (48, 2), **FLOAT8, strategy="group", group_size=32),
    ct_weights(
        "per block of 16 x 32", "F8_E4M3", (3, 2), **FLOAT8, strategy="block",
        block_structure=[16, 32],
    ),
    ct_weights(
        "per block of 32 x 48 (partial ones at the edges)", "F8_E4M3", (2, 2), **FLOAT8,
        strategy="block", block_structure=[32, 48],
    ),
]  # fmt: skip
CT_INPUTS = [
    Kind("not quantised"),
    ct_inputs("static, per tensor", each("input_scale", "BF16", 1), **FLOAT8, strategy="tensor"),
    ct_inputs("dynamic, per token", **FLOAT8, strategy="token", dynamic=True),
    ct_inputs("dynamic, per group", **FLOAT8, strategy="group", group_size=32, dynamic=True),
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
    ct_weights("int8, per channel", "I8", (48, 1), **INT8, strategy="channel"),
    Kind(
        "int4, packed",
        {"format": "pack-quantized", **ct_group(weights={"num_bits": 4, "type": "int"})},
        PACKED,
    ),
    ct_weights(
        "per channel, with zero points", "F8_E4M3", (48, 1), **FLOAT8, strategy="channel",
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
FINE_BLOCKS = fine_weights("per block of 16 x 32", "F32", 3, 2, weight_block_size=[16, 32])
FINE_E8M0 = fine_weights(
    "per block of 16 x 32, e8m0 scales", "F8_E8M0", 3, 2, weight_block_size=[16, 32]
)
FINE_PARTIAL = fine_weights(
    "per block of 32 x 48 (partial ones at the edges)", "F32", 2, 2, weight_block_size=[32, 48]
)
FINE_TENSOR = fine_weights("per tensor", "F32")
FINE_BYTES = fine_weights("per block of 1 x 32, MXFP8", "U8", 48, 2, weight_block_size=[1, 32])
FINE_ROWS = [
    *((blocks, FINE_GROUP) for blocks in (FINE_BLOCKS, FINE_E8M0, FINE_PARTIAL, FINE_BYTES)),
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
            fp8("weight_scale", "F32", 48),
        ),
        Kind("dynamic, per token"),
    ),
    (
        Kind(
            "per block of 16 x 16",
            {"quant_algo": "FP8_PB_WO"},
            fp8("weight_scale", "F32", 3, 1, 4, 1),
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
    furiosa_kind("per channel", "weight_dtype", "fp8-E4M3", "_weight_quantizer", 48),
    furiosa_kind("per tensor", "weight_dtype", "fp8-E4M3", "_weight_quantizer", 1),
    furiosa_kind("int8", "weight_dtype", "int8", "_weight_quantizer", 48),
]
FURIOSA_INPUTS = [
    furiosa_kind("static, per tensor", "act_dtype", "fp8-E4M3", "_input_quantizer", 1),
    furiosa_kind("static, per channel", "act_dtype", "fp8-E4M3", "_input_quantizer", 64),
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


def infos_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, shape, DTYPES[dtype], dtype)
        for name, (dtype, shape) in tensors.items()
    }


def describe(cell: Cell, directory: Path, checkpoint: Checkpoint) -> Quantization:
    """What the readers say about a cell's checkpoint, whose config is written to `directory`.

    Raises: the readers' errors; QNT022 for what is read and not compiled.
    """
    if cell.format == FURIOSA:
        options = " ".join(f"--{key} {value}" for key, value in cell.config.items())
        (directory / "qformat.yaml").write_text(f"# quantize.py {options}\n")
        quantizers = {
            name: {"amax": np.ones(shape, np.float32)} for name, (_, shape) in cell.tensors.items()
        }
        np.save(directory / "qparam.npy", np.array(quantizers, object), allow_pickle=True)
        ranges = FuriosaDirectory.open(directory)
        found: Quantization | None = describe_furiosa(ranges, checkpoint)
        assert found is not None
        compiled, _ = quantizing(checkpoint, found, ranges.read)
    else:
        config = {"quantization_config": cell.config}
        (directory / "config.json").write_text(json.dumps(config))
        found = read_quantization(directory, checkpoint)
        assert found is not None, f"{cell.config} quantises nothing"
        compiled = found
    if problems := unsupported(compiled):
        raise quantization_not_compiled(problems)
    return found


def outcome(cell: Cell) -> str:
    """`exact`, `VERDICT (warning)`, `CODE unless allowed` or `CODE`."""
    infos = infos_of(PLAIN if cell.format == FURIOSA else cell.tensors)
    try:
        with tempfile.TemporaryDirectory() as directory:
            found = describe(cell, Path(directory), Shapes(infos))
    except CompileError as error:
        return error.code
    ledger = make_ledger(found, infos, {})
    verdicts = {row.verdict for row in ledger.rows} - {"exact"}
    try:
        check_losses(ledger, [])
    except CompileError as error:
        return f"{', '.join(sorted(verdicts))} ({error.code} unless allowed)"
    assert verdicts <= {ALLOWS_ITSELF.get(ledger.source)}
    return f"{', '.join(sorted(verdicts))} (a warning)" if verdicts else "exact"


# --- the page ---

HEAD = """# Quantised checkpoints

What becomes of each kind of checkpoint. Every format is read into one description
(`models/quantization.py`): for each linear layer the type of its codes, which of them share a
scale, and how its inputs are quantised; for each attention module the scales of its caches. Config
*and* tensors decide; where they contradict each other, nothing is imported (QNT004).

- `exact`: codes and scales are carried over as they are stored, bit for bit.
- `unverified (a warning)`: the ledger says what was assumed, because the format is not public.
- A code: refused by name, with the tensors concerned, before anything is compiled
  ([errors](errors.md)).

`quantization_ledger.json` in the artifact has one row for every tensor of the checkpoint. What is
not `exact` there fails the build (QNT009), unless `--allow-lossy PATTERN` names the tensor or the
table below says that it is only a warning. GGUF files are `dequantized` by design, with a warning.

A scale that is missing, has another shape than its weight needs, or scales nothing is an error that
names it (QNT003), and so is one that is zero, negative, NaN or infinite (QNT005), and a weight
with codes that are no numbers (QNT011). Where no code of a checkpoint is above 240, the ledger
remarks that it was written for a chip whose e4m3 ends there. Shapes may be written as formats do:
`[]` or `[1]` for one scale, `[O]` or `[O, 1]` for channels, `[O/b, I/b]` or `[O/b, 1, I/b, 1]` for
blocks. Stored scales may be f32, bf16, f16 or e8m0.

The tables are made from the code (`docs/generate_quantization_matrix.py`): each cell is the answer
to a small checkpoint, and a test reads each of them again with data in it.
"""

FURIOSA_NOTE = """The layout of `.qckpt` files is not public, nor are the names of quantizers in
language models. Weights are quantised anew from the unquantised checkpoint by the ranges in
`qparam.npy`, which is read without unpickling: it can hold arrays and plain containers, nothing
else (QNT007).
"""


def render() -> str:
    """The page."""
    parts = [HEAD]
    for name, table in _tables().items():
        parts.append(f"## {name}\n\n{_table(table)}")
        if name == FURIOSA:
            parts.append(FURIOSA_NOTE)
    schemes = "\n".join(f"- {scheme}" for scheme in MARKS)
    reasons = "\n".join(f"- {kind}: {reason}" for kind, reason in _reasons())
    parts.append(
        "## Recognised by their tensors and refused\n\n"
        f"Whatever the config says (QNT001):\n\n{schemes}\n"
    )
    refused = "Refused by `import-fp8-quantization` (QNT022)"
    parts.append(f"## Read, but not compiled\n\n{refused}:\n\n{reasons}\n")
    return "\n".join(parts)


def _tables() -> dict[str, list[Cell]]:
    tables: dict[str, list[Cell]] = {}
    for cell in cells():
        tables.setdefault(cell.format, []).append(cell)
    return tables


def _table(table: list[Cell]) -> str:
    """A row for each kind of weights and inputs, a column for each kind of cache."""
    caches = list(dict.fromkeys(cell.cache for cell in table))
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in table:
        rows.setdefault((cell.weights, cell.inputs), []).append(outcome(cell))
    head = ["weights", "inputs", *(f"KV {cache}" for cache in caches)]
    lines = [head, ["---"] * len(head), *([*key, *row] for key, row in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _reasons() -> Iterator[tuple[str, str]]:
    """What `models/quantization_support.py` refuses, in words."""
    for storage, reason in STORAGES.items():
        yield f"{storage} codes", reason
    for granularity, reason in WEIGHTS.items():
        yield f"weights with a scale per {granularity}", reason
    for (mode, inputs), reason in ACTIVATIONS.items():
        yield f"inputs quantised {mode}, per {inputs}", reason


if __name__ == "__main__":
    Path(__file__).with_name("quantization.md").write_text(render(), encoding="utf-8")

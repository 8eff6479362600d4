"""Write docs/quantization.md: `make docs`. Each cell is what the code makes of a small checkpoint.

The checkpoints are those of `quantization_cells.py`; readers need no data.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from quantization_cells import FURIOSA, PLAIN, Cell, Tensors, cells
from xdsl.dialects.func import FuncOp
from xdsl.rewriter import Rewriter

from furiosa_llm.artifact.ledger import ALLOWS_ITSELF, check_losses, make_ledger
from furiosa_llm.backend_rngd import supported
from furiosa_llm.errors import (
    CompileError,
    quantization_not_compiled,
    unsupported_by_backend,
)
from furiosa_llm.frontend.checkpoint import Array, Checkpoint, TensorInfo
from furiosa_llm.frontend.quantization.furiosa import FuriosaDirectory
from furiosa_llm.frontend.quantization.furiosa import describe as describe_furiosa
from furiosa_llm.frontend.quantization.quantizing import quantizing
from furiosa_llm.frontend.quantization.reader import read_quantization
from furiosa_llm.frontend.quantization.refused import MARKS
from furiosa_llm.frontend.safetensors_checkpoint import DTYPES
from furiosa_llm.ir import nn
from furiosa_llm.ir.text import make_context, parse_module
from furiosa_llm.models.quantization import Quantization, QuantizedLinear
from furiosa_llm.models.quantization_support import (
    ACTIVATIONS,
    STORAGES,
    WEIGHTS,
    unsupported,
)
from furiosa_llm.passes.import_fp8_quantization import (
    ImportFp8QuantizationPass,
    describe_quantization,
)


class Shapes(NamedTuple):
    """A checkpoint without data."""

    tensors: Mapping[str, TensorInfo]
    path: str = "checkpoint"

    def read(self, name: str) -> Array:
        raise NotImplementedError(f"{name} has no data")

    def read_rows(self, name: str, begin: int, end: int) -> Array:
        raise NotImplementedError(f"{name} has no data")


def infos_of(tensors: Tensors) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, shape, DTYPES[dtype], dtype)
        for name, (dtype, shape) in tensors.items()
    }


def describe(cell: Cell, directory: Path, checkpoint: Checkpoint) -> Quantization:
    """What the readers say about a cell's checkpoint, whose config is written to `directory`.

    Raises: the readers' errors; QNT022 for what is read and not compiled; BCK001 for what has no
    instructions.
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
    # All linears of a cell are alike.
    if missing := without_kernel(compiled, compiled.linears[0]):
        raise unsupported_by_backend(missing)
    return found


LINEAR = """
nn.parameter @{weight} : tensor<{n}x{k}xbf16>
func.func @forward(%x: tensor<1x8x{k}xbf16>) -> tensor<1x8x{n}xbf16> {{
  %w = nn.get_parameter @{weight} : tensor<{n}x{k}xbf16>
  %h = nn.silu %x : tensor<1x8x{k}xbf16>
  %y = nn.linear %h, %w : tensor<1x8x{k}xbf16>, tensor<{n}x{k}xbf16> -> tensor<1x8x{n}xbf16>
  func.return %y : tensor<1x8x{n}xbf16>
}}
"""


def without_kernel(quantization: Quantization, linear: QuantizedLinear) -> list[tuple[str, str]]:
    """What the backend says about one linear layer, as the pass writes it."""
    n, k = linear.shape
    module = parse_module(LINEAR.format(weight=linear.weight, n=n, k=k))
    describe_quantization(module, replace(quantization, linears=(linear,), caches=()))
    ImportFp8QuantizationPass().apply(make_context(), module)
    (forward,) = (op for op in module.walk() if isinstance(op, FuncOp))
    body = forward.body.block
    for read in [op for op in body.ops if isinstance(op, nn.GetParameterOp)]:
        # Outlined blocks have parameters as arguments.
        read.y.replace_all_uses_with(body.insert_arg(read.y.type, len(body.args)))
        Rewriter.erase_op(read)
    return supported.unsupported(body)


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
- `QNT001`, `QNT022`: refused by name, with the tensors concerned, because the scheme is none of
  those that are imported, or because there are no operators for it ([errors](errors.md)). The
  backend refuses some sizes (BCK001): blocks whose columns are no multiple of 16, and groups of
  inputs that a rank's part cuts.

`quantization_ledger.json` in the artifact has one row for every tensor of the checkpoint. What is
not `exact` there fails the build (QNT009), unless `--allow-lossy PATTERN` names the tensor or the
table below says that it is only a warning. GGUF files are `dequantized` by design, with a warning.
A checkpoint in f32 or f16 that is not quantised is rounded to bf16 (`requantized`), with a
warning as well; tensors whose values are all bf16 numbers are `exact`.

A tensor that the model has no use for is `dropped`. The frequencies of rotary embeddings
(`rotary_emb.inv_freq`), which old checkpoints hold for each layer, are `exact` where they are those
that the config gives, within two units of rounding: binaries hold these as constants.

`run --weights-from DIR` warns of what is rounded or not used. Codes for an artifact that takes
none, or none for one that takes them, are refused (QNT023).

A scale that is missing, has another shape than its weight needs, or scales nothing is an error that
names it (QNT003), and so is one that is zero, negative, NaN or infinite (QNT005), and a weight
with codes that are no numbers (QNT011). Where no code of a checkpoint is above 240, the ledger
remarks that it was written for a chip whose e4m3 ends there. Shapes may be written as formats do:
`[]` or `[1]` for one scale, `[O]` or `[O, 1]` for channels, `[O/b, I/b]` or `[O/b, 1, I/b, 1]` for
blocks. Stored scales may be f32, bf16, f16 or e8m0.

Weights that hold several layers (`qkv_proj`, `gate_up_proj` of Phi-3) are multiplied in parts, each
with the scales of its rows, and have one row in the ledger. A layer that begins inside a block of
scales and ends in another one is refused (QNT022).

A quantised `lm_head` is a linear layer like any other. If the config ties it to the embeddings,
which are other numbers, `tie_word_embeddings` has to say first that it is not tied (QNT004).

`scale_fmt: ue8m0` is taken to be about stored scales alone: those of inputs are f32 numbers.
transformers rounds them up to powers of two on some GPUs, and not on others.

The tables are made from the code by `make docs`: each cell is what readers, pass and backend say
to a small checkpoint (`docs/quantization_cells.py`), and a test reads each of them with data in it.
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

"""docs/quantization.md: each cell holds for checkpoints with data in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from generate_quantization_matrix import describe, render
from memory_checkpoint import MemoryCheckpoint
from numpy.typing import NDArray
from quantization_cells import FURIOSA, MODULES, PLAIN, Cell, Tensors, cells
from small_linears import causes

from furiosa_llm.artifact.ledger import check_losses, make_ledger
from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.codes import check_codes
from furiosa_llm.frontend.quantization.dequantize import dequantize
from furiosa_llm.frontend.quantization.furiosa import FuriosaDirectory
from furiosa_llm.frontend.quantization.scales import (
    check_scale_values,
    described_scales,
    multipliers,
)
from furiosa_llm.frontend.safetensors_checkpoint import DTYPES
from furiosa_llm.models import quantization_support as support
from furiosa_llm.models.quantization import (
    PER_CHANNEL,
    PER_TENSOR,
    STATIC_TENSOR,
    ActivationScheme,
    Quantization,
    QuantizedLinear,
    ScaleTensor,
)

ROOT = Path(__file__).parents[3]
CELLS = list(cells())
PAGE = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")


def test_the_page_is_up_to_date() -> None:
    assert render() == PAGE, "run `make docs`"


def said_in_the_page() -> dict[tuple[str, ...], str]:
    """(format, weights, inputs, cache) -> what the page says, of all its tables."""
    found: dict[tuple[str, ...], str] = {}
    title, caches = "", list[str]()
    for line in PAGE.splitlines():
        columns = [column.strip() for column in line.strip("|").split("|")]
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif columns[0] == "weights":
            caches = [column.removeprefix("KV ") for column in columns[2:]]
        elif line.startswith("| ") and columns[0] != "---":
            for cache, cell in zip(caches, columns[2:], strict=True):
                found[title, columns[0], columns[1], cache] = cell
    return found


SAID = said_in_the_page()
REFUSED = ("QNT001", "QNT022", "BCK001")


def key_of(cell: Cell) -> tuple[str, ...]:
    return cell.format, cell.weights, cell.inputs, cell.cache


def test_every_cell_has_a_case() -> None:
    assert [key_of(cell) for cell in CELLS] == list(SAID)
    said = set(SAID.values())
    assert {"exact", "QNT001", "QNT022"} <= said
    assert said <= {"exact", "unverified (a warning)", *REFUSED}


def array_of(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Codes of all numbers, powers of two, or anything else."""
    rng = np.random.default_rng(len(name) + sum(shape))
    if dtype == ml_dtypes.float8_e4m3fn:
        numbers = [bits for bits in range(256) if bits & 0x7F != 0x7F]
        return rng.choice(numbers, shape).astype(np.uint8).view(dtype)
    if dtype == ml_dtypes.float8_e8m0fnu:
        return rng.integers(110, 130, shape, np.uint8).view(dtype)
    return np.asarray(rng.uniform(1, 9, shape)).astype(dtype)


def arrays_of(tensors: Tensors) -> dict[str, NDArray[Any]]:
    return {
        name: array_of(name, DTYPES[stored], shape) for name, (stored, shape) in tensors.items()
    }


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "; ".join(key_of(cell)))
def test_each_cell(tmp_path: Path, cell: Cell) -> None:
    said = SAID[key_of(cell)]
    is_furiosa = cell.format == FURIOSA
    checkpoint = MemoryCheckpoint(arrays_of(PLAIN if is_furiosa else cell.tensors))
    if said in REFUSED:
        with pytest.raises(CompileError) as caught:
            describe(cell, tmp_path, checkpoint)
        assert caught.value.code == said
        known = [f"`{name}`" for name in (*cell.tensors, *checkpoint.tensors, *MODULES)]
        for line in causes(caught.value) if said != "BCK001" else ():
            assert "the model as a whole" in line or any(name in line for name in known)
        return
    found = describe(cell, tmp_path, checkpoint)
    read = FuriosaDirectory.open(tmp_path).read if is_furiosa else checkpoint.read
    check_scale_values(found, checkpoint.path, read)
    made = make_ledger(found, checkpoint.tensors, {}, check_codes(found, checkpoint))
    warned = check_losses(made, [])
    assert [row.tensor for row in made.rows] == sorted(checkpoint.tensors)
    assert {row.verdict for row in made.rows} == {said.partition(" ")[0]}
    assert len(warned) == (len(made.rows) if is_furiosa else 0)
    assert set(described_scales(found)) == {n for n in cell.tensors if not n.endswith(".weight")}
    assert len(found.caches) == (cell.cache != "bf16")
    for linear in found.linears:
        if linear.codes_are_stored:
            check_values(linear, checkpoint)


def check_values(linear: QuantizedLinear, checkpoint: MemoryCheckpoint) -> None:
    """Each code times the multiplier of the block that it lies in, by its position."""
    codes, stored = checkpoint.read(linear.weight), checkpoint.read(linear.scale.name)
    values = dequantize(codes, linear.scheme, multipliers(linear.scale, checkpoint.read))
    grid_rows, grid_columns = linear.scale.grid
    flat = stored.astype(np.float64).reshape(-1)
    assert flat.size == grid_rows * grid_columns
    rows, columns = linear.scheme.block_of(linear.shape)
    row, column = np.indices(linear.shape)
    scales = flat[row // rows * grid_columns + column // columns]
    np.testing.assert_array_equal(values, codes.astype(np.float64) * scales)


# --- what is described and not compiled ---

SCALE = ScaleTensor("n.weight_scale", "f32", (), (1, 1))
LINEAR = QuantizedLinear("n", "n.weight", (4, 4), "e4m3", PER_TENSOR, SCALE, STATIC_TENSOR, SCALE)


def refused(**changes: Any) -> list[str]:
    other = replace(LINEAR, module="m", weight="m.weight", **changes)
    return support.unsupported(Quantization("compressed-tensors", (LINEAR, other)))


def test_what_is_compiled_is_not_refused() -> None:
    assert refused() == []


@pytest.mark.parametrize(("storage", "reason"), support.STORAGES.items())
def test_other_codes_are_refused_with_the_reason(storage: str, reason: str) -> None:
    assert refused(storage=storage) == [f"`m.weight` holds {storage} codes: {reason}"]


@pytest.mark.parametrize(("inputs", "reason"), support.ACTIVATIONS.items())
def test_other_inputs_are_refused_with_the_reason(inputs: Any, reason: str) -> None:
    assert refused(activation=ActivationScheme(*inputs)) == [
        f"`m` has {inputs[0]} inputs with a scale per {inputs[1]}: {reason}"
    ]


def test_other_weights_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "WEIGHTS", {"channel": "for a test"})
    assert refused(scheme=PER_CHANNEL) == ["`m.weight` has a scale per channel: for a test"]


def test_groups_have_to_divide_the_inputs() -> None:
    assert refused(activation=ActivationScheme("dynamic", "group", 2)) == []
    assert refused(activation=ActivationScheme("dynamic", "group", 3)) == [
        "`m` is quantised in parts, and groups of 3 inputs do not divide K = 4"
    ]


def test_ranges_are_no_scales() -> None:
    assert refused(scale=replace(SCALE, divisor=448.0), codes_are_stored=False) == [
        "`m.weight` is to be quantised by the build, and no codes are stored",
        "`n.weight_scale` is 448 times a scale",
    ]

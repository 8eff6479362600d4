"""The ledger: a row for every tensor, and nothing lost that nobody allowed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from memory_checkpoint import MemoryCheckpoint
from small_linears import ATTENTION, MODULE, causes, describe, linear, ones, plain_tensors

from furiosa_llm.artifact.ledger import (
    LEDGER_FILE,
    Decision,
    Ledger,
    Verdict,
    check_complete,
    check_losses,
    make_gguf_ledger,
    make_ledger,
)
from furiosa_llm.artifact.schema import read_json, to_json
from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.checkpoint import TensorInfo
from furiosa_llm.models.quantization import (
    PER_CHANNEL,
    STATIC_TENSOR,
    Quantization,
    QuantizedLinear,
    ScaleTensor,
)

WEIGHT = f"{MODULE}.weight"
AUTOFP8 = {"quant_method": "fp8", "activation_scheme": "static"}
ARRAYS = {
    **plain_tensors(),
    **linear(weight_scale=ones(), input_scale=ones()),
    f"{ATTENTION}.kv_scale": ones(),
}
TENSORS = MemoryCheckpoint(ARRAYS).tensors
RECODED = Decision("e4m3", "requantized", "240 is no e4m3 code at half the scale")


def ledger(tmp_path: Path, **decisions: Decision) -> Ledger:
    """Of one linear and one cache; `weight=...` decides about the linear's weight."""
    quantization = describe(
        tmp_path, AUTOFP8, {k: ARRAYS[k] for k in ARRAYS.keys() - plain_tensors()}
    )
    named = {f"{MODULE}.{key}": decision for key, decision in decisions.items()}
    return make_ledger(quantization, TENSORS, named)


def test_every_tensor_has_a_row_that_says_what_it_is(tmp_path: Path) -> None:
    made = ledger(tmp_path)
    assert made.source == "autofp8"
    assert {row.tensor: row.scheme_in for row in made.rows} == {
        "model.embed_tokens.weight": "BF16",
        f"{ATTENTION}.kv_scale": f"f32 scale of keys and values of {ATTENTION}",
        f"{MODULE}.input_scale": f"f32 scale of the inputs of {MODULE}",
        WEIGHT: "e4m3, scale per tensor, inputs static per tensor",
        f"{MODULE}.weight_scale": f"f32 scale of {WEIGHT}",
        "model.norm.weight": "BF16",
    }
    assert all(row.scheme_out == row.scheme_in and row.verdict == "exact" for row in made.rows)
    check_complete(made, TENSORS, LEDGER_FILE)


@pytest.mark.parametrize(
    ("block", "scales", "scheme"),
    [
        ([4, 8], ones(2, 2), "e4m3, scale per block 4x8, inputs dynamic per group 8"),
        (None, ones(), "e4m3, scale per tensor, inputs dynamic per token"),
    ],
)
def test_schemes_in_words(tmp_path: Path, block: object, scales: object, scheme: str) -> None:
    config = {"quant_method": "fp8", "weight_block_size": block}
    tensors = linear(weight_scale_inv=np.asarray(scales))
    made = make_ledger(describe(tmp_path, config, tensors), MemoryCheckpoint(tensors).tensors, {})
    assert scheme in [row.scheme_in for row in made.rows]


def test_a_plain_checkpoint_has_a_ledger_too() -> None:
    made = make_ledger(None, TENSORS, {})
    assert made.source == "plain"
    assert check_losses(made, []) == ()


def test_the_file_keeps_it(tmp_path: Path) -> None:
    made = ledger(tmp_path, weight=RECODED)
    file = tmp_path / LEDGER_FILE
    file.write_text(to_json(made))
    assert read_json(Ledger, file) == made


def test_rows_and_tensors_have_to_be_the_same(tmp_path: Path) -> None:
    made = ledger(tmp_path)
    damaged = made.model_copy(update={"rows": (*made.rows[1:], made.rows[-1])})
    tensors = [*TENSORS.keys() - {WEIGHT}]
    with pytest.raises(CompileError) as caught:
        check_complete(damaged, tensors, LEDGER_FILE)
    assert caught.value.code == "QNT008"
    assert causes(caught.value) == [
        "`model.embed_tokens.weight` has no row",
        f"`{WEIGHT}` is no tensor",
        "`model.norm.weight` has 2 rows",
    ]


# --- what may be lost ---


def test_a_loss_that_nobody_allows(tmp_path: Path) -> None:
    dropped = Decision("", "dropped", "inputs stay in bf16")
    made = ledger(tmp_path, weight=RECODED, input_scale=dropped)
    with pytest.raises(CompileError) as caught:
        check_losses(made, ["*.weight"])
    assert caught.value.code == "QNT009"
    assert causes(caught.value) == [
        f"`{MODULE}.input_scale` is dropped, f32 scale of the inputs of {MODULE} -> -: "
        "inputs stay in bf16"
    ]


@pytest.mark.parametrize("pattern", [WEIGHT, "model.layers.*", "*", "model.layers.?.*weight"])
def test_a_loss_that_a_pattern_allows(tmp_path: Path, pattern: str) -> None:
    made = ledger(tmp_path, weight=RECODED)
    assert [row.tensor for row in check_losses(made, [pattern])] == [WEIGHT]


@pytest.mark.parametrize("pattern", ["model.norm.weight", "*.bias", "Model.*"])
def test_a_pattern_that_allows_nothing(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(CompileError) as caught:
        check_losses(ledger(tmp_path, weight=RECODED), ["*", pattern])
    assert (caught.value.code, f"`{WEIGHT}`" in caught.value.cause) == ("QNT010", True)


@pytest.mark.parametrize(
    "verdict", ["rescaled", "requantized", "dequantized", "dropped", "unverified"]
)
def test_every_verdict_but_exact_is_a_loss(tmp_path: Path, verdict: Verdict) -> None:
    decision = RECODED._replace(verdict=verdict)
    with pytest.raises(CompileError) as caught:
        check_losses(ledger(tmp_path, weight=decision), [])
    assert caught.value.code == "QNT009"


def test_gguf_tensors_are_dequantized_with_a_warning() -> None:
    infos = [
        TensorInfo(stored, (4,), np.dtype(np.float32), stored) for stored in ("BF16", "Q4_1", "F32")
    ]
    made = make_gguf_ledger({info.name: info for info in infos})
    assert [row.tensor for row in check_losses(made, [])] == ["F32", "Q4_1"]


def test_a_furiosa_directory_is_unverified_with_a_warning() -> None:
    scale = ScaleTensor(f"{MODULE}._weight_quantizer", "f32", (6,), (6, 1), 448.0)
    weight = QuantizedLinear(
        MODULE, WEIGHT, (6, 16), "e4m3", PER_CHANNEL, scale, STATIC_TENSOR, scale, False
    )
    quantization = Quantization("furiosa", (weight,), (), ("one thing", "another"))
    made = make_ledger(quantization, {WEIGHT: TENSORS[WEIGHT]}, {})
    (row,) = check_losses(made, [])
    assert (row.verdict, row.reason) == ("unverified", "assumed: one thing; another")
    requantized = make_ledger(quantization, {WEIGHT: TENSORS[WEIGHT]}, {WEIGHT: RECODED})
    with pytest.raises(CompileError, match="QNT009"):
        check_losses(requantized, [])

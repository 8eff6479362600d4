"""What the codes themselves tell: no numbers, and the range of another chip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_checkpoint import MemoryCheckpoint
from small_linears import MODULE, Arrays, causes, describe, linear, ones

from furiosa_llm.artifact.ledger import check_losses, make_ledger
from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization import codes as codes_module
from furiosa_llm.frontend.quantization.codes import REMARK, check_codes, facts_of

E4M3, E5M2, FNUZ = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz
CONFIG = {"quant_method": "fp8", "weight_block_size": None}
OTHER = "model.layers.0.mlp.up_proj"


def test_facts_of_codes() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert facts_of(np.array([[1.0, -448.0]]).astype(E4M3)) == (448.0, 0)
    assert facts_of(np.array([[240.0, np.nan]]).astype(E4M3)) == (240.0, 1)
    assert facts_of(every.view(E4M3)) == (448.0, 2)
    assert facts_of(every.view(FNUZ)) == (240.0, 1)
    assert facts_of(every.view(E5M2)) == (57344.0, 8)
    assert facts_of(np.zeros((0, 4), E4M3)) == (0.0, 0)


@given(bits=st.lists(st.integers(0, 255), min_size=1), dtype=st.sampled_from([E4M3, E5M2, FNUZ]))
def test_facts_are_those_of_the_values(bits: list[int], dtype: Any) -> None:
    codes = np.array([bits], np.uint8).view(dtype)
    values = codes.astype(np.float64)
    finite = np.isfinite(values)
    largest = np.abs(values[finite]).max(initial=0)
    assert facts_of(codes) == (largest, (~finite).sum())


def checked(tmp_path: Path, *codes: Any) -> tuple[dict[str, str], Arrays]:
    """Two linears with these codes: what is remarked about them, and the tensors."""
    tensors: Arrays = {}
    for module, array in zip((MODULE, OTHER), codes, strict=True):
        tensors |= linear(module, weight_scale_inv=ones())
        tensors[f"{module}.weight"] = array
    quantization = describe(tmp_path, CONFIG, tensors)
    assert quantization is not None
    checkpoint = MemoryCheckpoint(tensors)
    remarks = check_codes(quantization, checkpoint)
    made = make_ledger(quantization, checkpoint.tensors, {}, remarks)
    assert {row.tensor: row.reason for row in made.rows if row.reason} == remarks
    assert check_losses(made, []) == ()
    return remarks, tensors


def full(value: float, dtype: Any = E4M3) -> Any:
    return np.full((6, 16), value).astype(dtype)


def test_codes_of_another_chip_s_range_are_remarked(tmp_path: Path) -> None:
    remarks, _ = checked(tmp_path, full(240), full(-208))
    assert remarks == {f"{MODULE}.weight": REMARK, f"{OTHER}.weight": REMARK}


@pytest.mark.parametrize("other", [full(256), full(-448)])
def test_one_larger_code_shows_the_whole_range(tmp_path: Path, other: Any) -> None:
    remarks, _ = checked(tmp_path, full(240), other)
    assert remarks == {}


@pytest.mark.parametrize(
    ("bits", "dtype", "said"),
    [
        (0x7F, E4M3, "96 codes that are no numbers; 0x7F and 0xFF are 240 in e4m3fnuz"),
        (0xFF, E4M3, "96 codes that are no numbers; 0x7F and 0xFF are 240 in e4m3fnuz"),
        (0x80, FNUZ, "96 codes that are no numbers; 0x80 is -0 in e4m3"),
        (0x7C, E5M2, "96 codes that are no numbers"),
        (0xFE, E5M2, "96 codes that are no numbers"),
    ],
)
def test_codes_that_are_no_numbers(tmp_path: Path, bits: int, dtype: Any, said: str) -> None:
    codes = np.full((6, 16), bits, np.uint8).view(dtype)
    with pytest.raises(CompileError) as caught:
        checked(tmp_path, full(1, dtype), codes)
    assert caught.value.code == "QNT011"
    assert causes(caught.value) == [f"`{OTHER}.weight` has {said}"]


def test_a_large_weight_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one bad code is in the last, shorter part."""
    monkeypatch.setattr(codes_module, "CHUNK_BYTES", 4 * 16)
    codes = full(1)
    codes.view(np.uint8)[5, 15] = 0x7F
    with pytest.raises(CompileError) as caught:
        checked(tmp_path, full(1), codes)
    assert "`model.layers.0.mlp.up_proj.weight` has 1 codes" in caught.value.cause

"""Every rule of the `paged` ops rejects what it should; the message names the cause."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from xdsl.dialects.builtin import ModuleOp

from furiosa_llm import errors
from furiosa_llm.ir.verification import verify_module

Snippet = Callable[[str, list[str]], ModuleOp]

CACHE = 'tensor<?x2x2x16xbf16, #nn.dims<"slots", _, _, _>>'
Q = 'tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>>'
KV = 'tensor<?x2x?x16xbf16, #nn.dims<"batch", _, "seq", _>>'
BT = 'tensor<?x?xi32, #nn.dims<"batch", "seq">>'
BA = 'tensor<?x?xi32, #nn.dims<"batch", "attn">>'
B = 'tensor<?xi32, #nn.dims<"batch">>'
Y = 'tensor<?x?x4x16xbf16, #nn.dims<"batch", "seq", _, _>>'
X = 'tensor<?x?x64xbf16, #nn.dims<"batch", "seq", _>>'
ROW = 'tensor<?x1x64xbf16, #nn.dims<"batch", _, _>>'


def write(
    cache: str = CACHE, k: str = KV, v: str = KV, slots: str = BT, y: str = CACHE
) -> tuple[str, list[str]]:
    types = [cache, k, v, slots]
    return f"paged.write %0, %1, %2, %3 : {', '.join(types)} -> {y}", types


def attention(
    q: str = Q,
    cache: str = CACHE,
    table: str = BA,
    lengths: str = B,
    positions: str = BT,
    y: str = Y,
    *,
    attributes: str = "scale 0.25",
) -> tuple[str, list[str]]:
    types = [q, cache, table, lengths, positions]
    op = f"paged.attention %0, %1, %2, %3, %4 {attributes} : {', '.join(types)} -> {y}"
    return op, types


CODES = CACHE.replace("bf16", "f8E4M3FN")
CODES_KV = KV.replace("bf16", "f8E4M3FN")


def attention_to_codes(
    cache: str = CODES, k_scale: str | None = "tensor<1xf32>", v_scale: str | None = "tensor<bf16>"
) -> tuple[str, list[str]]:
    types = [Q, cache, BA, B, BT]
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    given = [(name, type) for name, type in scales.items() if type is not None]
    operands = "".join(f" {name} %{5 + i}" for i, (name, _) in enumerate(given))
    of_types = "".join(f" {name} {type}" for name, type in given)
    op = f"paged.attention %0, %1, %2, %3, %4{operands} scale 0.25 : {', '.join(types)}{of_types}"
    return f"{op} -> {Y}", [*types, *(type for _, type in given)]


def last_token(x: str = X, lengths: str = B, y: str = ROW) -> tuple[str, list[str]]:
    return f"paged.last_token %0, %1 : {x}, {lengths} -> {y}", [x, lengths]


@pytest.mark.parametrize(
    "case",
    [
        write(),
        write(CODES, CODES_KV, CODES_KV, y=CODES),
        attention(),
        attention(attributes="scale 0.25 window 4"),
        attention_to_codes(),
        attention_to_codes(k_scale="tensor<1x1xf8E8M0FNU>"),
        last_token(),
    ],
)
def test_the_verifier_accepts(case: tuple[str, list[str]], snippet: Snippet) -> None:
    verify_module(snippet(*case))


F32_KV = KV.replace("bf16", "f32")
REJECTED = {
    "write into a cache of another dtype": (
        write(k=F32_KV, v=F32_KV),
        "cache bf16, k f32, v f32",
    ),
    "write floats into a cache of codes": (
        write(cache=CODES, y=CODES),
        "cache f8E4M3FN, k bf16, v bf16",
    ),
    "write k of rank 3": (write(k=X), "k must have rank 4"),
    "write v of another shape": (write(v=Q), "v must be [batch, 2, seq, 16]"),
    "write to slots of another shape": (
        write(slots=BA),
        "slot_mapping must be [batch, seq], but it is [batch, attn]",
    ),
    "write to float slots": (write(slots=BT.replace("i32", "f32")), "not one of i32"),
    "write into a cache without the K|V dimension": (
        write(cache="tensor<64x2x16xbf16>", y="tensor<64x2x16xbf16>"),
        "cache must have rank 4",
    ),
    "write into a cache of other heads": (
        write(cache="tensor<64x4x2x16xbf16>", y="tensor<64x4x2x16xbf16>"),
        "cache must be [64, 2, 2, 16]",
    ),
    "write into a cache with K only": (
        write(cache="tensor<64x2x1x16xbf16>", y="tensor<64x2x1x16xbf16>"),
        "cache must be [64, 2, 2, 16]",
    ),
    "write with a wrong result": (write(y=KV), "the operands give"),
    "attention to a cache of another dtype": (
        attention(cache=CACHE.replace("bf16", "f32")),
        "q bf16, cache f32",
    ),
    "attention with q of rank 3": (attention(q=X), "q must have rank 4"),
    "attention to a cache of rank 3": (
        attention(cache="tensor<64x2x16xbf16>"),
        "cache must have rank 4",
    ),
    "attention to a cache of another head size": (
        attention(cache="tensor<64x2x2x8xbf16>"),
        "cache must be [64, 2, 2, 16]",
    ),
    "attention with a flat table": (attention(table=B), "block_table must have rank 2"),
    "attention with a table of other sequences": (
        attention(table='tensor<?x?xi32, #nn.dims<"seq", "attn">>'),
        "block_table must be [batch, attn]",
    ),
    "attention with a length per token": (attention(lengths=BT), "lengths must be [batch]"),
    "attention with a position per key": (
        attention(positions=BA),
        "position_ids must be [batch, seq]",
    ),
    "attention with Q that G does not divide": (
        attention(cache="tensor<64x3x2x16xbf16>"),
        "Q = 4 is not a multiple of G = 3",
    ),
    "attention with an infinite scale": (attention(attributes="scale inf"), "scale is finite"),
    "attention with an empty window": (
        attention(attributes="scale 0.25 window 0"),
        "window is at least 1",
    ),
    "attention with a wrong result": (attention(y=Q), "the operands give"),
    "attention to codes without their scale": (
        attention_to_codes(v_scale=None),
        "there is a v_scale exactly if the cache holds codes",
    ),
    "attention to floats with a scale": (
        attention_to_codes(cache=CACHE),
        "there is a k_scale exactly if the cache holds codes",
    ),
    "attention with a scale for each head": (
        attention_to_codes(k_scale="tensor<2xf32>"),
        "k_scale is one number, but it is [2]",
    ),
    "attention with a scale in integers": (
        attention_to_codes(k_scale="tensor<1xi32>"),
        "not one of bf16, f16, f32",
    ),
    "last token of rank 4": (last_token(x=Y, y=ROW), "x must have rank 3"),
    "last token of other sequences": (
        last_token(lengths='tensor<?xi32, #nn.dims<"seq">>'),
        "lengths must be [batch]",
    ),
    "last token with a wrong result": (last_token(y=X), "the operands give"),
}


@pytest.mark.parametrize("case", REJECTED.values(), ids=REJECTED.keys())
def test_the_verifier_rejects(case: tuple[tuple[str, list[str]], str], snippet: Snippet) -> None:
    (op, operand_types), cause = case
    with pytest.raises(errors.CompileError, match=re.escape(cause)) as error:
        verify_module(snippet(op, operand_types))
    # The parser refuses what the constraint on one operand forbids, the verifier the rest.
    assert error.value.code in ("IRV001", "IRV008")
    if error.value.code == "IRV001":
        assert str(error.value.at) in op

"""Tensor types: named dimensions, their text, and the rules that every nn tensor obeys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from xdsl.dialects.builtin import DYNAMIC_INDEX, StringAttr, TensorType, i1
from xdsl.ir import Attribute
from xdsl.irdl import VerificationContext
from xdsl.parser import Parser
from xdsl.utils.exceptions import VerifyException

from furiosa_llm.ir.text import make_context, parse_module, print_module
from furiosa_llm.ir.types import (
    FLOAT_TENSOR,
    Dim,
    DimsAttr,
    bf16,
    broadcast,
    check_tensor_type,
    dims_of,
    dtype_of,
    f32,
    i32,
    shape_of,
    specialize,
    tensor,
)

DIMS = st.lists(st.one_of(st.integers(1, 9), st.sampled_from(["batch", "seq", "attn"])), max_size=5)


def test_a_dynamic_dimension_has_its_name_in_the_encoding() -> None:
    type = tensor(("batch", "seq", 576), bf16)

    assert str(type) == 'tensor<?x?x576xbf16, #nn.dims<"batch", "seq", _>>'
    assert dims_of(type) == ("batch", "seq", 576)
    assert shape_of(type) == (-1, -1, 576)
    assert dtype_of(type) == bf16


def test_a_static_tensor_has_no_encoding() -> None:
    assert tensor((2, 3), f32) == TensorType(f32, (2, 3))


@given(DIMS)
def test_types_read_back_from_their_text(dims: list[Dim]) -> None:
    type = tensor(dims, bf16)
    assert Parser(make_context(), str(type)).parse_type() == type
    assert dims_of(type) == tuple(dims)


@pytest.mark.parametrize(
    ("type", "cause"),
    [
        (f32, "not a ranked tensor"),
        (TensorType(f32, (DYNAMIC_INDEX,)), "dynamic dimension 0 .* has no name"),
        (TensorType(f32, (DYNAMIC_INDEX,), DimsAttr([""])), "dynamic dimension 0 .* has no name"),
        (TensorType(f32, (2,), DimsAttr(["batch"])), "both a size and a name"),
        (TensorType(f32, (2,), DimsAttr([""])), "must have no #nn.dims"),
        (TensorType(f32, (DYNAMIC_INDEX,), DimsAttr(["a", ""])), "1 dimensions but 2 names"),
        (TensorType(f32, (2,), StringAttr("row-major")), "encoding other than"),
        (TensorType(f32, (0,)), "is empty"),
    ],
)
def test_malformed_tensor_types_are_rejected(type: Attribute, cause: str) -> None:
    with pytest.raises(VerifyException, match=cause):
        check_tensor_type(type)


def test_dimension_names_are_identifiers() -> None:
    with pytest.raises(VerifyException, match="not an identifier"):
        DimsAttr(["batch size"])


def test_a_constraint_names_the_element_types_it_takes() -> None:
    FLOAT_TENSOR.verify(tensor((2,), bf16), VerificationContext())
    for dtype in (i32, i1):
        with pytest.raises(VerifyException, match="not one of bf16, f16, f32, f64"):
            FLOAT_TENSOR.verify(tensor((2,), dtype), VerificationContext())


SIZES = st.lists(st.sampled_from([1, 1, 2, 3]), max_size=4)


@settings(deadline=None)  # the first call warms torch up
@given(SIZES, SIZES)
def test_static_dims_broadcast_as_torch_does(a: list[int], b: list[int]) -> None:
    try:
        expected = tuple((torch.zeros(a) + torch.zeros(b)).shape)
    except RuntimeError:
        with pytest.raises(VerifyException, match="do not broadcast"):
            broadcast(tuple(a), tuple(b))
    else:
        assert broadcast(tuple(a), tuple(b)) == expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (("batch", 4), (4,), ("batch", 4)),
        (("batch", 1), (1, "seq"), ("batch", "seq")),
        (("batch",), ("batch",), ("batch",)),
    ],
)
def test_names_broadcast_with_themselves_and_with_one(
    a: tuple[Dim, ...], b: tuple[Dim, ...], expected: tuple[Dim, ...]
) -> None:
    assert broadcast(a, b) == expected


@pytest.mark.parametrize(("a", "b"), [(("batch",), ("seq",)), (("batch",), (4,))])
def test_different_names_do_not_broadcast(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> None:
    with pytest.raises(VerifyException, match="do not broadcast"):
        broadcast(a, b)


def test_specialize_makes_named_dims_static() -> None:
    cache = tensor(("slots", 3, 2, 64), bf16)
    hidden = tensor(("batch", "seq", 576), bf16)

    assert specialize(hidden, {"batch": 4, "seq": 1}) == tensor((4, 1, 576), bf16)
    assert specialize(hidden, {"batch": 4}) == tensor((4, "seq", 576), bf16)
    assert specialize(cache, {"batch": 4}) is cache
    assert specialize(i32, {"batch": 4}) is i32


def test_an_encoding_survives_a_round_trip_in_a_module() -> None:
    text = "func.func private @f(" + str(tensor(("batch", 2), i32)) + ") -> ()"
    printed = print_module(parse_module(text))
    assert '#nn.dims<"batch", _>' in printed
    assert print_module(parse_module(printed)) == printed

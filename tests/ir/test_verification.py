"""What xDSL's verifier leaves out: order of values, symbols, calls, sizes of dimensions."""

from __future__ import annotations

import time

import pytest
from xdsl.dialects import test as test_dialect
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, Region, SSAValue

from furiosa_llm import errors
from furiosa_llm.ir import nn
from furiosa_llm.ir.text import parse_module
from furiosa_llm.ir.types import f32, tensor
from furiosa_llm.ir.verification import verify_module

T = "tensor<2xf32>"
DYNAMIC = 'tensor<?xf32, #nn.dims<"batch">>'

REJECTED = {
    "IRV001 a return of another type": (
        f"func.func @f(%x: {T}) -> {T} {{ func.return }}",
        "IRV001",
        "func.return in @f",
        "same types as the function output",
    ),
    "IRV001 a body without return": (
        f"func.func @f(%x: {T}) {{ %y = nn.neg %x : {T} }}",
        "IRV001",
        "nn.neg in @f",
        "not a terminator",
    ),
    "IRV001 two symbols of one name": (
        f"nn.parameter @w : {T}\nnn.parameter @w : {T}",
        "IRV001",
        "builtin.module",
        'Redefinition of symbol "w"',
    ),
    "IRV001 an argument of a malformed type": (
        "func.func @f(%x: tensor<?xf32>) { func.return }",
        "IRV001",
        "func.func @f",
        "has no name",
    ),
    "IRV002 use before definition": (
        f"""func.func @f(%x: {T}) -> {T} {{
          %y = nn.add %x, %z : {T}, {T} -> {T} loc("mlp"("add_1"))
          %z = nn.neg %x : {T} loc("mlp"("neg_1"))
          func.return %y : {T}
        }}""",
        "IRV002",
        "nn.add in @f, mlp (add_1)",
        "nn.neg in @f, mlp (neg_1)",
    ),
    "IRV002 an op that uses itself": (
        f"func.func @f() {{ %y = nn.neg %y : {T} func.return }}",
        "IRV002",
        "nn.neg in @f",
        "nn.neg in @f",
    ),
    "IRV003 two blocks": (
        '"test.op"() ({ "test.termop"() [^bb1] : () -> ()\n'
        '^bb1: "test.termop"() : () -> () }) : () -> ()',
        "IRV003",
        "test.op",
        "no control flow",
    ),
    "IRV004 an undeclared parameter": (
        f"nn.parameter @w : {T}\n%w = nn.get_parameter @v : {T}",
        "IRV004",
        "nn.get_parameter",
        "declares as parameter: @w",
    ),
    "IRV004 a call of a parameter": (
        f"nn.parameter @w : {T}\nfunc.func @f() {{ func.call @w() : () -> () func.return }}",
        "IRV004",
        "func.call in @f",
        "declares as function: @f",
    ),
    "IRV005 a parameter of another type": (
        f"nn.parameter @w : {T}\n%w = nn.get_parameter @w : tensor<2xbf16>",
        "IRV005",
        "nn.get_parameter",
        "used as tensor<2xbf16>, declared as tensor<2xf32>",
    ),
    "IRV005 a call with too few arguments": (
        f"func.func private @g({T}) -> ()\n"
        "func.func @f() { func.call @g() : () -> () func.return }",
        "IRV005",
        "func.call in @f",
        "used as () -> (), declared as (tensor<2xf32>) -> ()",
    ),
    "IRV005 a call with another dimension name": (
        f"func.func private @g({DYNAMIC}) -> ()\n"
        f"func.func @f(%x: {DYNAMIC.replace('batch', 'seq')}) "
        f"{{ func.call @g(%x) : ({DYNAMIC.replace('batch', 'seq')}) -> () func.return }}",
        "IRV005",
        "func.call in @f",
        '#nn.dims<"seq">',
    ),
    "IRV006 recursion": (
        "func.func @f() { func.call @g() : () -> () func.return }\n"
        "func.func @g() { func.call @f() : () -> () func.return }",
        "IRV006",
        "func.func @f",
        "@f -> @g -> @f",
    ),
    "IRV007 a size that nothing gives": (
        f"func.func @f(%x: tensor<1xf32>) {{ %y = nn.expand %x : tensor<1xf32> -> {DYNAMIC}"
        " func.return }",
        "IRV007",
        "nn.expand in @f",
        "names on the function's arguments",
    ),
}


def parse(text: str) -> ModuleOp:
    return parse_module(text, extra_dialects={"test": lambda: test_dialect.Test})


@pytest.mark.parametrize("case", REJECTED.values(), ids=REJECTED.keys())
def test_rejected_with_code_place_and_cause(case: tuple[str, str, str, str]) -> None:
    text, code, at, cause = case
    module = parse(text)
    with pytest.raises(errors.CompileError) as error:
        verify_module(module)
    assert (error.value.code, error.value.at) == (code, at)
    assert cause in error.value.cause


def test_a_value_of_another_function_is_not_defined() -> None:
    type = tensor((2,), f32)
    first, second = Block(arg_types=[type]), Block(arg_types=[type])
    first.add_op(ReturnOp(first.args[0]))
    second.add_op(ReturnOp(first.args[0]))
    module = ModuleOp(
        [
            FuncOp("f", ([type], [type]), Region(first)),
            FuncOp("g", ([type], [type]), Region(second)),
        ]
    )
    with pytest.raises(errors.CompileError) as error:
        verify_module(module)
    assert error.value.code == "IRV002"
    assert "the arguments of func.func @f" in error.value.cause


def test_a_value_of_an_enclosing_region_is_defined_and_one_of_a_sibling_is_not() -> None:
    region = f'"test.op"() ({{ %y = nn.neg %x : {T} "test.termop"() : () -> () }}) : () -> ()'
    module = parse(f"func.func @f(%x: {T}) {{ {region} {region} func.return }}")
    verify_module(module)

    first, second = (op for op in module.walk() if isinstance(op, nn.NegOp))
    second.operands[0] = first.y
    with pytest.raises(errors.CompileError) as error:
        verify_module(module)
    assert error.value.code == "IRV002"


def test_accepted() -> None:
    verify_module(
        parse(
            f"""
            nn.parameter @w : {T}
            func.func @forward(%x: {DYNAMIC}) -> {DYNAMIC} {{
              %w = nn.get_parameter @w : {T}
              %y = func.call @block(%x, %w) : ({DYNAMIC}, {T}) -> {DYNAMIC}
              %z = func.call @block(%y, %w) : ({DYNAMIC}, {T}) -> {DYNAMIC}
              func.return %z : {DYNAMIC}
            }}
            func.func private @block(%x: {DYNAMIC}, %w: {T}) -> {DYNAMIC} {{
              func.return %x : {DYNAMIC}
            }}
            """
        )
    )


def chain(ops: int) -> ModuleOp:
    type = tensor((2,), f32)
    block = Block(arg_types=[type])
    value: SSAValue = block.args[0]
    for _ in range(ops):
        op = nn.NegOp(value)
        block.add_op(op)
        value = op.y
    block.add_op(ReturnOp(value))
    return ModuleOp([FuncOp("f", ([type], [type]), Region(block))])


def seconds(ops: int) -> float:
    module = chain(ops)
    start = time.perf_counter()
    verify_module(module)
    return time.perf_counter() - start


def test_verification_takes_linear_time() -> None:
    small = min(seconds(500) for _ in range(3))
    large = min(seconds(4000) for _ in range(3))
    assert large < 3 * 8 * small

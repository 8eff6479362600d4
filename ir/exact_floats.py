"""Floats in the textual form: the shortest decimals that read back as the same bits.

xDSL's own directive prints some whole numbers as hexadecimal integers, which it then cannot
parse, and all others with at least seven digits.
"""

from __future__ import annotations

import struct

from xdsl.dialects.builtin import DenseArrayBase, Float32Type, Float64Type, FloatAttr
from xdsl.ir import Attribute
from xdsl.irdl import IRDLOperation
from xdsl.irdl.declarative_assembly_format import (
    AttributeVariable,
    CustomDirective,
    DenseArrayAttributeVariable,
    ParsingState,
    PrintingState,
    TypedAttributeVariable,
    irdl_custom_directive,
)
from xdsl.parser import Parser
from xdsl.printer import Printer


@irdl_custom_directive
class Exact(CustomDirective):
    """`custom<Exact>($name)` for a float property or an array of floats."""

    number: AttributeVariable

    def parse(self, parser: Parser, state: ParsingState) -> None:
        if isinstance(self.number, DenseArrayAttributeVariable):
            square = parser.Delimiter.SQUARE
            values = parser.parse_comma_separated_list(square, lambda: _parse(parser))
            array_type = self.number.elt_type
            assert isinstance(array_type, Float32Type | Float64Type)
            self.number.set(state, DenseArrayBase.from_list(array_type, values))
        else:
            assert isinstance(self.number, TypedAttributeVariable)
            type = self.number.unique_type
            assert isinstance(type, Float32Type | Float64Type)
            self.number.set(state, FloatAttr(_parse(parser), type))

    def print(self, printer: Printer, state: PrintingState, op: IRDLOperation) -> None:
        state.print_whitespace(printer)
        attribute = self.number.get(op)
        if isinstance(attribute, DenseArrayBase):
            with printer.in_square_brackets():
                printer.print_list(
                    attribute.iter_values(),
                    lambda value: printer.print_string(show_float(value, attribute.elt_type)),
                )
        else:
            assert isinstance(attribute, FloatAttr)
            printer.print_string(show_float(attribute.value.data, attribute.type))


def show_float(value: float, type: Attribute) -> str:
    """The shortest decimal that reads back as `value` in `type`; it always has a point."""
    text = _shortest_f32(value) if isinstance(type, Float32Type) else repr(value)
    if "." in text or not text.lstrip("-")[0].isdigit():
        return text
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if exponent else f"{mantissa}.0"


def _shortest_f32(value: float) -> str:
    # Nine digits tell all f32 apart.
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next((text for text in texts if _round_f32(float(text)) == value), repr(value))


def _round_f32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:  # rounding up the largest f32 to few digits
        return float("inf")


def _parse(parser: Parser) -> float:
    for keyword in ("nan", "inf"):  # verifiers refuse them, but what is printed must parse
        if parser.parse_optional_keyword(keyword) is not None:
            return float(keyword)
    return float(parser.parse_number())

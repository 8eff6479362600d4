"""Writes docs/dialects/*.md from the definitions of the ops: `python docs/generate_dialects.py`."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdsl.dialects.builtin import (
    BoolAttr,
    DenseArrayBase,
    DenseIntOrFPElementsAttr,
    DictionaryAttr,
    FloatAttr,
    IntegerAttr,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
    UnitAttr,
)
from xdsl.ir import Attribute, Dialect, Operation, ParametrizedAttribute
from xdsl.irdl import (
    AttrConstraint,
    BaseAttr,
    EqAttrConstraint,
    IRDLOperation,
    MessageConstraint,
    OpDef,
    OptionalDef,
    ParamAttrConstraint,
    RangeOf,
    VarConstraint,
    VariadicDef,
)
from xdsl.irdl.constraints import RangeLengthConstraint
from xdsl.traits import Pure

from furiosa_llm.ir.types import TensorConstraint

DIRECTORY = Path(__file__).parent / "dialects"

# Dialect -> where it is defined; its module's docstring is the introduction.
DIALECTS = {
    "nn": "furiosa_llm.ir.nn:NN",
    "paged": "furiosa_llm.ir.paged:PAGED",
    "quant": "furiosa_llm.ir.quant:QUANT",
    "dist": "furiosa_llm.ir.dist:DIST",
    "rngd": "furiosa_llm.backend_rngd.rngd:RNGD",
}

ATTRIBUTES: dict[type[Attribute], str] = {
    BoolAttr: "true or false",
    DenseIntOrFPElementsAttr: "dense elements",
    DictionaryAttr: "dictionary",
    StringAttr: "string",
    SymbolRefAttr: "symbol",
    UnitAttr: "flag",
}
NUMBERS: dict[type[Attribute], str] = {
    DenseArrayBase: "array of {}",
    FloatAttr: "{}",
    IntegerAttr: "{}",
}


def pages() -> dict[Path, str]:
    """The path and text of every page."""
    return {DIRECTORY / f"{name}.md": _page(name, place) for name, place in DIALECTS.items()}


def _page(name: str, place: str) -> str:
    module_name, _, variable = place.partition(":")
    module = importlib.import_module(module_name)
    dialect = getattr(module, variable)
    assert isinstance(dialect, Dialect)
    sections = [
        f"# The `{name}` dialect",
        "<!-- written by docs/generate_dialects.py; do not edit -->",
        inspect.cleandoc(module.__doc__ or ""),
        _summary(list(dialect.operations)),
        *(_attribute_section(attribute) for attribute in dialect.attributes),
        *(_op_section(op) for op in dialect.operations),
    ]
    return "\n\n".join(sections) + "\n"


def _attribute_section(attribute: type[Attribute]) -> str:
    sigil = "#" if not attribute.name.startswith("!") else ""
    return f"## `{sigil}{attribute.name}`\n\n{inspect.getdoc(attribute)}"


def _summary(ops: list[type[Operation]]) -> str:
    """One row per op: what goes in, what comes out, and the docstring's first line."""
    rows = ["| op | operands | results | attributes | summary |", "|---|---|---|---|---|"]
    for op in ops:
        assert issubclass(op, IRDLOperation)
        definition = op.get_irdl_definition()
        summary = (inspect.getdoc(op) or "").partition("\n")[0]
        cells = [
            f"`{op.name}`",
            _names(definition.operands),
            _names(definition.results),
            _names([*definition.properties.items(), *definition.attributes.items()]),
            summary,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _names(fields: Sequence[tuple[str, object]]) -> str:
    """`x`, `bias?` (optional), `xs…` (variadic)."""
    marks = {"optional ": "?", "variadic ": "…", "": ""}
    return ", ".join(f"`{name}{marks[_arity(field)]}`" for name, field in fields)


def _op_section(op: type[Operation]) -> str:
    assert issubclass(op, IRDLOperation)
    definition = op.get_irdl_definition()
    parts = [f"## `{op.name}`", inspect.getdoc(op) or ""]
    if definition.assembly_format is not None:
        parts.append(f"```text\n{op.name} {_syntax(definition)}\n```")
    rows = [*_value_rows(definition), *_attribute_rows(definition)]
    if rows:
        parts.append("\n".join(["| name | kind | what |", "|---|---|---|", *rows]))
    if not op.has_trait(Pure):
        parts.append("Not pure: stays although nothing uses it.")
    return "\n\n".join(parts)


def _syntax(definition: OpDef) -> str:
    """The declarative format as a reader writes it: no backticks, no directives."""
    text = re.sub(r"custom<\w+>\((\$\w+)\)", r"\1", definition.assembly_format or "")
    for name, attribute in definition.properties.items():
        if _describe(attribute.constr) == "flag":
            text = text.replace(f" ${name}", "")  # the keyword alone says it
    text = text.replace("`", "").replace("^", "").replace(" attr-dict", "")
    return re.sub(r" ,", ",", text)


def _value_rows(definition: OpDef) -> list[str]:
    return [
        f"| `{name}` | {_arity(value)}{kind} | {_describe(value.constr)} |"
        for kind, values in (("operand", definition.operands), ("result", definition.results))
        for name, value in values
    ]


def _attribute_rows(definition: OpDef) -> list[str]:
    attributes = definition.properties | definition.attributes
    return [
        f"| `{name}` | {_arity(attribute)}attribute | {_describe(attribute.constr)} |"
        for name, attribute in attributes.items()
    ]


def _arity(definition: object) -> str:
    if isinstance(definition, OptionalDef):
        return "optional "
    return "variadic " if isinstance(definition, VariadicDef) else ""


def _describe(constraint: Any) -> str:
    match constraint:
        case RangeLengthConstraint():
            return _describe(constraint.constraint)
        case RangeOf():
            return _describe(constraint.constr)
        case MessageConstraint():
            return _describe(constraint.constr)
        case VarConstraint():
            return f"{_describe(constraint.constraint)}; one type for all `{constraint.name}`"
        case TensorConstraint():
            return "tensor of " + ", ".join(str(dtype) for dtype in constraint.dtypes)
        case SymbolNameConstraint():
            return "symbol name"
        case BaseAttr() if constraint.attr in ATTRIBUTES:
            return ATTRIBUTES[constraint.attr]
        case BaseAttr() if constraint.attr in NUMBERS:
            return NUMBERS[constraint.attr].format("integers")
        case BaseAttr() if constraint.attr.name.startswith(("dist.", "rngd.")):
            return f"`{constraint.attr.name}`"
        case ParamAttrConstraint() if constraint.base_attr in ATTRIBUTES:
            return ATTRIBUTES[constraint.base_attr]
        case ParamAttrConstraint() if constraint.base_attr in NUMBERS:
            return NUMBERS[constraint.base_attr].format(_element_type(constraint))
    raise AssertionError(f"no words for {constraint}")


def _element_type(constraint: ParamAttrConstraint[ParametrizedAttribute]) -> str:
    """The number type among the parameters of a float, an integer or an array attribute."""
    for parameter in constraint.param_constrs:
        if isinstance(parameter, EqAttrConstraint):
            return str(parameter.attr)
        name = _base_name(parameter)
        if name is not None:
            return name
    raise AssertionError(f"no element type in {constraint}")


def _base_name(parameter: AttrConstraint[Attribute]) -> str | None:
    """`f64` for a constraint to the class Float64Type; None for other parameters."""
    if isinstance(parameter, BaseAttr) and parameter.attr.name.startswith(("f", "bf")):
        return parameter.attr.name if parameter.attr.name[-1].isdigit() else None
    return None


def main() -> int:
    """Write every page; with `--check`, only say which ones are out of date."""
    check = sys.argv[1:] == ["--check"]
    stale = [path for path, text in pages().items() if _read(path) != text]
    for path in stale:
        print(f"{path.name} {'is out of date' if check else 'written'}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages()[path], encoding="utf-8")
    return 1 if check and stale else 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())

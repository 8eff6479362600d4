"""Fill in the tables of isa.md and cycles.md from the code: `python docs/generate_isa.py`.

The prose of the pages is written by hand. Tables stand between `<!-- begin: KIND NAME -->` and
`<!-- end -->`; what is between them is replaced. With `--check` nothing is written.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from furiosa_llm.backend_rngd.isa import (
    dtypes,
    instructions,
    rank_rules,
    record_types,
    rules,
    topology_rules,
    units,
    vector_rules,
)
from furiosa_llm.backend_rngd.isa.assembly import SINGULAR
from furiosa_llm.backend_rngd.isa.machine import Parameter, load_machine

PAGES = [Path(__file__).parent / name for name in ("isa.md", "cycles.md")]
RULES = (rules, rank_rules, topology_rules, vector_rules)
MARKED = re.compile(r"(<!-- begin: (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """`page` with all tables made anew."""
    return MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]](m[3])}\n{m[4]}", page)


def _table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --- what the code says ---


def _docstrings(source: object, name: str) -> dict[str, str]:
    """Field or member -> the docstring below it, in the class `name` of a module."""
    tree = ast.parse(inspect.getsource(source))  # type: ignore[arg-type]
    (owner,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    found: dict[str, str] = {}
    for node, after in zip(owner.body, [*owner.body[1:], ast.Pass()], strict=True):
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign):
            target = node.targets[0]  # type: ignore[assignment]
        if isinstance(target, ast.Name) and isinstance(after, ast.Expr):
            text = ast.literal_eval(after.value)
            found[target.id] = " ".join(text.split())
    return found


def _fields(name: str) -> str:
    """The fields of a command's part, as assembler text names them."""
    kind = getattr(instructions, name)
    meaning = _docstrings(sys.modules[kind.__module__], name)
    hints = get_type_hints(kind)

    def rows() -> Iterator[list[str]]:
        for field in dataclasses.fields(kind):
            assert field.name in meaning, f"{name}.{field.name} has no docstring"
            text = SINGULAR.get(field.name, field.name)
            yield [f"`{text}`", _type(hints[field.name]), _default(field), meaning[field.name]]

    return _table(["field", "value", "default", "meaning"], rows())


def _type(hint: Any) -> str:
    if isinstance(hint, UnionType):
        (hint,) = (arg for arg in get_args(hint) if arg is not NoneType)
    if get_origin(hint) is tuple:
        element = get_args(hint)[0]
        return f"{_type(element)}, repeated" if _is_part(element) else "integers"
    if hint is bool:
        return "flag"
    if hint is int:
        return "integer"
    if hint is dtypes.DType or len(hint.__members__ if issubclass(hint, IntEnum) else ()) > 8:
        return f"a name of `{hint.__name__}`"
    if issubclass(hint, IntEnum):
        return ", ".join(f"`{member.name.lower()}`" for member in hint)
    return f"`{hint.__name__}`"


def _is_part(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "its defaults"
    if field.default is dataclasses.MISSING:
        return ""
    if field.default in (None, ()):
        return "none"
    if isinstance(field.default, IntEnum):
        return f"`{field.default.name.lower()}`"
    if isinstance(field.default, tuple):
        return ",".join(map(str, field.default))
    return "off" if field.default is False else str(field.default)


def _members(name: str) -> str:
    """The members of an enumeration that say what they mean."""
    kind = getattr(instructions, name)
    meaning = _docstrings(sys.modules[kind.__module__], name)
    return _table(
        ["value", "name", "meaning"],
        ([str(int(m)), f"`{m.name.lower()}`", meaning.get(m.name, "")] for m in kind),
    )


def _bytes(name: str) -> str:
    """The layout of a record."""
    record = getattr(record_types, name)
    return _table(
        ["byte", "field", "type"],
        ([str(at), f"`{field}`", kind] for at, field, kind in _leaves(record, "", 0)),
    )


def _leaves(record: np.dtype[Any], prefix: str, offset: int) -> Iterator[tuple[int, str, str]]:
    """(offset, name, type) of every field; parts that repeat are shown once."""
    assert record.fields is not None
    for name, (dtype, at, *_) in record.fields.items():
        if name.startswith("reserved"):
            continue
        element, shape = dtype.subdtype or (dtype, ())
        times = f" x {shape[0]}" if shape else ""
        if element.fields is None:
            yield offset + at, f"{prefix}{name}", f"{element.name}{times}"
        else:
            if times:
                yield offset + at, f"{prefix}{name}", f"{element.itemsize} B{times}, the first:"
            yield from _leaves(element, f"{prefix}{name}.", offset + at)


def _rules(_: str) -> str:
    """Every rule of rules.py with the cause that its error gives."""
    trees = [ast.parse(inspect.getsource(module)) for module in RULES]
    found: dict[str, list[str]] = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        value = node.value if isinstance(node, ast.Yield) else None
        if isinstance(value, ast.Tuple) and isinstance(value.elts[0], ast.Constant):
            found.setdefault(str(value.elts[0].value), []).append(_template(value.elts[1]))
    return _table(
        ["rule", "what its error says"],
        ([f"`{rule}`", "; ".join(dict.fromkeys(causes))] for rule, causes in sorted(found.items())),
    )


def _template(node: ast.expr) -> str:
    """The text of an f-string with … where values go."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.JoinedStr)
    return "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)


def _units(_: str) -> str:
    """The vector engine's units with their stage and operations."""
    return _table(
        ["unit", "stage", "operations"],
        (
            [
                f"`{unit.name.lower()}`",
                str(units.STAGE[unit]),
                ", ".join(f"`{op.name.lower()}`" for op in ops),
            ]
            for unit, ops in units.ALU_OPS.items()
        ),
    )


def _machine(name: str) -> str:
    """The parameters of a machine description."""
    return _table(
        ["parameter", "value", "unit", "range", "tag", "source"],
        (
            [f"`{path}`", _value(p), p.unit, _range(p), p.tag.value, p.source]
            for path, p in load_machine(name).parameters.items()
        ),
    )


def _value(parameter: Parameter) -> str:
    value = parameter.value
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return ", ".join(f"{key} {item}" for key, item in value.items())


def _range(parameter: Parameter) -> str:
    low, high = parameter.low, parameter.high
    return "" if low is None or low == high else f"{low:g} to {high:g}"


TABLES: dict[str, Callable[[str], str]] = {
    "fields": _fields,
    "members": _members,
    "bytes": _bytes,
    "rules": _rules,
    "units": _units,
    "machine": _machine,
}


def main() -> int:
    """Write the pages, or with `--check` only say which are out of date."""
    check, stale = sys.argv[1:] == ["--check"], 0
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        new = render(page)
        if new == page:
            continue
        stale += 1
        print(f"{path.name} {'is out of date' if check else 'written'}")
        if not check:
            path.write_text(new, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())

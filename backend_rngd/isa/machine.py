"""Machine files: one YAML file per description, each number with its unit and source.

`load_machine()` gives a typed `Machine`; `machine.dma.startup_cycles` is a plain number, and
`machine.parameters["dma.startup_cycles"]` the same with unit, source, tag and range. The YAML
settles what the sources disagree on; code has no switches.

A file is whole, or `extends` another one, by the name of one that is included or by a path beside
the file itself, and says only what differs:

    schema: 1
    extends: silicon
    hbm: {bandwidth_bytes_per_second: {value: 3.072e12}}
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard, get_type_hints

import yaml

from ... import errors
from .machine_checks import check_parameter, check_relations, unit_of
from .machine_schema import Machine, Parameter, Sizes, Table, Tag, Value

__all__ = [
    "DEFAULT_MACHINE",
    "Machine",
    "Parameter",
    "Tag",
    "load_machine",
    "parse_machine",
    "shipped_machines",
]

SCHEMA = 1
DEFAULT_MACHINE = "silicon"
DOCUMENTED_MACHINE = "book"
SECTIONS = tuple(
    f.name for f in dataclasses.fields(Machine) if f.name not in ("name", "parameters")
)


def load_machine(name_or_path: str | Path = DEFAULT_MACHINE) -> Machine:
    """The description with that name, or in that file (anything with a slash or `.yaml`).

    Raises: VED021 (no such description), VED022 (the file is not valid, naming the parameter).
    """
    return _load(name_or_path, (), str(name_or_path))


@functools.cache
def with_documented_exchanges(machine: Machine) -> Machine:
    """The machine with exchanges by formula: what is documented, nothing that was fitted."""
    book = load_machine(DOCUMENTED_MACHINE)
    parameters = {**machine.parameters}
    parameters |= {name: p for name, p in book.parameters.items() if name.startswith("exchange.")}
    return dataclasses.replace(
        machine, exchange=book.exchange, parameters=MappingProxyType(parameters)
    )


def _load(name_or_path: str | Path, above: tuple[Path, ...], at: str) -> Machine:
    """`above` are the files that extend it, outermost first; `at` says where it is named."""
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or _is_path(name):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            cause = errors.in_words(error)
            raise errors.machine_not_found(name, shipped_machines(), cause, at) from None
        return parse_machine(text, name, above)
    if name not in shipped_machines():
        cause = "no description has this name; the path of a file has a slash or ends in .yaml"
        raise errors.machine_not_found(name, shipped_machines(), cause, at)
    return _shipped(name)


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


@functools.cache
def _shipped(name: str) -> Machine:
    text = (_machines_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_machine(text, name)


@functools.cache
def shipped_machines() -> tuple[str, ...]:
    """Names of the descriptions that come with the package."""
    files = (entry.name for entry in _machines_folder().iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml")))


def _machines_folder() -> Any:
    return resources.files(__package__) / "machines"


class _Loader(yaml.SafeLoader):
    """YAML with numbers as in its version 1.2, and without keys that stand twice.

    Version 1.1, which PyYAML reads, takes 2e9 for text; of two equal keys it keeps the last.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice!r} stands twice in one table", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_machine(text: str, where: str, above: tuple[Path, ...] = ()) -> Machine:
    """The machine in a YAML text. Raises: VED021 for what it extends, VED022 for all else."""
    try:
        document = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise errors.bad_machine(where, "file", f"not YAML: {errors.in_words(error)}") from None
    if not isinstance(document, dict):
        raise errors.bad_machine(where, "file", "not a table of sections")
    if document.get("schema") != SCHEMA:
        raise errors.bad_machine(where, "schema", f"{document.get('schema')!r}, expected {SCHEMA}")
    if "extends" in document:
        _check_keys(where, "", document, [], [*SECTIONS, "schema", "name", "extends"])
        base = _base(where, _text(where, "extends", document["extends"]), above)
        document = {"name": Path(where).stem, **document}
        for section in SECTIONS:
            document[section] = _extended(where, section, document.get(section, {}), base)
        del document["extends"]
    _check_keys(where, "", document, [*SECTIONS, "schema", "name"])
    hints = get_type_hints(Machine)
    parameters: dict[str, Parameter] = {}
    built = {
        name: _section(where, name, hints[name], document[name], parameters) for name in SECTIONS
    }
    name = _text(where, "name", document["name"])
    machine = Machine(name=name, parameters=MappingProxyType(parameters), **built)
    check_relations(where, machine)
    return machine


def _text(where: str, path: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise errors.bad_machine(where, path, f"{value!r} is not text")
    return value


# --- what a file extends ---


def _base(where: str, name: str, above: tuple[Path, ...]) -> Machine:
    """The description that the file `where` extends: an included one, or a file beside it."""
    at = f"{where}: extends"
    if not _is_path(name):
        return _load(name, (), at)
    above = (*above, Path(where).resolve())
    path = Path(where).parent / name
    if path.resolve() in above:
        raise errors.bad_machine(where, "extends", f"{name}: files extend each other in a circle")
    return _load(path, above, at)


def _extended(where: str, section: str, table: object, base: Machine) -> object:
    """The section with what `base` says wherever `table` says nothing.

    A new value stands alone: the range of the old one does not apply to it, nor how it is known.
    """
    if not isinstance(table, dict):
        return table
    merged: dict[object, object] = {}
    for field in dataclasses.fields(getattr(base, section)):
        new = table.get(field.name, {})
        entry = _entry(base.parameters[f"{section}.{field.name}"])
        if isinstance(new, dict) and "value" in new:
            entry.pop("range", None)
            entry["source"] = f"{where}, instead of {base.name}"
            entry["tag"] = Tag.ASSUMED.value
        merged[field.name] = {**entry, **new} if isinstance(new, dict) else new
    unknown = {key: entry for key, entry in table.items() if key not in merged}
    return {**merged, **unknown}


def _entry(known: Parameter) -> dict[str, object]:
    """A parameter as a file has it."""
    value: object = known.value
    if isinstance(value, Mapping):
        value = dict(value)
    elif isinstance(value, tuple):
        value = list(value)
    entry: dict[str, object] = {"value": value, "unit": known.unit}
    entry |= {"source": known.source, "tag": known.tag.value}
    if known.low is not None and known.low != known.high:
        entry["range"] = [known.low, known.high]
    return entry


# --- one section, one parameter ---


def _section(
    where: str, name: str, kind: type[Any], table: object, parameters: dict[str, Parameter]
) -> Any:
    if not isinstance(table, dict):
        raise errors.bad_machine(where, name, "not a table of parameters")
    hints = get_type_hints(kind)
    _check_keys(where, f"{name}.", table, list(hints))
    for field, hint in hints.items():
        path = f"{name}.{field}"
        parameters[path] = _parameter(where, path, hint, table[field])
    return kind(**{field: parameters[f"{name}.{field}"].value for field in hints})


def _parameter(where: str, path: str, hint: object, entry: object) -> Parameter:
    if not isinstance(entry, dict):
        problem = f"{entry!r} is not a table with value, unit, source and tag: {{value: {entry}}}"
        raise errors.bad_machine(where, path, problem)
    _check_keys(where, f"{path}.", entry, ["value", "unit", "source", "tag"], ["range"])
    value = _value(where, path, hint, entry["value"])
    for key in ("unit", "source"):
        if not isinstance(entry[key], str) or not entry[key]:
            raise errors.bad_machine(where, f"{path}.{key}", "missing or not text")
    if entry["tag"] not in {tag.value for tag in Tag}:
        choices = ", ".join(tag.value for tag in Tag)
        raise errors.bad_machine(where, f"{path}.tag", f"{entry['tag']!r} is none of {choices}")
    low, high = _range(where, path, value, entry.get("range"))
    parameter = Parameter(value, entry["unit"], entry["source"], Tag(entry["tag"]), low, high)
    check_parameter(where, path, parameter)
    return parameter


def _value(where: str, path: str, hint: object, value: object) -> Value:
    """The value as its field's type; a whole number may be written 1e3."""
    if hint is int and _is_whole(value):
        return int(value)
    if hint is float and _is_number(value):
        return float(value)
    if hint == Sizes and isinstance(value, list) and value and all(map(_is_whole, value)):
        return tuple(map(int, value))
    if hint == Table and isinstance(value, dict) and value and all(map(_is_whole, value.values())):
        return MappingProxyType({str(key): int(item) for key, item in value.items()})
    kinds = {int: "a whole number", float: "a number", Sizes: "a list of whole numbers"}
    expected = kinds.get(hint, "a table of whole numbers")  # type: ignore[call-overload]
    unit = unit_of(path.split(".")[1])
    raise errors.bad_machine(where, path, f"{value!r} is not {expected} of at least 0, in {unit}")


def _range(
    where: str, path: str, value: Value, bounds: object
) -> tuple[float | None, float | None]:
    if not _is_number(value):
        if bounds is not None:
            raise errors.bad_machine(where, f"{path}.range", "only numbers have a range")
        return None, None
    if bounds is None:
        return float(value), float(value)
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(map(_is_number, bounds)):
        raise errors.bad_machine(where, f"{path}.range", f"{bounds!r} is not a list [low, high]")
    low, high = float(bounds[0]), float(bounds[1])
    if low > high:
        raise errors.bad_machine(where, f"{path}.range", f"its low end {low} is above {high}")
    if not low <= value <= high:
        raise errors.bad_machine(where, f"{path}.range", f"{value} lies outside [{low}, {high}]")
    return low, high


def _is_whole(value: object) -> TypeGuard[int | float]:
    return _is_number(value) and value < 1 << 63 and int(value) == value


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30


def _check_keys(
    where: str,
    prefix: str,
    table: Mapping[Any, object],
    required: list[str],
    optional: list[str] | None = None,
) -> None:
    known = [*required, *(optional or ())]
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise errors.bad_machine(where, f"{prefix}{key}", f"no such parameter{hint}")
    for key in required:
        if key not in table:
            raise errors.bad_machine(where, f"{prefix}{key}", "missing")

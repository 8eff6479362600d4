"""Pipelines as text: `cse,specialize-bucket{kind=decode batch=4 length=256}`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from xdsl.passes import ModulePass
from xdsl.utils.arg_spec import ArgSpec, ParameterType, parse_pipeline
from xdsl.utils.exceptions import ArgSpecParseError
from xdsl.utils.hints import isa

from .. import errors
from .registry import PASSES, Registry

_WORD = re.compile(r"(?!true$|false$)[A-Za-z][A-Za-z0-9_-]*")


def parse_passes(text: str, registry: Registry | None = None) -> list[ModulePass]:
    """The passes that `text` names, with their options.

    Raises: PAS001 for an unknown pass, PAS002 for its options, PAS003 for anything else.
    """
    registry = PASSES if registry is None else registry
    # A space after a comma is what people write and xDSL refuses.
    compact = re.sub(r",\s+", ",", text.strip())
    try:
        specs = list(parse_pipeline(compact))
    except ArgSpecParseError as error:
        reason = str(error).strip().splitlines()[-1].strip(" ^")
        raise errors.malformed_pipeline(text, reason) from None
    return [_make(spec, registry) for spec in specs]


def _make(spec: ArgSpec, registry: Registry) -> ModulePass:
    if spec.name not in registry:
        raise errors.unknown_pass(spec.name, list(registry))
    kind = registry[spec.name]()
    spec = spec.normalize_parameter_names()
    if problems := _problems(spec, kind):
        accepted = [f"{name}={_show_type(hint)}" for name, hint in _options(kind).items()]
        raise errors.bad_pass_option(spec.name, "; ".join(problems), accepted)
    return kind.from_pass_spec(spec)


def _options(kind: type[ModulePass]) -> dict[str, Any]:
    """Each option's type."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _problems(spec: ArgSpec, kind: type[ModulePass]) -> list[str]:
    """What xDSL would refuse, said about each option by its name."""
    options = _options(kind)
    problems = [f"it has no option {name}" for name in spec.parameters if name not in options]
    missing = sorted(kind.required_fields() - spec.parameters.keys())
    problems += [f"option {name} is missing" for name in missing]
    for name, values in spec.parameters.items():
        if name in options and not _fits(values, options[name]):
            shown = ",".join(map(_show_value, values)) or "without a value"
            problems.append(f"{name} cannot be {shown}")
    return problems


def _fits(values: tuple[ParameterType, ...], hint: Any) -> bool:
    if not values:
        return type(None) in get_args(hint) or get_origin(hint) is tuple
    return isa(values, hint) or (len(values) == 1 and isa(values[0], hint))


def _show_type(hint: Any) -> str:
    """`Literal[0, 1, "all"]` as `0|1|all`, other types as `<int>`."""
    if get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in get_args(hint))
    return f"<{getattr(hint, '__name__', hint)}>"


def show_passes(passes: Iterable[ModulePass]) -> str:
    """The text that `parse_passes` reads back as equal passes; all options are written out."""
    return ",".join(one.name + show_options(one) * bool(fields(one)) for one in passes)


def show_options(one: ModulePass) -> str:
    """All options of a pass: `{kind=decode batch=4 length=256}`, or `{}`."""
    shown = (_show_option(field.name, getattr(one, field.name)) for field in fields(one))
    return f"{{{' '.join(shown)}}}"


def _show_option(name: str, value: ParameterType | tuple[ParameterType, ...] | None) -> str:
    if value is None or value == ():
        return name
    values = value if isinstance(value, tuple) else (value,)
    return f"{name}={','.join(_show_value(item) for item in values)}"


def _show_value(value: ParameterType) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) else f'"{value}"'
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text

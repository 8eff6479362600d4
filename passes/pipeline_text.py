"""Pipelines as text: `cse,specialize-bucket{kind=decode batch=4 length=256}`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields

from xdsl.passes import ModulePass, get_pass_option_infos
from xdsl.utils.arg_spec import ArgSpec, ParameterType, parse_pipeline
from xdsl.utils.exceptions import ArgSpecParseError

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
    try:
        return kind.from_pass_spec(spec)
    except ValueError as error:
        accepted = [f"{info.name}=<{info.expected_type}>" for info in get_pass_option_infos(kind)]
        raise errors.bad_pass_option(spec.name, str(error), accepted) from None


def show_passes(passes: Iterable[ModulePass]) -> str:
    """The text that `parse_passes` reads back as equal passes; all options are written out."""
    return ",".join(one.name + show_options(one) * bool(fields(one)) for one in passes)


def show_options(one: ModulePass) -> str:
    """All options of a pass: `{kind=decode batch=4 length=256}`, or `{}`."""
    shown = (_show_option(field.name, getattr(one, field.name)) for field in fields(one))
    return f"{{{' '.join(shown)}}}"


def _show_option(name: str, value: ParameterType | tuple[ParameterType, ...] | None) -> str:
    if value is None:
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

"""The readable form of commands: one line each, only fields that differ from their default.

    exec context=main a(base=0 register=1) counter(n=64 a=128 commit=16) stream(run=64) ...
    dma n=64 run=4096 source(space=hbm strides=4096 register=2) destination(space=dm ...)
    repeat count=4 length=12 step(register=1 bytes=8192)

A field is `name=value`, a part that has fields itself is `name(...)`, a list of parts repeats the
singular name. Values are integers, lists of integers, lower-case names, or a bare flag. The text
follows from the dataclasses in `instructions.py`; a new field there needs nothing here. It has
neither quotes nor line breaks, so it can stand inside a string.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from enum import IntEnum
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from ... import errors
from .instructions import Context, Control, Dma, Exec, Head, Instruction
from .program import Block, Call, Program, Region

MNEMONICS: dict[str, type[Any]] = {"exec": Exec, "dma": Dma, "repeat": Control}
SINGULAR = {
    "waits": "wait",
    "peer_signals": "peer_signal",
    "counters": "counter",
    "digits": "digit",
    "ops": "op",
    "comparators": "comparator",
    "slots": "slot",
    "gates": "gate",
    "steps": "step",
}
"""How one element of a field that lists parts is called."""
ORDER = {
    Exec: "head group valid_slices counters a b stream switch trf trf_lanes contraction vrf "
    "vector commit_port commit",
}
"""Fields in the order of the pipeline, where that differs from their definition; others follow."""
HEXADECIMAL = {"imm"}


# --- formatting ---


def format_command(command: Instruction) -> str:
    """One line that `parse_command` turns back into an equal command."""
    mnemonic = next(name for name, kind in MNEMONICS.items() if isinstance(command, kind))
    return " ".join([mnemonic, *_items(command)])


def _items(part: Any) -> Iterator[str]:
    for field in _fields(type(part)):
        value = getattr(part, field.name)
        if field.inline:
            yield from _items(value)
        elif field.required or value != field.default:
            yield from _item(field, value)


def _item(field: _Field, value: Any) -> Iterator[str]:
    if field.part is not None and field.many:
        yield from (f"{field.text}({' '.join(_items(element))})" for element in value)
    elif field.part is not None:
        yield f"{field.text}({' '.join(_items(value))})"
    elif field.kind is bool:
        yield field.text
    elif not field.many:
        yield f"{field.text}={_scalar(value)}"
    elif value:
        show = hex if field.name in HEXADECIMAL else str
        yield f"{field.text}={','.join(show(element) for element in value)}"


def _scalar(value: Any) -> str:
    return value.name.lower() if isinstance(value, IntEnum) else str(value)


# --- fields ---


@dataclass(frozen=True)
class _Field:
    """A field of an instruction's dataclass as the text shows it."""

    name: str
    text: str
    kind: type[Any]
    """Type of the value, or of an element when there are many."""
    many: bool
    default: Any
    required: bool
    inline: bool
    """The fields of the head stand directly in the command."""

    @property
    def part(self) -> type[Any] | None:
        return self.kind if dataclasses.is_dataclass(self.kind) else None


_FIELDS: dict[type[Any], tuple[_Field, ...]] = {}


def _fields(kind: type[Any]) -> tuple[_Field, ...]:
    if kind not in _FIELDS:
        hints = get_type_hints(kind)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        order = dict.fromkeys([*ORDER.get(kind, "").split(), *fields])
        _FIELDS[kind] = tuple(_field(kind, fields[name], hints[name]) for name in order)
    return _FIELDS[kind]


def _field(owner: type[Any], field: dataclasses.Field[Any], hint: Any) -> _Field:
    many = get_origin(hint) is tuple
    if many or isinstance(hint, UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not NoneType)
    default = field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    if owner is Head and field.name == "context":
        default = Context.DMA  # a DMA command has no other
    required = default is MISSING
    return _Field(
        name=field.name,
        text=SINGULAR.get(field.name, field.name) if dataclasses.is_dataclass(hint) else field.name,
        kind=hint,
        many=many,
        default=() if required and many else default,
        required=required,
        inline=hint is Head,
    )


# --- parsing ---


def parse_command(text: str) -> Instruction:
    """The command in a line of assembly text. Raises: VED020, naming the column."""
    parser = _Parser(text)
    name = parser.word("the name of a command")
    if name not in MNEMONICS:
        parser.fail(f"{name!r} is none of {', '.join(MNEMONICS)}", back=len(name))
    command = parser.part(MNEMONICS[name], end="")
    assert isinstance(command, Instruction)
    if not isinstance(command, Control):
        wrong = isinstance(command, Exec) == (command.head.context == Context.DMA)
        if wrong:
            parser.fail("exec has context=main or context=sub, dma has none")
    return command


class _Parser:
    """Reads items left to right; `at` is the index of the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, cause: str, back: int = 0) -> NoReturn:
        raise errors.assembly_not_parsed(self.text, self.at - back + 1, cause)

    def word(self, what: str) -> str:
        self._match(r" *")
        return self._match(r"[a-z_][a-z0-9_]*") or self.fail(f"expected {what}")

    def part(self, kind: type[Any], end: str) -> Any:
        """Items up to `end`, as an instance of `kind`."""
        targets = [kind, *(field.kind for field in _fields(kind) if field.inline)]
        values: dict[type[Any], dict[str, Any]] = {target: {} for target in targets}
        while not self._at_end(end):
            name = self.word(f"a field of {kind.__name__}")
            found = [(t, f) for t in targets for f in _fields(t) if f.text == name and not f.inline]
            if not found:
                self.fail(f"{kind.__name__} has no field {name!r}", back=len(name))
            target, field = found[0]
            self._item(field, values[target])
        for field in _fields(kind):
            if field.inline:
                values[kind][field.name] = self._build(field.kind, values[field.kind])
        return self._build(kind, values[kind])

    def _at_end(self, end: str) -> bool:
        self._match(r" *")
        if end and self.at == len(self.text):
            self.fail(f"expected {end!r}")
        return self.at == len(self.text) or self.text[self.at] == end

    def _item(self, field: _Field, values: dict[str, Any]) -> None:
        listed = field.many and field.part is not None
        if field.name in values and not listed:
            self.fail(f"{field.text!r} stands twice", back=len(field.text))
        if field.part is not None:
            self._expect("(", f"{field.text} has fields of its own")
            value = self.part(field.part, end=")")
            self._expect(")", f"the fields of {field.text} end here")
            values[field.name] = (*values.get(field.name, ()), value) if listed else value
        elif field.kind is bool:
            values[field.name] = True
        else:
            self._expect("=", f"{field.text} has a value")
            values[field.name] = self._list(field) if field.many else self._scalar(field)

    def _list(self, field: _Field) -> tuple[Any, ...]:
        elements = [self._scalar(field)]
        while self._match(","):
            elements.append(self._scalar(field))
        if (
            isinstance(field.default, tuple)
            and field.default
            and len(elements) != len(field.default)
        ):
            self.fail(f"{field.text} has {len(field.default)} values, here are {len(elements)}")
        return tuple(elements)

    def _scalar(self, field: _Field) -> Any:
        text = self._match(r"-?[A-Za-z0-9_]+")
        if issubclass(field.kind, IntEnum):
            members = {member.name.lower(): member for member in field.kind}
            if text not in members:
                self.fail(f"{field.text} is one of {', '.join(members)}", back=len(text))
            return members[text]
        try:
            return int(text, 0)
        except ValueError:
            self.fail(f"{field.text} is an integer", back=len(text))

    def _build(self, kind: type[Any], values: dict[str, Any]) -> Any:
        for field in _fields(kind):
            if field.name in values:
                continue
            if field.required and not field.many:
                self.fail(f"{kind.__name__} lacks {field.text!r}")
            values[field.name] = field.default
        return kind(**values)

    def _expect(self, text: str, cause: str) -> None:
        if not self.text.startswith(text, self.at):
            self.fail(f"expected {text!r}: {cause}")
        self.at += len(text)

    def _match(self, pattern: str) -> str:
        found = re.compile(pattern).match(self.text, self.at)
        if found is None:
            return ""
        self.at = found.end()
        return found.group()


# --- whole programs ---


def disassemble(program: Program) -> str:
    """All of a program as text: regions, blocks with their issue lists, calls."""
    lines = [f"program {program.bucket} of {program.header.model_name or '-'}"]
    lines += [f"region {i} {_region(region)}" for i, region in enumerate(program.regions)]
    for i, block in enumerate(program.blocks):
        lines += ["", *_block(program, i, block)]
    lines += ["", *(f"call {i} {_call(program, call)}" for i, call in enumerate(program.calls))]
    return "\n".join(lines) + "\n"


def _region(region: Region) -> str:
    content = region.model_dump(exclude_none=True, exclude={"name"})
    ((kind, fields),) = content.items()
    return f"{kind} {region.name}: {_plain(fields)}"


def _plain(value: Any) -> str:
    """Header data on one line: `key=value`, nested tables in brackets."""
    match value:
        case dict():
            return " ".join(
                f"{k}={_plain(v)}" if not isinstance(v, dict) else f"{k}({_plain(v)})"
                for k, v in value.items()
            )
        case tuple() | list():
            return "[" + ",".join(_plain(v) for v in value) + "]"
        case _:
            return str(value)


def _block(program: Program, i: int, block: Block) -> Iterator[str]:
    yield f"block {i} {block.name}: {block.count} entries, {program.block_code_bytes(block)} bytes"
    for k, entry in enumerate(block.provenance):
        node = f" node={entry.node}" if entry.node else ""
        macs = f" macs={entry.macs}" if entry.macs else ""
        successor = " successor" if entry.successor else ""
        yield f"  provenance {k} {entry.path or '-'}{node}{macs}{successor}"
    open_until: list[int] = []
    for k, command in enumerate(program.block_commands(block)):
        open_until = [end for end in open_until if k < end]
        yield f"  {k:04d} {'  ' * len(open_until)}{format_command(command)}"
        if isinstance(command, Control):
            open_until.append(k + 1 + command.length)


def _call(program: Program, call: Call) -> str:
    bindings = "".join(
        f" r{b.register_number}={program.regions[b.region].name}+{b.offset}" for b in call.bindings
    )
    successor = "" if call.successor is None else f" successor={call.successor}"
    name = program.blocks[call.block].name
    return f"{name} prefix={call.prefix or '-'}{successor}{bindings}"

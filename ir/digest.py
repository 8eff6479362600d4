"""Content addresses of IR: equal computations have equal digests in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from xdsl.dialects.builtin import (
    ArrayAttr,
    DenseArrayBase,
    DenseIntOrFPElementsAttr,
    NameLoc,
)
from xdsl.ir import Attribute, Block, Operation, SSAValue, TypeAttribute


def digest(op: Operation, *, locations: bool = False, ignore: Collection[str] = ()) -> str:
    """SHA-256 (hexadecimal) of an op with its regions, such as a module or a function.

    Value names never count; locations count if asked. Attributes named in `ignore` do not count
    at any depth: with `ignore={"sym_name", "layer"}`, equal decoder blocks have equal digests.
    """
    hasher = _Hasher(locations, frozenset(ignore))
    hasher.put_op(op)
    return str(hasher.sha.hexdigest())


@dataclass
class _Hasher:
    locations: bool
    ignore: frozenset[str]
    sha: Any = field(default_factory=hashlib.sha256)
    numbers: dict[SSAValue, int] = field(default_factory=dict)
    texts: dict[Attribute, bytes] = field(default_factory=dict)

    def put_op(self, op: Operation) -> None:
        self._put(op.name.encode())
        if self.locations:
            self._put_attribute(op.location)
        for operand in op.operands:
            # A value from outside `op` counts by the order in which it is first used.
            self._put(b"%d" % self._number(operand))
        self._put_dict(op.properties)
        self._put_dict(op.attributes)
        for result in op.results:
            self._number(result)
            self._put_attribute(result.type)
        for region in op.regions:
            self._put(b"region")
            for block in region.blocks:
                self._put_block(block)
        self._put(b"end")

    def _put_block(self, block: Block) -> None:
        self._put(b"block")
        for argument in block.args:
            self._number(argument)
            self._put_attribute(argument.type)
            if self.locations:
                self._put_attribute(argument.location)
        for op in block.ops:
            self.put_op(op)

    def _put_dict(self, attributes: Mapping[str, Attribute]) -> None:
        for name in sorted(attributes.keys() - self.ignore):
            self._put(name.encode())
            self._put_attribute(attributes[name])
        self._put(b"end")

    def _put_attribute(self, attribute: Attribute) -> None:
        if not isinstance(attribute, TypeAttribute | NameLoc):
            # Not memoised: 0.0 and -0.0 are equal as keys but not as constants.
            self._put(_bytes_of(attribute))
            return
        if attribute not in self.texts:
            self.texts[attribute] = str(attribute).encode()
        self._put(self.texts[attribute])

    def _number(self, value: SSAValue) -> int:
        return self.numbers.setdefault(value, len(self.numbers))

    def _put(self, part: bytes) -> None:
        # The length first, so that no two sequences of parts give the same stream.
        self.sha.update(b"%d:" % len(part))
        self.sha.update(part)


def _bytes_of(attribute: Attribute) -> bytes:
    """A text that tells attributes apart, also where xDSL's does not (NaN and -0.0 in lists)."""
    if isinstance(attribute, DenseIntOrFPElementsAttr):
        return str(attribute.type).encode() + b"=" + attribute.data.data
    if isinstance(attribute, DenseArrayBase):
        return str(attribute.elt_type).encode() + b"=" + attribute.data.data
    if isinstance(attribute, ArrayAttr):
        return b"".join(b"[%s]" % _bytes_of(item) for item in attribute)
    return str(attribute).encode()

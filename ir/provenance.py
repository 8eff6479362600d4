"""Where an op comes from: the Hugging Face module path and the source node, kept as a location.

An op's location is `loc("model.layers.0.mlp.gate_proj"("linear_3"))`: the module path, and inside
it the name of the node that the frontend translated. Inside an outlined function the path is
relative to the location of the call, so one function can serve many layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from xdsl.dialects.builtin import UNKNOWN_LOC, LocationAttr, NameLoc, NoneAttr, StringAttr
from xdsl.ir import Operation
from xdsl.pattern_rewriter import PatternRewriterListener

OpT = TypeVar("OpT", bound=Operation)


@dataclass(frozen=True)
class Provenance:
    """A module path (empty for the whole model) and the source node, if there is one."""

    module: str
    node: str | None = None

    def __str__(self) -> str:
        return f"{self.module} ({self.node})" if self.node else self.module


def make(module: str, node: str | None = None) -> NameLoc:
    """The location of an op of `module` that came from `node`."""
    child = NoneAttr() if node is None else NameLoc(StringAttr(node), NoneAttr())
    return NameLoc(StringAttr(module), child)


def read(location: LocationAttr) -> Provenance | None:
    """What `make` stored; None for a location of another kind."""
    if not isinstance(location, NameLoc):
        return None
    child = location.location
    return Provenance(location.desc.data, child.desc.data if isinstance(child, NameLoc) else None)


def module_path(op: Operation) -> str | None:
    """The op's module path, relative inside an outlined function; None if it is not known."""
    provenance = read(op.location)
    return None if provenance is None else provenance.module


def join(prefix: str, path: str) -> str:
    """The absolute path of a relative one: `join("model.layers.3", "mlp")`."""
    return ".".join(part for part in (prefix, path) if part)


def strip_prefix(location: LocationAttr, prefix: str) -> LocationAttr:
    """The location relative to the module `prefix`; unchanged if it is not inside that module."""
    provenance = read(location)
    if provenance is None or not prefix:
        return location
    if provenance.module == prefix:
        return make("", provenance.node)
    if provenance.module.startswith(prefix + "."):
        return make(provenance.module.removeprefix(prefix + "."), provenance.node)
    return location


def located(op: OpT, location: LocationAttr) -> OpT:
    """Set the op's location and return the op, because op constructors take no location."""
    op.location = location
    return op


def carry(old: Operation, new: Iterable[Operation]) -> None:
    """Give `old`'s location to each op of `new` that has none."""
    for op in new:
        if op.location == UNKNOWN_LOC:
            op.location = old.location


@dataclass
class LocationCarrier:
    """Keeps provenance through rewrites: what a pattern inserts before it replaces or
    modifies an op gets that op's location.

    `PatternRewriteWalker(pattern, listener=LocationCarrier().listener())`.
    """

    inserted: list[Operation] = field(default_factory=list)

    def listener(self) -> PatternRewriterListener:
        return PatternRewriterListener(
            operation_insertion_handler=[self.inserted.append],
            operation_modification_handler=[self._rewritten],
            operation_replacement_handler=[lambda old, _: self._rewritten(old)],
        )

    def _rewritten(self, op: Operation) -> None:
        carry(op, self.inserted)
        self.inserted.clear()


def describe(op: Operation) -> str:
    """Where an op is, for messages: `nn.linear in @block_0, self_attn.q_proj (linear_3)`."""
    function = op
    while function.parent_op() is not None and function.name != "func.func":
        parent = function.parent_op()
        assert parent is not None
        function = parent
    text = op.name
    if function.name == "func.func":
        name = function.properties.get("sym_name")
        symbol = f"@{name.data}" if isinstance(name, StringAttr) else "a function"
        text = f"{op.name} {symbol}" if function is op else f"{op.name} in {symbol}"
    provenance = read(op.location)
    return f"{text}, {provenance}" if provenance is not None and str(provenance) else text

"""What the phase `shard` did, for people: how each tensor is cut and why, what is exchanged."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from xdsl.dialects.builtin import FixedBitwidthType, ModuleOp, StringAttr
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute

from ..backend_rngd.isa.machine import Machine, load_machine, with_documented_exchanges
from ..ir import dist, nn
from ..ir.dist_cut import CutAttr, mesh_of
from ..ir.provenance import join, module_path
from ..ir.types import Dim, dims_of, dtype_of, shape_of
from ..ir.verification import callee_name, functions, parameters
from .exchange_cost import Collective, collective_cycles
from .rewriting import calls, forward_function
from .shard_tensor_parallel import WHY
from .signature import FIRST_CACHE

NUMBER = re.compile(r"\.\d+(?=\.|$)")
"""The number of a layer in a module path."""
WHOLE = "what reads it works on all of it"
ONE = "one number, for every rank"
CACHE = "with the heads of keys and values that are written to it"
LOGITS = "by rows of the vocabulary; the host puts them together"


@dataclass(frozen=True)
class TensorCut:
    """One tensor as its ranks have it. A size that is not known yet has a name."""

    name: str
    shape: tuple[Dim, ...]
    part: tuple[Dim, ...]
    """The shape of each rank's part."""
    dim: int | None
    """Along which it is cut; None for what is whole on every rank."""
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    """For each rank, which half-open ranges of that dimension it holds; empty for all of it."""
    zeros: float
    """Share of the ranks' parts that is padding."""
    copies: float
    """How often an element is on some rank, on average."""
    why: str


@dataclass(frozen=True)
class Exchange:
    """A collective, and how often a run executes it."""

    kind: str
    module: str
    runs: int
    ranks: int
    bytes: int
    """Of each rank's operand."""
    dtype: str
    """In which parts travel."""
    algorithm: str | None
    """None: not chosen yet."""
    cycles: int | None
    """Of one run on the default machine, if nothing hides it; None without an algorithm."""
    formula_cycles: int | None
    """The same by formula, from documented costs alone."""


@dataclass(frozen=True)
class ShardReport:
    """Of one bucket's module."""

    tensors: tuple[TensorCut, ...]
    exchanges: tuple[Exchange, ...]


def report_shards(module: ModuleOp) -> ShardReport:
    """Of a module after the phase `shard`; nothing for one that is not distributed."""
    mesh = mesh_of(module)
    if mesh is None:
        return ShardReport((), ())
    forward = forward_function(module, "shard-report")
    tensors = (*_parameters(module, forward), *_caches_and_logits(forward))
    return ShardReport(tensors, tuple(_exchanges(module, forward, mesh.ranks)))


def _parameters(module: ModuleOp, forward: FuncOp) -> Iterator[TensorCut]:
    declared = parameters(module)
    for op in forward.walk():
        if isinstance(op, nn.GetParameterOp):
            shape = dims_of(declared[op.parameter_name].type)
            yield _whole(op.parameter_name, shape)
        elif isinstance(op, dist.GetShardOp):
            why = op.attributes.get(WHY)
            yield _cut(op.parameter_name, op.cut, op.y.type, _text(why))


def _caches_and_logits(forward: FuncOp) -> Iterator[TensorCut]:
    arguments, results = dist.cuts_of(forward)
    for number, (argument, cut) in enumerate(zip(forward.args, arguments, strict=True)):
        if cut is not None:
            yield _cut(f"kv_cache.{number - FIRST_CACHE}", cut, argument.type, CACHE)
    has_logits = len(results) > len(forward.args) - FIRST_CACHE
    if has_logits and results[0] is not None:
        yield _cut("logits", results[0], forward.function_type.outputs.data[0], LOGITS)


def _whole(name: str, shape: tuple[Dim, ...]) -> TensorCut:
    why = ONE if all(size == 1 for size in shape) else WHOLE
    return TensorCut(name, shape, shape, None, (), 0.0, 1.0, why)


def _cut(name: str, cut: CutAttr, local: Attribute, why: str) -> TensorCut:
    ranges = tuple(tuple(held for _, held in cut.pieces(rank)) for rank in range(cut.ranks))
    held = sum(stop - start for own in ranges for start, stop in own)
    return TensorCut(
        name,
        tuple(dims_of(cut.whole_type(local))),
        tuple(dims_of(local)),
        cut.dim.data,
        ranges,
        zeros=1 - held / (cut.ranks * cut.local_size),
        copies=held / cut.whole_size,
        why=why,
    )


def _exchanges(module: ModuleOp, forward: FuncOp, ranks: int) -> Iterator[Exchange]:
    """Of @forward and of what it calls; equal ones of equal modules are one with more runs."""
    bodies = functions(module)
    runs: Counter[tuple[str, str]] = Counter({("", forward.sym_name.data): 1})
    for call in calls(forward):
        runs[_layerless(module_path(call) or ""), callee_name(call)] += 1
    for (prefix, name), count in runs.items():
        for op in bodies[name].walk():
            if isinstance(op, Collective):
                yield _exchange(op, join(prefix, module_path(op) or ""), count, ranks)


def _exchange(op: Collective, module: str, runs: int, ranks: int) -> Exchange:
    dtype = dtype_of(op.x)
    assert isinstance(dtype, FixedBitwidthType)
    return Exchange(
        kind=_kind(op),
        module=module,
        runs=runs,
        ranks=1 << op.mask.value.data.bit_count() if isinstance(op, dist.AllReduceOp) else ranks,
        bytes=prod(shape_of(op.x)) * dtype.bitwidth // 8,
        dtype=str(dtype),
        algorithm=None if op.algorithm is None else op.algorithm.data,
        cycles=_cycles(op, ranks, load_machine()),
        formula_cycles=_cycles(op, ranks, with_documented_exchanges(load_machine())),
    )


def _kind(op: Collective) -> str:
    """`all_reduce`, `all_reduce max` and so on."""
    kind = op.name.removeprefix("dist.")
    if isinstance(op, dist.AllReduceOp) and op.kind is not None:
        return f"{kind} {op.kind.data}"
    return kind


def _cycles(op: Collective, ranks: int, machine: Machine) -> int | None:
    return None if op.algorithm is None else collective_cycles(op, ranks, machine)


def _layerless(path: str) -> str:
    """`model.layers.*` for each layer."""
    return NUMBER.sub(".*", path)


def _text(attribute: Attribute | None) -> str:
    return attribute.data if isinstance(attribute, StringAttr) else ""

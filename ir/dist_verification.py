"""Checks of a distributed module: cuts fit the mesh, and each send has its recv."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from xdsl.dialects.builtin import ArrayAttr, ModuleOp, UnitAttr
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.utils.exceptions import VerifyException

from .. import errors
from . import dist, nn
from .dist import FORWARD
from .dist_cut import MESH, CutAttr, MeshAttr
from .provenance import describe


def verify_distribution(module: ModuleOp) -> None:
    """Check the ops of `dist` against the mesh, and the exchanges between stages.

    Raises: SHD001 without a mesh, SHD002 for cuts or collectives of other ranks than the mesh's,
    SHD003 for a send or recv without its partner, SHD004 for a value of another stage.
    """
    mesh = module.attributes.get(MESH)
    ops = [op for op in module.walk() if op.name.startswith("dist.")]
    if not isinstance(mesh, MeshAttr):
        if ops or mesh is not None:
            raise errors.no_mesh(at=describe(ops[0]) if ops else "the module")
        return
    for op in ops:
        _verify_ranks(op, mesh)
    for op in module.ops:
        if isinstance(op, FuncOp) and not op.is_declaration:
            _verify_function(op, mesh)


def _verify_ranks(op: Operation, mesh: MeshAttr) -> None:
    for cut in _cuts(op):
        if cut.ranks != mesh.ranks:
            raise errors.collective_of_other_ranks(
                at=describe(op), what=f"is cut over {cut.ranks} ranks", ranks=mesh.ranks
            )
    if isinstance(op, dist.AllReduceOp) and op.mask.value.data >= mesh.ranks:
        what = f"sums over ranks that differ in the bits of {op.mask.value.data}"
        raise errors.collective_of_other_ranks(at=describe(op), what=what, ranks=mesh.ranks)


def _cuts(op: Operation) -> Iterator[CutAttr]:
    for attribute in (*op.properties.values(), *op.attributes.values()):
        entries = attribute.data if isinstance(attribute, ArrayAttr) else (attribute,)
        yield from (entry for entry in entries if isinstance(entry, CutAttr))


def _verify_function(function: FuncOp, mesh: MeshAttr) -> None:
    _verify_ranks(function, mesh)
    _verify_signature(function)
    if function.sym_name.data == FORWARD:
        stages = _Stages()
        stages.run(function)
        if stages.stage + 1 != mesh.stages:
            raise errors.stages_differ(
                at=describe(function), stages=stages.stage + 1, mesh=mesh.stages
            )
    for op in function.body.block.ops:
        if isinstance(op, dist.SendOp | dist.RecvOp) and function.sym_name.data != FORWARD:
            raise errors.exchange_without_partner(
                at=describe(op),
                cause=f"stages exchange values in @{FORWARD} alone, between its calls",
            )


def _verify_signature(function: FuncOp) -> None:
    """Cuts are of the sizes that the function's types have."""
    type = function.function_type
    sides = ((dist.ARGUMENT_CUTS, type.inputs), (dist.RESULT_CUTS, type.outputs))
    for name, types in sides:
        attribute = function.attributes.get(name)
        if attribute is None:
            continue
        if not isinstance(attribute, ArrayAttr) or len(attribute) != len(types):
            cause = f"{name} must be an array of {len(types)} cuts or units"
            raise errors.ir_not_valid(at=describe(function), cause=cause)
        for index, (entry, one) in enumerate(zip(attribute, types, strict=True)):
            cause = f"{name}[{index}]: {_misfit(entry, one)}"
            if _misfit(entry, one):
                raise errors.ir_not_valid(at=describe(function), cause=cause)


def _misfit(entry: Attribute, local: Attribute) -> str:
    if isinstance(entry, UnitAttr):
        return ""
    if not isinstance(entry, CutAttr):
        return f"{entry} is neither a cut nor unit"
    try:
        entry.whole_type(local)
    except VerifyException as error:
        return str(error)
    return ""


@dataclass
class _Stages:
    """Walks @forward and keeps count of the stages."""

    stage: int = 0
    sent: deque[dist.SendOp] = field(default_factory=deque)
    stage_of: dict[SSAValue, int] = field(default_factory=dict)

    def run(self, function: FuncOp) -> None:
        for op in function.body.block.ops:
            if isinstance(op, dist.RecvOp):
                self._receive(op)
            if not isinstance(op, ReturnOp):
                self._verify_operands(op)
            if isinstance(op, dist.SendOp):
                self._send(op)
            if not _is_anywhere(op):
                self.stage_of.update(dict.fromkeys(op.results, self.stage))
        if self.sent:
            raise self._unpaired(self.sent[0])

    def _send(self, op: dist.SendOp) -> None:
        if self.sent and self.sent[0].to.value.data != self.stage + 1:
            raise self._unpaired(self.sent[0])
        if op.to.value.data != self.stage + 1:
            cause = f"stage {self.stage} sends to stage {self.stage + 1} alone"
            raise errors.exchange_without_partner(at=describe(op), cause=cause)
        self.sent.append(op)

    def _receive(self, op: dist.RecvOp) -> None:
        source = op.source.value.data
        if source == self.stage and self.sent:
            self.stage += 1
        partner = self.sent.popleft() if self.sent and source == self.stage - 1 else None
        if partner is None:
            cause = f"stage {source} sends it nothing that has not been received"
            raise errors.exchange_without_partner(at=describe(op), cause=cause)
        if partner.x.type != op.y.type:
            cause = f"it takes {op.y.type}, but {describe(partner)} sends {partner.x.type}"
            raise errors.exchange_without_partner(at=describe(op), cause=cause)

    def _unpaired(self, op: dist.SendOp) -> errors.CompileError:
        cause = f"stage {op.to.value.data} has no dist.recv for it"
        return errors.exchange_without_partner(at=describe(op), cause=cause)

    def _verify_operands(self, op: Operation) -> None:
        for value in op.operands:
            stage = self.stage_of.get(value, self.stage)
            if stage != self.stage:
                assert isinstance(value.owner, Operation)
                raise errors.value_of_another_stage(
                    at=describe(op), stage=self.stage, made_by=describe(value.owner), other=stage
                )


def _is_anywhere(op: Operation) -> bool:
    """Parameters and constants are at hand on every stage."""
    return isinstance(op, nn.GetParameterOp | nn.ConstantOp | dist.GetShardOp)

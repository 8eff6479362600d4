"""The `tile` pass: from tensors to commands on buffers.

Before: `@forward` calls functions of `nn` and `paged` ops, of one bucket.
After:  HBM regions, one `rngd.block` per function, one `rngd.call` per call; every buffer on chip
        is virtual.
Contract: budget; sums are in f32 and rounded once where PyTorch rounds each operator to bf16.
Raises: BCK001 (all unsupported operators at once), BCK003, BCK005, BCK006.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects import func
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from .. import errors
from ..ir import dist
from ..ir.types import shape_of
from ..models.config_types import Bucket
from .lower_function import lower_function
from .lower_program import LOGITS_RANK, ProgramLowering
from .rngd import ProgramOp
from .supported import unsupported
from .tiling import parse_pins
from .tokens import INDEX_BYTES, WORD_BYTES, TokenShape


@dataclass(frozen=True)
class TilePass(ModulePass):
    """Lower one bucket's functions to commands on virtual buffers."""

    name = "tile"

    kind: str = "decode"
    """prefill or decode."""
    batch: int = 1
    """Sequences."""
    length: int = 1
    """Attended tokens per sequence, the new ones included."""
    pins: tuple[str, ...] = ()
    """Tilings that products must have: `pattern of module paths inside a block: record`."""
    compare: bool = False
    """Record the next best tilings too; it takes time to find them."""

    @staticmethod
    def for_bucket(bucket: Bucket, pins: tuple[str, ...] = (), compare: bool = False) -> TilePass:
        """The pass for `bucket`."""
        kind = "decode" if bucket.is_decode else "prefill"
        return TilePass(kind, bucket.batch_size, bucket.attention_size, pins, compare)

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        mesh = dist.mesh_of(op)
        ids_are_data = any(isinstance(inner, dist.LocalRowsOp) for inner in op.walk())
        shape = TokenShape(
            Bucket.parse(f"{self.kind}:{self.batch},{self.length}"),
            WORD_BYTES if ids_are_data else INDEX_BYTES,
        )
        functions = {f.sym_name.data: f for f in op.ops if isinstance(f, func.FuncOp)}
        forward = functions.pop("forward")
        _join_stages(forward)
        problems = [p for f in functions.values() for p in unsupported(f.body.block)]
        if problems:
            raise errors.unsupported_by_backend(problems)
        logits = _logits_results(forward)
        pins = parse_pins(self.pins, "pins")
        blocks = {
            name: lower_function(
                f,
                shape,
                logits.get(name, frozenset()),
                pins,
                self.compare,
                mesh.ranks if mesh else 1,
            )
            for name, f in functions.items()
        }
        program = ProgramLowering(forward, shape, blocks)
        program.run()
        _replace_body(op, shape.bucket, mesh.ranks if mesh else 1, program)


def _join_stages(forward: func.FuncOp) -> None:
    """Stages are a matter of the call table, which the loader cuts: their exchanges go."""
    sends = [op for op in forward.body.block.ops if isinstance(op, dist.SendOp)]
    receives = [op for op in forward.body.block.ops if isinstance(op, dist.RecvOp)]
    for send, receive in zip(sends, receives, strict=True):
        receive.y.replace_all_uses_with(send.x)
    for op in (*sends, *receives):
        forward.body.block.erase_op(op)


def _logits_results(forward: func.FuncOp) -> dict[str, frozenset[int]]:
    """For each function, the numbers of its results that `@forward` returns and are no caches."""
    found: dict[str, frozenset[int]] = {}
    for op in forward.body.block.ops:
        if isinstance(op, func.ReturnOp):
            for value in op.operands:
                call = value.owner
                if isinstance(call, func.CallOp) and len(shape_of(value)) == LOGITS_RANK:
                    name = call.callee.root_reference.data
                    number = call.results.index(value)
                    found[name] = found.get(name, frozenset()) | {number}
    return found


def _replace_body(module: ModuleOp, bucket: Bucket, ranks: int, program: ProgramLowering) -> None:
    for op in reversed(list(module.ops)):
        module.body.block.erase_op(op, safe_erase=False)
    module.body.block.add_op(ProgramOp(bucket.name, ranks))
    for region in program.regions.values():
        module.body.block.add_op(region)
    for parts in program.blocks.values():
        for block in dict.fromkeys(lowered.op for lowered in parts):
            module.body.block.add_op(block)
    for call in program.calls:
        module.body.block.add_op(call)

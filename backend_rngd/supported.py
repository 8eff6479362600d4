"""Which operators the backend has kernels for; the rest is refused with all reasons at once."""

from __future__ import annotations

from xdsl.dialects import func
from xdsl.ir import Block, Operation, SSAValue

from ..ir import dist, nn, paged, quant
from ..ir import provenance as locations
from ..ir.types import shape_of
from .kernels import elementwise
from .lower_quant import measured_by, reason_against
from .value_uses import segments


def unsupported(body: Block) -> list[tuple[str, str]]:
    """(module path and operator, reason) for each op that has no kernel."""
    problems = []
    numbers = {op: number for number, ops in enumerate(segments(body)) for op in ops}
    for op in body.ops:
        reason = _reason(op)
        if reason is None and op.results and measured_by(op.results[0]) is not None:
            readers = {numbers[use.operation] for use in op.results[0].uses}
            if readers - {numbers[op]}:
                reason = "its scales are read on the other side of attention"
        if reason is not None:
            problems.append((locations.describe(op), reason))
    return problems


def _reason(op: Operation) -> str | None:
    match op:
        case quant.LinearOp() | quant.DynamicScaleOp() | quant.QuantizeOp() | quant.DequantizeOp():
            return reason_against(op)
        case nn.RopeOp():
            turning, head_dim = 2 * len(op.inv_freq.get_values()), shape_of(op.x)[-1]
            return None if turning == head_dim else f"only {turning} of {head_dim} features turn"
        case paged.AttentionOp() if op.window is not None:
            window = op.window.value.data
            return f"the bucket is longer than its window: use lengths up to {window}"
        case nn.TransposeOp():
            dims = {op.dim0.value.data, op.dim1.value.data}
            return None if dims == {1, 2} else f"transpose of dims {sorted(dims)}"
        case nn.ReshapeOp():
            before, after = shape_of(op.x), shape_of(op.y)
            splits = len(before) + len(after) == 7 and before[:2] == after[:2]
            return None if splits else f"reshape from {list(before)} to {list(after)}"
        case nn.SliceOp():
            return None if _is_parameter(op.x) else "slices of activations"
        case (
            nn.LinearOp()
            | nn.EmbeddingOp()
            | nn.RmsNormOp()
            | nn.ScaleOp()
            | nn.CastOp()
            | paged.WriteOp()
            | paged.AttentionOp()
            | paged.LastTokenOp()
            | dist.AllReduceOp()
            | dist.LocalRowsOp()
            | func.ReturnOp()
        ):
            return None
        case dist.AllReduceOp() if not op.is_sum:
            is_scale = measured_by(op.y) is not None
            return None if is_scale else "ranks compare scales of tokens alone"
        case dist.AllGatherOp() | dist.ReduceScatterOp() | dist.ShardOp():
            return "ranks exchange sums alone, and a part is needed whole: build with `-tp 1`"
        case nn.ConstantOp():
            return None if is_scalar(op.y) else "only scalar constants have a place"
        case nn.BinaryOp() if is_scalar(op.b):
            return None if op.name in elementwise.SCALAR else "no kernel takes a scalar here"
        case _ if op.name in elementwise.BINARY:
            same = shape_of(op.operands[0]) == shape_of(op.operands[1])
            return None if same else "operands of different shape"
        case _ if op.name in elementwise.UNARY:
            return None
        case _:
            return "the backend has no kernel for it"


def is_scalar(value: SSAValue) -> bool:
    """Whether a value is a constant of one element."""
    return isinstance(value.owner, nn.ConstantOp) and value.owner.to_numpy().size == 1


def _is_parameter(value: SSAValue) -> bool:
    """Whether a value is an argument of the function that only weights can be."""
    return isinstance(value.owner, Block)

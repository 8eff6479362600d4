"""What becomes of a function's values: where it is cut, who reads them, and in which order."""

from __future__ import annotations

from itertools import pairwise

from xdsl.dialects import func
from xdsl.ir import Block, Operation, SSAValue

from ..ir import nn, paged, provenance, quant
from ..ir.types import shape_of
from .isa.layout import FeatureOrder, heads
from .tokens import Chunk, TokenShape

Linear = nn.LinearOp | quant.LinearOp
"""Products of an activation and a weight."""
HEADS_RANK = 4
"""Dims of a tensor of heads: [B, T, heads, head_dim]."""


def segments(body: Block) -> list[list[Operation]]:
    """The operators before attention, attention, and those after it; all of them without it."""
    ops = list(body.ops)
    cuts = [i for i, op in enumerate(ops) if isinstance(op, paged.AttentionOp)]
    edges = sorted({0, len(ops), *cuts, *(i + 1 for i in cuts)})
    return [ops[low:high] for low, high in pairwise(edges)]


def feature_orders(body: Block) -> dict[SSAValue, FeatureOrder]:
    """The order that users ask of values: heads for attention, rotary order for RoPE."""
    asked: dict[SSAValue, FeatureOrder] = {}

    def ask(value: SSAValue, *, rotary: bool) -> None:
        _, count, _, head_dim = shape_of(value)
        asked.setdefault(value, heads(count, head_dim, rotary=rotary))

    for op in reversed(list(body.ops)):
        match op:
            case nn.RopeOp():
                ask(op.x, rotary=True)
            case paged.WriteOp():
                for value in (before_codes(op.k), before_codes(op.v)):
                    if not isinstance(value.owner, nn.RopeOp):
                        ask(value, rotary=False)
            case paged.AttentionOp():
                if not isinstance(op.q.owner, nn.RopeOp):
                    ask(op.q, rotary=False)
            case quant.QuantizeOp() | quant.DequantizeOp():
                if op.y in asked:
                    asked.setdefault(op.operands[0], asked[op.y])
            case _ if op.results and op.results[0] in asked and not isinstance(op, Linear):
                for operand in op.operands:
                    if shape_of(operand)[-1] == shape_of(op.results[0])[-1] or _is_view(op):
                        asked.setdefault(operand, asked[op.results[0]])
    return asked


def before_codes(value: SSAValue) -> SSAValue:
    """What a value is the codes of, or else the value."""
    return value.owner.x if isinstance(value.owner, quant.QuantizeOp) else value


def _is_view(op: Operation) -> bool:
    return isinstance(op, nn.ReshapeOp | nn.TransposeOp | nn.CastOp)


def wide_values(body: Block, logits: frozenset[int]) -> set[SSAValue]:
    """Values that stay in f32: logits, and what leads from the head's product to them."""
    wide: set[SSAValue] = set()
    for op in reversed(list(body.ops)):
        if isinstance(op, func.ReturnOp):
            wide |= {op.operands[i] for i in logits}
        elif op.results and op.results[0] in wide and not isinstance(op, Linear):
            wide |= set(op.operands)
    return wide


def useful_macs(op: Operation, shape: TokenShape, chunk: Chunk) -> int:
    """Products that an operator needs for the chunk's own tokens, without any padding."""
    match op:
        case nn.LinearOp() | quant.LinearOp():
            n, k = shape_of(op.w)
            last_only = shape_of(op.x)[1] == 1
            tokens = 1 if last_only else len(shape.own_tokens(chunk))
            return chunk.sequences * tokens * n * k
        case paged.AttentionOp():
            _, query_heads, _, head_dim = shape_of(op.q)
            return 2 * chunk.sequences * query_heads * head_dim * shape.visible_pairs(chunk)
        case _:
            return 0


def is_read_by_heads(value: SSAValue) -> bool:
    """Whether only attention and the cache read it, head by head: not slices without features."""
    for use in value.uses:
        op = use.operation
        if isinstance(op, paged.WriteOp | paged.AttentionOp):
            continue
        per_head = isinstance(op, nn.RmsNormOp) and len(shape_of(op.x)) == HEADS_RANK
        alone = isinstance(op, nn.RopeOp | quant.QuantizeOp | quant.DequantizeOp)
        if not (per_head or _is_view(op) or alone):
            return False
        if not is_read_by_heads(op.results[0]):
            return False
    return True


def module_of(op: Operation) -> str:
    """The path of the module that an operator belongs to."""
    found = provenance.read(op.location)
    return found.module if found else ""


def parts_of_modules(body: Block) -> dict[Operation, int]:
    """Numbers of the products whose module has several, in the order of the function."""
    products = [op for op in body.ops if isinstance(op, Linear)]
    modules = [module_of(op) for op in products]
    return {
        op: modules[: i + 1].count(module)
        for i, (op, module) in enumerate(zip(products, modules, strict=True))
        if modules.count(module) > 1
    }


def is_last_use(value: SSAValue, op: Operation) -> bool:
    """Whether nothing after `op` reads a value."""
    users = {use.operation for use in value.uses}
    block = op.parent_block()
    assert block is not None
    last = [other for other in block.ops if other in users][-1]
    return last is op


def is_returned(value: SSAValue) -> bool:
    return any(isinstance(use.operation, func.ReturnOp) for use in value.uses)

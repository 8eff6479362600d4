"""Linear layers and KV caches take the codes and scales that the checkpoint stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from .. import errors
from ..ir import nn, quant
from ..ir.provenance import carry, module_path
from ..ir.types import (
    bf16,
    dtype_of,
    f8e4m3,
    f8e5m2,
    f8e8m0,
    f16,
    f32,
    shape_of,
    show_dims,
    tensor,
)
from ..ir.verification import parameters
from ..models.quantization import (
    Quantization,
    QuantizedCache,
    QuantizedLinear,
    ScaleTensor,
    parse_quantization,
    print_quantization,
)
from ..models.quantization_support import unsupported
from .contract import Budget, Contract, ContractPass, Relation
from .rewriting import forward_function

DESCRIPTION = "quant.description"
"""The module's attribute that says how its checkpoint is quantised; the pass takes it away."""

CODES: dict[str, Attribute] = {"e4m3": f8e4m3, "e5m2": f8e5m2}
"""Type of each storage that `unsupported` lets through."""
KEYS, VALUES = 1, 2
"""Operands of `nn.attention`."""
SCALES: dict[str, Attribute] = {"f32": f32, "bf16": bf16, "f16": f16, "e8m0": f8e8m0}


def describe_quantization(module: ModuleOp, quantization: Quantization) -> None:
    """Leave the description for the pass."""
    module.attributes[DESCRIPTION] = StringAttr(print_quantization(quantization))


@dataclass
class _Importer:
    module: ModuleOp
    forward: FuncOp
    scales: dict[str, SSAValue] = field(default_factory=dict)
    """What reads each scale, once for all its users."""
    dynamic: dict[tuple[SSAValue, int], tuple[SSAValue, SSAValue]] = field(default_factory=dict)
    """Codes and scales of values that several linears take, by value and size of a group."""
    static: dict[tuple[SSAValue, str], SSAValue] = field(default_factory=dict)
    """Codes of values that several parts of one weight take, by value and stored scale."""
    unknown: list[str] = field(default_factory=list)
    cut_blocks: list[str] = field(default_factory=list)
    """Weights that hold several layers, of which one begins inside a block."""

    def run(self, quantization: Quantization) -> None:
        """Raises: QNT021 with every module that the model does not have so, QNT022."""
        declared, ops = parameters(self.module), list(self.forward.body.block.ops)
        order = {op: number for number, op in enumerate(ops)}
        reads = {op.parameter_name: op for op in ops if isinstance(op, nn.GetParameterOp)}
        for linear in quantization.linears:
            if linear.weight in reads:
                self._linear(linear, declared[linear.weight], reads[linear.weight], order)
            else:
                self.unknown.append(f"`{linear.weight}` is no parameter of the model")
        attentions = {module_path(op): op for op in ops if isinstance(op, nn.AttentionOp)}
        for cache in quantization.caches:
            if cache.module in attentions:
                self._cache(cache, attentions[cache.module])
            else:
                self.unknown.append(f"`{cache.module}` computes no attention in the model")
        if self.unknown:
            raise errors.quantized_modules_unknown(self.unknown)
        if self.cut_blocks:
            raise errors.quantization_not_compiled(self.cut_blocks)

    def _linear(
        self,
        linear: QuantizedLinear,
        declared: nn.ParameterOp,
        read: nn.GetParameterOp,
        order: Mapping[Operation, int],
    ) -> None:
        products = _products(read.y)
        if products is None:
            self.unknown.append(f"`{linear.weight}` is not only the weight of linear layers")
            return
        if shape_of(read.y) != linear.shape:
            has = show_dims(shape_of(read.y))
            self.unknown.append(f"`{linear.weight}` is {show_dims(linear.shape)}, not {has}")
            return
        if cut := list(_cut_blocks(linear, products)):
            self.cut_blocks += cut
            return
        declared.type = tensor(linear.shape, CODES[linear.storage])
        codes = self._insert(nn.GetParameterOp(declared), read)
        w_scale = self._scale(linear.scale, read)
        for op, part in sorted(products, key=lambda product: order[product.op]):
            w, scale = self._part(linear, codes, w_scale, part)
            rows, columns = linear.scheme.block_of((shape_of(w)[0], shape_of(w)[1]))
            x, x_scale = self._input(op, linear)
            new = quant.LinearOp(
                x, w, scale, x_scale, op.bias, rows=rows, columns=columns, dtype=dtype_of(op.y)
            )
            carry(op, (new,))
            Rewriter.replace_op(op, new)
            if part is not None and not part.y.uses:
                Rewriter.erase_op(part)
        Rewriter.erase_op(read)

    def _part(
        self, linear: QuantizedLinear, codes: SSAValue, scale: SSAValue, part: nn.SliceOp | None
    ) -> tuple[SSAValue, SSAValue]:
        """The rows of codes and scales that a product takes; all of them without a slice."""
        if part is None:
            return codes, scale
        start, end = part.start.value.data, part.end.value.data
        w = self._insert(nn.SliceOp(codes, dim=0, start=start, end=end), part)
        rows, _ = linear.scheme.block_of(linear.shape)
        if rows >= linear.shape[0]:
            return w, scale
        first, last = _cells(part, rows)
        return w, self._insert(nn.SliceOp(scale, dim=0, start=first, end=last), part)

    def _input(self, op: nn.LinearOp, linear: QuantizedLinear) -> tuple[SSAValue, SSAValue | None]:
        """What the linear multiplies, and its scale: the input itself, or its codes."""
        activation = linear.activation
        if activation.mode == "none":
            return op.x, None
        if linear.input_scale is not None:
            scale = self._scale(linear.input_scale, op)
            key = (op.x, linear.input_scale.name)
            if key not in self.static:
                self.static[key] = self._insert(quant.QuantizeOp(op.x, scale), op)
            codes = self.static[key]
            if activation.granularity == "tensor":
                return codes, scale
            # Scales of columns cannot be taken out of a sum over columns.
            return self._insert(quant.DequantizeOp(codes, scale, dtype=dtype_of(op.x)), op), None
        return self._quantized(op, activation.group_size or linear.shape[1])

    def _quantized(self, op: nn.LinearOp, group: int) -> tuple[SSAValue, SSAValue]:
        """Codes of what a linear takes and their scales: made once, before its first user.

        They belong to a module that takes them: what makes x may be part of another block, as
        where a block begins without a norm.
        """
        x = op.x
        if (x, group) not in self.dynamic:
            assert isinstance(x.owner, Operation)
            scale = quant.DynamicScaleOp(x, group=group)
            codes = quant.QuantizeOp(x, scale.y)
            carry(op, (scale, codes))
            Rewriter.insert_op((scale, codes), InsertPoint.after(x.owner))
            self.dynamic[x, group] = codes.y, scale.y
        return self.dynamic[x, group]

    def _cache(self, cache: QuantizedCache, op: nn.AttentionOp) -> None:
        """Keys and values as their codes say; `paged-attention` puts the codes into the cache."""
        for index, stored in ((KEYS, cache.key_scale), (VALUES, cache.value_scale)):
            scale, x = self._scale(stored, op), op.operands[index]
            codes = self._insert(quant.QuantizeOp(x, scale), op)
            op.operands[index] = self._insert(
                quant.DequantizeOp(codes, scale, dtype=dtype_of(x)), op
            )

    def _scale(self, scale: ScaleTensor, user: Operation) -> SSAValue:
        """The parameter's value, read where all parameters are."""
        if scale.name not in self.scales:
            declared = nn.ParameterOp(scale.name, tensor(scale.shape, SCALES[scale.dtype]))
            carry(user, (declared,))
            Rewriter.insert_op(declared, InsertPoint.before(self.forward))
            read = nn.GetParameterOp(declared)
            carry(user, (read,))
            Rewriter.insert_op(read, InsertPoint.at_start(self.forward.body.block))
            self.scales[scale.name] = read.y
        return self.scales[scale.name]

    def _insert(self, new: Operation, before: Operation) -> SSAValue:
        carry(before, (new,))
        Rewriter.insert_op(new, InsertPoint.before(before))
        return new.results[0]


class _Product(NamedTuple):
    """A linear layer, and which rows of a parameter its weight is; all of them without a part."""

    op: nn.LinearOp
    part: nn.SliceOp | None


def _products(w: SSAValue) -> list[_Product] | None:
    """The linear layers whose weight a parameter is or holds; None if it has other uses."""
    found: list[_Product] = []
    for use in w.uses:
        match use.operation:
            case nn.LinearOp(w=weight) as op if weight is w:
                found.append(_Product(op, None))
            case nn.SliceOp() as part if part.dim.value.data == 0:
                inside = _products(part.y)
                if inside is None or any(product.part is not None for product in inside):
                    return None
                found += [_Product(op, part) for op, _ in inside]
            case _:
                return None
    return found


def _cut_blocks(linear: QuantizedLinear, products: Sequence[_Product]) -> Iterator[str]:
    """Where a part begins inside a block and ends in another one: its first would be smaller."""
    rows, _ = linear.scheme.block_of(linear.shape)
    for op, part in products:
        if part is None or part.start.value.data % rows == 0:
            continue
        first, last = _cells(part, rows)
        if last - first > 1:
            start = part.start.value.data
            here = f"row {start} of `{linear.weight}`, which is inside a block of {rows} rows"
            yield f"a layer of `{module_path(op)}` begins at {here}"


def _cells(part: nn.SliceOp, rows: int) -> tuple[int, int]:
    """Bounds of the rows of blocks that a part of a weight lies in."""
    return part.start.value.data // rows, -(-part.end.value.data // rows)


@dataclass(frozen=True)
class ImportFp8QuantizationPass(ContractPass):
    """Multiply the codes that the checkpoint stores, and scale the sums as it says.

    Before: `nn.linear` over weights in the model's type, and a module attribute
    `quant.description` (JSON of `models.quantization.Quantization`); without it nothing changes.
    After:  `quant.linear` over parameters as the checkpoint stores them, codes and scales; inputs
    are quantised by `quant.quantize` where the checkpoint says so, by a stored scale or by
    `quant.dynamic_scale`. A weight that holds several layers is read in slices, with the scales of
    its rows. Keys and values go through `quant.quantize` and `quant.dequantize`.
    It comes before `outline-blocks`: layers that are quantised alike become one function.
    Contract: an error budget, since inputs and caches are rounded to 4 significant bits. Raises:
    PAS004, QNT021 for modules that the model does not have, QNT022 for schemes that have no op.
    """

    name = "import-fp8-quantization"
    contract: ClassVar[Contract] = Contract(
        "before `outline-blocks`",
        Relation.QUANTIZED,
        Budget(
            "inputs of linears, keys and values are rounded to 4 significant bits, and what comes "
            "after adds to the difference",
            relative=1.0,
            relative_float32=1e-4,
        ),
    )

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        description = op.attributes.get(DESCRIPTION)
        if description is None:
            return
        assert isinstance(description, StringAttr)
        quantization = parse_quantization(description.data)
        refused = unsupported(quantization)
        if refused:
            raise errors.quantization_not_compiled(refused)
        _Importer(op, forward_function(op, self.name)).run(quantization)
        del op.attributes[DESCRIPTION]

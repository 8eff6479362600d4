"""The `dist` dialect: one program that all ranks run, each on its part of the tensors.

The module's attribute `dist.mesh` says how many ranks share tensors and how many pipeline stages
follow each other. Every value has one type on all ranks: what a rank has less of is filled with
zeros (`#dist.cut`). A value is whole and equal on all ranks, or cut, or partial: of the shape of
the whole, to be summed over the ranks. As in PyTorch's DTensor these are Replicate, Shard and
Partial, but a value's kind is known from the op that made it and is not part of its type.

`@forward` has the types of one rank; its attributes `dist.argument_cuts` and `dist.result_cuts`
hold a cut, or `unit` for what is whole, for each argument and result. Its ops belong to stage 0 up
to the first `dist.recv`, and to the stage after the sender's from there on.
Constructors follow the convention of `nn`.
"""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import (
    ArrayAttr,
    FlatSymbolRefAttrConstr,
    IntegerAttr,
    StringAttr,
    SymbolRefAttr,
    UnitAttr,
)
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, Dialect, Operation, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from .dist_cut import CutAttr, MeshAttr, mesh_of
from .nn_parameters import ParameterOp
from .types import (
    ANY_TENSOR,
    FLOAT_TENSOR,
    I64_ATTR,
    INT_TENSOR,
    AnyTensor,
    dims_of,
    dtype_of,
    expect_type,
    i64,
    tensor,
)

__all__ = [
    "ALGORITHMS",
    "ARGUMENT_CUTS",
    "DIST",
    "FORWARD",
    "MAX",
    "RESULT_CUTS",
    "AllGatherOp",
    "AllReduceOp",
    "CutAttr",
    "GetShardOp",
    "LocalRowsOp",
    "MeshAttr",
    "RecvOp",
    "ReduceScatterOp",
    "SendOp",
    "ShardOp",
    "cuts_of",
    "mesh_of",
    "set_cuts",
    "stages_of",
]

FORWARD = "forward"
"""The function that runs the model; it alone has cuts and is cut into stages."""

ARGUMENT_CUTS, RESULT_CUTS = "dist.argument_cuts", "dist.result_cuts"

ALGORITHMS = ("rotate", "scatter_gather", "switch")
"""How an exchange runs: whole tensors to each other rank in turn; each rank collects a part and
hands out its sum; through the ring of switches of fused PEs."""


MAX = "max"
"""The kind of an all-reduce that is no sum."""


@irdl_op_definition
class GetShardOp(IRDLOperation):
    """This rank's part of a declared parameter."""

    name = "dist.get_shard"

    parameter = prop_def(FlatSymbolRefAttrConstr)
    cut = prop_def(CutAttr)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$parameter `cut` $cut attr-dict `:` type($y)"

    def __init__(self, parameter: ParameterOp, cut: CutAttr) -> None:
        super().__init__(
            properties={"parameter": SymbolRefAttr(parameter.sym_name.data), "cut": cut},
            result_types=[cut.local_type(parameter.type)],
        )

    @property
    def parameter_name(self) -> str:
        """The name of the tensor in the checkpoint."""
        return self.parameter.root_reference.data

    def verify_(self) -> None:
        self.cut.whole_type(self.y.type)


@irdl_op_definition
class LocalRowsOp(IRDLOperation):
    """Rows of a whole table -> rows of this rank's part; another rank's row -> a row of zeros.

    The row of zeros is the first one of the part, so each rank's part has at least one. Looking
    up such rows gives partial sums, of which one at most is not zero.
    """

    name = "dist.local_rows"

    ids = operand_def(INT_TENSOR)
    cut = prop_def(CutAttr)
    y = result_def(INT_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$ids `cut` $cut attr-dict `:` type($ids) `->` type($y)"

    def __init__(self, ids: SSAValue, cut: CutAttr) -> None:
        super().__init__(operands=[ids], properties={"cut": cut}, result_types=[ids.type])

    def verify_(self) -> None:
        expect_type(self.y, self.ids.type)
        if self.cut.dim.data != 0 or not self.cut.is_disjoint:
            raise VerifyException("the table is cut by rows, and each row is on one rank")
        full = [rank for rank in range(self.cut.ranks) if self.cut.first_zero(rank) is None]
        if full:
            raise VerifyException(f"the parts of ranks {full} have no row of zeros")


@irdl_op_definition
class AllReduceOp(IRDLOperation):
    """Sum over ranks, in f32 and rounded once to y's type; each of them gets the sum.

    With `kind "max"` it is the largest of the ranks' values instead, element by element.
    Summed are the ranks whose numbers differ from this one's only in the bits of `mask`: with 8
    ranks, 7 is all of them, 3 those of a cluster, 4 this rank's counterpart in the other cluster.
    `algorithm` is `rotate`, `scatter_gather` or `switch`; without one it is not chosen yet.
    """

    name = "dist.all_reduce"

    x = operand_def(FLOAT_TENSOR)
    mask = prop_def(I64_ATTR)
    kind = opt_prop_def(StringAttr)
    algorithm = opt_prop_def(StringAttr)
    y = result_def(FLOAT_TENSOR)

    traits = traits_def(Pure())

    assembly_format = (
        "$x `mask` $mask (`kind` $kind^)? (`algorithm` $algorithm^)? attr-dict"
        " `:` type($x) `->` type($y)"
    )

    def __init__(
        self,
        x: SSAValue,
        *,
        mask: int,
        dtype: Attribute,
        kind: str | None = None,
        algorithm: str | None = None,
    ) -> None:
        """`kind` is None for a sum."""
        super().__init__(
            operands=[x],
            properties={
                "mask": IntegerAttr(mask, i64),
                "kind": _optional(kind),
                "algorithm": _optional(algorithm),
            },
            result_types=[tensor(dims_of(x), dtype)],
        )

    @property
    def is_sum(self) -> bool:
        """Whether the ranks' values are added up."""
        return self.kind is None

    def verify_(self) -> None:
        expect_type(self.y, tensor(dims_of(self.x), dtype_of(self.y)))
        _check_algorithm(self.algorithm)
        if self.mask.value.data < 1:
            raise VerifyException(f"mask names at least one bit, but it is {self.mask.value.data}")
        if self.kind is not None and self.kind.data != MAX:
            raise VerifyException(f"kind is {MAX} or left out, not {self.kind.data}")


@irdl_op_definition
class AllGatherOp(IRDLOperation):
    """Each rank's part -> the whole tensor on every rank; padding is dropped."""

    name = "dist.all_gather"

    x = operand_def(ANY_TENSOR)
    cut = prop_def(CutAttr)
    algorithm = opt_prop_def(StringAttr)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    assembly_format = (
        "$x `cut` $cut (`algorithm` $algorithm^)? attr-dict `:` type($x) `->` type($y)"
    )

    def __init__(self, x: SSAValue, cut: CutAttr, *, algorithm: str | None = None) -> None:
        super().__init__(
            operands=[x],
            properties={"cut": cut, "algorithm": _optional(algorithm)},
            result_types=[cut.whole_type(x.type)],
        )

    def verify_(self) -> None:
        expect_type(self.y, self.cut.whole_type(self.x.type))
        _check_algorithm(self.algorithm)


@irdl_op_definition
class ReduceScatterOp(IRDLOperation):
    """Partial sums of a whole tensor -> this rank's part of the sum, rounded once to y's type."""

    name = "dist.reduce_scatter"

    x = operand_def(FLOAT_TENSOR)
    cut = prop_def(CutAttr)
    algorithm = opt_prop_def(StringAttr)
    y = result_def(FLOAT_TENSOR)

    traits = traits_def(Pure())

    assembly_format = (
        "$x `cut` $cut (`algorithm` $algorithm^)? attr-dict `:` type($x) `->` type($y)"
    )

    def __init__(
        self, x: SSAValue, cut: CutAttr, *, dtype: Attribute, algorithm: str | None = None
    ) -> None:
        super().__init__(
            operands=[x],
            properties={"cut": cut, "algorithm": _optional(algorithm)},
            result_types=[tensor(dims_of(cut.local_type(x.type)), dtype)],
        )

    def verify_(self) -> None:
        local = self.cut.local_type(self.x.type)
        expect_type(self.y, tensor(dims_of(local), dtype_of(self.y)))
        _check_algorithm(self.algorithm)


@irdl_op_definition
class ShardOp(IRDLOperation):
    """This rank's part of a tensor that is whole on every rank; nothing is sent."""

    name = "dist.shard"

    x = operand_def(ANY_TENSOR)
    cut = prop_def(CutAttr)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$x `cut` $cut attr-dict `:` type($x) `->` type($y)"

    def __init__(self, x: SSAValue, cut: CutAttr) -> None:
        super().__init__(
            operands=[x], properties={"cut": cut}, result_types=[cut.local_type(x.type)]
        )

    def verify_(self) -> None:
        expect_type(self.y, self.cut.local_type(self.x.type))


@irdl_op_definition
class SendOp(IRDLOperation):
    """Give a value to the next pipeline stage, each rank to the rank of its number there."""

    name = "dist.send"

    x = operand_def(ANY_TENSOR)
    to = prop_def(I64_ATTR)

    assembly_format = "$x `to` $to attr-dict `:` type($x)"

    def __init__(self, x: SSAValue, *, to: int) -> None:
        super().__init__(operands=[x], properties={"to": IntegerAttr(to, i64)})


@irdl_op_definition
class RecvOp(IRDLOperation):
    """Take the value that the previous stage sent: the n-th `recv` takes what the n-th `send` gave.

    What follows the `recv`s of a stage belongs to the next one.
    """

    name = "dist.recv"

    source = prop_def(I64_ATTR)
    y = result_def(ANY_TENSOR)

    assembly_format = "`from` $source attr-dict `:` type($y)"

    def __init__(self, type: AnyTensor, *, source: int) -> None:
        super().__init__(properties={"source": IntegerAttr(source, i64)}, result_types=[type])


def stages_of(function: FuncOp) -> list[list[Operation]]:
    """The ops of each pipeline stage of @forward, in order."""
    stages: list[list[Operation]] = [[]]
    for op in function.body.block.ops:
        if isinstance(op, RecvOp) and op.source.value.data == len(stages) - 1:
            stages.append([])
        stages[-1].append(op)
    return stages


def cuts_of(function: FuncOp) -> tuple[list[CutAttr | None], list[CutAttr | None]]:
    """How @forward's arguments and results are cut; None for what is whole."""
    return (
        _cuts(function.attributes.get(ARGUMENT_CUTS), len(function.function_type.inputs)),
        _cuts(function.attributes.get(RESULT_CUTS), len(function.function_type.outputs)),
    )


def set_cuts(
    function: FuncOp, arguments: Sequence[CutAttr | None], results: Sequence[CutAttr | None]
) -> None:
    """Store what `cuts_of` reads."""
    for name, cuts in ((ARGUMENT_CUTS, arguments), (RESULT_CUTS, results)):
        function.attributes[name] = ArrayAttr([cut or UnitAttr() for cut in cuts])


def _cuts(attribute: Attribute | None, count: int) -> list[CutAttr | None]:
    if not isinstance(attribute, ArrayAttr):
        return [None] * count
    return [cut if isinstance(cut, CutAttr) else None for cut in attribute]


def _optional(text: str | None) -> StringAttr | None:
    return None if text is None else StringAttr(text)


def _check_algorithm(algorithm: StringAttr | None) -> None:
    if algorithm is not None and algorithm.data not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise VerifyException(f"algorithm is one of {known}, not {algorithm.data}")


DIST = Dialect(
    "dist",
    [
        GetShardOp,
        LocalRowsOp,
        AllReduceOp,
        AllGatherOp,
        ReduceScatterOp,
        ShardOp,
        SendOp,
        RecvOp,
    ],
    [MeshAttr, CutAttr],
)

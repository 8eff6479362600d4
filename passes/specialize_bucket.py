"""Fix the sizes of one bucket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from xdsl.context import Context
from xdsl.dialects.builtin import FunctionType, ModuleOp
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.rewriter import Rewriter

from .. import errors
from ..ir import nn, paged
from ..ir.provenance import describe
from ..ir.types import dims_of, specialize
from ..models.config_types import Bucket
from .contract import Bitwise, Contract, ContractPass, Relation


def _set_sizes(module: ModuleOp, sizes: Mapping[str, int]) -> None:
    """Put numbers in the place of names in every type."""
    for op in module.walk():
        for region in op.regions:
            for block in region.blocks:
                for argument in block.args:
                    _retype(argument, sizes)
        for result in op.results:
            _retype(result, sizes)
        for attributes in (op.properties, op.attributes):
            for name, attribute in attributes.items():
                attributes[name] = _specialized(attribute, sizes)


def _retype(value: SSAValue, sizes: Mapping[str, int]) -> None:
    type = specialize(value.type, sizes)
    if type != value.type:
        Rewriter.replace_value_with_new_type(value, type)


def _specialized(attribute: Attribute, sizes: Mapping[str, int]) -> Attribute:
    if isinstance(attribute, FunctionType):
        return FunctionType.from_lists(
            [specialize(type, sizes) for type in attribute.inputs],
            [specialize(type, sizes) for type in attribute.outputs],
        )
    return specialize(attribute, sizes)


def _drop_wide_window(op: Operation, length: int) -> None:
    """A window as long as the bucket hides nothing."""
    if isinstance(op, nn.AttentionOp | paged.AttentionOp) and op.window is not None:
        if op.window.value.data >= length:
            op.window = None


def _drop_only_token(op: Operation) -> None:
    """The last of one token is that token."""
    if isinstance(op, paged.LastTokenOp) and dims_of(op.x)[1] == 1:
        Rewriter.replace_op(op, [], [op.x])


@dataclass(frozen=True)
class SpecializeBucketPass(ContractPass):
    """Make the program one bucket's: all sizes known but the number of KV slots.

    Before: `tensor<?x?x576xbf16, #nn.dims<"batch", "seq", _>>`.
    After:  `tensor<4x1x576xbf16>` for `{kind=decode batch=4 length=256}`: "batch" is 4, "seq"
    is 1 in decode and `length` in prefill, "attn" is `length`; "slots" stays. A window of at
    least `length` tokens goes, and so does `paged.last_token` of a single token.
    Contract: bitwise. Raises: PAS008 for sizes below 1, PAS009 for decode without caches.
    """

    name = "specialize-bucket"
    contract: ClassVar[Contract] = Contract(
        "any module; after `paged-attention` for kind=decode", Relation.SPECIALIZED, Bitwise()
    )

    kind: Literal["prefill", "decode"]
    """Whether a step takes whole prompts or one token per sequence."""
    batch: int
    """Sequences per step."""
    length: int
    """Tokens that a sequence attends to, including those of the step."""

    @classmethod
    def for_bucket(cls, bucket: Bucket) -> SpecializeBucketPass:
        kind: Literal["prefill", "decode"] = "prefill" if bucket.is_prefill else "decode"
        return cls(kind, bucket.batch_size, bucket.attention_size)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each dimension by its name."""
        seq = 1 if self.kind == "decode" else self.length
        return {"batch": self.batch, "seq": seq, "attn": self.length}

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for option, value in (("batch", self.batch), ("length", self.length)):
            if value < 1:
                raise errors.bucket_size_out_of_range(self.name, option, value)
        if self.kind == "decode":
            _expect_caches(op)
        _set_sizes(op, self.sizes)
        for inner in list(op.walk()):
            _drop_wide_window(inner, self.length)
            _drop_only_token(inner)


def _expect_caches(module: ModuleOp) -> None:
    for op in module.walk():
        if isinstance(op, nn.AttentionOp):
            raise errors.decode_without_caches(at=describe(op))

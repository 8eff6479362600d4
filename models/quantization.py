"""One description of a quantised model, whatever checkpoint format it comes from.

A quantised weight [O, I] is `codes * multiplier`: the multiplier is one f32 for each cell of a grid
of blocks. All granularities are such a grid: the whole tensor, a row (channel), a part of a row
(group), or a rectangle (block, where the last row and column of blocks may be partial).

Every format that is read stores multipliers, `weight_scale_inv` too: it is the inverse of what the
quantiser multiplied by. An amax (largest magnitude) is a multiplier times the largest code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pydantic import TypeAdapter

E4M3_MAX = 448.0
"""Largest magnitude of an e4m3 code; an amax is divided by it."""

Storage = Literal["e4m3", "e5m2", "e4m3fnuz"]
"""Type of the codes. `e4m3fnuz` is another encoding: bias 8, no -0, NaN at 0x80."""
ScaleDtype = Literal["f32", "bf16", "f16", "e8m0"]
Granularity = Literal["tensor", "channel", "group", "block"]
ActivationMode = Literal["none", "static", "dynamic"]
ActivationGranularity = Literal["tensor", "token", "group", "channel"]
FormatName = Literal["compressed-tensors", "fine-grained-fp8", "autofp8", "modelopt", "furiosa"]


@dataclass(frozen=True)
class ScaleTensor:
    """A stored scale. Its multiplier is the stored value divided by `divisor`."""

    name: str
    """Tensor of the checkpoint, or quantizer of a Furiosa directory."""
    dtype: ScaleDtype
    shape: tuple[int, ...]
    """As stored; formats write [O], [O, 1] or [O/b, 1, I/b, 1] for the same grid."""
    grid: tuple[int, int]
    """Blocks in each direction: (1, 1) for one scale, (O, 1) for one per channel."""
    divisor: float = 1.0


@dataclass(frozen=True)
class WeightScheme:
    """How the codes of a weight [O, I] are scaled: one multiplier per block of rows and columns."""

    granularity: Granularity
    rows: int | None
    """Rows of a block; None is all of them."""
    columns: int | None
    """Columns of a block; None is all of them."""

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that share a multiplier, in a weight of this shape."""
        return self.rows or shape[0], self.columns or shape[1]

    def grid_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many multipliers there are in each direction; a partial block has one, too."""
        rows, columns = self.block_of(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)


PER_TENSOR = WeightScheme("tensor", None, None)
PER_CHANNEL = WeightScheme("channel", 1, None)


def per_group(columns: int) -> WeightScheme:
    return WeightScheme("group", 1, columns)


def per_block(rows: int, columns: int) -> WeightScheme:
    return WeightScheme("block", rows, columns)


@dataclass(frozen=True)
class ActivationScheme:
    """How a linear's input [tokens, I] is quantised before the product, to e4m3."""

    mode: ActivationMode
    granularity: ActivationGranularity | None = None
    """None if inputs are not quantised. `channel`: a static multiplier for each column."""
    group_size: int | None = None
    """Columns that share a multiplier, of a group; each token has its own."""


NO_ACTIVATION = ActivationScheme("none")
STATIC_TENSOR = ActivationScheme("static", "tensor")
DYNAMIC_TOKEN = ActivationScheme("dynamic", "token")


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer whose weight has 8-bit codes."""

    module: str
    weight: str
    """Tensor of the checkpoint, [O, I]."""
    shape: tuple[int, int]
    storage: Storage
    scheme: WeightScheme
    scale: ScaleTensor
    activation: ActivationScheme
    input_scale: ScaleTensor | None
    """Present if the activation is static."""
    codes_are_stored: bool = True
    """False: the checkpoint holds unquantised values, and the scale says how to quantise them."""


@dataclass(frozen=True)
class QuantizedCache:
    """KV cache of one attention module in e4m3, one static multiplier each for keys and values."""

    module: str
    key_scale: ScaleTensor
    value_scale: ScaleTensor
    """The same tensor as `key_scale` where a format stores one for both."""


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says about all its tensors; nothing else in it is quantised."""

    format: FormatName
    linears: tuple[QuantizedLinear, ...]
    caches: tuple[QuantizedCache, ...] = ()
    assumptions: tuple[str, ...] = ()
    """What was taken for granted where a format is not public; empty if nothing was."""


def print_quantization(quantization: Quantization) -> str:
    """One line of JSON that `parse_quantization` reads."""
    return _adapter().dump_json(quantization).decode()


def parse_quantization(text: str) -> Quantization:
    """The inverse of `print_quantization`. Raises: ValueError for anything else."""
    return _adapter().validate_json(text, strict=True)


@cache
def _adapter() -> TypeAdapter[Quantization]:
    from pydantic import TypeAdapter

    return TypeAdapter(Quantization)

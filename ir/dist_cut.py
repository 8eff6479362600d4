"""How a tensor is cut over the ranks of a mesh: the attributes of the `dist` dialect."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from xdsl.dialects.builtin import ArrayAttr, DenseArrayBase, IntAttr, IntegerType, ModuleOp
from xdsl.ir import Attribute, ParametrizedAttribute
from xdsl.irdl import irdl_attr_definition, param_def
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from .types import AnyTensor, dims_of, dtype_of, i64, show_dims, tensor

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
"""Ranks that share a tensor: PEs of one card, fused in aligned runs."""

MESH = "dist.mesh"
"""The module's attribute that holds its `MeshAttr`."""

Range: TypeAlias = tuple[int, int]
"""First element and the one after the last."""
Slots: TypeAlias = tuple[Range | None, ...]
"""What each slot of one rank holds; None for nothing."""


@irdl_attr_definition
class MeshAttr(ParametrizedAttribute):
    """Who runs the program: `#dist.mesh<4, 2>` is 4 ranks in each of 2 pipeline stages.

    It is the module's attribute `dist.mesh`; a module without one is not distributed.
    """

    name = "dist.mesh"

    tp: IntAttr = param_def()
    pp: IntAttr = param_def()

    def __init__(self, tp: int, pp: int) -> None:
        super().__init__(IntAttr(tp), IntAttr(pp))

    @property
    def ranks(self) -> int:
        """Ranks of one stage."""
        return self.tp.data

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return self.pp.data

    def verify(self) -> None:
        if self.ranks not in TENSOR_PARALLEL_SIZES:
            sizes = ", ".join(map(str, TENSOR_PARALLEL_SIZES))
            raise VerifyException(f"a mesh has one of {sizes} ranks, not {self.ranks}")
        if self.stages < 1:
            raise VerifyException(f"a mesh has at least one stage, not {self.stages}")

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            tp = parser.parse_integer()
            parser.parse_punctuation(",")
            return [IntAttr(tp), IntAttr(parser.parse_integer())]

    def print_parameters(self, printer: Printer) -> None:
        printer.print_string(f"<{self.ranks}, {self.stages}>")


def mesh_of(module: ModuleOp) -> MeshAttr | None:
    """The mesh that the module runs on; None if it is not distributed."""
    mesh = module.attributes.get(MESH)
    return mesh if isinstance(mesh, MeshAttr) else None


@irdl_attr_definition
class CutAttr(ParametrizedAttribute):
    """Which part of a tensor each rank has: `#dist.cut<1, 3, [[0:3, 3:5], [5:8, -]]>`.

    Along dimension 1, each of two ranks has two slots of 3 elements. A slot holds a range of the
    whole tensor, the rest of it zeros, or nothing but zeros (`-`). Ranges may be on several ranks,
    such as KV heads that are needed there; together they are the whole dimension. Cuts of one
    meaning are equal: slots that only continue each other on every rank are one slot, as in
    `#dist.cut<1, 6, [[0:5], [5:8]]>` for `#dist.cut<1, 3, [[0:3, 3:5], [5:8, -]]>`.
    """

    name = "dist.cut"

    dim: IntAttr = param_def()
    length: IntAttr = param_def()
    slots: ArrayAttr[DenseArrayBase[IntegerType]] = param_def()
    """Per rank: first and last + 1 of each slot's range, 0 and 0 for nothing."""

    def __init__(self, dim: int, length: int, slots: Sequence[Sequence[Range | None]]) -> None:
        super().__init__(*_parameters(dim, length, slots))

    @staticmethod
    def even(dim: int, size: int, ranks: int, *, unit: int = 1, spare: int = 0) -> CutAttr:
        """Runs of equally many units of `unit` elements, of which the last one may be partial, and
        `spare` zeros after each rank's."""
        units = -(-size // unit)
        share = -(-units // ranks) * unit
        starts = [min(rank * share, size) for rank in range(ranks)]
        runs = [(start, min(start + share, size)) for start in starts]
        return CutAttr(dim, share + spare, [[run if run[0] < run[1] else None] for run in runs])

    @property
    def ranks(self) -> int:
        """How many ranks share the tensor."""
        return len(self.slots.data)

    @property
    def local_size(self) -> int:
        """Elements along the dimension that each rank has, zeros included."""
        return len(self.slots.data[0]) // 2 * self.length.data

    @property
    def whole_size(self) -> int:
        """Elements of the whole tensor along the dimension."""
        return max(max(slots.get_values()) for slots in self.slots)

    def ranges(self, rank: int) -> Slots:
        """What each slot of `rank` holds."""
        bounds = self.slots.data[rank].get_values()
        pairs = zip(bounds[::2], bounds[1::2], strict=True)
        return tuple(pair if pair[0] < pair[1] else None for pair in pairs)

    def pieces(self, rank: int) -> list[tuple[int, Range]]:
        """(first element in the rank's part, range of the whole tensor) for what it holds."""
        ranges = enumerate(self.ranges(rank))
        return [(slot * self.length.data, held) for slot, held in ranges if held is not None]

    def first_zero(self, rank: int) -> int | None:
        """The first element of the rank's part that is padding; None if there is none."""
        ends = 0
        for begin, (start, stop) in self.pieces(rank):
            if begin > ends:
                break
            ends = begin + stop - start
        return ends if ends < self.local_size else None

    @property
    def is_padded(self) -> bool:
        """Whether some rank has zeros that are not of the whole tensor."""
        return any(self.first_zero(rank) is not None for rank in range(self.ranks))

    @property
    def is_disjoint(self) -> bool:
        """Whether no element is on two ranks, so that sums over the ranks count it once."""
        held = [held for rank in range(self.ranks) for _, held in self.pieces(rank)]
        return sum(stop - start for start, stop in held) == self.whole_size

    def local_type(self, whole: Attribute) -> AnyTensor:
        """The type of each rank's part. Raises VerifyException if `whole` cannot be cut so."""
        dims = dims_of(whole)
        dim = self.dim.data
        if dim >= len(dims) or dims[dim] != self.whole_size:
            raise VerifyException(
                f"{show_dims(dims)} has no dimension {dim} of {self.whole_size} elements to cut"
            )
        return tensor((*dims[:dim], self.local_size, *dims[dim + 1 :]), dtype_of(whole))

    def whole_type(self, local: Attribute) -> AnyTensor:
        """The type of the whole tensor. Raises VerifyException if `local` is no part of one."""
        dims = dims_of(local)
        dim = self.dim.data
        if dim >= len(dims) or dims[dim] != self.local_size:
            raise VerifyException(
                f"{show_dims(dims)} has no dimension {dim} of {self.local_size} elements, which "
                "is each rank's part of the cut"
            )
        return tensor((*dims[:dim], self.whole_size, *dims[dim + 1 :]), dtype_of(local))

    # --- the same cut, seen through a view ---

    def at(self, dim: int) -> CutAttr:
        """The cut of another dimension of the same size."""
        return CutAttr(dim, self.length.data, self._all_ranges())

    def scaled(self, factor: int) -> CutAttr:
        """Each element has become `factor` elements that lie together."""
        ranges = [[_times(held, factor) for held in slots] for slots in self._all_ranges()]
        return CutAttr(self.dim.data, self.length.data * factor, ranges)

    def divided(self, factor: int) -> CutAttr | None:
        """Each `factor` elements have become one; None if a range does not begin or end there."""
        bounds = [bound for slots in self.slots for bound in slots.get_values()]
        if any(bound % factor for bound in (self.length.data, *bounds)):
            return None
        ranges = [
            [None if held is None else (held[0] // factor, held[1] // factor) for held in slots]
            for slots in self._all_ranges()
        ]
        return CutAttr(self.dim.data, self.length.data // factor, ranges)

    def _all_ranges(self) -> list[Slots]:
        return [self.ranges(rank) for rank in range(self.ranks)]

    # --- checks and text ---

    def verify(self) -> None:
        counts = {len(slots) for slots in self.slots}
        if self.dim.data < 0 or self.length.data < 1:
            raise VerifyException("a cut has a dimension, counted from 0, and slots of 1 or more")
        if len(counts) != 1 or 0 in counts:
            raise VerifyException("all ranks of a cut have the same number of slots")
        for rank in range(self.ranks):
            self._verify_rank(rank)
        held = sorted(held for rank in range(self.ranks) for _, held in self.pieces(rank))
        if not held:
            raise VerifyException("no rank of the cut holds anything")
        end = 0
        for start, stop in held:
            if start > end:
                raise VerifyException(f"no rank of the cut holds elements {end} to {start}")
            end = max(end, stop)

    def _verify_rank(self, rank: int) -> None:
        bounds = self.slots.data[rank].get_values()
        for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
            if not (0 <= start < stop or start == stop == 0):
                raise VerifyException(f"{start}:{stop} is not a range")
            if stop - start > self.length.data:
                raise VerifyException(f"{start}:{stop} is longer than a slot, {self.length.data}")

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        def slot() -> Range | None:
            if parser.parse_optional_punctuation("-") is not None:
                return None
            start = parser.parse_integer(allow_negative=False)
            parser.parse_punctuation(":")
            return start, parser.parse_integer(allow_negative=False)

        def rank() -> list[Range | None]:
            return parser.parse_comma_separated_list(parser.Delimiter.SQUARE, slot)

        with parser.in_angle_brackets():
            dim = parser.parse_integer(allow_negative=False)
            parser.parse_punctuation(",")
            length = parser.parse_integer(allow_negative=False)
            parser.parse_punctuation(",")
            slots = parser.parse_comma_separated_list(parser.Delimiter.SQUARE, rank)
        return _parameters(dim, length, slots)

    def print_parameters(self, printer: Printer) -> None:
        def text(held: Range | None) -> str:
            return "-" if held is None else f"{held[0]}:{held[1]}"

        ranks = (", ".join(map(text, slots)) for slots in self._all_ranges())
        listed = ", ".join(f"[{rank}]" for rank in ranks)
        printer.print_string(f"<{self.dim.data}, {self.length.data}, [{listed}]>")


def refined(cut: CutAttr, length: int) -> list[Slots]:
    """Each rank's slots when they have only `length` elements, which divides the cut's."""
    parts = cut.length.data // length
    assert parts * length == cut.length.data
    return [
        tuple(part for held in cut.ranges(rank) for part in _split(held, length, parts))
        for rank in range(cut.ranks)
    ]


def _split(held: Range | None, length: int, parts: int) -> list[Range | None]:
    start, stop = held or (0, 0)
    begins = [start + part * length for part in range(parts)]
    return [(begin, min(begin + length, stop)) if begin < stop else None for begin in begins]


def _times(held: Range | None, factor: int) -> Range | None:
    return None if held is None else (held[0] * factor, held[1] * factor)


def _parameters(dim: int, length: int, slots: Sequence[Sequence[Range | None]]) -> list[Attribute]:
    counts = {len(rank) for rank in slots}
    if len(counts) == 1 and length > 0:
        count = counts.pop()
        merged = next(
            (n for n in range(count, 1, -1) if count % n == 0 and _continue(slots, length, n)), 1
        )
        slots = [_join(rank, merged) for rank in slots]
        length *= merged
    bounds = ([bound for held in rank for bound in held or (0, 0)] for rank in slots)
    ranks = [DenseArrayBase.from_list(i64, rank) for rank in bounds]
    return [IntAttr(dim), IntAttr(length), ArrayAttr(ranks)]


def _continue(slots: Sequence[Sequence[Range | None]], length: int, count: int) -> bool:
    """Whether each `count` slots of every rank hold one range, with zeros only after it."""
    return all(
        _is_one(rank[first : first + count], length)
        for rank in slots
        for first in range(0, len(rank), count)
    )


def _is_one(group: Sequence[Range | None], length: int) -> bool:
    for before, after in pairwise(group):
        if after is None:
            continue
        if before is None or before[1] - before[0] != length or before[1] != after[0]:
            return False
    return True


def _join(rank: Sequence[Range | None], count: int) -> list[Range | None]:
    groups = (rank[first : first + count] for first in range(0, len(rank), count))
    held = [[part for part in group if part is not None] for group in groups]
    return [(parts[0][0], parts[-1][1]) if parts else None for parts in held]

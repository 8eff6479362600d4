"""Decoded weights, kept because converting them again would cost more than the product."""

from __future__ import annotations

import numpy as np

from .budget import default_budget_bytes
from .contraction import Groups, StreamOperand, trimmed_operand
from .memory import Tile
from .stream import StreamReader

Array = np.ndarray


class WeightCache:
    """f32 stream operands by what they hold: parameter, tile, and how a pass reads it.

    Operands are kept until the budget is used up and then made anew each time: programs walk
    all weights in a circle, and throwing out the oldest would throw out everything.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        self._left = default_budget_bytes() if budget_bytes is None else budget_bytes
        self._operands: dict[tuple[object, ...], StreamOperand] = {}
        self._numbers: dict[tuple[object, ...], int] = {}
        self.bytes = 0
        """Bytes of operands that are kept."""

    def intern(self, geometry: tuple[object, ...]) -> int:
        """A small number for a geometry, the same for equal ones."""
        return self._numbers.setdefault(geometry, len(self._numbers))

    def operand(
        self, tile: Tile, address: int, geometry: int, reader: StreamReader, groups: Groups
    ) -> StreamOperand:
        """The stream operand that `reader` reads at `address` of data memory inside `tile`."""
        rows = groups.batch, groups.slices, groups.rows
        key = (tile.key, address - tile.low, geometry, *map(len, rows))
        operand = self._operands.get(key)
        if operand is None:
            content = tile.read()
            view = reader.view(content, content.strides[0], address - tile.low)
            operand = trimmed_operand(np.ascontiguousarray(reader.read(view)), groups)
            if operand.bytes <= self._left:
                self._left -= operand.bytes
                self.bytes += operand.bytes
                self._operands[key] = operand
        return operand

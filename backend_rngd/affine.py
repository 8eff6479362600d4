"""Address lists as loop nests: what a DMA command can walk.

A transfer between two layouts is a list of runs, each with an address on either side. Written
over its natural axes (heads, tokens, ...) the list is often affine, and where it is not, splitting
an axis makes it so. `factor` finds the fewest nests greedily, so no layout needs its own code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .isa.instructions import MAX_LOOPS

MAX_COUNT = 65535


@dataclass(frozen=True)
class Nest:
    """Loops (outermost first) with, for each stream, a base and a stride per loop."""

    n: tuple[int, ...]
    bases: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


def factor(*streams: np.ndarray) -> list[Nest]:
    """Loop nests that visit every element of the equally shaped integer arrays `streams`."""
    stacked = np.stack(np.broadcast_arrays(*streams)).astype(np.int64)
    return [_merged(nest) for nest in _factor(stacked)]


def _factor(streams: np.ndarray) -> list[Nest]:
    shape = streams.shape[1:]
    periods = [min(_affine_period(streams, axis), MAX_COUNT) for axis in range(len(shape))]
    bent = [axis for axis, n in enumerate(shape) if periods[axis] < n]
    if not bent:
        return [_nest(streams)]
    axis = max(bent, key=lambda axis: periods[axis])
    n, period = shape[axis], periods[axis]
    if period == 1:  # nothing regular here: every index on its own
        singles = [streams.take([i], axis=axis + 1) for i in range(n)]
        return [nest for part in singles for nest in _factor(part)]
    parts = []
    whole = n // period * period
    for low, high, inner in ((0, whole, period), (whole, n, n - whole)):
        if low < high:
            part = streams.take(range(low, high), axis=axis + 1)
            split = (*shape[:axis], (high - low) // inner, inner, *shape[axis + 1 :])
            parts += _factor(part.reshape(len(streams), *split))
    return parts


def _affine_period(streams: np.ndarray, axis: int) -> int:
    """Longest prefix of `axis` along which each stream moves by one stride, whatever the others.

    1 if already the first step depends on another axis.
    """
    n = streams.shape[axis + 1]
    if n == 1:
        return 1
    moves = np.moveaxis(np.diff(streams, axis=axis + 1), axis + 1, 1)
    moves = moves.reshape(len(streams), n - 1, -1)
    regular = (moves == moves[:, :1, :1]).all(axis=(0, 2))
    breaks = np.flatnonzero(~regular)
    return n if len(breaks) == 0 else int(breaks[0]) + 1


def _nest(streams: np.ndarray) -> Nest:
    shape = streams.shape[1:]
    bases = tuple(int(s.flat[0]) for s in streams)
    strides = []
    for stream in streams:
        zero = (0,) * len(shape)
        steps = []
        for axis, n in enumerate(shape):
            one = tuple(int(i == axis) for i in range(len(shape)))
            steps.append(int(stream[one] - stream[zero]) if n > 1 else 0)
        strides.append(tuple(steps))
    return Nest(tuple(shape), bases, tuple(strides))


def _merged(nest: Nest) -> Nest:
    """Drop loops of one step and join neighbours that walk on at the same stride."""
    loops: list[tuple[int, tuple[int, ...]]] = []
    for n, strides in zip(nest.n, zip(*nest.strides, strict=True), strict=True):
        if n == 1:
            continue
        if loops:
            outer_n, outer = loops[-1]
            joins = all(o == n * i for o, i in zip(outer, strides, strict=True))
            if joins and outer_n * n <= MAX_COUNT:
                loops[-1] = (outer_n * n, strides)
                continue
        loops.append((n, strides))
    assert len(loops) <= MAX_LOOPS, f"{len(loops)} loops after factoring {nest.n}"
    if not loops:
        return Nest((), nest.bases, tuple(() for _ in nest.bases))
    counts, strides_by_loop = zip(*loops, strict=True)
    return Nest(tuple(counts), nest.bases, tuple(zip(*strides_by_loop, strict=True)))

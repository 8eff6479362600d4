"""What each topology of the switch can do, in the terms of digits and slice counters.

The slice number inside a ring is read as [slice1, slice0]. A regular topology has one form: which
part stays, which part a digit permutes, and which part becomes time, whose counter lies inside
those of the fetch. A custom bitmap names any set of source slices of the ring for each slice;
they come in the order of their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from .instructions import Birth, Counter, Digit, Exec, Switch, Topology

Violations = Iterator[tuple[str, str]]


def topology_violations(c: Exec) -> Violations:
    """(rule, cause) of each constraint that does not hold."""
    switch = c.switch
    brought = [(i, k) for i, k in enumerate(c.counters) if k.birth == Birth.SLICE]
    yield from _bitmap(c, [k for _, k in brought])
    if any(k.slices < 0 for _, k in brought):
        yield "topology", "packets of other slices come in the order of the ring"
    steps = [k.slices for _, k in brought]
    if steps != sorted(steps, reverse=True):
        yield "topology", "slices that become time keep their order"
    if switch.topology not in _MIXED and brought:
        inside = c.counters[brought[0][0] :]
        if any(k.birth == Birth.FETCH and k.n > 1 for k in inside):
            yield "topology", "slices that become time are the innermost of it"
    check = _FORMS.get(switch.topology)
    if check is not None and not check(switch, [k for _, k in brought]):
        yield "topology", f"{switch.topology.name.lower()} does not move packets like this"


def _bitmap(c: Exec, brought: list[Counter]) -> Violations:
    switch = c.switch
    if switch.bitmap is None:
        return
    if switch.topology != Topology.CUSTOM or switch.digits:
        yield "bitmap", "a bitmap makes a custom topology, and digits have no part in it"
    if switch.bitmap % 8:
        yield "bitmap", "bitmaps lie at multiples of 8 B"
    if len(brought) > 1 or any(k.slices != 1 for k in brought):
        yield "bitmap", "one counter walks over the slices that a bitmap names"
    if c.generate is not None or c.stream.pair:
        yield "bitmap", "a bitmap routes one stream"


def _low(switch: Switch, slices: int) -> int:
    """Bits of a digit at the bottom of the slice number with that stride; 0 without one."""
    found = [d.bits for d in switch.digits if (d.shift, d.slices, d.bytes) == (0, slices, 0)]
    return found[0] if found else 0


def _high(switch: Switch) -> Digit | None:
    """The digit that fills the ring's upper bits."""
    ring_bits = switch.ring.bit_length() - 1
    return next((d for d in switch.digits if d.shift and d.shift + d.bits == ring_bits), None)


def _broadcast01(switch: Switch, _: list[Counter]) -> bool:
    """slice [s1, s0] -> [X, Y], time [t1, t0] -> [t1, s1, t0, s0]; s1 and s0 in any factors."""
    return not switch.digits


def _broadcast1(switch: Switch, brought: list[Counter]) -> bool:
    """slice [s1, s0] -> [X, s0], time [t0] -> [t0, s1]."""
    size0 = 1 << _low(switch, 1)
    return len(switch.digits) == (size0 > 1) and (not brought or _steps_of(size0, brought))


def _steps_of(slices: int, brought: list[Counter]) -> bool:
    """Whether the counters are one walk in steps of so many slices, cut into digits of time."""
    for k in reversed(brought):
        if k.slices != slices:
            return False
        slices *= k.n
    return True


def _transpose(switch: Switch, brought: list[Counter]) -> bool:
    """slice [s1, s0] -> [s0, s1]."""
    high = _high(switch)
    if high is None or len(switch.digits) != 2 or brought:
        return False
    return high.slices == 1 and high.bytes == 0 and _low(switch, 1 << high.bits) == high.shift


def _inter_transpose(switch: Switch, brought: list[Counter]) -> bool:
    """slice [s1, s0] -> [t1, s0], time [t1] -> [s1]: any digit may become time.

    Counters may share the digit's walk, each over a part of its bits.
    """
    walks = all(a.slices == b.slices * b.n for a, b in pairwise(brought))
    return walks and any(d.bytes for d in switch.digits)


def _transposed_broadcast1(switch: Switch, brought: list[Counter]) -> bool:
    """slice [s1, s0] -> [Y, s1], time [t0] -> [t0, s0]."""
    if len(switch.digits) != 1:
        return False
    digit = switch.digits[0]
    size0 = switch.ring >> digit.bits
    form = digit.shift == 0 and digit.slices == size0 and digit.bytes == 0
    return form and all(k.slices == 1 and k.n <= size0 for k in brought) and len(brought) <= 1


_MIXED = (Topology.BROADCAST01, Topology.INTER_TRANSPOSE)
"""Topologies whose slices may become an outer part of time."""
_FORMS = {
    Topology.BROADCAST01: _broadcast01,
    Topology.BROADCAST1: _broadcast1,
    Topology.TRANSPOSE: _transpose,
    Topology.INTER_TRANSPOSE: _inter_transpose,
    Topology.TRANSPOSED_BROADCAST1: _transposed_broadcast1,
}

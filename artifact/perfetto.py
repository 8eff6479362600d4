"""Perfetto's trace format, as much of it as tracks, slices, arguments and arrows need.

A trace is a protobuf message: packets, each with a track's description, a table of strings, or
the begin or end of a slice. Millions of packets differ only in their times and arrows, so a
`Pattern` is encoded once and filled in for every command. Field numbers come from perfetto's
`protos/perfetto/trace/`; the tests read the bytes back with the `perfetto` package.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

SEQUENCE = 1
"""All packets are of one writer, in file order."""
STATE_CLEARED, NEEDS_STATE = 1, 2
"""Flags of a sequence: strings are defined from here on; this packet uses them."""
EXPLICIT_ORDER = 3
"""Tracks below this one stand in the order of their ranks."""
WIDE_VARINT_BYTES = 8
"""Width of a number that is filled in later: 56 bits, nanoseconds of two years."""


class Edge(IntEnum):
    """Which end of a slice an event is: TrackEvent.Type."""

    BEGIN = 1
    END = 2


# --- protobuf ---


def varint(value: int) -> bytes:
    """A number in groups of 7 bits, lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """A varint field."""
    return varint(field << 3) + varint(value)


def message(field: int, *parts: bytes) -> bytes:
    """A field with a length: a message of those fields, or text."""
    content = b"".join(parts)
    return varint(field << 3 | 2) + varint(len(content)) + content


def text(field: int, value: str) -> bytes:
    return message(field, value.encode())


_PAIRS = [bytes((low | 128, high | 128)) for high in range(128) for low in range(128)]
_LAST_PAIRS = [bytes((low | 128, high)) for high in range(128) for low in range(128)]


def wide_varint(value: int) -> bytes:
    """A varint of `WIDE_VARINT_BYTES`, whatever the value: readers accept leading zeros."""
    return (
        _PAIRS[value & 16383]
        + _PAIRS[value >> 14 & 16383]
        + _PAIRS[value >> 28 & 16383]
        + _LAST_PAIRS[value >> 42]
    )


# --- packets ---


class Strings:
    """Names that packets refer to by number; 0 is no name."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._keys: dict[str, int] = {}
        self._values: dict[str, int] = {}

    def name(self, value: str) -> int:
        """The number of a slice's name."""
        return self._names.setdefault(value, len(self._names) + 1)

    def arguments(self, values: Mapping[str, int | str]) -> bytes:
        """Fields of an event that show `values` beside the slice."""
        return b"".join(self._argument(key, value) for key, value in values.items())

    def _argument(self, key: str, value: int | str) -> bytes:
        name = number(1, self._keys.setdefault(key, len(self._keys) + 1))
        if isinstance(value, int):
            return message(4, name, number(3, value))
        return message(4, name, number(17, self._values.setdefault(value, len(self._values) + 1)))

    def packet(self) -> bytes:
        """Definitions of all names so far; it stands before the packets that use them."""
        tables = {2: self._names, 3: self._keys, 29: self._values}
        entries = [
            message(field, number(1, iid), text(2, value))
            for field, table in tables.items()
            for value, iid in table.items()
        ]
        return _packet(STATE_CLEARED, message(12, *entries))


def process_track(uuid: int, name: str, pid: int) -> bytes:
    """The track of a processing element, which groups the others."""
    process = message(3, number(1, pid), text(6, name))
    return message(1, message(60, number(1, uuid), process, number(11, EXPLICIT_ORDER)))


def slice_track(uuid: int, parent: int, name: str, rank: int) -> bytes:
    """A track for slices that do not overlap, at place `rank` below its parent."""
    fields = (number(1, uuid), text(2, name), number(5, parent), number(12, rank))
    return message(1, message(60, *fields))


def _packet(flags: int, *fields: bytes) -> bytes:
    return message(1, number(10, SEQUENCE), number(13, flags), *fields)


class Pattern:
    """Packets of one command, with gaps for its times, its name and its arrows.

    Events are added in the order in which they stand in the file; each has an index into the
    times that `fill` gets.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = [b""]
        self._gaps: list[int] = []

    def event(
        self, edge: Edge, track: int, time: int, name: int = 0, arguments: bytes = b""
    ) -> None:
        """One end of a slice at `times[time]`; names and arguments belong to its begin."""
        fields = [number(9, edge), number(11, track)]
        if name:
            fields.append(number(10, name))
        self._add(time, message(11, *fields, arguments))

    def named_event(self, track: int, time: int, arguments: bytes, n_out: int, n_in: int) -> None:
        """A begin whose name is filled in, with arrows that leave and arrive."""
        fixed = number(9, Edge.BEGIN) + number(11, track) + arguments + varint(10 << 3)
        flows = 10 * (n_out + n_in)  # a tag of two bytes, eight of the number
        head = varint(11 << 3 | 2) + varint(len(fixed) + WIDE_VARINT_BYTES + flows) + fixed
        self._add(time, head, gap_bytes=WIDE_VARINT_BYTES + flows)
        self._gaps.append(NAME)
        self._pieces.append(b"")

    def _add(self, time: int, event: bytes, gap_bytes: int = 0) -> None:
        """A packet around `event`, whose last `gap_bytes` follow later."""
        head = number(10, SEQUENCE) + number(13, NEEDS_STATE) + varint(8 << 3)
        length = len(head) + WIDE_VARINT_BYTES + len(event) + gap_bytes
        self._pieces[-1] += varint(1 << 3 | 2) + varint(length) + head
        self._gaps.append(time)
        self._pieces.append(event)

    def fill(
        self, times: Sequence[int], name: int, leaving: Sequence[int], arriving: Sequence[int]
    ) -> bytes:
        """The packets' bytes. `times` are nanoseconds; arrows are numbers that both ends share."""
        parts = [self._pieces[0]]
        for gap, piece in zip(self._gaps, self._pieces[1:], strict=True):
            if gap == NAME:
                parts.append(wide_varint(name))
                parts += [_LEAVING + _FIXED64.pack(arrow) for arrow in leaving]
                parts += [_ARRIVING + _FIXED64.pack(arrow) for arrow in arriving]
            else:
                parts.append(wide_varint(times[gap]))
            parts.append(piece)
        return b"".join(parts)


NAME = -1
"""The gap for a slice's name and its arrows; other gaps are indices of times."""
_FIXED64 = struct.Struct("<Q")
_LEAVING, _ARRIVING = (varint(field << 3 | 1) for field in (47, 48))


def slices(track: int, spans: Iterable[tuple[int, int, int]]) -> bytes:
    """Slices (begin, end, name) of one track, which do not overlap."""
    found: dict[int, Pattern] = {}
    parts = []
    for begin, end, name in spans:
        if name not in found:
            found[name] = Pattern()
            found[name].event(Edge.BEGIN, track, 0, name)
            found[name].event(Edge.END, track, 1)
        parts.append(found[name].fill((begin, end), name, (), ()))
    return b"".join(parts)

"""Damaged binaries whose checksums are right: one field changed, or the file's structure.

Everything follows from a seed: `mutated(data, seed)` gives the same file again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from furiosa_llm.backend_rngd.isa.container import ALIGNMENT, PREAMBLE, len_padded
from furiosa_llm.backend_rngd.isa.record_types import CONTROL, DMA, EXEC

TABLES = {"exec": EXEC, "dma": DMA, "control": CONTROL, "issue": np.dtype("<u4")}
"""The sections behind the counts, in order."""


@dataclass(frozen=True)
class Field:
    """A number in a binary: where it is, and what it is called."""

    name: str
    at: int
    dtype: np.dtype[Any]

    def get(self, data: bytes) -> int:
        return int(np.frombuffer(data, self.dtype, 1, self.at)[0])

    def put(self, data: bytes, value: int) -> bytes:
        """`data` with another number here, and the checksum mended."""
        new = np.array(value, self.dtype).tobytes()
        return mended(data[: self.at] + new + data[self.at + len(new) :])


def mended(data: bytes) -> bytes:
    """`data` with the checksum of what it holds now."""
    digest = hashlib.sha256(memoryview(data)[PREAMBLE.size :]).digest()
    return data[:24] + digest + data[56:]


def fields(data: bytes) -> list[Field]:
    """Every number of the records, reserved ones too, by the records' own types."""
    sections = _sections(data)
    found = [Field("counts", sections[0] + 8 * i, np.dtype("<u8")) for i in range(4)]
    for (name, dtype), start, count in zip(
        TABLES.items(), sections[1:], _counts(data), strict=True
    ):
        leaves = list(_leaves(name, dtype, 0))
        for i in range(count):
            at = start + i * dtype.itemsize
            found += [Field(leaf.name, at + leaf.at, leaf.dtype) for leaf in leaves]
    return found


def _counts(data: bytes) -> list[int]:
    return list(np.frombuffer(data, "<u8", 4, _sections(data)[0]).tolist())


def _sections(data: bytes) -> list[int]:
    """Where counts, exec, dma, control and issue sections start."""
    header, records = PREAMBLE.unpack_from(data)[2:4]
    starts = [PREAMBLE.size + len_padded(header)]
    assert starts[0] + records == len(data)
    counts = np.frombuffer(data, "<u8", 4, starts[0]).tolist()
    starts.append(starts[0] + ALIGNMENT)
    for dtype, count in zip(list(TABLES.values())[:-1], counts, strict=False):
        starts.append(starts[-1] + len_padded(dtype.itemsize * count))
    return starts


def _leaves(name: str, dtype: np.dtype[Any], at: int) -> Iterator[Field]:
    """The numbers of a record; elements of an array have one name."""
    if dtype.names:
        for part in dtype.names:
            kind, offset = dtype.fields[part][:2]  # type: ignore[index]
            yield from _leaves(f"{name}.{part}", kind, at + offset)
    elif dtype.subdtype:
        element, shape = dtype.subdtype
        for i in range(shape[0]):
            yield from _leaves(name, element, at + i * element.itemsize)
    else:
        yield Field(name, at, dtype)


def another_value(field: Field, data: bytes, every: list[Field], rng: random.Random) -> int:
    """A value that `field` does not have: near it, a flipped bit, another record's, or any."""
    bits = 8 * field.dtype.itemsize
    old = field.get(data)
    same = [other for other in every if other.name == field.name]
    choices: list[Callable[[], int]] = [
        lambda: old + rng.choice((-1, 1)) * rng.randint(1, 8),
        lambda: old ^ 1 << rng.randrange(bits),
        lambda: rng.choice(same).get(data),
        lambda: rng.getrandbits(bits),
        lambda: rng.getrandbits(rng.randint(1, bits)),
    ]
    while True:
        value = rng.choice(choices)() & (1 << bits) - 1
        if field.dtype.kind == "i" and value >> (bits - 1):
            value -= 1 << bits
        if value != old:
            return value


# --- any damage ---


def mutated(data: bytes, seed: str) -> bytes:
    """A damaged copy of the binary; its checksum is that of its content."""
    rng = random.Random(seed)
    kinds = [
        _field,
        _field,
        _used_field,
        _used_field,
        _bytes,
        _header,
        _header,
        _records,
        _preamble,
    ]
    return mended(rng.choice(kinds)(data, rng))


def _field(data: bytes, rng: random.Random) -> bytes:
    every = fields(data)
    field = rng.choice(every)
    return field.put(data, another_value(field, data, every, rng))


def _used_field(data: bytes, rng: random.Random) -> bytes:
    """One or two of the fields that are not zero."""
    every = fields(data)
    used = [field for field in every if field.get(data)]
    for field in rng.sample(used, rng.choice((1, 1, 2))):
        data = field.put(data, another_value(field, data, every, rng))
    return data


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three bytes behind the preamble."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(PREAMBLE.size, len(out))
        out[at] = rng.choice([out[at] ^ 1 << rng.randrange(8), rng.randrange(256), 255, 0])
    return bytes(out)


def _preamble(data: bytes, rng: random.Random) -> bytes:
    """Magic, version, lengths, reserved bytes; or the file's end."""
    if rng.random() < 0.3:
        cut = rng.randrange(PREAMBLE.size, len(data))
        return rng.choice([data[:cut], data + data[cut:], data + bytes(rng.randrange(1, 200))])
    at = rng.choice([*range(24), *range(56, 64)])
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header's tables and the records."""
    header, records = PREAMBLE.unpack_from(data)[2:4]
    text = data[PREAMBLE.size : PREAMBLE.size + header]
    return json.loads(text), data[len(data) - records :]


def _joined(data: bytes, header: dict[str, Any], records: bytes) -> bytes:
    """A file of this header and these records, with the lengths that they have."""
    magic, version = PREAMBLE.unpack_from(data)[:2]
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    front = PREAMBLE.pack(magic, version, len(text), len(records), bytes(32), bytes(8))
    return front + text + bytes(-len(text) % ALIGNMENT) + records


def _header(data: bytes, rng: random.Random) -> bytes:
    """One value of the header's tables: another, none, two of them, or in another order."""
    header, records = _split(data)
    places = list(_places(header))
    parent, key = rng.choice(places)
    value = parent[key]
    action = rng.randrange(4)
    if isinstance(value, list) and value and action:
        at = rng.randrange(len(value))
        parent[key] = [
            [*value, value[at]],
            value[:at] + value[at + 1 :],
            rng.sample(value, len(value)),
        ][action - 1]
    elif action == 0 and isinstance(parent, dict):
        del parent[key]
    else:
        # A copy, because the value may be one that `parent` is a part of.
        parent[key] = copy.deepcopy(_other_json(value, rng, places))
    return _joined(data, header, records)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of everything inside."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _other_json(value: Any, rng: random.Random, places: list[tuple[Any, Any]]) -> Any:
    parent, key = rng.choice(places)
    odd: list[Any] = [
        None,
        -1,
        0,
        1,
        2,
        1 << 20,
        1 << 31,
        1 << 40,
        1 << 70,
        0.5,
        1e308,
        "",
        "x" * 2000,
        [],
        {},
    ]
    if isinstance(value, int) and rng.random() < 0.7:
        return rng.choice(
            [value + 1, value - 1, 2 * value, value ^ 1 << rng.randrange(32), 1 << 31]
        )
    return rng.choice([*odd, True, parent[key]])


def _records(data: bytes, rng: random.Random) -> bytes:
    """A record twice, missing, exchanged with another, or sections in another order."""
    header, _ = _split(data)
    starts, counts = _sections(data), _counts(data)
    tables = [
        [data[at + i * t.itemsize : at + (i + 1) * t.itemsize] for i in range(n)]
        for t, at, n in zip(TABLES.values(), starts[1:], counts, strict=True)
    ]
    table = rng.choice([table for table in tables if table])
    at = rng.randrange(len(table))
    other = rng.randrange(len(table))
    action = rng.randrange(4)
    if action == 0:
        table.insert(other, table[at])
    elif action == 1:
        del table[at]
    elif action == 2:
        table[at], table[other] = table[other], table[at]
    else:
        rng.shuffle(tables)
    honest = [len(table) for table in tables]
    numbers = np.array(rng.choice([honest, counts]), "<u8").tobytes()
    parts = [numbers, *(b"".join(table) for table in tables)]
    records = b"".join(part + bytes(-len(part) % ALIGNMENT) for part in parts)
    return _joined(data, header, records)

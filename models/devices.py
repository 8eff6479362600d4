"""The device grammar of `furiosa-llm`: which PEs of which cards a model runs on.

    npu:N, npu:N:*   all eight PEs of card N
    npu:N:P          PE P alone
    npu:N:A-B        PEs A to B, fused: 1, 2, 4 or 8 of them, from a multiple of their number
    cpu, cpu:N       no card
    cuda:N           no card

Several are joined by commas, all of one kind. An impossible list is refused with the nearest
possible ones. One PE is one tensor-parallel rank; PEs work together only in aligned runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .. import errors

PES_PER_CARD = 8
RUN_SIZES = (1, 2, 4, 8)
"""How many PEs of a card can be fused; also the tensor-parallel sizes."""

DeviceKind = Literal["npu", "cpu", "cuda"]

_ITEM = re.compile(r"npu:([0-9]{1,4})(?::(\*|[0-9]{1,4})(?:-([0-9]{1,4}))?)?")
_OTHER = re.compile(r"(cpu)(?::[0-9]{1,4})?|(cuda):[0-9]{1,4}")


@dataclass(frozen=True, order=True)
class PeRun:
    """`size` fused PEs of one card: from `first`, which is a multiple of `size`."""

    card: int
    first: int
    size: int

    @property
    def pes(self) -> range:
        return range(self.first, self.first + self.size)

    @property
    def name(self) -> str:
        """As the grammar writes it."""
        if self.size == PES_PER_CARD:
            return f"npu:{self.card}"
        last = "" if self.size == 1 else f"-{self.pes[-1]}"
        return f"npu:{self.card}:{self.first}{last}"

    def overlaps(self, other: PeRun) -> bool:
        """Aligned runs are inside each other, or apart."""
        return self.card == other.card and not set(self.pes).isdisjoint(other.pes)


@dataclass(frozen=True)
class Devices:
    """A parsed list: runs in the order in which they are written; none but on cards."""

    kind: DeviceKind
    runs: tuple[PeRun, ...]

    @property
    def name(self) -> str:
        """As the grammar writes it."""
        return device_list(self.runs) if self.runs else self.kind

    def fuse(self, size: int) -> tuple[PeRun, ...]:
        """Aligned runs of `size` PEs, in the order in which their first PEs are written.

        Raises: PAR005 if PEs are left over, PAR006 without cards.
        """
        if self.kind != "npu":
            raise errors.not_a_card(self.kind, PeRun(0, 0, size).name)
        pes = [(run.card, pe) for run in self.runs for pe in run.pes]
        fused = tuple(
            dict.fromkeys(PeRun(card, pe - pe % size, size) for card, pe in pes)  # in order
        )
        if sum(run.size for run in fused) == len(pes):
            return fused
        smaller = max(s for s in RUN_SIZES if s < size and self._fuses(s))
        raise errors.pes_do_not_fuse(self.name, size, smaller, device_list(sorted(fused)))

    def _fuses(self, size: int) -> bool:
        pes = {(run.card, pe) for run in self.runs for pe in run.pes}
        return len({(card, pe // size) for card, pe in pes}) * size == len(pes)


def parse_devices(text: str) -> Devices:
    """A comma-separated device list.

    Raises: PAR001 (no device), PAR002 (no aligned run), PAR003 (mixed kinds), PAR004 (twice).
    """
    if not isinstance(text, str):
        raise errors.not_a_device(repr(text), repr(text))
    items = [item.strip() for item in text.split(",")]
    others = {item: match for item in items if (match := _OTHER.fullmatch(item))}
    cards = [_parse_run(item, text) for item in items if item not in others]
    kinds: list[DeviceKind] = ["npu"] if cards else []
    kinds += dict.fromkeys("cpu" if match[1] else "cuda" for match in others.values())
    if len(kinds) > 1:
        nearest = device_list(_without_overlaps(cards)) or PeRun(0, 0, PES_PER_CARD).name
        raise errors.mixed_device_kinds(text, kinds, nearest)
    if not cards:
        twice = next((item for i, item in enumerate(items) if item in items[:i]), None)
        if twice is not None:
            raise errors.device_named_twice(text, twice, ",".join(others))
        return Devices(kinds[0], ())
    kept = _without_overlaps(cards)
    if len(kept) < len(cards):
        twice = next(r.name for i, r in enumerate(cards) if any(map(r.overlaps, cards[:i])))
        raise errors.device_named_twice(text, twice, device_list(kept))
    return Devices("npu", tuple(cards))


def device_list(runs: Iterable[PeRun]) -> str:
    return ",".join(run.name for run in runs)


def is_device_list(text: str) -> bool:
    """Whether `text` is meant as devices: an item begins with a kind of device, possible or not."""
    return any(item.strip().partition(":")[0] in get_args(DeviceKind) for item in text.split(","))


def _parse_run(item: str, text: str) -> PeRun:
    """Raises: PAR001, PAR002."""
    match = _ITEM.fullmatch(item)
    if match is None or (match[2] == "*" and match[3]):
        raise errors.not_a_device(text, item)
    card = int(match[1])
    if match[2] in (None, "*"):
        return PeRun(card, 0, PES_PER_CARD)
    first = int(match[2])
    last = first if match[3] is None else int(match[3])
    run = PeRun(card, first, last - first + 1)
    if run not in _aligned_runs(card):
        raise errors.pes_not_aligned(item, PES_PER_CARD, _nearest_runs(card, first, last))
    return run


def _aligned_runs(card: int) -> list[PeRun]:
    return [PeRun(card, i, size) for size in RUN_SIZES for i in range(0, PES_PER_CARD, size)]


def _nearest_runs(card: int, first: int, last: int) -> list[str]:
    """The aligned runs most like PEs `first` to `last`: in size, then in the PEs they take."""
    low, high = sorted(min(pe, PES_PER_CARD - 1) for pe in (first, last))
    asked = set(range(low, high + 1))
    differences = {
        run.name: (abs(run.size - len(asked)), len(asked ^ set(run.pes)))
        for run in _aligned_runs(card)
    }
    least = min(differences.values())
    return [name for name, difference in differences.items() if difference == least]


def _without_overlaps(runs: Sequence[PeRun]) -> list[PeRun]:
    """The largest runs that cover the same PEs once, in their order."""
    kept: list[PeRun] = []
    for run in sorted(runs, key=lambda run: -run.size):
        if not any(map(run.overlaps, kept)):
            kept.append(run)
    return sorted(kept, key=runs.index)

"""Which PEs each rank of each replica and stage is: the mesh [dp][pp][tp]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .. import errors
from .devices import PES_PER_CARD, RUN_SIZES, PeRun, device_list, parse_devices
from .stages import check_count, check_whole


@dataclass(frozen=True)
class Mesh:
    """Replicas of the model, each a run of fused PEs per pipeline stage."""

    replicas: tuple[tuple[PeRun, ...], ...]
    """[dp][pp]; the PEs of a run are the tensor-parallel ranks."""

    @property
    def tp(self) -> int:
        return self.replicas[0][0].size

    @property
    def pp(self) -> int:
        return len(self.replicas[0])

    @property
    def dp(self) -> int:
        return len(self.replicas)

    @property
    def name(self) -> str:
        """The device list that gives this mesh."""
        return device_list(run for replica in self.replicas for run in replica)

    def sharers(self, replica: int, stage: int) -> int:
        """PEs that load from the HBM of a stage's card at the same time, its own included.

        Stages of one replica work after each other, replicas side by side.
        """
        card = self.replicas[replica][stage].card
        others = sum(
            any(run.card == card for run in runs)
            for number, runs in enumerate(self.replicas)
            if number != replica
        )
        return self.tp * (1 + others)


def make_mesh(
    devices: str | None = None, *, tp: int = 1, pp: int = 1, dp: int | None = None
) -> Mesh:
    """The mesh of a device list, or without one `default_mesh`.

    Runs fill the mesh in the order in which they are written. Without `dp` there are as many
    replicas as the list has PEs for; with it, PEs that are not needed stay idle.
    Raises: PAR001 to PAR004 (the list), PAR005 to PAR009, PAR015 and PAR016 (what it cannot hold),
    PAR014 and PAR018 (numbers that count nothing).
    """
    check_tensor_parallel(tp)
    check_count("pipeline", pp)
    if dp is not None:
        check_count("data", dp)
    if devices is None:
        return default_mesh(tp, pp, dp or 1)
    runs = parse_devices(devices).fuse(tp)
    if len(runs) < pp * (dp or 1):
        enough = default_mesh(tp, pp, dp or 1).name
        raise errors.too_few_pes(devices, len(runs) * tp, tp, pp, dp or 1, enough)
    if dp is None and len(runs) % pp:
        fitting = device_list(sorted(runs)[: len(runs) - len(runs) % pp])
        raise errors.pes_left_over(devices, len(runs) * tp, tp, pp, fitting)
    used = runs[: pp * (dp or len(runs) // pp)]
    replicas = tuple(used[i : i + pp] for i in range(0, len(used), pp))
    for replica in replicas:
        _check_order(devices, replica, used)
    return Mesh(replicas)


def default_mesh(tp: int, pp: int, dp: int) -> Mesh:
    """Each stage on a card of its own; replicas fill the cards before they take more of them."""
    per_card = PES_PER_CARD // tp
    return Mesh(
        tuple(
            tuple(
                PeRun(replica // per_card * pp + stage, replica % per_card * tp, tp)
                for stage in range(pp)
            )
            for replica in range(dp)
        )
    )


def check_tensor_parallel(tp: int) -> None:
    """Raises: PAR007 for a number of PEs that cannot be fused, PAR008 for more than a card has,
    PAR018 for what is no whole number.
    """
    check_whole("tensor_parallel_size", tp)
    if tp in RUN_SIZES:
        return
    if tp > PES_PER_CARD:
        raise errors.tensor_parallel_over_cards(tp, PES_PER_CARD)
    nearest = [size for size in RUN_SIZES if abs(size - tp) == min(abs(s - tp) for s in RUN_SIZES)]
    raise errors.impossible_tensor_parallel(tp, nearest)


def _check_order(devices: str, replica: Sequence[PeRun], used: Sequence[PeRun]) -> None:
    """Raises: PAR009 unless each stage comes after the one before: next card, or later PEs."""
    for before, after in pairwise(replica):
        if after < before:
            raise errors.stages_out_of_order(
                devices, before.name, after.name, device_list(sorted(used))
            )

"""The order of the backend's passes, and their names for `furiosa-llm opt`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from xdsl.ir import Dialect
from xdsl.passes import ModulePass

from ..models.config_types import Bucket


def backend_phase(
    bucket: Bucket, level: int = 2, pins: tuple[str, ...] = (), compare: bool = False
) -> list[ModulePass]:
    """Tensors of one bucket -> synchronised commands, ready to be encoded.

    `level` is that of `build -O`: 0 keeps the program's order, 1 overlaps commands inside each
    kernel, 2 inside each block, and loads across calls. `pins` are tilings that products must
    have, and `compare` also records the next best ones, see `TilePass`.
    """
    from .chain import ChainPass
    from .place import PlacePass
    from .schedule import SchedulePass
    from .synchronise import SynchronisePass
    from .tile import TilePass

    return [
        TilePass.for_bucket(bucket, pins, compare),
        *([ChainPass()] if level == 2 else []),
        SchedulePass(level),
        PlacePass(),
        SynchronisePass(level),
    ]


def _tile() -> type[ModulePass]:
    from .tile import TilePass

    return TilePass


def _chain() -> type[ModulePass]:
    from .chain import ChainPass

    return ChainPass


def _place() -> type[ModulePass]:
    from .place import PlacePass

    return PlacePass


def _schedule() -> type[ModulePass]:
    from .schedule import SchedulePass

    return SchedulePass


def _synchronise() -> type[ModulePass]:
    from .synchronise import SynchronisePass

    return SynchronisePass


def _rngd() -> Dialect:
    from .rngd import RNGD

    return RNGD


PASSES: Mapping[str, Callable[[], type[ModulePass]]] = MappingProxyType(
    {
        "tile": _tile,
        "chain": _chain,
        "schedule": _schedule,
        "place": _place,
        "synchronise": _synchronise,
    }
)
DIALECTS: Mapping[str, Callable[[], Dialect]] = MappingProxyType({"rngd": _rngd})

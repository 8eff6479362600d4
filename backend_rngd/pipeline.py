"""The order of the backend's passes, and their names for `furiosa-llm opt`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from xdsl.ir import Dialect
from xdsl.passes import ModulePass

from ..models.config_types import Bucket


def backend_phase(bucket: Bucket) -> list[ModulePass]:
    """Tensors of one bucket -> scheduled commands, ready to be encoded."""
    from .place import PlacePass
    from .schedule import SchedulePass
    from .tile import TilePass

    return [TilePass.for_bucket(bucket), PlacePass(), SchedulePass()]


def _tile() -> type[ModulePass]:
    from .tile import TilePass

    return TilePass


def _place() -> type[ModulePass]:
    from .place import PlacePass

    return PlacePass


def _schedule() -> type[ModulePass]:
    from .schedule import SchedulePass

    return SchedulePass


def _rngd() -> Dialect:
    from .rngd import RNGD

    return RNGD


PASSES: Mapping[str, Callable[[], type[ModulePass]]] = MappingProxyType(
    {"tile": _tile, "place": _place, "schedule": _schedule}
)
DIALECTS: Mapping[str, Callable[[], Dialect]] = MappingProxyType({"rngd": _rngd})

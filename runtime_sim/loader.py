"""What a device keeps in HBM for all its programs, and the regions that each of them sees."""

from __future__ import annotations

from .. import errors
from ..backend_rngd.isa.container import CacheIo, Program, Relocation
from ..backend_rngd.isa.container import Region as RegionTable
from ..backend_rngd.isa.layout import Derived
from .budget import default_budget_bytes
from .hbm import Buffer, DerivedTable, Parameter, PlacedRoom, Region, TensorSource


class Loader:
    """Parameters, tables and KV caches, each once however many programs name them."""

    def __init__(self) -> None:
        self._room = PlacedRoom()
        self._parameters: dict[Relocation, Parameter] = {}
        self._tables: dict[Derived, DerivedTable] = {}
        self._caches: dict[int, tuple[CacheIo, Buffer]] = {}

    def give_source(self, program: Program, source: TensorSource) -> None:
        """Let the program's parameters come from `source`, unless they already have a source."""
        for relocation in program.parameters:
            parameter = self._parameter(relocation)
            if parameter.source is None:
                parameter.source = source

    def allocate_caches(self, program: Program, slots: int) -> bool:
        """Make the KV caches of the program's layers; those that exist with as many slots stay.

        Returns whether any is new.
        """
        new = False
        for io in program.caches:
            size = io.slot_bytes * slots
            known = self._caches.get(io.layer)
            if known is None or known[0] != io or known[1].size != size:
                cache = Buffer(f"cache of layer {io.layer}", size, writable=True, tracked=False)
                self._caches[io.layer] = io, cache
                new = True
        return new

    def forget_placed(self) -> None:
        """Drop the bytes of large parameters, which are placed again if someone needs them."""
        self._room.clear_large()

    def cache(self, layer: int) -> tuple[CacheIo, Buffer]:
        """The KV cache of a layer. Raises: SIM022."""
        if layer not in self._caches:
            raise errors.program_not_ready(
                f"layer {layer} has no KV cache", "Device.allocate_caches"
            )
        return self._caches[layer]

    def regions(self, program: Program) -> tuple[Region, ...]:
        """The program's regions in order; its inputs, outputs and scratch are its own.

        Raises: SIM019 if they are too large, SIM022 if a parameter has no source or a layer has
        no cache.
        """
        regions = tuple(self._region(table) for table in program.regions)
        needed = sum(region.size for region in regions if not isinstance(region, Parameter))
        if needed > (limit := default_budget_bytes()):
            raise errors.too_much_memory(needed, limit)
        return regions

    def _region(self, table: RegionTable) -> Region:
        if table.parameter is not None:
            parameter = self._parameter(table.parameter)
            if parameter.source is None:
                raise errors.program_not_ready(f"`{parameter.name}` has no value", "Device.load")
            return parameter
        if table.derived is not None:
            return self._table(table.derived, table.name)
        if table.cache is not None:
            io, cache = self.cache(table.cache.layer)
            if io != table.cache:
                problem = f"layer {io.layer} has a KV cache of another shape"
                raise errors.program_not_ready(problem, "Device.allocate_caches")
            return cache
        size, own = table.bytes_for(slots=0), table.input is None
        return Buffer(table.name, size, writable=own, tracked=own)

    def _parameter(self, relocation: Relocation) -> Parameter:
        if relocation not in self._parameters:
            number = len(self._parameters)
            self._parameters[relocation] = Parameter(number, relocation, self._room)
        return self._parameters[relocation]

    def _table(self, derived: Derived, name: str) -> DerivedTable:
        if derived not in self._tables:
            self._tables[derived] = DerivedTable(name, derived)
        return self._tables[derived]

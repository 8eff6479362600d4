"""What a device keeps in HBM for all its programs, and the regions that each rank of them sees."""

from __future__ import annotations

from .. import errors
from ..backend_rngd.isa.layout import Derived, RankNumbers
from ..backend_rngd.isa.program import CacheIo, Program, Relocation
from ..backend_rngd.isa.program import Region as RegionTable
from .budget import default_budget_bytes
from .hbm import Buffer, DerivedTable, Parameter, PlacedRoom, Region, TensorSource


class Loader:
    """Parameters, tables and KV caches, each once however many programs name them.

    What does not differ between ranks all of them share.
    """

    def __init__(self) -> None:
        self._room = PlacedRoom()
        self._parameters: dict[tuple[Relocation, int], Parameter] = {}
        self._tables: dict[tuple[Derived, int], DerivedTable] = {}
        self._caches: dict[tuple[int, int], tuple[CacheIo, Buffer]] = {}

    def give_source(self, program: Program, source: TensorSource) -> None:
        """Let the program's parameters come from `source`, unless they already have a source."""
        for relocation in program.parameters:
            for rank in range(program.header.tensor_parallel_size):
                parameter = self._parameter(relocation, rank)
                if parameter.source is None:
                    parameter.source = source

    def allocate_caches(self, program: Program, slots: int) -> bool:
        """Make the KV caches of the program's layers; those that exist with as many slots stay.

        Returns whether any is new. Raises: SIM019 if all of them are too large.
        """
        ranks = program.header.tensor_parallel_size
        needed = sum(io.slot_bytes for io in program.caches) * slots * ranks
        if needed > (limit := default_budget_bytes()):
            raise errors.too_much_memory(needed, limit)
        new = False
        for io in program.caches:
            size = io.slot_bytes * slots
            for rank in range(ranks):
                known = self._caches.get((io.layer, rank))
                if known is None or known[0] != io or known[1].size != size:
                    name = f"cache of layer {io.layer}"
                    cache = Buffer(name, size, writable=True, tracked=False)
                    self._caches[io.layer, rank] = io, cache
                    new = True
        return new

    def forget_placed(self) -> None:
        """Drop the bytes of large parameters, which are placed again if someone needs them."""
        self._room.clear_large()

    def cache(self, layer: int, rank: int) -> tuple[CacheIo, Buffer]:
        """A rank's KV cache of a layer. Raises: SIM022."""
        if (layer, rank) not in self._caches:
            raise errors.program_not_ready(
                f"layer {layer} has no KV cache", "Device.allocate_caches"
            )
        return self._caches[layer, rank]

    def regions(self, program: Program) -> list[tuple[Region, ...]]:
        """For each rank the program's regions in order.

        Outputs and scratch are the program's and the rank's own, inputs the program's.
        Raises: SIM019 if they are too large, SIM022 if a parameter has no source or a layer has
        no cache.
        """
        inputs = {
            i: Buffer(table.name, table.input.bytes, writable=False, tracked=False)
            for i, table in enumerate(program.regions)
            if table.input is not None
        }
        ranks = [
            tuple(
                inputs[i] if i in inputs else self._region(table, rank)
                for i, table in enumerate(program.regions)
            )
            for rank in range(program.header.tensor_parallel_size)
        ]
        distinct = {id(region): region for regions in ranks for region in regions}
        needed = sum(r.size for r in distinct.values() if not isinstance(r, Parameter))
        if needed > (limit := default_budget_bytes()):
            raise errors.too_much_memory(needed, limit)
        return ranks

    def _region(self, table: RegionTable, rank: int) -> Region:
        if table.parameter is not None:
            parameter = self._parameter(table.parameter, rank)
            if parameter.source is None:
                raise errors.program_not_ready(f"`{parameter.name}` has no value", "Device.load")
            return parameter
        if table.derived is not None:
            return self._table(table.derived, table.name, rank)
        if table.cache is not None:
            io, cache = self.cache(table.cache.layer, rank)
            if io != table.cache:
                problem = f"layer {io.layer} has a KV cache of another shape"
                raise errors.program_not_ready(problem, "Device.allocate_caches")
            return cache
        return Buffer(table.name, table.bytes_for(slots=0), writable=True, tracked=True)

    def _parameter(self, relocation: Relocation, rank: int) -> Parameter:
        key = (relocation, rank if relocation.cut is not None else 0)
        if key not in self._parameters:
            self._parameters[key] = Parameter(len(self._parameters), *key, self._room)
        return self._parameters[key]

    def _table(self, derived: Derived, name: str, rank: int) -> DerivedTable:
        key = (derived, rank if isinstance(derived, RankNumbers) else 0)
        if key not in self._tables:
            self._tables[key] = DerivedTable(name, *key)
        return self._tables[key]

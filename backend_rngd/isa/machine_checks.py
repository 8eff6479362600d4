"""Which numbers a machine can have: every parameter's limits, and what must fit together.

A number outside them would be timed all the same, and mean nothing: three channels have no address
bits, an efficiency of 2 is more than all. Limits that no physics gives are wide: they catch a wrong
unit, not a bold question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ... import errors
from . import rules
from .instructions import MAX_LOOPS, REGISTERS
from .machine_schema import Machine, Parameter, Value
from .plan import SLICE_ADDRESS_BYTES

MAX_GROUP = 2
"""log2 of the PEs that one command can span."""
ACCUMULATOR_COLUMNS = 32
"""Columns that the accumulator of a lane takes from a packet."""
MAX_PES = 256
"""Costs count slices one by one."""
MAX_UNIT_BYTES = 4096
"""A packet of DMA, which is a whole number of units."""
MAX_CHANNELS = 128
ADDRESS_BITS = 41
MAX_BANK_BITS = 8
"""Of banks and bank groups together."""
MAX_CYCLES = 1_000_000_000
"""A second, about: more for one command is another unit."""
FLIT_ELEMENTS = rules.FLIT_BYTES // 4
"""Of 32 bits."""

RECORD_GEOMETRY: Mapping[str, object] = MappingProxyType(
    {
        "chip.slices_per_pe": rules.SLICES_PER_PE,
        "chip.lanes_per_slice": rules.LANES,
        "dm.bytes_per_slice": rules.DM_BYTES,
        "dm.slice_window_bytes": SLICE_ADDRESS_BYTES,
        "trf.logical_bytes": rules.TRF_BYTES,
        "vrf.capacity_bytes": rules.VRF_BYTES,
        "accumulator.cells": rules.ACCUMULATOR_CELLS,
        "dma.max_loops": MAX_LOOPS,
        "sequencer.max_entries": rules.SEQUENCER_ENTRIES,
        "stream.flit_bytes": rules.FLIT_BYTES,
        "switch.snoop_entries": rules.SLICES_PER_PE << MAX_GROUP,
        "contraction.packet_bytes": 2 * rules.FLIT_BYTES,
        "contraction.tree_levels": {
            f"{kind}{bits}": rules.TREE_DEPTH[bits]
            for kind, bits in (("bf", 16), ("i", 8), ("f", 8), ("i", 4))
        },
        "contraction.interleaved_slot_cells": rules.ACCUMULATOR_CELLS // rules.LANES,
        "contraction.sequential_slot_lanes": rules.ACCUMULATOR_CELLS // ACCUMULATOR_COLUMNS,
        "vector.reduce_slots": rules.REDUCE_SLOTS,
        "vector.max_slice_group": rules.SLICES_PER_PE << MAX_GROUP,
        "transpose.max_rows": {f"b{bits}": rows for bits, rows in rules.TRANSPOSER_ROWS.items()},
        "control.registers": REGISTERS,
    }
)
"""Sizes that the format of binaries and its rules rest on: a description cannot change them."""

TABLE_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "hbm.column_delay_dram_cycles": ("different_bank_group", "same_bank_group"),
        "trf.geometry": ("lanes", "banks", "rows"),
        "trf.elements_per_row": ("i4", "i8", "f8", "bf16"),
        "contraction.macs_per_lane": ("i4", "i8", "f8", "bf16"),
        "transpose.valid_per_flit": ("b4", "b8", "b16", "b32"),
    }
)

UNITS = (
    ("bytes_per_second", "B/s"),
    ("bytes_per_cycle", "B/cycle"),
    ("dram_cycles", "cycles at 1.5 GHz"),
    ("cycles", "cycles"),
    ("bytes", "B"),
    ("hertz", "Hz"),
    ("factor", "factor"),
    ("efficiency", "factor"),
    ("bit", "bit"),
)
"""What a field is counted in, by the first of these parts that its name has; else `count`."""


def unit_of(field: str) -> str:
    """The unit that a field's name says."""
    return next((unit for part, unit in UNITS if part in field), "count")


@dataclass(frozen=True)
class Limits:
    """Between which ends a number lies; of a list or a table each."""

    low: float
    high: float
    power_of_two: bool = False

    def allow(self, value: float) -> bool:
        if not self.low <= value <= self.high:
            return False
        return not self.power_of_two or math.frexp(value)[0] == 0.5

    def __str__(self) -> str:
        kind = "powers of two" if self.power_of_two else "numbers"
        return f"{kind} from {self.low:,} to {self.high:,}"


def _power_of_two(low: int, high: int) -> Limits:
    return Limits(low, high, power_of_two=True)


_FACTOR = Limits(1, 10_000)
_FILL = Limits(0, 10_000)
_ONCE = Limits(0, MAX_CYCLES)
_RATE = Limits(1, 1_000_000)
_BIT = Limits(0, ADDRESS_BITS - 1)

LIMITS: Mapping[str, Limits] = MappingProxyType(
    {
        "chip.clusters": Limits(1, MAX_PES),
        "chip.pes": Limits(1, MAX_PES),
        "chip.slices_per_dmn": _power_of_two(1, rules.SLICES_PER_PE),
        "chip.clock_hertz": Limits(1e6, 1e12),
        "hbm.capacity_bytes": Limits(1 << 20, 1 << ADDRESS_BITS),
        "hbm.bandwidth_bytes_per_second": Limits(1e6, 1e16),
        "hbm.efficiency": Limits(0.01, 1),
        "hbm.channels": _power_of_two(2, MAX_CHANNELS),
        "hbm.unit_bytes": _power_of_two(8, MAX_UNIT_BYTES),
        "hbm.queue_entries_per_channel": Limits(1, 1 << 16),
        "hbm.row_conflict_cycles": _FILL,
        "hbm.column_delay_dram_cycles": Limits(1, 10_000),
        "hbm.stack_bit": _BIT,
        "hbm.channel_nibble_bits": _BIT,
        "hbm.bank_bits": _BIT,
        "hbm.bank_group_bits": _BIT,
        "hbm.row_bit": _BIT,
        "hbm.rmw_write_factor": _FACTOR,
        "hbm.unaligned_read_factor": _FACTOR,
        "hbm.read_latency_cycles": _ONCE,
        "dm.banks": _power_of_two(1, rules.DM_BYTES),
        "dm.bank_width_bytes": _power_of_two(1, rules.DM_BYTES),
        "dm.rows_per_bank": _power_of_two(1, rules.DM_BYTES),
        "dm.dmn_bytes_per_cycle": _power_of_two(1, MAX_UNIT_BYTES),
        "dm.noc_timeout_cycles": Limits(1, MAX_CYCLES),
        "dm.misaligned_write_factor": _FACTOR,
        "trf.geometry": _power_of_two(1, rules.TRF_BYTES),
        "trf.elements_per_row": _power_of_two(1, rules.TRF_BYTES),
        "dma.bytes_per_cycle": _RATE,
        "dma.startup_cycles": _ONCE,
        "dma.run_overhead_cycles": _FILL,
        "dma.descriptors_per_command": Limits(1, MAX_PES),
        "dma.remote_cycles": _ONCE,
        "dma.cross_cluster_cycles": _ONCE,
        "dma.cross_cluster_bytes_per_cycle": _RATE,
        "dma.dm_write_alignment_bytes": _power_of_two(1, MAX_UNIT_BYTES),
        "fetch.main_read_bytes": Limits(1, rules.FLIT_BYTES),
        "fetch.sub_read_bytes": _power_of_two(1, rules.FLIT_BYTES),
        "fetch.cast_latency_cycles": _FILL,
        "fetch.max_cast_output_bytes": _power_of_two(4, rules.FLIT_BYTES),
        "fetch.fill_cycles": _FILL,
        "fetch.adapter_fill_cycles": _FILL,
        "commit.valid_bytes": Limits(1, rules.FLIT_BYTES),
        "commit.sub_write_bytes": _power_of_two(1, rules.FLIT_BYTES),
        "commit.fill_cycles": _FILL,
        "stream.collect_fill_cycles": _FILL,
        "switch.hop_cycles": Limits(1, 10_000),
        "switch.router_buffer_packets": Limits(1, 1 << 20),
        "switch.fill_cycles_per_hop": _FILL,
        "switch.bitmap_load_cycles": _ONCE,
        "contraction.macs_per_lane": _power_of_two(1, 2 * rules.FLIT_BYTES * 8),
        "contraction.out_bus_elements": _power_of_two(1, ACCUMULATOR_COLUMNS),
        "contraction.accumulator_fill_cycles": _FILL,
        "contraction.folder_fill_cycles": _FILL,
        "vector.elements_per_cycle": _power_of_two(1, FLIT_ELEMENTS),
        "vector.float_elements_per_cycle": _power_of_two(1, FLIT_ELEMENTS),
        "vector.alu_latency_cycles": _FILL,
        "vector.cast_fill_cycles": _FILL,
        "transpose.valid_per_flit": _power_of_two(1, rules.FLIT_BYTES * 2),
        "transpose.buffer_columns": _power_of_two(1, ACCUMULATOR_COLUMNS),
        "control.exec_main_cycles": _ONCE,
        "control.exec_sub_cycles": _ONCE,
        "control.signal_cycles": _ONCE,
        "control.launch_cycles": _ONCE,
        "control.finish_cycles": _ONCE,
        "model.time_factor": Limits(0.1, 10),
        "exchange.message_cycles": _ONCE,
        "exchange.signal_cycles": _ONCE,
        "exchange.pcie_bytes_per_cycle": _RATE,
        "exchange.p2p_latency_cycles": _ONCE,
    }
)
"""Every number that a description may choose."""


def check_parameter(where: str, path: str, parameter: Parameter) -> None:
    """Raises: VED022 for a value, or an end of its range, that no machine has."""
    unit = unit_of(path.split(".")[1])
    if parameter.unit != unit:
        problem = f"{parameter.unit!r}; allowed: {unit}, which the name says"
        raise errors.bad_machine(where, f"{path}.unit", problem)
    keys = TABLE_KEYS.get(path)
    if keys is not None and isinstance(parameter.value, Mapping):
        _check_keys(where, path, parameter.value, keys)
    fixed = RECORD_GEOMETRY.get(path)
    if fixed is not None:
        if parameter.value != fixed:
            problem = f"{_text(parameter.value)}; allowed: {_text(fixed)}, for which binaries are"
            raise errors.bad_machine(where, path, f"{problem} made")
        return
    limits = LIMITS[path]
    for value in _numbers(parameter.value):
        if not limits.allow(value):
            raise errors.bad_machine(where, path, f"{value:,}; allowed: {limits}")
    for end in (parameter.low, parameter.high):
        if end is not None and not limits.allow(end):
            raise errors.bad_machine(where, f"{path}.range", f"{end:,}; allowed: {limits}")


def _check_keys(where: str, path: str, table: Mapping[str, int], keys: tuple[str, ...]) -> None:
    if set(table) != set(keys):
        problem = f"{_text(table)}; allowed: a table with the keys {', '.join(keys)}"
        raise errors.bad_machine(where, path, problem)


def _numbers(value: Value) -> list[float]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, tuple) else [value]


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# --- what must fit together ---

Problem = tuple[str, str]
"""(parameter, what about it)"""


def check_relations(where: str, machine: Machine) -> None:
    """Raises: VED022 for numbers that contradict each other."""
    for check in RELATIONS:
        for path, needed in check(machine):
            problem = f"{_text(machine.parameters[path].value)}; allowed: {needed}"
            raise errors.bad_machine(where, path, problem)


def _chip(machine: Machine) -> Iterator[Problem]:
    chip = machine.chip
    if chip.pes % chip.clusters:
        yield "chip.pes", f"a multiple of the {chip.clusters} clusters"


def _address_bits(machine: Machine) -> Iterator[Problem]:
    """Channel, bank and row of an address: each bit says one thing, and a unit lies in one bank."""
    hbm = machine.hbm
    lowest = hbm.unit_bytes.bit_length() - 1
    below = f"bits from {lowest} on, for a unit of {hbm.unit_bytes} B lies in one place"
    nibble = range(min(hbm.channel_nibble_bits), min(hbm.channel_nibble_bits) + hbm.nibble_width)
    if hbm.stack_bit < lowest or hbm.stack_bit in nibble:
        yield "hbm.stack_bit", f"{below}, except {nibble.start} to {nibble.stop - 1} of a channel"
    banks = [*hbm.bank_bits, *hbm.bank_group_bits]
    if len(set(banks)) < len(banks) or len(banks) > MAX_BANK_BITS:
        yield "hbm.bank_bits", f"{MAX_BANK_BITS} different bits at most, bank groups included"
    if len(set(hbm.channel_nibble_bits)) < len(hbm.channel_nibble_bits):
        yield "hbm.channel_nibble_bits", "different bits, for equal ones cancel"
    for path in ("hbm.channel_nibble_bits", "hbm.bank_bits", "hbm.bank_group_bits"):
        if min(getattr(hbm, path.split(".")[1])) < lowest:
            yield path, below
    if hbm.row_bit <= max(banks):
        yield "hbm.row_bit", f"bits above the banks', from {max(banks) + 1} on"


def _hbm_delays(machine: Machine) -> Iterator[Problem]:
    delays = machine.hbm.column_delay_dram_cycles
    if delays["same_bank_group"] < delays["different_bank_group"]:
        yield "hbm.column_delay_dram_cycles", "the same bank group is never the faster one"


def _data_memory(machine: Machine) -> Iterator[Problem]:
    dm = machine.dm
    if dm.banks * dm.bank_width_bytes * dm.rows_per_bank != dm.bytes_per_slice:
        line = dm.banks * dm.bank_width_bytes
        yield "dm.rows_per_bank", f"what makes {dm.bytes_per_slice} B of rows of {line} B"


def _registers(machine: Machine) -> Iterator[Problem]:
    trf = machine.trf
    if trf.geometry["lanes"] != machine.chip.lanes_per_slice:
        yield "trf.geometry", f"the {machine.chip.lanes_per_slice} lanes of a slice"
    rows = math.prod(trf.geometry.values())
    for kind, elements in trf.elements_per_row.items():
        if rows * elements * _bits(kind) != trf.logical_bytes * 8:
            yield "trf.elements_per_row", f"what fills {trf.logical_bytes} B with {rows} rows"


def _streams(machine: Machine) -> Iterator[Problem]:
    reads, writes = machine.fetch.main_read_bytes, machine.commit.valid_bytes
    if list(reads) != sorted(set(reads)) or reads[0] != 1:
        yield "fetch.main_read_bytes", "growing sizes that begin with 1"
    if list(writes) != sorted(set(writes)) or writes[-1] != machine.stream.flit_bytes:
        yield "commit.valid_bytes", f"growing sizes that end with {machine.stream.flit_bytes}"
    unit = machine.commit.sub_write_bytes
    if any(size % unit for size in writes):
        yield "commit.valid_bytes", f"multiples of the {unit} B of commit.sub_write_bytes"


def _engines(machine: Machine) -> Iterator[Problem]:
    vector = machine.vector
    for kind, macs in machine.contraction.macs_per_lane.items():
        elements = machine.contraction.packet_bytes * 8 // _bits(kind)
        if macs > elements:
            packet = f"a packet of {machine.contraction.packet_bytes} B has no more of {kind}"
            yield "contraction.macs_per_lane", f"at most {elements} for {kind}: {packet}"
    if vector.float_elements_per_cycle > vector.elements_per_cycle:
        at_once = f"at most the {vector.elements_per_cycle} of vector.elements_per_cycle"
        yield "vector.float_elements_per_cycle", at_once
    for kind, valid in machine.transpose.valid_per_flit.items():
        elements = machine.stream.flit_bytes * 8 // _bits(kind)
        if valid > elements:
            yield "transpose.valid_per_flit", f"at most {elements} for {kind}, as a flit has"


def _bits(kind: str) -> int:
    """Bits of an element: 16 of `bf16`."""
    return int(kind.lstrip("bfi"))


RELATIONS: tuple[Callable[[Machine], Iterator[Problem]], ...] = (
    _chip,
    _address_bits,
    _hbm_delays,
    _data_memory,
    _registers,
    _streams,
    _engines,
)

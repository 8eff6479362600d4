"""The machine's numbers, typed: sections of a machine file, and where each number is from.

Fields carry their unit in their name. `machine.py` reads the files, `machine_checks.py` says which
values make sense.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

Table = Mapping[str, int]
"""A small table of counts, by element type or kind."""
Sizes = tuple[int, ...]
Value = int | float | Sizes | Table


class Tag(Enum):
    """How we know a number."""

    DOCUMENTED = "documented"
    DERIVED = "derived"
    FITTED = "fitted"
    ASSUMED = "assumed"


@dataclass(frozen=True)
class Parameter:
    """One number of a machine file. `low` and `high` bound it; both equal it when it is exact."""

    value: Value
    unit: str
    source: str
    tag: Tag
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Chip:
    clusters: int
    pes: int
    slices_per_pe: int
    lanes_per_slice: int
    slices_per_dmn: int
    clock_hertz: float


@dataclass(frozen=True)
class Hbm:
    """High-bandwidth memory; `*_cycles` are core cycles."""

    capacity_bytes: int
    bandwidth_bytes_per_second: float
    efficiency: float
    channels: int
    unit_bytes: int
    queue_entries_per_channel: int
    row_conflict_cycles: float
    column_delay_dram_cycles: Table
    stack_bit: int
    channel_nibble_bits: Sizes
    bank_bits: Sizes
    bank_group_bits: Sizes
    row_bit: int
    rmw_write_factor: float
    unaligned_read_factor: float
    read_latency_cycles: int

    @property
    def nibble_width(self) -> int:
        """Bits that name a channel of a stack."""
        return self.channels.bit_length() - 2


@dataclass(frozen=True)
class DataMemory:
    bytes_per_slice: int
    banks: int
    bank_width_bytes: int
    rows_per_bank: int
    dmn_bytes_per_cycle: int
    slice_window_bytes: int
    noc_timeout_cycles: int
    misaligned_write_factor: float


@dataclass(frozen=True)
class TensorRegisters:
    logical_bytes: int
    geometry: Table
    elements_per_row: Table


@dataclass(frozen=True)
class VectorRegisters:
    capacity_bytes: int


@dataclass(frozen=True)
class Accumulator:
    cells: int


@dataclass(frozen=True)
class DmaEngine:
    bytes_per_cycle: float
    startup_cycles: int
    run_overhead_cycles: float
    descriptors_per_command: int
    remote_cycles: int
    cross_cluster_cycles: int
    cross_cluster_bytes_per_cycle: float
    dm_write_alignment_bytes: int
    max_loops: int


@dataclass(frozen=True)
class Sequencer:
    max_entries: int


@dataclass(frozen=True)
class Fetch:
    main_read_bytes: Sizes
    sub_read_bytes: int
    cast_latency_cycles: int
    max_cast_output_bytes: int
    fill_cycles: int
    adapter_fill_cycles: int


@dataclass(frozen=True)
class CommitEngine:
    valid_bytes: Sizes
    sub_write_bytes: int
    fill_cycles: int


@dataclass(frozen=True)
class StreamWidth:
    flit_bytes: int
    collect_fill_cycles: int


@dataclass(frozen=True)
class SwitchEngine:
    hop_cycles: int
    router_buffer_packets: int
    snoop_entries: int
    fill_cycles_per_hop: int
    bitmap_load_cycles: int


@dataclass(frozen=True)
class ContractionEngine:
    packet_bytes: int
    macs_per_lane: Table
    tree_levels: Table
    out_bus_elements: int
    interleaved_slot_cells: int
    sequential_slot_lanes: int
    accumulator_fill_cycles: int
    folder_fill_cycles: int


@dataclass(frozen=True)
class VectorEngine:
    elements_per_cycle: int
    float_elements_per_cycle: int
    alu_latency_cycles: int
    reduce_slots: int
    max_slice_group: int
    cast_fill_cycles: int


@dataclass(frozen=True)
class TransposeEngine:
    valid_per_flit: Table
    max_rows: Table
    buffer_columns: int


@dataclass(frozen=True)
class ControlUnit:
    registers: int
    exec_main_cycles: int
    exec_sub_cycles: int
    signal_cycles: int
    launch_cycles: int
    finish_cycles: int


@dataclass(frozen=True)
class CycleModel:
    """What the formulas themselves may be off by, whatever the numbers in them."""

    time_factor: float


@dataclass(frozen=True)
class Exchange:
    """What reaching another PE or card takes beyond the transfer itself."""

    message_cycles: int
    """A card delivers one message after the other, each in so many cycles."""
    signal_cycles: int
    pcie_bytes_per_cycle: float
    p2p_latency_cycles: int


@dataclass(frozen=True, eq=False)
class Machine:
    """A machine description. Equality and hash are identity: costs are cached per machine."""

    name: str
    chip: Chip
    hbm: Hbm
    dm: DataMemory
    trf: TensorRegisters
    vrf: VectorRegisters
    accumulator: Accumulator
    dma: DmaEngine
    sequencer: Sequencer
    fetch: Fetch
    commit: CommitEngine
    stream: StreamWidth
    switch: SwitchEngine
    contraction: ContractionEngine
    vector: VectorEngine
    transpose: TransposeEngine
    control: ControlUnit
    exchange: Exchange
    model: CycleModel
    parameters: Mapping[str, Parameter]
    """Every number above as "section.field", with its unit, source, tag and range."""

    def microseconds(self, cycles: float) -> float:
        return cycles / self.chip.clock_hertz * 1e6 * self.model.time_factor

    @functools.cached_property
    def hbm_bytes_per_cycle(self) -> float:
        """What all channels together deliver at best."""
        return self.hbm.bandwidth_bytes_per_second * self.hbm.efficiency / self.chip.clock_hertz

    @functools.cached_property
    def hbm_unit_cycles(self) -> float:
        """Core cycles in which one channel moves a unit of 256 B from an open row."""
        return self.hbm.unit_bytes * self.hbm.channels / self.hbm_bytes_per_cycle

    def macs_per_cycle(self, kind: str) -> int:
        """Multiply-accumulates of one PE on elements of `kind`: "i4", "i8", "f8" or "bf16"."""
        lanes = self.chip.slices_per_pe * self.chip.lanes_per_slice
        return lanes * self.contraction.macs_per_lane[kind]

    def replace(self, path: str, value: float) -> Machine:
        """The same machine with another value for one number, which is then taken as exact."""
        section, field = path.split(".")
        known = getattr(self, section)
        if isinstance(getattr(known, field), int) and value == int(value):
            value = int(value)
        changed = dataclasses.replace(known, **{field: value})
        exact = dataclasses.replace(self.parameters[path], value=value, low=value, high=value)
        parameters = MappingProxyType({**self.parameters, path: exact})
        return dataclasses.replace(self, parameters=parameters, **{section: changed})

"""The machine's numbers: one YAML file per description, each number with its unit and source.

`load_machine()` gives a typed `Machine`; `machine.dma.startup_cycles` is a plain number, and
`machine.parameters["dma.startup_cycles"]` the same with unit, source, tag and range. Fields carry
their unit in their name. The YAML settles what the sources disagree on; code has no switches.

A file is whole, or `extends` one that is included and says only what differs:

    schema: 1
    extends: silicon
    hbm: {bandwidth_bytes_per_second: {value: 3.072e+12}}
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard, get_type_hints

import yaml

from ... import errors
from . import rules
from .instructions import MAX_LOOPS, REGISTERS
from .plan import SLICE_ADDRESS_BYTES

SCHEMA = 1
DEFAULT_MACHINE = "silicon"

MAX_GROUP = 2
"""log2 of the PEs that one command can span."""
ACCUMULATOR_COLUMNS = 32
"""Columns that the accumulator of a lane takes from a packet."""

MAX_PES = 256
MAX_UNIT_BYTES = 4096
"""Limits of what costs count one by one."""
TABLE_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "hbm.column_delay_dram_cycles": ("different_bank_group", "same_bank_group"),
        "trf.elements_per_row": ("i4", "i8", "f8", "bf16"),
        "contraction.macs_per_lane": ("i4", "i8", "f8", "bf16"),
        "transpose.valid_per_flit": ("b4", "b8", "b16", "b32"),
    }
)

Table = Mapping[str, int]
"""A small table of counts, by element type or kind."""
Sizes = tuple[int, ...]
Value = int | float | str | Sizes | Table


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
    parameters: Mapping[str, Parameter]
    """Every number above as "section.field", with its unit, source, tag and range."""

    def microseconds(self, cycles: float) -> float:
        return cycles / self.chip.clock_hertz * 1e6

    @functools.cached_property
    def hbm_bytes_per_cycle(self) -> float:
        """What all channels together deliver at best."""
        return self.hbm.bandwidth_bytes_per_second * self.hbm.efficiency / self.chip.clock_hertz

    @functools.cached_property
    def hbm_unit_cycles(self) -> float:
        """Core cycles in which one channel moves a unit of 256 B from an open row."""
        return self.hbm.unit_bytes * self.hbm.channels / self.hbm_bytes_per_cycle

    def load_bytes_per_cycle(self, sharers: int = 1) -> float:
        """The most that one PE's DMA engine gets from HBM while `sharers` PEs load."""
        return min(self.dma.bytes_per_cycle, self.hbm_bytes_per_cycle / sharers)

    def macs_per_cycle(self, kind: str) -> int:
        """Multiply-accumulates of one PE on elements of `kind`: "i4", "i8", "f8" or "bf16"."""
        lanes = self.chip.slices_per_pe * self.chip.lanes_per_slice
        return lanes * self.contraction.macs_per_lane[kind]

    def replace(self, path: str, value: float) -> Machine:
        """The same machine with another value for one number, which is then taken as exact."""
        section, field = path.split(".")
        changed = dataclasses.replace(getattr(self, section), **{field: value})
        exact = dataclasses.replace(self.parameters[path], value=value, low=value, high=value)
        parameters = MappingProxyType({**self.parameters, path: exact})
        return dataclasses.replace(self, parameters=parameters, **{section: changed})


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


def load_machine(name_or_path: str | Path = DEFAULT_MACHINE) -> Machine:
    """The description with that name, or in that file (anything with a slash or `.yaml`).

    Raises: VED021 (no such description), VED022 (the file is not valid, naming the parameter).
    """
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name)
        try:
            return parse_machine(path.read_text(encoding="utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise errors.machine_not_found(name, shipped_machines(), str(error)) from None
    return _included(name)


def _included(name: str) -> Machine:
    if name not in shipped_machines():
        raise errors.machine_not_found(name, shipped_machines(), "no description has this name")
    return _shipped(name)


@functools.cache
def _shipped(name: str) -> Machine:
    text = (_machines_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_machine(text, name)


def shipped_machines() -> tuple[str, ...]:
    """Names of the descriptions that come with the package."""
    files = (entry.name for entry in _machines_folder().iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml")))


def _machines_folder() -> Any:
    return resources.files(__package__) / "machines"


def parse_machine(text: str, where: str) -> Machine:
    """The machine in a YAML text. Raises: VED021 for what it extends, VED022 for all else."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise errors.bad_machine(where, "file", f"not YAML: {error}") from None
    if not isinstance(document, dict):
        raise errors.bad_machine(where, "file", "not a table of sections")
    if document.get("schema") != SCHEMA:
        raise errors.bad_machine(where, "schema", f"{document.get('schema')!r}, expected {SCHEMA}")
    sections = [f.name for f in dataclasses.fields(Machine) if f.name not in ("name", "parameters")]
    if "extends" in document:
        _check_keys(where, "", document, [], [*sections, "schema", "name", "extends"])
        base = _included(_text(where, "extends", document["extends"]))
        document = {"name": Path(where).stem, **document}
        for section in sections:
            document[section] = _extended(where, section, document.get(section, {}), base)
        del document["extends"]
    _check_keys(where, "", document, [*sections, "schema", "name"])
    hints = get_type_hints(Machine)
    parameters: dict[str, Parameter] = {}
    built = {
        name: _section(where, name, hints[name], document[name], parameters) for name in sections
    }
    _check_geometry(where, parameters)
    name = _text(where, "name", document["name"])
    machine = Machine(name=name, parameters=MappingProxyType(parameters), **built)
    _check_tables(where, machine)
    _check_sizes(where, machine)
    return machine


def _text(where: str, path: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise errors.bad_machine(where, path, f"{value!r} is not text")
    return value


def _extended(where: str, section: str, table: object, base: Machine) -> object:
    """The section with what `base` says wherever `table` says nothing.

    A new value stands alone: the range of the old one does not apply to it.
    """
    if not isinstance(table, dict):
        return table
    merged: dict[object, object] = {}
    for field in dataclasses.fields(getattr(base, section)):
        new = table.get(field.name, {})
        entry = _entry(base.parameters[f"{section}.{field.name}"])
        if isinstance(new, dict) and "value" in new:
            entry.pop("range", None)
            entry["source"] = f"{where}, instead of {base.name}"
        merged[field.name] = {**entry, **new} if isinstance(new, dict) else new
    unknown = {key: entry for key, entry in table.items() if key not in merged}
    return {**merged, **unknown}


def _entry(known: Parameter) -> dict[str, object]:
    """A parameter as a file has it."""
    value: object = known.value
    if isinstance(value, Mapping):
        value = dict(value)
    elif isinstance(value, tuple):
        value = list(value)
    entry: dict[str, object] = {"value": value, "unit": known.unit}
    entry |= {"source": known.source, "tag": known.tag.value}
    if known.low is not None and known.low != known.high:
        entry["range"] = [known.low, known.high]
    return entry


def _check_geometry(where: str, parameters: Mapping[str, Parameter]) -> None:
    """Raises: VED022 for a capacity that binaries are not made for."""
    for path, size in RECORD_GEOMETRY.items():
        if parameters[path].value != size:
            problem = f"{parameters[path].value}, but binaries are made for {size}"
            raise errors.bad_machine(where, path, problem)


def _check_tables(where: str, machine: Machine) -> None:
    """Raises: VED022 for lists and tables that costs could not use."""
    for path, keys in TABLE_KEYS.items():
        value = machine.parameters[path].value
        if not isinstance(value, Mapping) or set(value) != set(keys):
            raise errors.bad_machine(where, path, f"its keys are not {', '.join(keys)}")
    for path, parameter in machine.parameters.items():
        bits = parameter.value if isinstance(parameter.value, tuple) else (parameter.value,)
        if parameter.unit == "bit" and any(not isinstance(b, int) or b > 40 for b in bits):
            raise errors.bad_machine(where, path, "an address has bits 0 to 40")
    reads, writes = machine.fetch.main_read_bytes, machine.commit.valid_bytes
    if list(reads) != sorted(reads) or reads[0] != 1:
        raise errors.bad_machine(where, "fetch.main_read_bytes", "sizes grow, and begin with 1")
    if list(writes) != sorted(writes) or writes[-1] != machine.stream.flit_bytes:
        raise errors.bad_machine(where, "commit.valid_bytes", "sizes grow, and end with a flit")


def _check_sizes(where: str, machine: Machine) -> None:
    """Raises: VED022 for numbers that contradict each other."""
    dm, trf, chip = machine.dm, machine.trf, machine.chip
    if chip.pes > MAX_PES:
        raise errors.bad_machine(where, "chip.pes", f"{chip.pes} PEs, at most {MAX_PES}")
    if machine.hbm.unit_bytes > MAX_UNIT_BYTES:
        raise errors.bad_machine(where, "hbm.unit_bytes", f"at most {MAX_UNIT_BYTES} bytes")
    if dm.banks * dm.bank_width_bytes * dm.rows_per_bank != dm.bytes_per_slice:
        problem = f"banks, their width and rows do not make {dm.bytes_per_slice} bytes"
        raise errors.bad_machine(where, "dm.rows_per_bank", problem)
    rows = math.prod(trf.geometry.values())
    for kind, elements in trf.elements_per_row.items():
        if rows * elements * int(kind.lstrip("bfi")) != trf.logical_bytes * 8:
            problem = f"{elements} elements of {kind} in {rows} rows are not {trf.logical_bytes} B"
            raise errors.bad_machine(where, "trf.elements_per_row", problem)
    if chip.pes % chip.clusters:
        problem = f"{chip.pes} PEs do not divide into {chip.clusters} clusters"
        raise errors.bad_machine(where, "chip.pes", problem)
    if chip.slices_per_pe % chip.slices_per_dmn:
        problem = f"{chip.slices_per_dmn} does not divide {chip.slices_per_pe} slices"
        raise errors.bad_machine(where, "chip.slices_per_dmn", problem)


def _section(
    where: str, name: str, kind: type[Any], table: object, parameters: dict[str, Parameter]
) -> Any:
    if not isinstance(table, dict):
        raise errors.bad_machine(where, name, "not a table of parameters")
    hints = get_type_hints(kind)
    _check_keys(where, f"{name}.", table, list(hints))
    for field, hint in hints.items():
        path = f"{name}.{field}"
        parameters[path] = _parameter(where, path, hint, table[field])
    return kind(**{field: parameters[f"{name}.{field}"].value for field in hints})


def _parameter(where: str, path: str, hint: object, entry: object) -> Parameter:
    if not isinstance(entry, dict):
        raise errors.bad_machine(where, path, "not a table with value, unit, source and tag")
    _check_keys(where, f"{path}.", entry, ["value", "unit", "source", "tag"], ["range"])
    value = _value(where, path, hint, entry["value"])
    for key in ("unit", "source"):
        if not isinstance(entry[key], str) or not entry[key]:
            raise errors.bad_machine(where, f"{path}.{key}", "missing or not text")
    if entry["tag"] not in {tag.value for tag in Tag}:
        choices = ", ".join(tag.value for tag in Tag)
        raise errors.bad_machine(where, f"{path}.tag", f"{entry['tag']!r} is none of {choices}")
    if value == 0 and not entry["unit"].startswith("cycles"):
        raise errors.bad_machine(where, path, "only a number of cycles may be 0")
    low, high = _range(where, path, value, entry.get("range"))
    return Parameter(value, entry["unit"], entry["source"], Tag(entry["tag"]), low, high)


def _value(where: str, path: str, hint: object, value: object) -> Value:
    if hint is str and isinstance(value, str):
        return value
    if hint is int and _is_count(value):
        return value
    if hint is float and _is_number(value):
        return float(value)
    if hint == Sizes and isinstance(value, list) and value and all(map(_is_count, value)):
        return tuple(value)
    if hint == Table and isinstance(value, dict) and value and all(map(_is_count, value.values())):
        return MappingProxyType({str(key): item for key, item in value.items()})
    kinds = {int: "a whole number", float: "a number", str: "text", Sizes: "a list of counts"}
    expected = kinds.get(hint, "a table of counts")  # type: ignore[call-overload]
    raise errors.bad_machine(where, path, f"{value!r} is not {expected} of at least 0")


def _range(
    where: str, path: str, value: Value, bounds: object
) -> tuple[float | None, float | None]:
    if not _is_number(value):
        if bounds is not None:
            raise errors.bad_machine(where, f"{path}.range", "only numbers have a range")
        return None, None
    if bounds is None:
        return float(value), float(value)
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(map(_is_number, bounds)):
        raise errors.bad_machine(where, f"{path}.range", "not a list [low, high]")
    low, high = float(bounds[0]), float(bounds[1])
    if not low <= value <= high:
        raise errors.bad_machine(where, f"{path}.range", f"{value} lies outside [{low}, {high}]")
    return low, high


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30


def _check_keys(
    where: str,
    prefix: str,
    table: Mapping[Any, object],
    required: list[str],
    optional: list[str] | None = None,
) -> None:
    known = [*required, *(optional or ())]
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise errors.bad_machine(where, f"{prefix}{key}", f"no such parameter{hint}")
    for key in required:
        if key not in table:
            raise errors.bad_machine(where, f"{prefix}{key}", "missing")

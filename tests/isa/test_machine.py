"""Machine descriptions: every number has a unit and a source, and bad files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from furiosa_llm.backend_rngd.isa import rules
from furiosa_llm.backend_rngd.isa.machine import (
    RECORD_GEOMETRY,
    Tag,
    load_machine,
    parse_machine,
    shipped_machines,
)
from furiosa_llm.errors import BinaryError

BOOK = load_machine("book")
BOOK_TEXT = (
    Path(rules.__file__).resolve().parent.joinpath("machines", "book.yaml").read_text("utf-8")
)


EXTENDS = "schema: 1"
MACS = "contraction.macs_per_lane"


def changed(section: str, field: str, **entry: object) -> str:
    """The book with some keys of a parameter replaced; None removes one."""
    document = yaml.safe_load(BOOK_TEXT)
    for key, value in entry.items():
        if value is None:
            del document[section][field][key]
        else:
            document[section][field][key] = value
    return yaml.safe_dump(document)


def test_numbers_are_plain_and_described() -> None:
    assert BOOK.dma.startup_cycles == 500
    parameter = BOOK.parameters["dma.startup_cycles"]
    assert (parameter.value, parameter.unit, parameter.tag) == (500, "cycles", Tag.DOCUMENTED)
    assert (parameter.low, parameter.high) == (450, 500)
    assert BOOK.contraction.macs_per_lane["bf16"] == 32
    assert BOOK.fetch.main_read_bytes == (1, 2, 4, 8, 16, 32)
    assert BOOK.microseconds(1500) == 1.5


@pytest.mark.parametrize("name", shipped_machines())
def test_every_parameter_says_where_it_is_from(name: str) -> None:
    for path, parameter in load_machine(name).parameters.items():
        assert parameter.source, path
        if parameter.tag == Tag.ASSUMED and parameter.low is not None:
            assert parameter.high is not None
            assert parameter.low < parameter.high, f"{path}: an assumption has a range"


@pytest.mark.parametrize("path", BOOK.parameters)
def test_names_carry_their_units(path: str) -> None:
    unit = BOOK.parameters[path].unit
    endings = {"cycles": "cycles", "B": "bytes", "B/s": "bytes_per_second", "Hz": "hertz"}
    for ending, suffix in endings.items():
        if unit == ending:
            assert suffix in path


def test_capacities_are_those_that_the_rules_check() -> None:
    assert BOOK.dm.bytes_per_slice == rules.DM_BYTES
    assert BOOK.trf.logical_bytes == rules.TRF_BYTES
    assert BOOK.vrf.capacity_bytes == rules.VRF_BYTES
    assert BOOK.accumulator.cells == rules.ACCUMULATOR_CELLS
    assert BOOK.chip.slices_per_pe == rules.SLICES_PER_PE
    assert BOOK.chip.lanes_per_slice == rules.LANES
    assert BOOK.stream.flit_bytes == rules.FLIT_BYTES
    assert BOOK.transpose.max_rows == {
        f"b{bits}": rows for bits, rows in rules.TRANSPOSER_ROWS.items()
    }


def test_peaks_are_the_published_ones() -> None:
    chip = BOOK.chip
    lanes = chip.pes * chip.slices_per_pe * chip.lanes_per_slice
    teraops = {
        name: lanes * macs * 2 * chip.clock_hertz / 1e12
        for name, macs in BOOK.contraction.macs_per_lane.items()
    }
    assert teraops == pytest.approx({"bf16": 256, "i8": 512, "f8": 512, "i4": 1024}, rel=0.03)


def test_a_file_can_replace_the_book(tmp_path: Path) -> None:
    path = tmp_path / "fast.yaml"
    path.write_text(changed("dma", "startup_cycles", value=100, range=[50, 100]))
    assert load_machine(path).dma.startup_cycles == 100
    assert load_machine(str(path)).dma.startup_cycles == 100


@pytest.mark.parametrize(
    ("text", "at", "cause"),
    [
        ("[1, 2]", "file", "not a table"),
        ("a: [", "file", "not YAML"),
        ("schema: 7", "schema", "7, expected 1"),
        (changed("dma", "startup_cycles", value="many"), "dma.startup_cycles", "'many' is not"),
        (changed("chip", "pes", value=2.5), "chip.pes", "not a whole number"),
        (changed("chip", "pes", value=0), "chip.pes", "only a number of cycles may be 0"),
        (changed("chip", "pes", tag="guessed"), "chip.pes.tag", "'guessed' is none of"),
        (changed("chip", "pes", unit=None), "chip.pes.unit", "missing"),
        (changed("chip", "pes", colour="red"), "chip.pes.colour", "no such parameter"),
        (changed("dma", "startup_cycles", value=700), "dma.startup_cycles.range", "lies outside"),
        (changed("chip", "slices_per_pe", value=16), "chip.slices_per_pe", "are made for 64"),
        (changed("dma", "startup_cycles", range=[1]), "dma.startup_cycles.range", "[low, high]"),
        (BOOK_TEXT.replace("  channels:", "  chanels:"), "hbm.chanels", "mean hbm.channels?"),
        (BOOK_TEXT.replace("\nvector:", "\nvektor:"), "vektor", "no such parameter"),
        (changed("dm", "banks", value=8), "dm.rows_per_bank", "do not make 524288 bytes"),
        (changed("trf", "geometry", value={"rows": 2}), "trf.elements_per_row", "are not 65536"),
        (changed("chip", "pes", value=512), "chip.pes", "at most 256"),
        (changed("hbm", "unit_bytes", value=1 << 20), "hbm.unit_bytes", "at most 4096"),
        (changed("hbm", "row_bit", value=64), "hbm.row_bit", "bits 0 to 40"),
        (changed("hbm", "bank_bits", value=[1 << 50]), "hbm.bank_bits", "bits 0 to 40"),
        (
            changed("contraction", "macs_per_lane", value={"i4": 1}),
            "contraction.macs_per_lane",
            "are",
        ),
        (
            changed("fetch", "main_read_bytes", value=[2, 4]),
            "fetch.main_read_bytes",
            "begin with 1",
        ),
        (changed("commit", "valid_bytes", value=[8, 24]), "commit.valid_bytes", "end with a flit"),
        (changed("chip", "pes", value=7), "chip.pes", "do not divide into 2 clusters"),
        (changed("chip", "slices_per_dmn", value=20), "chip.slices_per_dmn", "does not divide"),
        (f"{EXTENDS}\nextends: 3", "extends", "3 is not text"),
        (f"{EXTENDS}\nname: 3\nextends: book", "name", "3 is not text"),
        (f"{EXTENDS}\nextends: book\nhbn: {{}}", "hbn", "mean hbm?"),
        (f"{EXTENDS}\nextends: book\nhbm: 3", "hbm", "not a table of parameters"),
        (f"{EXTENDS}\nextends: book\nhbm: {{banks: {{value: 3}}}}", "hbm.banks", "no such"),
        (f"{EXTENDS}\nextends: book\nhbm: {{channels: 64}}", "hbm.channels", "not a table with"),
    ],
)
def test_bad_files_name_the_parameter(text: str, at: str, cause: str) -> None:
    with pytest.raises(BinaryError) as caught:
        parse_machine(text, "mine.yaml")
    assert caught.value.code == "VED022"
    assert caught.value.at == at
    assert cause in caught.value.cause
    assert "mine.yaml" in caught.value.message
    assert caught.value.exit_code == 2


def test_three_lines_ask_what_if(tmp_path: Path) -> None:
    path = tmp_path / "fast.yaml"
    hbm = (
        "hbm: {bandwidth_bytes_per_second: {value: 3.072e+12}, row_conflict_cycles: {tag: derived}}"
    )
    path.write_text(f"schema: 1\nextends: book\n{hbm}\n")
    fast = load_machine(path)
    assert fast.name == "fast"
    assert fast.hbm_bytes_per_cycle == 3072
    parameter = fast.parameters["hbm.bandwidth_bytes_per_second"]
    assert (parameter.low, parameter.high, parameter.unit) == (3.072e12, 3.072e12, "B/s")
    assert "instead of book" in parameter.source
    conflict = fast.parameters["hbm.row_conflict_cycles"]
    assert (conflict.value, conflict.low, conflict.high, conflict.tag) == (40, 40, 50, Tag.DERIVED)
    assert fast.dma == BOOK.dma


def test_a_file_extends_a_description_that_exists() -> None:
    with pytest.raises(BinaryError) as caught:
        parse_machine("schema: 1\nextends: nothing", "mine.yaml")
    assert caught.value.code == "VED021"


@pytest.mark.parametrize("name", ["silicone", "missing.yaml", "/nowhere/at/all"])
def test_unknown_descriptions_list_the_known_ones(name: str) -> None:
    with pytest.raises(BinaryError) as caught:
        load_machine(name)
    assert caught.value.code == "VED021"
    assert "book" in caught.value.next_step


@pytest.mark.parametrize("path", RECORD_GEOMETRY)
def test_sizes_that_binaries_rest_on_stay(path: str) -> None:
    section, field = path.split(".")
    value = BOOK.parameters[path].value
    other: dict[str, object] = {"value": {"b8": 1}}
    if isinstance(value, int):
        other = {"value": value + 1, "range": [0, 1 << 40]}
    with pytest.raises(BinaryError) as caught:
        parse_machine(changed(section, field, **other), "mine.yaml")
    assert (caught.value.code, caught.value.at) == ("VED022", path)

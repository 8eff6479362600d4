"""Files of pins: their forms, what is wrong with bad ones, and explanations that are such files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from model_zoo import make_config

from furiosa_llm.artifact.tilings import ExplainedTiling, TilingPins, read_pins, to_pin_file
from furiosa_llm.backend_rngd.tiling import Cycles, MatmulTiling, ProductName, Role
from furiosa_llm.cli.main import main
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.models.config_types import Bucket

RECORD = "weights-stream tokens=1 rows=4 load_rows=8 load_chunks=2 command_chunks=2"
WHOLE = f"{RECORD} k_split=1 run_per_row=0 every_slice=1"
FIELDS = "role: weights-stream, tokens: 1, rows: 4, load_rows: 8, load_chunks: 2, command_chunks: 2"
PREFILL, DECODE = Bucket.prefill(1, 16), Bucket.decode(2, 32)


def pins(tmp_path: Path, text: str) -> TilingPins:
    (tmp_path / "pins").write_text(text)
    return read_pins(tmp_path / "pins")


# --- files ---


@pytest.mark.parametrize(
    "text",
    [
        f"mlp.*: {RECORD}",
        f"mlp.*: {{{FIELDS}, every_slice: true}}",
        f'"*":\n  mlp.*: {RECORD}  # a comment',
        json.dumps({"mlp.*": RECORD}),
    ],
)
def test_the_forms_of_a_pin_for_all_buckets(tmp_path: Path, text: str) -> None:
    found = pins(tmp_path, text)
    assert found.lines(PREFILL) == found.lines(DECODE) == (f"mlp.*: {WHOLE}",)


def test_pins_of_some_buckets(tmp_path: Path) -> None:
    found = pins(tmp_path, f'"decode:*":\n  lm_head: {RECORD}\nmlp.up: {RECORD}')
    assert found.lines(PREFILL) == (f"mlp.up: {WHOLE}",)
    assert found.lines(DECODE) == (f"lm_head: {WHOLE}", f"mlp.up: {WHOLE}")


def test_the_more_specific_pattern_counts(tmp_path: Path) -> None:
    found = pins(
        tmp_path,
        f'"*": {{lm_head: {RECORD}}}\nmlp.up: {RECORD}\n'
        f'"decode:*": {{"*": {RECORD}, "mlp.*": {RECORD}, "[m]lp.?": {RECORD}, mlp.u: {RECORD}}}\n'
        f'"decode:2,32": {{"*": {RECORD}}}',
    )
    order = [line.partition(":")[0] for line in found.lines(DECODE)]
    assert order == ["*", "mlp.u", "mlp.*", "[m]lp.?", "*", "lm_head", "mlp.up"]


@pytest.mark.parametrize("text", ["", "- a", "{", "mlp: 3", "mlp: [1]", "mlp:"])
def test_what_is_no_file_of_pins(tmp_path: Path, text: str) -> None:
    with pytest.raises(FuriosaLLMError, match="BLD015"):
        pins(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FuriosaLLMError, match="BLD015") as caught:
        read_pins(tmp_path / "missing")
    assert caught.value.cause == "No such file or directory"


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "pins").write_bytes(b"mlp\xff")
    with pytest.raises(FuriosaLLMError, match="BLD015") as caught:
        read_pins(tmp_path / "pins")
    assert caught.value.cause == "it is not text: byte 3 is not UTF-8"


@pytest.mark.parametrize(
    "record", ["rows=4", f"{RECORD} colour=3", f"{RECORD} every_slice=7", "{role: sideways}"]
)
def test_what_is_no_record(tmp_path: Path, record: str) -> None:
    with pytest.raises(FuriosaLLMError, match="BCK006"):
        pins(tmp_path, f"mlp: {record}")


# --- explanations ---


def tiling(rows: int, cycles: int) -> MatmulTiling:
    return MatmulTiling(
        Role.WEIGHTS, 1, rows, 8, 2, 2, predicted=Cycles(cycles, 1, cycles - 10, cycles)
    )


def test_distance_is_of_what_the_search_ranks_by() -> None:
    other = replace(tiling(8, 1100), predicted=Cycles(800, 1, 1, 1100))
    one = explained("mlp.up", runner_up=other)  # slower as a whole, but neighbours hide that
    assert one.distance == pytest.approx(-0.05)


def explained(
    module: str, rows: int = 4, runner_up: MatmulTiling | None = None, function: str = "block_0"
) -> ExplainedTiling:
    module, _, tokens = module.partition("@")
    product = ProductName(function, module, 0, int(tokens or 2))
    return ExplainedTiling("decode:2,32", "block_0", product, tiling(rows, 1000), runner_up)


def test_an_explanation_is_a_file_of_pins(tmp_path: Path) -> None:
    products = [explained("mlp.up"), explained("mlp.up"), explained("lm_head")]
    products.append(explained("mlp.up@1", 8))
    found = pins(tmp_path, to_pin_file(products))
    eight = WHOLE.replace("rows=4", "rows=8", 1)
    lines = (f"mlp.up@1: {eight}", f"lm_head: {WHOLE}", f"mlp.up: {WHOLE}")
    assert found.lines(DECODE) == lines
    assert found.lines(PREFILL) == ()


def test_functions_are_named_where_they_cut_a_product_in_different_ways(tmp_path: Path) -> None:
    other = explained("mlp.up", 8, function="block_1")
    found = pins(tmp_path, to_pin_file([explained("mlp.up"), other, explained("lm_head")]))
    names = [line.partition(":")[0] for line in found.lines(DECODE)]
    assert sorted(names) == ["block_0/mlp.up", "block_1/mlp.up", "lm_head"]


def test_an_explanation_says_what_came_next() -> None:
    one = explained("mlp.up", runner_up=tiling(8, 1100))
    assert one.distance == pytest.approx(0.1)
    text = to_pin_file([one])
    assert "1,000 cycles (main 1,000, sub 1, dma 990); next +10.0%: weights-stream" in text
    assert "the only candidate" in to_pin_file([explained("mlp.up")])
    assert one.to_json()["tiling"]["predicted"]["total"] == 1000


# --- builds ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's config: tilings need no weights."""
    directory = tmp_path_factory.mktemp("model")
    make_config("llama").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def fused_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its module qkv_proj is three products of different sizes."""
    directory = tmp_path_factory.mktemp("fused")
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 1}
    make_config("phi3", **sizes).save_pretrained(directory)
    return directory


def build(model: Path, output: Path, *options: str) -> tuple[int, str, str]:
    buckets = () if "-pb" in options else ("-db", "2,32")
    arguments = ["build", str(model), str(output), *buckets, "--weights", "skip", *options]
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.stdout, result.stderr


BUCKETS = ("-pb", "1,128", "-db", "2,32", "-db", "16,32")


def check_round_trip(model: Path, tmp_path: Path, *buckets: str) -> str:
    """What a build prints gives the same binaries as pins, and is printed again."""
    code, printed, _ = build(model, tmp_path / "a", *buckets, "--explain-tiling")
    assert code == 0
    (tmp_path / "pins").write_text(printed)
    pinned = ("--pin-tiling", str(tmp_path / "pins"))
    code, again, stderr = build(model, tmp_path / "b", *buckets, *pinned, "--explain-tiling")
    assert code == 0, stderr
    assert again == printed
    binaries = {file.name: file.read_bytes() for file in (tmp_path / "a").glob("*.vedf")}
    assert len(binaries) == len(buckets) // 2
    for name, data in binaries.items():
        assert (tmp_path / "b" / name).read_bytes() == data, name
    return printed


def test_what_is_printed_gives_the_same_binaries(model: Path, tmp_path: Path) -> None:
    """Prefill and decode: with fused residuals and gates, and without."""
    check_round_trip(model, tmp_path, *BUCKETS)


def test_parts_of_different_lengths_and_of_a_module_have_pins_of_their_own(
    fused_model: Path, tmp_path: Path
) -> None:
    printed = check_round_trip(fused_model, tmp_path, "-pb", "1,300", "-db", "300,32")
    for name in ("self_attn.qkv_proj#1@256", "self_attn.qkv_proj#3@44", "self_attn.o_proj@48"):
        assert f"  {name}: " in printed


def test_what_is_printed_can_be_changed_and_pinned(model: Path, tmp_path: Path) -> None:
    code, printed, _ = build(model, tmp_path / "a", "--explain-tiling")
    assert code == 0
    (line,) = [line for line in printed.splitlines() if line.startswith("  mlp.up_proj:")]
    assert " rows=16 load_rows=16 " in line
    other = line.replace(" rows=16 load_rows=16 ", " rows=4 load_rows=8 ")
    (tmp_path / "pins").write_text(printed.replace(line, other))
    pinned = ("--pin-tiling", str(tmp_path / "pins"), "--explain-tiling", "--json")
    code, found, stderr = build(model, tmp_path / "b", *pinned)
    assert code == 0, stderr
    tilings = {tiling["module"]: tiling for tiling in json.loads(found)["tilings"]}
    assert tilings["mlp.up_proj"]["tiling"]["rows"] == 4
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert "rows=4 load_rows=8 " in manifest["tiling_pins"]["decode:2,32"]["mlp.up_proj"]


@pytest.mark.parametrize("text", [f"mlp.nothing: {RECORD}", f'"prefill:*": {{lm_head: {RECORD}}}'])
def test_a_pin_of_nothing_is_refused_with_what_there_is(
    model: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "pins").write_text(text)
    code, _, stderr = build(model, tmp_path / "a", "--pin-tiling", str(tmp_path / "pins"))
    assert code == 2
    assert "error[BLD016]" in stderr
    assert "mlp.up_proj" in stderr or "decode:2,32" in stderr


def test_a_pin_that_does_not_suit_its_product_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pins").write_text(f"mlp.up_proj: {RECORD.replace('tokens=1', 'tokens=99')}")
    code, _, stderr = build(model, tmp_path / "a", "--pin-tiling", str(tmp_path / "pins"))
    assert code == 1
    assert "error[BCK006]" in stderr

"""The cycle model against published measurements: the claims of docs/fidelity.md, on some rows.

`benchmarks/fidelity` checks all of them in about a minute; here are the rows that build quickly.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.backend_rngd.isa.container import read_program
from furiosa_llm.backend_rngd.isa.ordering import check_order

ROOT = Path(__file__).resolve().parent.parent
SILICON = ROOT / "benchmarks" / "silicon"
QUICK = {
    "rngd_pe_dense_tp1.csv": (
        "o_proj,1,",
        "o_proj,128,",
        "o_proj,256,",
        "qkv_proj,16,",
        "qkv_proj,128,",
        "down_proj,16,",
        "layernorm,512,",
        "act_fn,512,",
        "rotary_emb,512,",
        "embedding,512,",
    ),
    "rngd_pe_attention_tp1.csv": ("0,1,1024,", "0,8,1024,", "0,32,128,", "256,0,0,"),
    "rngd_misc.csv": ("HBM to DM load rate,", "all-reduce per decoder layer"),
}


def fidelity(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "fidelity"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rows")
    for name, starts in QUICK.items():
        header, *lines = (SILICON / name).read_text().splitlines()
        chosen = [line for line in lines if line.startswith(starts)]
        (folder / name).write_text("\n".join([header, *chosen]) + "\n")
    ran = fidelity("--json", "--rows", *folder.glob("*.csv"))
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize(
    ("kind", "rows"), [("dense", 10), ("attention", 4), ("all-reduce", 3), ("load-rate", 5)]
)
def test_errors_stay_below_what_the_docs_claim(table: dict[str, Any], kind: str, rows: int) -> None:
    summary = table["summary"][kind]
    assert summary["rows"] == rows
    goals = {"dense": 0.10, "attention": 0.20, "all-reduce": 0.20, "load-rate": 0.10}
    assert summary["mean_error"] < goals[kind]


def test_every_sum_over_pes_is_predicted(table: dict[str, Any]) -> None:
    sums = [row for row in table["rows"] if row["kind"] == "all-reduce"]
    assert all(abs(row["error"]) < 0.20 for row in sums)
    assert all(row["inside"] for row in sums)


def test_without_a_message_s_cost_the_sums_would_be_far_too_short(tmp_path: Path) -> None:
    """By formula alone, with the documented cost of a transfer: what the constant explains."""
    header, *lines = (SILICON / "rngd_misc.csv").read_text().splitlines()
    rows = tmp_path / "rows.csv"
    rows.write_text("\n".join([header, *(line for line in lines if "all-reduce" in line)]) + "\n")
    ran = fidelity("--json", "--machine", "book", "--rows", rows)
    errors = [row["error"] for row in json.loads(ran.stdout)["rows"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < -0.8


def test_intervals_hold_most_rows_and_are_narrow_enough(table: dict[str, Any]) -> None:
    assert table["summary"]["all"]["inside"] >= 0.8
    assert table["summary"]["all"]["median_width"] <= 0.4
    rows = [row for row in table["rows"] if row["kind"] != "load-rate"]
    assert all(row["low"] < row["predicted"] < row["high"] for row in rows)
    assert all(row["dominant"] for row in rows)


def test_eight_pes_share_a_layer_and_the_hbm(tmp_path: Path) -> None:
    """A shard has an eighth of the weights and a ninth or so of the time, never less."""
    rows = tmp_path / "rows.csv"
    rows.write_text("layer,tokens,time_us\no_proj,1,170\nqkv_proj,1,260\n")
    times = {
        tp: [r["predicted"] for r in json.loads(ran.stdout)["rows"]]
        for tp in (1, 8)
        for ran in [fidelity("--json", "--tp", str(tp), "--rows", rows)]
    }
    for whole, shard in zip(times[1], times[8], strict=True):
        assert whole / 8 < shard < whole / 5


def test_what_a_shared_layer_exchanges_stands_beside_its_time(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("layer,tokens,time_us\no_proj,1,170\nqkv_proj,1,260\n")
    printed = fidelity("--tp", "8", "--rows", rows).stdout
    assert "without the all-reduce behind o_proj: 57.5 us" in printed
    assert "behind qkv_proj" not in printed


def row(measured: float, low: float = 90.0, high: float = 110.0) -> Any:
    predict = benchmark("predict")
    return predict.Prediction(None, measured, 100.0, low, high, 100, None)


def test_a_row_asks_for_the_factor_that_its_interval_needs() -> None:
    """Independent parts combine as the root of the sum of squares."""
    needed = benchmark("coverage").needed_factor
    assert needed(row(105)) == needed(row(95)) == 1
    above, below = row(140), row(60)
    assert 10**2 + (100 * (needed(above) - 1)) ** 2 == pytest.approx(40**2)
    assert 10**2 + (100 * (1 - 1 / needed(below))) ** 2 == pytest.approx(40**2)


def test_a_part_can_be_taken_out_of_an_interval() -> None:
    wide = row(100, low=50, high=200).without(0.3, 0.8)
    assert (wide.low, wide.high) == (pytest.approx(60), pytest.approx(160))
    exact = row(100, low=70, high=180).without(0.3, 0.8)
    assert (exact.low, exact.high) == (pytest.approx(100), pytest.approx(100))


@pytest.mark.parametrize("measured", ["100\n", "100\no_proj,16,100\n"])
def test_rows_without_an_order_have_no_rank_correlation(tmp_path: Path, measured: str) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(f"layer,tokens,time_us\no_proj,1,{measured}")
    table = json.loads(fidelity("--json", "--rows", rows).stdout)
    assert table["summary"]["dense"]["rank_correlation"] is None
    assert "dense" in fidelity("--rows", rows).stdout


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("layer,tokens,time_us\nconv,1,5\n", "no mapping for ['conv']"),
        ("a,b\n1,2\n", "columns ['a', 'b']"),
    ],
)
def test_unknown_rows_are_refused(tmp_path: Path, text: str, cause: str) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(text)
    ran = fidelity("--rows", rows)
    assert ran.returncode == 1
    assert cause in ran.stderr


def test_our_own_rows_are_of_one_pe() -> None:
    ran = fidelity("--tp", "8")
    assert ran.returncode == 2
    assert "--tp needs --rows" in ran.stderr


def benchmark(module: str) -> Any:
    """A module of the benchmark, which is no installed package."""
    folder = ROOT / "benchmarks" / "fidelity"
    if "fidelity_benchmark" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "fidelity_benchmark", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        sys.modules["fidelity_benchmark"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"fidelity_benchmark.{module}")


MAPPINGS: dict[str, tuple[str, Callable[[Any], bytes]]] = {
    "product": ("linear", lambda m: m.linear(4096, 1024, 40)),
    "product, K in tiles": ("linear", lambda m: m.linear(8192, 512, 70)),
    "product, tiles in a repeat": ("linear", lambda m: m.linear(1024, 28672, 512)),
    "norm": ("vector", lambda m: m.norm(4096, 600)),
    "activation": ("vector", lambda m: m.activation(14336, 100)),
    "rotary": ("vector", lambda m: m.rotary((4096, 1024), 128, 500)),
    "rotary, a shard of 8": ("vector", lambda m: m.rotary((512, 128), 128, 2048)),
    "embedding": ("vector", lambda m: m.embedding(4096, 1000, 100)),
    "decode": ("attention", lambda m: m.decode(m.Heads(32, 8, 128), 3, 700)),
    "decode, long": ("attention", lambda m: m.decode(m.Heads(4, 1, 128), 2, 20000)),
    "prefill": ("attention", lambda m: m.prefill(m.Heads(32, 8, 128), 300)),
    "all-reduce": ("all_reduce", lambda m: m.all_reduce(8, 8192)),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_mappings_are_ordered_programs(name: str) -> None:
    module, build = MAPPINGS[name]
    check_order(read_program(build(benchmark(module))))

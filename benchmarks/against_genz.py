"""Our cycle model and GenZ, an analytic model of accelerators, on the published silicon rows.

    pip install -e ".[genz]"                        # about 850 MB with what it needs
    python benchmarks/against_genz.py [--machine silicon] [--rounds 3]

Both predict the same rows of `benchmarks/silicon` in one process: the dense products and the
attention of one layer of Llama-3.1-8B, on one processing element. GenZ is configured as that
element, from the machine description: multiply rate, DMA rate from HBM, data memory. The operators
are its own: a GEMM per dense row; Logit and Attend with the scores on chip for attention.

GenZ is shown twice, as it is (both efficiencies 1) and with its two efficiencies fitted to these
very rows, which is the best that it can do here. Times per point are medians: for us of reading
and timing the binary with its interval (building it is beside it), for GenZ of making the operators
and their roofline.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fidelity.rows import SILICON, Model, Row, read_rows

if TYPE_CHECKING:
    from furiosa_llm.backend_rngd.isa.machine import Machine

DENSE, ATTENTION = "rngd_pe_dense_tp1.csv", "rngd_pe_attention_tp1.csv"
EFFICIENCIES = [share / 100 for share in range(30, 101)]
GENZ_BANDWIDTH_UNIT = 2**30
"""GenZ reads rates of memories in GiB/s."""
FULL_RATE = (1.0, 1.0)


@dataclass(frozen=True)
class Point:
    """A row and what both say of it; times in us."""

    row: Row
    ours: float
    our_seconds: float
    build_seconds: float
    genz_parts: tuple[tuple[float, float], ...]
    """(multiplying, moving) of each of GenZ's operators at full rate."""
    genz_seconds: float

    def genz(self, compute: float, memory: float) -> float:
        """The sum over operators of what takes longer, with these efficiencies."""
        return sum(max(c / compute, m / memory) for c, m in self.genz_parts)


# --- ours ---


def our_time(row: Row, machine: Machine, rounds: int) -> tuple[float, float, float]:
    """(prediction in us without launch and finish, seconds per point, seconds to build)."""
    from simulator_speed import forget

    from furiosa_llm.backend_rngd.isa.container import read_program
    from furiosa_llm.runtime_sim.timing import time_program

    began = perf_counter()
    data = row.build()
    build_seconds = perf_counter() - began
    seconds = []
    for _ in range(rounds):
        forget()
        began = perf_counter()
        timing = time_program(read_program(data), machine)
        seconds.append(perf_counter() - began)
    frame = machine.control.launch_cycles + machine.control.finish_cycles
    return machine.microseconds(timing.cycles - frame), median(seconds), build_seconds


# --- GenZ ---

Operators = Callable[[], list[Any]]


def genz_system(machine: Machine) -> Any:
    """One processing element in GenZ's terms."""
    from GenZ.system import System

    clock, chip = machine.chip.clock_hertz, machine.chip
    fetch_bytes = chip.slices_per_pe * max(machine.fetch.main_read_bytes)
    return System(
        flops=2 * machine.macs_per_cycle("bf16") * clock / 1e12,
        offchip_mem_bw=machine.dma.bytes_per_cycle * clock / GENZ_BANDWIDTH_UNIT,
        onchip_mem_bw=fetch_bytes * clock / GENZ_BANDWIDTH_UNIT,
        frequency=clock / 1e6,
        bits="bf16",
    )


def genz_operators(model: Model) -> Mapping[str, Operators]:
    """Row name -> GenZ's operators for it, for rows that GenZ has operators for."""
    query, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    products = {
        "gate_up_proj": (model.hidden, 2 * model.feed_forward),
        "down_proj": (model.feed_forward, model.hidden),
        "o_proj": (query, model.hidden),
        "qkv_proj": (model.hidden, query + 2 * kv),
    }
    found: dict[str, Operators] = {}
    for line in _lines(DENSE):
        if line["layer"] in products:
            k, n = products[line["layer"]]
            found[f"{line['layer']} {line['tokens']}"] = _gemm(k, n, int(line["tokens"]))
    for line in _lines(ATTENTION):
        chunk, sequences, cached = (
            int(line[c]) for c in ("prefill_chunk", "n_decode", "kv_decode")
        )
        if chunk:
            found[f"prefill {chunk}"] = _attention(model, 1, chunk, chunk)
        else:
            found[f"decode {sequences} x {cached}"] = _attention(model, sequences, 1, cached)
    return found


def _lines(name: str) -> list[dict[str, str]]:
    with (SILICON / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _gemm(k: int, n: int, tokens: int) -> Operators:
    from GenZ.Models import OpType
    from GenZ.operators import GEMM

    return lambda: [GEMM(["product", 1, n, tokens, k, int(OpType.GEMM)], FULL_RATE_DENSITY)]


def _attention(model: Model, sequences: int, queries: int, keys: int) -> Operators:
    from GenZ.Models import OpType
    from GenZ.operators import Attend, Logit

    dims = [sequences, model.heads, queries, keys, model.head_dim, model.kv_heads]

    def make() -> list[Any]:
        scores = Logit(["scores", *dims, int(OpType.Logit)], FULL_RATE_DENSITY)
        scores.set_mem_pin(output="on")
        values = Attend(["values", *dims, int(OpType.Attend)], FULL_RATE_DENSITY)
        values.set_mem_pin(input_a="on")
        return [scores, values]

    return make


FULL_RATE_DENSITY = (1.0, 1.0, 1.0)
"""No operand is sparse."""


def genz_time(
    make: Operators, system: Any, rounds: int
) -> tuple[tuple[tuple[float, float], ...], float]:
    """(parts in us, seconds per point)."""
    from GenZ.unit import Unit

    unit = Unit(unit_time="usec")
    seconds = []
    for _ in range(rounds):
        began = perf_counter()
        rooflines = [operator.get_roofline(system, unit) for operator in make()]
        seconds.append(perf_counter() - began)
    keys = ("Compute time (usec)", "Memory time (usec)")
    return tuple((float(r[keys[0]]), float(r[keys[1]])) for r in rooflines), median(seconds)


# --- report ---


def main() -> None:
    from furiosa_llm.backend_rngd.isa.machine import DEFAULT_MACHINE, load_machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default=DEFAULT_MACHINE)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    machine = load_machine(options.machine)
    points = measure(machine, options.rounds)
    fitted = fit(points)
    print(f"{'row':22} {'measured':>9} {'ours':>9} {'':>7} {'GenZ':>9} {'':>7} {'fitted':>9}")
    for point in points:
        ours, genz, best = point.ours, point.genz(*FULL_RATE), point.genz(*fitted)
        print(
            f"{point.row.name:22} {point.row.measured:6,.0f} us {ours:6,.0f} us"
            f" {_error(point, ours):+7.1%} {genz:6,.0f} us {_error(point, genz):+7.1%}"
            f" {best:6,.0f} us {_error(point, best):+7.1%}"
        )
    summarise(points, fitted)


def measure(machine: Machine, rounds: int) -> list[Point]:
    operators = genz_operators(Model())
    system = genz_system(machine)
    rows = [row for name in (DENSE, ATTENTION) for row in read_rows(SILICON / name, tp=1)]
    points = []
    for row in rows:
        if row.name in operators:
            ours = our_time(row, machine, rounds)
            points.append(Point(row, *ours, *genz_time(operators[row.name], system, rounds)))
    return points


def fit(points: Sequence[Point]) -> tuple[float, float]:
    """GenZ's efficiencies of multiplying and of memory with the least mean error."""
    pairs = [(compute, memory) for compute in EFFICIENCIES for memory in EFFICIENCIES]
    return min(pairs, key=lambda pair: _mean_error(points, lambda point: point.genz(*pair)))


def summarise(points: Sequence[Point], fitted: tuple[float, float]) -> None:
    predictions: dict[str, Callable[[Point], float]] = {
        "ours": lambda point: point.ours,
        "GenZ": lambda point: point.genz(*FULL_RATE),
        "GenZ, fitted to these rows": lambda point: point.genz(*fitted),
    }
    print("\nmean absolute error of the time")
    for name, predict in predictions.items():
        errors = [
            f"{kind} {_mean_error([p for p in points if p.row.kind == kind], predict):6.1%}"
            for kind in ("dense", "attention")
        ]
        print(f"  {name:28} {'   '.join(errors)}")
    print(f"GenZ's fitted efficiencies: multiplying {fitted[0]:.2f}, memory {fitted[1]:.2f}")
    ours = median(point.our_seconds for point in points)
    genz = median(point.genz_seconds for point in points)
    build = median(point.build_seconds for point in points)
    print(
        f"time per point, median: ours {ours * 1e3:.2f} ms (building it {build * 1e3:.0f} ms),"
        f" GenZ {genz * 1e3:.2f} ms"
    )


def _error(point: Point, predicted: float) -> float:
    return predicted / point.row.measured - 1


def _mean_error(points: Sequence[Point], predict: Callable[[Point], float]) -> float:
    return mean(abs(_error(point, predict(point))) for point in points)


if __name__ == "__main__":
    main()

"""Print published measurements beside what the cycle model says.

    python benchmarks/fidelity [--rows FILE ... [--tp 8]] [--json]

Without `--rows` these are the rows of `benchmarks/silicon`, the fit of the constants in
machines/silicon.yaml is done again, and the errors of rows and groups that a fit has not seen are
printed beside. docs/fidelity.md explains the mappings and the constants.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a folder: the package is `fidelity`, beside the other benchmarks
    __package__ = "fidelity"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from furiosa_llm.backend_rngd.isa.machine import DEFAULT_MACHINE, Machine, load_machine

from .coverage import FACTOR, SHARE, Coverage, coverage
from .exchange import exchange_us
from .fit import MESSAGE, STARTUP, Fitter, MessageFit, fit_message
from .predict import Prediction, Summary, predict, programs
from .rows import SILICON, read_rows

KINDS = ("dense", "attention", "all-reduce", "load-rate")
GOALS = {"dense": 0.10, "attention": 0.20, "all-reduce": 0.20, "load-rate": 0.10}
"""Mean absolute error to stay below."""


def main() -> None:
    options = _options()
    started = time.perf_counter()
    machine = load_machine(options.machine)
    paths = options.rows or sorted(SILICON.glob("*.csv"))
    rows = [row for path in paths for row in read_rows(path, options.tp)]
    decoded = programs(rows)
    predictions = predict(rows, decoded, machine, options.tp)
    fitter = None if options.rows else Fitter(rows, decoded, machine)
    messages = None if options.rows else fit_message(rows, decoded, machine)
    seconds = time.perf_counter() - started
    if options.json:
        table = _table(predictions, fitter, machine, seconds)
        if messages is not None:
            table["fit_message"] = asdict(messages)
        print(json.dumps(table, indent=1))
        return
    _print_rows(predictions, options.tp)
    _print_summaries(predictions)
    if fitter is not None:
        _print_fit(fitter, machine)
        layers = [p for p in predictions if p.row.kind in ("dense", "attention")]
        _print_coverage(coverage(layers, machine), machine)
    if messages is not None:
        _print_messages(messages, machine)
    print(f"\n{seconds:.0f} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, nargs="+", help="CSV files instead of our own")
    parser.add_argument(
        "--tp", type=int, default=1, help="PEs that share each layer and load in step"
    )
    parser.add_argument("--machine", default=DEFAULT_MACHINE, help="name or file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.tp not in (1, 2, 4, 8):
        parser.error("--tp is 1, 2, 4 or 8")
    if options.tp > 1 and not options.rows:
        parser.error("--tp needs --rows: the rows of benchmarks/silicon are layers of one PE")
    return options


def _print_rows(predictions: Sequence[Prediction], tp: int) -> None:
    print(f"{'row':22}{'measured':>10}{'predicted':>11}{'interval':>22}{'error':>8}  in  range of")
    for p in predictions:
        digits = 3 if p.row.kind == "load-rate" else 1
        known = p.low is not None
        interval = f"{p.low:.{digits}f} .. {p.high:.{digits}f}" if known else ""
        inside = {True: "yes", False: "no", None: ""}[p.inside]
        print(
            f"{p.row.name:22}{p.measured:10.{digits}f}{p.value:11.{digits}f}{interval:>22}"
            f"{p.error:8.1%}  {inside:3} {p.dominant or ''}"
        )
    print("(us between launch and finish; load rates relative to the mean of their rows)")
    for layer in dict.fromkeys(p.row.group for p in predictions):
        exchange = exchange_us(layer, tp)
        if exchange is not None:
            print(f"(without the all-reduce behind {layer}: {exchange:.1f} us a token, measured)")


def _of_kind(predictions: Sequence[Prediction], kind: str) -> list[Prediction]:
    return [p for p in predictions if p.row.kind == kind]


def _print_summaries(predictions: Sequence[Prediction]) -> None:
    print(f"\n{'kind':12}{'rows':>5}{'mean error':>12}{'goal':>7}{'rank corr.':>12}", end="")
    print(f"{'inside':>9}{'median width':>14}")
    for kind in (*KINDS, "all"):
        own = list(predictions) if kind == "all" else _of_kind(predictions, kind)
        if own:
            s = Summary.of(own)
            goal = f"{GOALS[kind]:.0%}" if kind in GOALS else ""
            order = "" if s.rank_correlation is None else f"{s.rank_correlation:.3f}"
            print(
                f"{kind:12}{s.rows:5}{s.mean_error:12.1%}{goal:>7}{order:>12}"
                f"{_percent(s.inside):>9}{_percent(s.median_width):>14}"
            )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _print_fit(fitter: Fitter, machine: Machine) -> None:
    fit, half, free = fitter.fit(), fitter.fit_half(), fitter.fit_with_clock()
    own = machine.parameters[STARTUP]
    print(
        f"\nfitted to all dense and attention rows: {STARTUP} {fit.startup_cycles}"
        f" (mean error {fit.error:.1%}); {machine.name}.yaml: {own.value} [{own.low}, {own.high}]"
        f"\nfitted to every second of them: {half.startup_cycles}"
        f" (mean error {half.error:.1%}, of the others {half.error_of_others:.1%})"
        f"\nwith the clock free: {free.startup_cycles} at {free.clock_ghz:.3f} GHz"
        f" (mean error {free.error:.1%})"
    )
    print(f"\n{'left out':16}{'rows':>5}{'startup':>9}{'their error':>13}")
    for left in fitter.leave_one_group_out():
        print(f"{left.group:16}{left.rows:5}{left.startup_cycles:9}{left.error:13.1%}")


def _print_coverage(found: Coverage, machine: Machine) -> None:
    own = machine.parameters[FACTOR]
    print(
        f"\n{FACTOR}: {SHARE:.0%} of the fitted half ask for 1 / {found.factor:.3f} to"
        f" {found.factor:.3f}; {machine.name}.yaml: [{own.low}, {own.high}]"
        f"\n{'inside':40}{'rows':>5}{'inside':>9}{'median width':>14}"
    )
    for name, s in (
        ("the rows that it was fitted to", found.fitted_half),
        ("the rows that it was not fitted to", found.other_half),
        ("all, the model taken as exact", found.without_factor),
    ):
        print(f"{name:40}{s.rows:5}{_percent(s.inside):>9}{_percent(s.median_width):>14}")


def _print_messages(fit: MessageFit, machine: Machine) -> None:
    own = machine.parameters[MESSAGE]
    print(
        f"\nfitted to the all-reduce rows: {MESSAGE} {fit.message_cycles} (largest error"
        f" {fit.error:.1%}); {machine.name}.yaml: {own.value} [{own.low}, {own.high}]"
    )
    print(f"\n{'left out':20}{'message':>9}{'its error':>11}")
    for name, (cycles, error) in fit.left_out.items():
        print(f"{name:20}{cycles:9}{error:11.1%}")


def _table(
    predictions: Sequence[Prediction], fitter: Fitter | None, machine: Machine, seconds: float
) -> dict[str, Any]:
    kinds = [kind for kind in KINDS if _of_kind(predictions, kind)]
    table: dict[str, Any] = {
        "machine": machine.name,
        "rows": [
            {
                "kind": p.row.kind,
                "group": p.row.group,
                "name": p.row.name,
                "measured": p.measured,
                "predicted": p.value,
                "low": p.low,
                "high": p.high,
                "cycles": p.cycles,
                "error": p.error,
                "inside": p.inside,
                "dominant": p.dominant,
            }
            for p in predictions
        ],
        "summary": {kind: asdict(Summary.of(_of_kind(predictions, kind))) for kind in kinds}
        | {"all": asdict(Summary.of(predictions))},
        "seconds": seconds,
    }
    if fitter is not None:
        table["fit"] = asdict(fitter.fit())
        table["fit_half"] = asdict(fitter.fit_half())
        table["fit_with_clock"] = asdict(fitter.fit_with_clock())
        table["coverage"] = asdict(coverage(predictions, machine))
        table["left_out"] = [asdict(left) for left in fitter.leave_one_group_out()]
    return table


if __name__ == "__main__":
    main()

"""What a shared layer needs beside its own commands: the sum of its outputs over all PEs.

A row of a layer is its graph without its exchange, so the measured time of that stands beside the
prediction and is not part of it. The all-reduce rows predict it (`all_reduce.py`).
"""

from __future__ import annotations

import csv

from .rows import SILICON

PER_BLOCK = "all-reduce per decoder layer"
"""Two exchanges of 8 KB: behind o_proj and behind down_proj."""
EXCHANGED = ("o_proj", "down_proj")


def exchange_us(layer: str, tp: int) -> float | None:
    """Measured time of the all-reduce of one token behind `layer`; None if it has none."""
    if layer not in EXCHANGED:
        return None
    with (SILICON / "rngd_misc.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["what"].startswith(PER_BLOCK)]
    per_block = {row["condition"]: float(row["value"]) for row in rows}
    found = per_block.get(f"{tp} PEs")
    return None if found is None else found / len(EXCHANGED)

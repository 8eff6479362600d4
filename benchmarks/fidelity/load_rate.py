"""One DMA command that brings runs of one length from rows of 8 KB in HBM to all slices."""

from __future__ import annotations

from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES
from furiosa_llm.backend_rngd.isa.rules import SLICES_PER_PE

from .sketch import Sketch

ROW_BYTES = 8192
SLICE_BYTES = 65536
"""What a slice gets: enough for the startup not to count."""


def load_rate(run_bytes: int) -> tuple[bytes, int]:
    """(the binary, the bytes that it moves)."""
    sketch = Sketch("load_rate")
    runs = SLICE_BYTES // run_bytes
    source = sketch.hbm("rows", SLICES_PER_PE * runs * ROW_BYTES)
    to = sketch.dm(SLICE_BYTES, "runs")
    loops = [
        (SLICES_PER_PE, runs * ROW_BYTES, SLICE_ADDRESS_BYTES),
        (runs, ROW_BYTES, run_bytes),
    ]
    sketch.emit.dma(loops, run_bytes, source, to)
    return sketch.binary(), SLICES_PER_PE * SLICE_BYTES

"""The layout of records: numpy structured dtypes, packed, little-endian.

What is reserved is zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .instructions import MAX_COUNTERS, MAX_LOOPS, MAX_STEPS
from .vector_fields import MAX_COMPARATORS, MAX_GATES, MAX_SLOTS, MAX_VECTOR_OPS

Record = Any
"""One element of a structured array; numpy gives its fields no static types."""

NO_REGISTER = 255
NO_SEMAPHORE = 255
MAX_WAITS = 3
MAX_SIGNALS = 2

HEAD = np.dtype(
    [
        ("kind", "u1"),
        ("context", "u1"),
        ("group", "u1"),
        ("flags", "u1"),
        ("wait_semaphore", "u1", MAX_WAITS),
        ("n_counters", "u1"),
        ("wait_count", "<u2", MAX_WAITS),
        ("n_ops", "u1"),
        ("reserved0", "u1"),
        ("signal_semaphore", "u1", MAX_SIGNALS),
        ("signal_peers", "u1", MAX_SIGNALS),
        ("provenance", "<u4"),
        ("wait_peers", "u1", MAX_WAITS),
        ("reserved2", "u1", 5),
    ]
)
PORT = np.dtype(
    [
        ("base", "<u4"),
        ("register", "u1"),
        ("dtype", "u1"),
        ("reserved", "u1", 6),
        ("limit", "<u4"),
    ]
)
COUNTER = np.dtype(
    [
        ("n", "<u4"),
        ("birth", "u1"),
        ("fate", "u1"),
        ("slices", "<i2"),
        ("a", "<i4"),
        ("b", "<i4"),
        ("trf", "<i4"),
        ("vrf", "<i4"),
        ("commit", "<i4"),
        ("lanes", "<i2"),
        ("valid_step", "<u2"),
    ]
)
STREAM = np.dtype(
    [
        ("run", "<u2"),
        ("run_step", "u1"),
        ("cast", "u1"),
        ("runs", "<u2"),
        ("pad", "<u2"),
        ("run_stride", "<i4"),
        ("pair", "u1"),
        ("lookup", "u1"),
        ("zero_used", "u1"),
        ("zero_point", "i1"),
    ]
)
DIGIT = np.dtype([("shift", "u1"), ("bits", "u1"), ("slices", "<i2"), ("bytes", "<i4")])
SWITCH = np.dtype(
    [("topology", "u1"), ("bitmap_used", "u1"), ("ring", "<u2"), ("digits", DIGIT, 2)]
)
CONTRACTION = np.dtype(
    [
        ("used", "u1"),
        ("pack", "u1"),
        ("lanes", "u1"),
        ("trf_read", "u1"),
        ("depth", "u1"),
        ("fold", "u1"),
        ("reserved", "u1", 2),
    ]
)
VECTOR_OP = np.dtype(
    [
        ("alu", "u1"),
        ("op", "u1"),
        ("y", "u1"),
        ("z", "u1"),
        ("reverse", "u1"),
        ("stash", "u1"),
        ("fraction_bits", "u1"),
        ("groups", "u1"),
    ]
)
VECTOR = np.dtype(
    [
        ("ops", VECTOR_OP, MAX_VECTOR_OPS),
        ("imm", "<u4", 3),
        ("reduce", "u1"),
        ("reduce_columns", "u1"),
        ("slice_reduce", "u1"),
        ("slice_placement", "u1"),
        ("slice_group", "<u2"),
        ("reserved", "u1", 2),
        ("vrf_lane", "<i4"),
        ("vrf_column", "<i4"),
        ("vrf_pair", "<i4"),
    ]
)
SLOT = np.dtype([("source", "u1"), ("tag", "u1"), ("negate", "u1")])
GATE = np.dtype(
    [
        ("bound", "<u2"),
        ("mask", "<u2"),
        ("slice_bound", "<u2"),
        ("time_major", "u1"),
        ("reserved", "u1"),
    ]
)
TAGS = np.dtype(
    [
        ("n_comparators", "u1"),
        ("n_slots", "u1"),
        ("n_gates", "u1"),
        ("clipper_used", "u1"),
        ("comparator_kind", "u1", MAX_COMPARATORS),
        ("comparator_boundary", "<u4", MAX_COMPARATORS),
        ("slots", SLOT, MAX_SLOTS),
        ("gates", GATE, MAX_GATES),
        ("clipper_size", "<u2"),
        ("clipper_span", "u1"),
        ("reserved", "u1"),
    ]
)
COMMIT = np.dtype(
    [
        ("sink", "u1"),
        ("relu", "u1"),
        ("lanes", "u1"),
        ("transpose_rows", "u1"),
        ("columns", "<u2"),
        ("transpose_columns", "u1"),
        ("reserved", "u1"),
        ("lane_stride", "<i4"),
        ("column_stride", "<i4"),
    ]
)
EXEC = np.dtype(
    [
        ("head", HEAD),
        ("a", PORT),
        ("b", PORT),
        ("trf", PORT),
        ("vrf", PORT),
        ("commit", PORT),
        ("counters", COUNTER, MAX_COUNTERS),
        ("stream", STREAM),
        ("switch", SWITCH),
        ("contraction", CONTRACTION),
        ("vector", VECTOR),
        ("out", COMMIT),
        ("valid_slices", "<u2"),
        ("generate_used", "u1"),
        ("count_up", "u1"),
        ("generated", "<u4"),
        ("bitmap", "<u4"),
        ("valid_dim", "u1", MAX_COUNTERS),
        ("tags", TAGS),
        ("reserved", "u1", 16),
    ]
)
SIDE = np.dtype(
    [
        ("base", "<i8"),
        ("space", "u1"),
        ("register", "u1"),
        ("peer", "u1"),
        ("rank_mask", "u1"),
        ("rank_stride", "<i4"),
        ("limit", "<u8"),
        ("strides", "<i4", MAX_LOOPS),
    ]
)
DMA = np.dtype(
    [
        ("head", HEAD),
        ("source", SIDE),
        ("destination", SIDE),
        ("n", "<u2", MAX_LOOPS),
        ("run", "<u4"),
        ("indirect", "u1"),
        ("index_register", "u1"),
        ("reserved0", "u1", 2),
        ("index_base", "<i8"),
        ("index_scale", "<u4"),
        ("index_bound", "<u4"),
        ("index_strides", "<i4", MAX_LOOPS),
        ("index_origin", "<i4"),
        ("reserved1", "u1", 36),
    ]
)
CONTROL = np.dtype(
    [
        ("kind", "u1"),
        ("n_steps", "u1"),
        ("reserved", "u1", 2),
        ("count", "<u4"),
        ("length", "<u4"),
        ("register", "u1", MAX_STEPS),
        ("bytes", "<i4", MAX_STEPS),
        ("reserved1", "u1", 12),
    ]
)
assert (EXEC.itemsize, DMA.itemsize, CONTROL.itemsize) == (640, 256, 64)

KIND_EXEC, KIND_DMA, KIND_CONTROL = 1, 2, 3

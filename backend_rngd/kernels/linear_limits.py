"""Which tilings of a matrix product its kernels can run: what fits the register files."""

from __future__ import annotations

from ... import errors
from ..emitter import power_of_two_at_least
from ..isa.rules import LANES, SLICES_PER_PE, TRF_BYTES, VRF_BYTES
from ..isa.scale_cells import ScaleCells
from ..tiling import MatmulTiling, Role
from .linear import CHUNK_BYTES, GROUP, TILE_FEATURES, MatmulShape


def check_tiling(shape: MatmulShape, tiling: MatmulTiling, where: str) -> None:
    """Raises: BCK006 if the product cannot be cut so."""
    cause = _objection(shape, tiling)
    if cause is not None:
        raise errors.invalid_tiling(where, cause)


def _objection(shape: MatmulShape, tiling: MatmulTiling) -> str | None:
    t = tiling
    parts = t.k_split
    if parts != shape.parts:
        return f"k_split is {parts}, but the weights lie in HBM for {shape.parts}"
    if t.groups != shape.groups:
        return f"groups is {t.groups}, but its neighbours' is {shape.groups}"
    if t.groups > 1:
        return _objection_in_groups(shape, t)
    if min(t.tokens, t.rows, t.load_rows, t.load_chunks, t.command_chunks) < 1:
        return "tokens, rows and chunks are at least 1"
    if not t.every_slice and (parts > 1 or shape.slices_read == SLICES_PER_PE):
        return "every_slice=0 needs slices without features, and k_split=1"
    if t.load_rows % t.rows or t.load_rows > shape.per_slice:
        return (
            f"rows={t.rows} do not divide load_rows={t.load_rows}, "
            f"which is at most {shape.per_slice}"
        )
    if any(rows not in (4, 8) and rows % GROUP for rows in (t.rows, t.load_rows)):
        return f"rows and load_rows are 4, 8 or a multiple of {GROUP}"
    if max(t.load_chunks, t.command_chunks) > shape.k_chunks:
        return f"K has {shape.k_chunks} chunks"
    if shape.cells is not None:
        if t.role == Role.WEIGHTS and not scales_fit(shape.cells, t.load_rows):
            return f"scales of {t.load_rows} rows do not fit the vector register file"
        if t.role == Role.TOKENS and not command_suits(shape.cells, t.command_chunks):
            return f"scales are those of {shape.cells.chunks} chunks of K"
    chunk_bytes = shape.k_slices // parts * CHUNK_BYTES
    if t.role == Role.WEIGHTS:
        if t.command_chunks != shape.k_chunks or t.load_chunks != shape.k_chunks:
            return f"a weights-stream product sums all {shape.k_chunks} chunks of K at once"
        lanes = min(LANES, power_of_two_at_least(t.tokens))
        per_lane = -(-t.tokens // lanes) * shape.k_chunks * chunk_bytes
        if t.tokens > TILE_FEATURES or lanes * per_lane > TRF_BYTES:
            return f"{t.tokens} tokens do not fit the register file"
        return None
    if t.rows != TILE_FEATURES or not t.every_slice or t.tokens != shape.tokens:
        return (
            f"a tokens-stream product has rows={TILE_FEATURES}, every_slice=1 and all "
            f"{shape.tokens} tokens in a command"
        )
    if t.command_chunks * chunk_bytes * TILE_FEATURES > TRF_BYTES:
        return f"{t.command_chunks} chunks of K do not fit the register file"
    if t.load_chunks % t.command_chunks and t.load_chunks != shape.k_chunks:
        return "load_chunks is a multiple of command_chunks, or all chunks"
    if t.load_chunks < shape.k_chunks and t.load_rows != TILE_FEATURES:
        return f"a load of some chunks of K has load_rows={TILE_FEATURES}"
    return None


def scales_fit(cells: ScaleCells, rows: int) -> bool:
    """Whether the VRF holds the scales of the cells of so many rows, which are loaded at once."""
    if rows < GROUP and cells.per_row:
        return 4 * rows * cells.count <= VRF_BYTES
    groups = max(1, rows // GROUP)
    return 4 * groups * cells.group_numbers <= VRF_BYTES // (1 if groups == 1 else 2)


def command_suits(cells: ScaleCells, chunks: int) -> bool:
    """Whether a tokens-stream command can sum so many chunks of K, cell by cell."""
    numbers = 4 * GROUP * cells.slice_cells * cells.of_chunks(chunks)
    return cells.suits(chunks) and (not cells.per_row or numbers <= VRF_BYTES)


def _objection_in_groups(shape: MatmulShape, t: MatmulTiling) -> str | None:
    chunks, chunk_bytes = group_chunks(shape)
    loads = {chunks} if shape.by_chunk else range(1, shape.k_chunks + 1)
    if t.role != Role.TOKENS or t.tokens != shape.tokens or not t.every_slice or t.run_per_row:
        return f"groups multiply all their {shape.tokens} tokens as a tokens-stream"
    if {t.rows, t.load_rows} != {TILE_FEATURES}:
        return f"groups have rows and load_rows={TILE_FEATURES}"
    if t.load_chunks not in loads or not 0 < t.command_chunks <= chunks:
        return f"K has {chunks} chunks" + (", loaded at once" if shape.by_chunk else "")
    if t.command_chunks * chunk_bytes * TILE_FEATURES > TRF_BYTES:
        return f"{t.command_chunks} chunks of K do not fit the register file"
    if t.load_chunks % t.command_chunks and t.load_chunks != chunks:
        return "load_chunks is a multiple of command_chunks, or all chunks"
    return None


def group_chunks(shape: MatmulShape) -> tuple[int, int]:
    """The parts of K that a group's command can sum alone: their number and bytes per row."""
    ring = min(SLICES_PER_PE // shape.groups, shape.k_slices)
    if shape.by_chunk:
        return shape.k_units, ring * CHUNK_BYTES
    return shape.k_chunks, shape.k_units * ring * CHUNK_BYTES

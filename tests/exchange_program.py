"""A program that is one sum over ranks: parameters in HBM -> the backend -> all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Region

from furiosa_llm.backend_rngd.emitter import Activation, Emitter, Ref
from furiosa_llm.backend_rngd.encode import content_attribute, encode_program
from furiosa_llm.backend_rngd.isa.cut import Cut
from furiosa_llm.backend_rngd.isa.layout import RowTableLayout, features_per_slice, plain
from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES, Memory
from furiosa_llm.backend_rngd.isa.program import Program, Relocation, TensorIo
from furiosa_llm.backend_rngd.isa.program import Region as HbmRegion
from furiosa_llm.backend_rngd.kernels.exchange import AllReduce, pieces, put
from furiosa_llm.backend_rngd.kernels.largest import Comparison
from furiosa_llm.backend_rngd.kernels.quantize import InputScale, looked_up, quantize, token_scales
from furiosa_llm.backend_rngd.pipeline import backend_phase
from furiosa_llm.backend_rngd.rngd import BlockOp, BufferType, CallOp, ProgramOp, RegionOp
from furiosa_llm.backend_rngd.tile import TilePass
from furiosa_llm.models.config_types import Bucket

Array = np.ndarray[Any, Any]
SLICES = 64


def exchange_program(
    ranks: int,
    tokens: int,
    features: int,
    reduce: AllReduce | Comparison,
    level: int = 2,
    groups: int = 1,
) -> Program:
    """y [tokens, features] = the sum of `x`, and of `residual`, as the ranks of a group have it.

    With a comparison y is codes: those of x by the scale that the group's largest numbers give.

    `x` is a parameter [ranks · tokens, features] of which each rank has its rows, `residual` one
    that all of them have; y is cut in the same way as x. All are bf16. Groups of slices have a part
    of the tokens each.
    """
    layout = _rows(tokens, features)
    rows = [((rank * tokens, (rank + 1) * tokens),) for rank in range(ranks)]
    cut = Cut(dim=0, length=tokens, slots=tuple(rows))
    io = TensorIo(
        name="y",
        dtype="bf16",
        shape=(tokens, features),
        element_bytes=2,
        row_bytes=SLICES * layout.per_slice * 2,
        cut=cut,
    )
    regions = [
        HbmRegion(name="x", parameter=_part("x", (ranks * tokens, features), layout, cut)),
        HbmRegion(name="residual", parameter=_part("residual", (tokens, features), layout, None)),
        HbmRegion(name="y", output=io),
    ]
    ops = [RegionOp(region.name, content_attribute(region)) for region in regions]
    block = Block(arg_types=[BufferType(Memory.HBM, 0)] * len(ops))
    _emit(Emitter(block), tokens, features, groups, reduce, *map(Ref, block.args))
    module = ModuleOp([ProgramOp("decode:1,8", ranks), *ops])
    module.body.block.add_op(BlockOp("exchange", Region(block)))
    module.body.block.add_op(CallOp("exchange", [op.buffer for op in ops]))
    module.verify()
    for step in backend_phase(Bucket.decode(1, 8), level):
        if not isinstance(step, TilePass):
            step.apply(Context(), module)
    return encode_program(module, "exchange")


def _rows(tokens: int, features: int) -> RowTableLayout:
    order = plain(features)
    return RowTableLayout(order=order, per_slice=features_per_slice(order), rows=tokens)


def _part(name: str, shape: tuple[int, int], layout: RowTableLayout, cut: Cut | None) -> Relocation:
    return Relocation(
        tensor=name, shape=shape, begin=(0, 0), end=layout.tensor_shape, layout=layout, cut=cut
    )


def _emit(
    emit: Emitter,
    tokens: int,
    features: int,
    groups: int,
    reduce: AllReduce | Comparison,
    x: Ref,
    residual: Ref,
    y: Ref,
) -> None:
    order, own_tokens = plain(features), tokens // groups

    def loaded(source: Ref) -> Activation:
        found = emit.activation(order, own_tokens, "loaded", groups=groups)
        for outside, place, loops in _between(found):
            emit.dma(loops, found.row_bytes, source.at(outside), place)
        return found

    own = loaded(x)
    if isinstance(reduce, Comparison):
        out = _codes(emit, reduce, own)
    else:
        out = _sum(emit, reduce, own, loaded(residual) if reduce.residual else None)
    for outside, place, loops in _between(out):
        emit.dma([(n, b, a) for n, a, b in loops], out.row_bytes, place, y.at(outside))


def _codes(emit: Emitter, reduce: Comparison, own: Activation) -> Activation:
    scales = reduce.run(emit, token_scales(emit, own).ref, own.tokens)
    return looked_up(emit, quantize(emit, own, InputScale(scales, per_token=True)))


def _sum(
    emit: Emitter, reduce: AllReduce, own: Activation, residual: Activation | None
) -> Activation:
    summand = reduce.reserve(emit, own.order, own.tokens, own.groups)
    count = len(summand.slots)
    for source, slot in zip(pieces(own, count), pieces(summand, count), strict=True):
        put(emit, source, slot)
    added = () if residual is None else reduce.whole_residual(emit, residual)
    out = emit.activation(own.order, own.tokens, "sum", groups=own.groups)
    reduce.run(emit, summand, added, out)
    return out


def _between(x: Activation) -> Iterator[tuple[int, Ref, list[tuple[int, int, int]]]]:
    """Per unit its place in HBM's [token][64 · C], that on chip, and the loops over both."""
    all_slices_bytes = SLICES * x.row_bytes
    for unit in range(x.units):
        loops = [
            (x.groups, x.tokens * all_slices_bytes, x.ring * SLICE_ADDRESS_BYTES),
            (x.tokens, all_slices_bytes, x.row_bytes),
            (x.ring, x.row_bytes, SLICE_ADDRESS_BYTES),
        ]
        yield unit * x.ring * x.row_bytes, x.place(unit * x.unit), loops


def random_rows(rng: np.random.Generator, rows: int, features: int) -> Array:
    """bf16 numbers of either sign."""
    return rng.standard_normal((rows, features)).astype(ml_dtypes.bfloat16)

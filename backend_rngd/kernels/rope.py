"""Rotary position embedding on features in rotary order: a feature's partner is 8 places away."""

from __future__ import annotations

from ... import errors
from ..emitter import UNROLL_LIMIT, Activation, Emitter, Ref
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Commit,
    Context,
    Counter,
    Op,
    Source,
    Stream,
    Vector,
    VectorOp,
)
from ..isa.layout import CHUNK, ROTARY_RUN, FeatureOrder, features_per_slice
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from ..isa.rules import SLICES_PER_PE, VRF_BYTES

HALF_BYTES = 2 * ROTARY_RUN
"""bf16 bytes of a run of first halves or of their partners."""


def load_angles(
    emit: Emitter, x: Activation, table: Ref, positions: Ref, position_bytes: int
) -> Ref:
    """cos and sin [token][C / 16][half][cos 8 | sin 8] of x's features, as f32 in data memory.

    `table` is a `RopeTable` of x's order; `positions` lists the tokens' rows in it. Raises: BCK005.
    """
    angle_bytes = _angle_bytes(x)
    if angle_bytes > VRF_BYTES:
        limit = SLICES_PER_PE * VRF_BYTES // 8
        raise errors.too_many_features("rotary embedding", x.order.positions, limit)
    angles = emit.alloc(Memory.DM, x.tokens * angle_bytes, "angles")
    emit.gather(
        [
            (x.groups, 0, x.ring * SLICE_ADDRESS_BYTES, x.tokens * position_bytes),
            (x.tokens, 0, angle_bytes, position_bytes),
            (x.ring, angle_bytes, SLICE_ADDRESS_BYTES, 0),
        ],
        angle_bytes,
        table,
        angles,
        index=positions,
        row_bytes=SLICES_PER_PE * angle_bytes,
    )
    return angles


def _angle_bytes(x: Activation) -> int:
    """cos and sin as f32, per slice and token."""
    return x.per_slice * 8


def rope(emit: Emitter, x: Activation, angles: Ref, label: str) -> Activation:
    """x · cos(angle) + partner · (± sin(angle)), in f32 and rounded once to bf16.

    `angles` are of x's tokens (`load_angles`), for x's order or one that goes on after x's heads.
    The units of a group have the same angles: each of them is whole heads (`rotates_in_groups`).
    """
    y = emit.activation(x.order, x.tokens, label, groups=x.groups)
    angle_bytes = _angle_bytes(x)
    # With several passes, half of the VRF is filled while the other is used.
    tokens = min(x.tokens, VRF_BYTES // angle_bytes)
    if x.groups > 1:
        tokens = max(1, tokens // 2)
    whole, rest = divmod(x.tokens, tokens)
    for turn in emit.loop(whole, straight=UNROLL_LIMIT if x.groups == 1 else whole):
        first = angles.moved(turn, tokens * angle_bytes)
        source, out = (ref.moved(turn, tokens * x.row_bytes) for ref in (x.ref, y.ref))
        _rotate(emit, x, source, out, first, tokens)
    if rest:
        first = angles.at(whole * tokens * angle_bytes)
        source, out = (ref.at(whole * tokens * x.row_bytes) for ref in (x.ref, y.ref))
        _rotate(emit, x, source, out, first, rest)
    return y


def rotates_in_groups(order: FeatureOrder, ring: int) -> bool:
    """Whether all units of a group's slices have the angles of the first."""
    per_slice = features_per_slice(order)
    used = order.positions // per_slice
    return used <= ring or ring * per_slice % order.padded == 0


def _rotate(emit: Emitter, x: Activation, source: Ref, out: Ref, angles: Ref, tokens: int) -> None:
    """Some tokens of every unit of x, at `source`."""
    per_slice = x.per_slice
    vrf = emit.load_vrf(angles, tokens * per_slice * 2, "angles")
    chunk_bytes = 2 * CHUNK
    emit.exec(
        Context.MAIN,
        [
            Counter(x.units, a=x.unit_bytes, b=x.unit_bytes, commit=x.unit_bytes),
            Counter(
                tokens, a=per_slice * 2, b=per_slice * 2, vrf=per_slice * 8, commit=per_slice * 2
            ),
            Counter(per_slice // CHUNK, a=chunk_bytes, b=chunk_bytes, vrf=128, commit=chunk_bytes),
            Counter(2, a=HALF_BYTES, b=-HALF_BYTES, vrf=64, commit=HALF_BYTES),
        ],
        Stream(ROTARY_RUN, cast=DType.F32, pair=True),
        a=source,
        b=source.at(HALF_BYTES),
        vrf=vrf,
        out=out,
        out_dtype=DType.BF16,
        vector=Vector(
            (
                VectorOp(Alu.MUL0, Op.MUL, y=Source.VRF),
                VectorOp(Alu.FMA, Op.ADD, y=Source.ZIP),
            ),
            vrf_column=4,
            vrf_pair=32,
        ),
        commit=Commit(columns=ROTARY_RUN, column_stride=2),
    )

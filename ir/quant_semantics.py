"""What the ops of `quant` compute, said in PyTorch; all arithmetic is f32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_CODE = 448.0
"""The largest e4m3 value."""


def dynamic_scale(x: Tensor, group: int) -> Tensor:
    """f32 [..., K / group]: the largest magnitude of each group of [..., K], over 448."""
    groups = x.float().reshape(*x.shape[:-1], -1, group)
    return groups.abs().amax(dim=-1) / LARGEST_CODE


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 codes of x / scale."""
    return clamped_quotient(x, scale).to(torch.float8_e4m3fn)


def clamped_quotient(x: Tensor, scale: Tensor) -> Tensor:
    """f32 x / scale within what codes can say: the cast alone would not saturate."""
    spread = _spread_over_groups(scale, x.shape[-1])
    quotient = torch.where(spread == 0, 0.0, x.float() / spread)
    return quotient.clamp(-LARGEST_CODE, LARGEST_CODE)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """f32 codes * scale."""
    return codes.float() * _spread_over_groups(scale, codes.shape[-1])


def linear(
    x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, block: tuple[int, int]
) -> Tensor:
    """f32 x @ (w * w_scale).T + bias; blocks of w share a scale."""
    return F.linear(
        x.float(),
        w.float() * spread_over_blocks(w_scale, (w.shape[0], w.shape[1]), block),
        None if bias is None else bias.float(),
    )


def spread_over_blocks(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """f32 [N, K]: the scale of each element of a weight; the last blocks may be partial."""
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    rows = scale.float().reshape(grid).repeat_interleave(block[0], dim=0)
    return rows.repeat_interleave(block[1], dim=1)[: shape[0], : shape[1]]


def _spread_over_groups(scale: Tensor, width: int) -> Tensor:
    """One number and one for each column [K] as they are, [..., groups] as [..., K]."""
    wide = scale.float()
    if wide.numel() == 1:
        return wide.reshape(())
    return wide.repeat_interleave(width // wide.shape[-1], dim=-1)

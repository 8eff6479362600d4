"""What commands cost: `exec_cost` for passes of the tensor unit, `dma_cost` for transfers.

`docs/cycles.md` explains the model. Costs are pure functions of a plan and a machine.
"""

from __future__ import annotations

from .cost_dma import DmaCost, dma_cost
from .cost_exec import (
    ExecCost,
    exec_cost,
    multiplied_kind,
    uses_vector_engine,
    without_addresses,
)

__all__ = [
    "DmaCost",
    "ExecCost",
    "dma_cost",
    "exec_cost",
    "multiplied_kind",
    "uses_vector_engine",
    "without_addresses",
]

"""How much of the host's memory a simulated device may take."""

from __future__ import annotations

import os


def default_budget_bytes() -> int:
    """Half of the host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

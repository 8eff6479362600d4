"""docs/dialects/ says what the definitions of the ops say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_pages_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_dialects.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    advice = "run `python docs/generate_dialects.py`"
    assert result.returncode == 0, f"{result.stdout}{result.stderr}{advice}"

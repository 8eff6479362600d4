"""An open compiler and simulator for the RNGD accelerator.

The public names are imported when they are first used, so that `import furiosa_llm` is free.
"""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifact.builder import ArtifactBuilder
    from .llm.llm import LLM
    from .llm.outputs import CompletionOutput, RequestOutput
    from .llm.sampling_params import SamplingParams
    from .models.config_types import Bucket, SchedulerConfig

__all__ = [
    "LLM",
    "ArtifactBuilder",
    "Bucket",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
]

_MODULES = {
    "LLM": ".llm.llm",
    "ArtifactBuilder": ".artifact.builder",
    "Bucket": ".models.config_types",
    "CompletionOutput": ".llm.outputs",
    "RequestOutput": ".llm.outputs",
    "SamplingParams": ".llm.sampling_params",
    "SchedulerConfig": ".models.config_types",
}

_VENDOR_METADATA = re.compile(r"furiosa[-_.]llm-[^-]+\.(dist|egg)-info", re.IGNORECASE)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def _refuse_vendor_package() -> None:
    """Raises: ENV001 if the vendor's distribution is installed, which owns this folder too.

    Looks for its metadata by name: importlib.metadata alone takes longer to import than this.
    """
    for directory in sys.path:
        try:
            names = os.listdir(directory or ".")
        except OSError:
            continue
        if any(_VENDOR_METADATA.fullmatch(name) for name in names):
            from .errors import vendor_package_present

            error = vendor_package_present("furiosa-llm")
            if os.path.basename(sys.argv[0]) == "furiosa-llm":
                # The command line cannot catch what happens while it is being imported.
                sys.exit(str(error))
            raise error


_refuse_vendor_package()

"""Write docs/errors.md from the docstrings of errors.py: `make docs`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from furiosa_llm import errors

FAMILIES = {
    "ENV": "the environment",
    "BLD": "build options and buckets",
    "FRO": "models and their configuration",
    "CKP": "checkpoints and their tensors",
    "GGF": "GGUF files",
    "QNT": "quantised checkpoints and their ledger",
    "IRV": "the IR: parsing and verification",
    "PAS": "passes",
    "SHD": "sharding over ranks and pipeline stages",
    "BCK": "code generation",
    "VED": "binaries, their records, machine descriptions",
    "SIM": "faults of a simulated program",
    "ART": "artifacts",
    "RUN": "running an artifact",
    "PAR": "devices, tensor-parallel ranks, pipeline stages, replicas",
}
"""First letters of a code -> what it is about."""

HEAD = """# Errors

Every error that a user can see has a stable code, says what failed and where, why, and what to do
next. `furiosa-llm` prints it on stderr and exits with 1, or with 2 where the command line was
wrong. `--debug` adds a traceback. This page is generated from `errors.py` by `make docs`.
"""

DOCSTRING = re.compile(r"([A-Z]{3}\d{3}): (.+)", re.DOTALL)


def documented() -> dict[str, str]:
    """Code -> what it means, from the factories' docstrings, by code."""
    found: dict[str, str] = {}
    for name, factory in inspect.getmembers(errors, inspect.isfunction):
        match = DOCSTRING.fullmatch(inspect.getdoc(factory) or "")
        if match is None:
            continue
        code, meaning = match.groups()
        assert code not in found, f"{code} is documented twice, once by {name}"
        found[code] = meaning.split("\n\n")[0].replace("\n", " ")
    return dict(sorted(found.items()))


def render() -> str:
    """The page."""
    codes = documented()
    parts = [HEAD]
    for family, about in FAMILIES.items():
        rows = [f"| {code} | {text} |" for code, text in codes.items() if code[:3] == family]
        if rows:
            parts.append(f"## {family}: {about}\n\n| code | meaning |\n| --- | --- |")
            parts[-1] += "\n" + "\n".join(rows) + "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("errors.md").write_text(render(), encoding="utf-8")

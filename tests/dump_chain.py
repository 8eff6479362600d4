"""Each dumped IR file, given the pass that its header names next, is the following file."""

from __future__ import annotations

import itertools
from pathlib import Path

from furiosa_llm.backend_rngd.pipeline import DIALECTS, PASSES
from furiosa_llm.passes.dump import read_header
from furiosa_llm.passes.opt_tool import run_opt


def check_dumps(folder: Path) -> int:
    """Fails at the first file that does not lead to the next; how many did."""
    steps = list(itertools.pairwise(sorted(folder.glob("*.mlir"))))
    for before, after in steps:
        text = before.read_text()
        header = read_header(text)
        assert header is not None, before
        passes = first_item(header[2])
        made = run_opt(text, passes, registry=PASSES, extra_dialects=DIALECTS)
        assert made == after.read_text(), (before, after)
    return len(steps)


def first_item(passes: str) -> str:
    """The first pass of `a{x=1,2},b`, commas in braces aside."""
    depth = 0
    for i, character in enumerate(passes):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            return passes[:i]
    return passes

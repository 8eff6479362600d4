"""Run passes on IR text: what `furiosa-llm opt` does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from xdsl.ir import Dialect
from xdsl.passes import ModulePass

from ..ir.text import LazyDialects, make_context, parse_module, print_module
from ..ir.verification import verify_module
from .dump import Header, pipeline_items, read_header
from .pipeline import run_passes
from .pipeline_text import parse_passes
from .registry import PASSES, Registry

SEPARATOR = "// -----"

_ITEM = re.compile(r"[^,{\s]+(?:\{[^}]*\})?")
"""One pass of a pipeline, with its options."""


def _test_dialect() -> Dialect:
    from xdsl.dialects.test import Test

    return Test


def run_opt(text: str, passes: str, split_input_file: bool = False, **options: Any) -> str:
    """What `opt_modules` gives, as one text."""
    return f"{SEPARATOR}\n".join(opt_modules(text, passes, split_input_file, **options))


def opt_modules(
    text: str,
    passes: str,
    split_input_file: bool = False,
    *,
    registry: Registry | None = None,
    extra_dialects: LazyDialects | None = None,
    filename: str = "<text>",
) -> list[str]:
    """The text of the module in `text` after `passes` (`a,b{opt=1}`), with locations.

    It is verified before the first pass and after each. With `split_input_file` the parts
    between `// -----` lines are modules of their own. A header, as `--dump-ir` writes it, is
    kept up to date. `registry` and `extra_dialects` (such as `rngd`) add to what is known here;
    xDSL's `test.op` stands for values from anywhere.
    Raises: PAS001 to PAS003 for `passes`, IRV… for the text, and what the passes raise.
    """
    known = {**PASSES, **(registry or {})}
    pipeline = parse_passes(passes, known)
    dialects = {"test": _test_dialect, **(extra_dialects or {})}
    parts = text.split(SEPARATOR) if split_input_file else [text]
    return [_run(part, pipeline, known, dialects, filename) for part in parts]


def _run(
    text: str,
    pipeline: Sequence[ModulePass],
    registry: Registry,
    dialects: LazyDialects,
    filename: str,
) -> str:
    module = parse_module(text, filename, dialects)
    verify_module(module)
    context = make_context(dialects)
    header = _read_header(text, registry)
    if header is None:
        run_passes(module, pipeline, context=context)
        return print_module(module)
    for one in pipeline:
        before = print_module(module)
        run_passes(module, [one], context=context)
        header = header.after(one, changed=print_module(module) != before)
    return header.text() + print_module(module)


def _read_header(text: str, registry: Registry) -> Header | None:
    found = read_header(text)
    if found is None:
        return None
    made_by, options, following = found
    items = _ITEM.findall(following)
    return Header(made_by, options, tuple(_normal_form(item, registry) for item in items))


def _normal_form(item: str, registry: Registry) -> str:
    """A pass as `show_passes` writes it, however its options are written; unknown ones stay."""
    if item.partition("{")[0] not in registry:
        return item
    (text,) = pipeline_items(parse_passes(item, registry))
    return text

"""Running passes: timing, verification, and IR files that `opt` reproduces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from nn_programs import LLAMA
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from furiosa_llm.errors import CompileError
from furiosa_llm.ir import nn
from furiosa_llm.ir.text import parse_module, print_module
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.passes.dump import read_header
from furiosa_llm.passes.opt_tool import run_opt
from furiosa_llm.passes.pipeline import (
    PassTiming,
    bucket_phase,
    import_phase,
    model_phase,
    run_passes,
)
from furiosa_llm.passes.pipeline_text import parse_passes, show_passes

ALL = [*import_phase(), *model_phase(), *bucket_phase(Bucket.decode(4, 256))]


def dumped(module: ModuleOp, passes: list[ModulePass], directory: Path) -> list[Path]:
    run_passes(module, passes, dump_dir=directory)
    return sorted(directory.iterdir())


def header_of(path: Path) -> tuple[str, str, str]:
    found = read_header(path.read_text())
    assert found is not None
    return found


def first_pass(following: str) -> str:
    return show_passes(parse_passes(following)[:1])


def test_opt_reproduces_each_dumped_file(
    imported: Callable[[str], ModuleOp], tmp_path: Path
) -> None:
    """By the first pass that a file says comes next, and by what the next file says made it."""
    files = dumped(imported("qwen3"), ALL, tmp_path)
    assert [path.name for path in files] == [
        "00-import.mlir",
        "01-canonicalize.mlir",
        "02-cse.mlir",
        # dce has nothing to do: the import leaves no dead code
        "04-fuse-primitives.mlir",
        # the model is not quantised
        "06-outline-blocks.mlir",
        "07-paged-attention.mlir",
        "08-prune-logits.mlir",
        "09-specialize-bucket.mlir",
    ]
    for before, after in pairwise(files):
        made_by, options, _ = header_of(after)
        text = before.read_text()
        assert run_opt(text, f"{made_by}{options}") == after.read_text(), after.name
        assert first_pass(header_of(before)[2]).startswith(made_by)
    everything = header_of(files[0])[2]
    assert run_opt(files[0].read_text(), everything) == files[-1].read_text()


def test_headers_name_pass_options_and_what_comes_next(tmp_path: Path) -> None:
    files = dumped(LLAMA.module(), ALL, tmp_path)
    assert files[0].read_text().splitlines()[:3] == [
        "// pass: import",
        "// options: {}",
        "// next: canonicalize,cse,fuse-primitives,outline-blocks,paged-attention,"
        "prune-logits{rows=1},specialize-bucket{kind=decode batch=4 length=256}",
    ]
    assert files[-1].read_text().splitlines()[:4] == [
        "// pass: specialize-bucket",
        "// options: {kind=decode batch=4 length=256}",
        "// next:",
        "builtin.module {",
    ]


def test_passes_without_effect_leave_no_file_and_no_trace(tmp_path: Path) -> None:
    """Otherwise the next pass named in a file would not give the next file."""
    passes = parse_passes("cse,dce,dce,canonicalize,canonicalize")
    files = dumped(LLAMA.module(), passes, tmp_path)
    assert [path.name for path in files] == [
        "00-import.mlir",
        "01-cse.mlir",
        "04-canonicalize.mlir",
    ]
    assert [header_of(path)[2] for path in files] == ["cse,canonicalize", "canonicalize", ""]
    assert run_opt(files[1].read_text(), "canonicalize") == files[2].read_text()


def test_a_failed_pipeline_leaves_the_files_so_far(tmp_path: Path) -> None:
    """Their headers name all passes, since which have an effect is not known."""
    passes = parse_passes("cse,prune-logits,dce")
    with pytest.raises(CompileError, match="PAS007"):
        run_passes(LLAMA.module(), passes, dump_dir=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["00-import.mlir", "01-cse.mlir"]
    assert header_of(files[1])[2] == "prune-logits{rows=1},dce"


def test_second_stage_dumps_name_their_own_input(tmp_path: Path) -> None:
    module = LLAMA.module()
    run_passes(module, [*import_phase(), *model_phase()])
    run_passes(
        module, bucket_phase(Bucket.prefill(1, 8)), dump_dir=tmp_path, input_name="prune-logits"
    )
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["00-prune-logits.mlir", "01-specialize-bucket.mlir"]


def test_unwritable_dump_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompileError) as caught:
        run_passes(LLAMA.module(), [], dump_dir=tmp_path / "file")
    assert caught.value.code == "PAS011"


def test_opt_keeps_the_header_up_to_date() -> None:
    """Options may be written in any form; a pass that is not planned leaves the plan as it is."""
    plan = '// pass: x\n// options: {}\n// next: dce,prune-logits,specialize-bucket{kind="decode" '
    text = plan + "batch=1 length=2}\n" + print_module(LLAMA.module())
    unplanned = run_opt(text, "cse").splitlines()
    assert unplanned[:2] == ["// pass: cse", "// options: {}"]
    rest = "prune-logits{rows=1},specialize-bucket{kind=decode batch=1 length=2}"
    assert unplanned[2] == f"// next: dce,{rest}"
    # dce finds nothing to do in this module.
    assert run_opt(text, "cse,dce").splitlines()[:3] == [
        "// pass: cse",
        "// options: {}",
        f"// next: {rest}",
    ]
    # Passes that only another registry knows stay in the plan.
    unknown = run_opt(text.replace("// next: dce", "// next: dce,tile{size=1,2}"), "dce")
    assert unknown.splitlines()[2] == f"// next: tile{{size=1,2}},{rest}"
    assert run_opt("builtin.module {\n}\n", "dce") == "builtin.module {\n} loc(unknown)\n"


@dataclass(frozen=True)
class BreakTypes(ModulePass):
    """Leaves a module that is not valid."""

    name = "break-types"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for inner in op.walk():
            if isinstance(inner, nn.ParameterOp):
                inner.sym_name = type(inner.sym_name)("elsewhere")


def test_the_result_of_each_pass_is_verified() -> None:
    with pytest.raises(CompileError, match="IRV"):
        run_passes(LLAMA.module(), [BreakTypes()])
    run_passes(LLAMA.module(), [BreakTypes()], verify_each=False)


def test_timings_name_every_pass() -> None:
    timings: list[PassTiming] = []
    run_passes(LLAMA.module(), ALL, timings=timings)
    assert [timing.name for timing in timings] == [one.name for one in ALL]
    assert all(timing.seconds > 0 and timing.verify_seconds > 0 for timing in timings)


def test_file_and_memory_agree_after_a_round_trip(tmp_path: Path) -> None:
    module = LLAMA.module()
    reread = parse_module(print_module(module))
    run_passes(module, ALL)
    run_passes(reread, ALL)
    assert print_module(module) == print_module(reread)

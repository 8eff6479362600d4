"""The order of the passes, and running them.

Phases: `import` (what PyTorch exported becomes a few distinct blocks), `model` (what every bucket
shares), `bucket` (the sizes of one bucket), `shard` (each rank's part). The backend's passes
follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from ..backend_rngd.isa.machine import DEFAULT_MACHINE
from ..ir.text import make_context, print_module
from ..ir.verification import verify_module
from ..models.config_types import Bucket
from .dump import IrDump


def import_phase() -> list[ModulePass]:
    """Import -> @forward that calls one function per distinct block.

    A checkpoint's codes and scales come in before the blocks are told apart.
    """
    from .canonicalize import CanonicalizePass
    from .cse import CsePass
    from .dce import DcePass
    from .fuse_primitives import FusePrimitivesPass
    from .import_fp8_quantization import ImportFp8QuantizationPass
    from .outline_blocks import OutlineBlocksPass

    return [
        CanonicalizePass(),
        CsePass(),
        DcePass(),
        FusePrimitivesPass(),
        ImportFp8QuantizationPass(),
        OutlineBlocksPass(),
    ]


def model_phase(*, rows: Literal[0, 1, "all"] = 1) -> list[ModulePass]:
    """Caches, and logits for `rows` tokens of each sequence."""
    from .paged_attention import PagedAttentionPass
    from .prune_logits import PruneLogitsPass

    return [PagedAttentionPass(), PruneLogitsPass(rows)]


def bucket_phase(bucket: Bucket) -> list[ModulePass]:
    """All sizes but the number of KV slots."""
    from .specialize_bucket import SpecializeBucketPass

    return [SpecializeBucketPass.for_bucket(bucket)]


def shard_phase(
    tp: int,
    *,
    partial_sum: Literal["f32", "bf16"] = "f32",
    stages: int | None = None,
    blocks: Sequence[int] | None = None,
    machine: str = DEFAULT_MACHINE,
) -> list[ModulePass]:
    """The program of each of `tp` ranks, in one stage or, by number or by blocks, several."""
    from .lower_collectives import LowerCollectivesPass
    from .shard_tensor_parallel import ShardTensorParallelPass
    from .split_pipeline_stages import SplitPipelineStagesPass

    sizes = None if blocks is None else tuple(blocks)
    passes: list[ModulePass] = [ShardTensorParallelPass(tp, partial_sum)]
    if stages is not None or sizes is not None:
        passes.append(SplitPipelineStagesPass(stages, sizes))
    return [*passes, LowerCollectivesPass(machine)]


Observe = Callable[[str, ModuleOp], None]


@dataclass(frozen=True)
class PassTiming:
    """How long a pass and the check of its result took."""

    name: str
    seconds: float
    verify_seconds: float


def run_passes(
    module: ModuleOp,
    passes: Sequence[ModulePass],
    *,
    dump_dir: Path | None = None,
    input_name: str = "import",
    timings: list[PassTiming] | None = None,
    verify_each: bool = True,
    context: Context | None = None,
    observe: Observe | None = None,
) -> None:
    """Run the passes on the module, in place; each one's result is verified.

    `dump_dir` gets the input (as `00-<input_name>.mlir`) and what each pass changed, see
    `dump`. `timings` is appended to. `observe` sees each pass's name and what it made.
    Raises: what the passes and `verify_module` raise, PAS011.
    """
    context = context or make_context()
    dump = None if dump_dir is None else IrDump(dump_dir, passes, input_name)
    if dump is not None:
        dump.add(0, print_module(module))
    for number, one in enumerate(passes, start=1):
        began = perf_counter()
        one.apply(context, module)
        applied = perf_counter()
        if verify_each:
            verify_module(module)
        if timings is not None:
            timings.append(PassTiming(one.name, applied - began, perf_counter() - applied))
        if observe is not None:
            observe(one.name, module)
        if dump is not None:
            dump.add(number, print_module(module))
    if dump is not None:
        dump.finish()

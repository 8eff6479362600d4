"""From a model's config to binaries: calls the compiler's stages in their order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backend_rngd.isa.container import write_program
from ..frontend.parameters import ParameterSpec
from ..models.config_types import Bucket
from ..models.quantization import Quantization
from .schema import OptimizationLevel, PartialSum
from .tilings import NO_PINS, ExplainedTiling, TilingPins, explain

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

    from ..passes.shard_report import ShardReport

Progress = Callable[[str], None]
"""Told what is done next, in a few words."""


@dataclass(frozen=True)
class CompiledBucket:
    """One bucket's binary, and how its products are cut."""

    bucket: Bucket
    data: bytes
    tilings: tuple[ExplainedTiling, ...]
    shards: ShardReport


@dataclass(frozen=True)
class CompileOptions:
    """What shapes the binaries besides the model and the buckets."""

    last_token_only: bool = True
    """Prefill gives logits of the last token alone."""
    level: OptimizationLevel = 2
    """How hard the scheduler tries, see `backend_phase`."""
    pins: TilingPins = NO_PINS
    compare_tilings: bool = False
    """Look for the next best tilings too."""
    tensor_parallel_size: int = 1
    partial_sum: PartialSum = "f32"


@dataclass(frozen=True)
class CompiledModel:
    """An imported model; binaries are compiled as they are asked for, until it is closed."""

    parameters: tuple[ParameterSpec, ...]
    frequencies: tuple[float, ...] | None
    """Of the rotary embeddings; None if there are none, or several kinds."""
    binaries: Generator[CompiledBucket]


def compile_model(
    config: Any,
    quantization: Quantization | None,
    buckets: Sequence[Bucket],
    options: CompileOptions,
    dump_ir: Path | None,
    progress: Progress,
    workers: int = 1,
) -> CompiledModel:
    """Import the model of a transformers `config` once, then compile it for every bucket.

    `quantization` says which of its parameters are codes, if any are.
    `dump_ir` gets the IR after each pass that the buckets share, and a folder per bucket for what
    follows. Binaries do not depend on what the model or its directory is called, nor on how many
    `workers` compile buckets at the same time.
    Raises: FRO007, QNT021 and QNT022 (import), BCKxxx and VED005 (backend), BLD016 (pins), BLD019
    (a worker).
    """
    from ..frontend.declarations import declared_parameters, rotary_frequencies

    progress("importing the model")
    module = import_shared(config, quantization, options.last_token_only, dump_ir)
    name = str(config.architectures[0])
    return CompiledModel(
        tuple(declared_parameters(module)),
        rotary_frequencies(module),
        _binaries(module, name, buckets, options, dump_ir, progress, workers),
    )


def _binaries(
    module: ModuleOp,
    name: str,
    buckets: Sequence[Bucket],
    options: CompileOptions,
    dump_ir: Path | None,
    progress: Progress,
    workers: int,
) -> Generator[CompiledBucket]:
    """In this process, or in several if more than one can work."""
    from ..ir.text import print_module
    from .compile_worker import Shared
    from .workers import compile_in_processes, processes_for

    processes = processes_for(workers, len(buckets))
    if processes > 1:
        shared = Shared(print_module(module), name, options, dump_ir)
        yield from compile_in_processes(shared, buckets, processes, progress)
        return
    for bucket in buckets:
        progress(f"compiling {bucket.name}")
        yield compile_bucket(module, name, bucket, options, dump_ir)


def import_shared(
    config: Any, quantization: Quantization | None, last_token_only: bool, dump_ir: Path | None
) -> ModuleOp:
    """What all buckets share: outlined blocks over paged caches, sizes still open."""
    import torch

    from ..frontend.torch_import import import_model
    from ..passes.import_fp8_quantization import describe_quantization
    from ..passes.pipeline import import_phase, model_phase, run_passes

    module = import_model(config, torch.bfloat16)
    if quantization is not None:
        describe_quantization(module, quantization)
    passes = [*import_phase(), *model_phase(rows=1 if last_token_only else "all")]
    run_passes(module, passes, dump_dir=dump_ir)
    return module


def compile_bucket(
    shared: ModuleOp, name: str, bucket: Bucket, options: CompileOptions, dump_ir: Path | None
) -> CompiledBucket:
    """One bucket's binary; the shared module stays as it is."""
    from ..backend_rngd.encode import encode_program
    from ..backend_rngd.pipeline import DIALECTS, backend_phase
    from ..ir.text import make_context
    from ..passes.pipeline import bucket_phase, run_passes, shard_phase
    from ..passes.shard_report import report_shards

    shard = shard_phase(options.tensor_parallel_size, partial_sum=options.partial_sum)
    reports: list[ShardReport] = []

    def observe(name: str, module: ModuleOp) -> None:
        if name == shard[-1].name:
            reports.append(report_shards(module))

    module = shared.clone()
    pins = options.pins.lines(bucket)
    run_passes(
        module,
        [
            *bucket_phase(bucket),
            *shard,
            *backend_phase(bucket, options.level, pins, options.compare_tilings),
        ],
        dump_dir=None if dump_ir is None else dump_ir / bucket.file_stem,
        input_name="model",
        context=make_context(DIALECTS),
        observe=observe,
    )
    tilings = tuple(explain(module, bucket))
    options.pins.check_modules(bucket, tilings)
    data = write_program(encode_program(module, name))
    return CompiledBucket(bucket, data, tilings, reports[0])

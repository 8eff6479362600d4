"""From a model's config to binaries: calls the compiler's stages in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backend_rngd.isa.container import write_program
from ..frontend.parameters import ParameterSpec
from ..models.config_types import Bucket
from .schema import OptimizationLevel
from .tilings import ExplainedTiling, TilingPins, explain

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

Progress = Callable[[str], None]
"""Told what is done next, in a few words."""


@dataclass(frozen=True)
class CompiledBucket:
    """One bucket's binary, and how its products are cut."""

    bucket: Bucket
    data: bytes
    tilings: tuple[ExplainedTiling, ...]


@dataclass(frozen=True)
class CompiledModel:
    """An imported model; each binary is compiled when the iterator reaches it."""

    parameters: tuple[ParameterSpec, ...]
    binaries: Iterator[CompiledBucket]


def compile_model(
    config: Any,
    buckets: Sequence[Bucket],
    last_token_only: bool,
    level: OptimizationLevel,
    dump_ir: Path | None,
    progress: Progress,
    pins: TilingPins,
    compare_tilings: bool,
) -> CompiledModel:
    """Import the model of a transformers `config` once, then compile it for every bucket.

    `level` is how hard the scheduler tries, see `backend_phase`. `compare_tilings` looks for the
    next best tilings too.
    `dump_ir` gets the IR after each pass that the buckets share, and a folder per bucket for what
    follows. Binaries do not depend on what the model or its directory is called.
    Raises: FRO007 (import), BCKxxx and VED005 (backend), BLD016 (pins).
    """
    from ..frontend.declarations import declared_parameters

    progress("importing the model")
    module = _import(config, last_token_only, dump_ir)
    name = str(config.architectures[0])
    return CompiledModel(
        tuple(declared_parameters(module)),
        (
            _binary(module, name, bucket, level, dump_ir, progress, pins, compare_tilings)
            for bucket in buckets
        ),
    )


def _import(config: Any, last_token_only: bool, dump_ir: Path | None) -> ModuleOp:
    """What all buckets share: outlined blocks over paged caches, sizes still open."""
    import torch

    from ..frontend.torch_import import import_model
    from ..passes.pipeline import import_phase, model_phase, run_passes

    module = import_model(config, torch.bfloat16)
    passes = [*import_phase(), *model_phase(rows=1 if last_token_only else "all")]
    run_passes(module, passes, dump_dir=dump_ir)
    return module


def _binary(
    shared: ModuleOp,
    name: str,
    bucket: Bucket,
    level: OptimizationLevel,
    dump_ir: Path | None,
    progress: Progress,
    pins: TilingPins,
    compare_tilings: bool,
) -> CompiledBucket:
    """One bucket's binary; the shared module stays as it is."""
    from ..backend_rngd.encode import encode_program
    from ..backend_rngd.pipeline import DIALECTS, backend_phase
    from ..ir.text import make_context
    from ..passes.pipeline import bucket_phase, run_passes

    progress(f"compiling {bucket.name}")
    module = shared.clone()
    run_passes(
        module,
        [
            *bucket_phase(bucket),
            *backend_phase(bucket, level, pins.lines(bucket), compare_tilings),
        ],
        dump_dir=None if dump_ir is None else dump_ir / bucket.file_stem,
        input_name="model",
        context=make_context(DIALECTS),
    )
    tilings = tuple(explain(module, bucket))
    pins.check_modules(bucket, tilings)
    return CompiledBucket(bucket, write_program(encode_program(module, name)), tilings)

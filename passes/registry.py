"""Every pass by name, imported when it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from xdsl.passes import ModulePass

Registry: TypeAlias = Mapping[str, Callable[[], type[ModulePass]]]


def _canonicalize() -> type[ModulePass]:
    from .canonicalize import CanonicalizePass

    return CanonicalizePass


def _cse() -> type[ModulePass]:
    from .cse import CsePass

    return CsePass


def _dce() -> type[ModulePass]:
    from .dce import DcePass

    return DcePass


def _fuse_primitives() -> type[ModulePass]:
    from .fuse_primitives import FusePrimitivesPass

    return FusePrimitivesPass


def _import_fp8_quantization() -> type[ModulePass]:
    from .import_fp8_quantization import ImportFp8QuantizationPass

    return ImportFp8QuantizationPass


def _lower_collectives() -> type[ModulePass]:
    from .lower_collectives import LowerCollectivesPass

    return LowerCollectivesPass


def _outline_blocks() -> type[ModulePass]:
    from .outline_blocks import OutlineBlocksPass

    return OutlineBlocksPass


def _paged_attention() -> type[ModulePass]:
    from .paged_attention import PagedAttentionPass

    return PagedAttentionPass


def _prune_logits() -> type[ModulePass]:
    from .prune_logits import PruneLogitsPass

    return PruneLogitsPass


def _shard_tensor_parallel() -> type[ModulePass]:
    from .shard_tensor_parallel import ShardTensorParallelPass

    return ShardTensorParallelPass


def _specialize_bucket() -> type[ModulePass]:
    from .specialize_bucket import SpecializeBucketPass

    return SpecializeBucketPass


def _split_pipeline_stages() -> type[ModulePass]:
    from .split_pipeline_stages import SplitPipelineStagesPass

    return SplitPipelineStagesPass


PASSES: Registry = {
    "canonicalize": _canonicalize,
    "cse": _cse,
    "dce": _dce,
    "fuse-primitives": _fuse_primitives,
    "import-fp8-quantization": _import_fp8_quantization,
    "lower-collectives": _lower_collectives,
    "outline-blocks": _outline_blocks,
    "paged-attention": _paged_attention,
    "prune-logits": _prune_logits,
    "shard-tensor-parallel": _shard_tensor_parallel,
    "specialize-bucket": _specialize_bucket,
    "split-pipeline-stages": _split_pipeline_stages,
}
"""The passes on tensors; `artifact` and `cli` add the backend's."""

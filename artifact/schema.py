"""The JSON files of an artifact: what they hold, and how they are written.

`artifact.json` and `runtime_config.json` keep the 2025.1 schema of `furiosa-llm`, so that tools
which read it find what they know. `manifest.json` is ours: the format's version, hashes of all
files, the resolved configuration, and the parameters with their shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .. import errors
from ..frontend.safetensors_checkpoint import DTYPES
from ..models.config_types import Bucket

ARTIFACT_FILE = "artifact.json"
RUNTIME_CONFIG_FILE = "runtime_config.json"
MANIFEST_FILE = "manifest.json"
SHARDING_FILE = "sharding.json"
TOKENIZER_FILE = "tokenizer.json"

FORMAT_VERSION = 4
"""Of the artifact directory. A change that older readers cannot take raises it."""

PRODUCT = "furiosa-llm-open"

WeightsMode = Literal["copy", "link", "skip"]
OptimizationLevel = Literal[0, 1, 2]
"""0: program order. 1: overlap inside each kernel. 2: overlap across a block's kernels."""
PartialSum = Literal["f32", "bf16"]
"""Type in which tensor-parallel ranks exchange their parts of a sum."""

DTYPE_NAMED = {dtype.name: dtype for dtype in DTYPES.values()}
"""numpy and ml_dtypes types by name, such as `bfloat16`."""


def _known_dtype(name: str) -> str:
    if name not in DTYPE_NAMED:
        raise ValueError(f"{name!r} is no type that parameters have")
    return name


def _bucket_name(name: str) -> str:
    Bucket.parse(name)
    return name


class Schema(BaseModel):
    """A part of a JSON file. Unknown keys are an error: they would be ignored in silence."""

    # `model_` is pydantic's own prefix by default; the 2025.1 schema uses it for data.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Version(Schema):
    furiosa_llm: str
    furiosa_compiler: str


class Metadata(Schema):
    artifact_id: str
    """A UUID derived from the hashes of all binaries and parameters."""
    name: str
    timestamp: int
    """Always 0: equal inputs give equal bytes. The file's own time says when it was built."""
    version: Version


class BucketEntry(Schema):
    batch_size: int
    attention_size: int
    kv_cache_size: int


class PagedAttention(Schema):
    num_blocks: int | None
    """None: the loader decides how many blocks the KV cache has."""
    block_size: int
    padding_block_idx: int


class GeneratorConfig(Schema):
    position_id_pad: int
    buckets: tuple[BucketEntry, ...]
    model_qname: str
    paged_attention_config: PagedAttention
    packing_type: str
    kv_cache_sharing_across_beams_config: None
    num_speculative_tokens: None
    unpadded_vocab_size: int | None


class OptimizationConfig(Schema):
    optimize_paged_attention: bool
    calculate_logit_only_for_last_token: bool


class QuantizationConfig(Schema):
    """Types of what is multiplied and cached, by the names of Furiosa's quantiser."""

    weight: str
    activation: str
    kv_cache: str
    use_mcp: bool
    """Whether Furiosa's quantiser found the ranges."""


class LlmConfig(Schema):
    optimization_config: OptimizationConfig
    quantization_config: QuantizationConfig | None


class ModelMetadata(Schema):
    pretrained_id: str
    task_type: str
    llm_config: LlmConfig
    hf_configs: dict[str, Any]
    model_weight_path: str | None
    trust_remote_code: bool


class ModelRewritingConfig(Schema):
    do_decompositions_for_model_rewrite: bool
    use_blockwise_compile: bool
    num_blocks_per_supertask: int
    embed_all_constants_into_graph: bool
    optimize_logit_shape: bool


class Parallel(Schema):
    tensor_parallel_size: int
    pipeline_parallel_size: int


class ConstantValue(Schema):
    """Where a constant comes from: half-open `placements` per dimension of the stored tensor."""

    param_file: str | None
    """Key in the pipeline's `param_files`; None if the artifact was built without weights."""
    name: str
    name_in_graph: str
    placements: tuple[tuple[int, int], ...]


class PipelineTensor(Schema):
    shape: tuple[int, ...]
    dtype: str
    value: ConstantValue | None = None


class Supertask(Schema):
    """A node of a pipeline; edges are implicit by tensor name."""

    kind: Literal["input", "output", "edf", "send", "recv"]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    device: str | None = None
    data_blob: str | None = None
    group: str | None = None
    """What a send and its recv have in common."""


class StageCalls(Schema):
    """The calls of a bucket's binary that a pipeline stage runs."""

    device: str
    first: int
    end: int
    """The one after the last."""


class PipelineContent(Schema):
    """What a pipeline is for."""

    bucket: str
    stages: tuple[StageCalls, ...]


class ParamFile(Schema):
    path: str
    format: Literal["safetensors"]


class Pipeline(Schema):
    """One bucket: its binary is the blob, a file beside this one."""

    name: str
    devices: dict[str, str]
    tensors: dict[str, PipelineTensor]
    supertasks: dict[str, Supertask]
    metadata: PipelineContent
    blobs: dict[str, None]
    param_files: dict[str, ParamFile]
    device_constraints: tuple[str, ...]
    version: str


class PipelineMetadata(Schema):
    output_logits_size: int | None


class ArtifactDescription(Schema):
    """`artifact.json`."""

    metadata: Metadata
    devices: str
    generator_config: GeneratorConfig
    hf_config: dict[str, Any]
    model_metadata: ModelMetadata
    model_rewriting_config: ModelRewritingConfig
    parallel_config: Parallel
    pipelines: tuple[Pipeline, ...]
    pipeline_metadata_list: tuple[PipelineMetadata, ...]
    max_prompt_len: int | None


class RuntimeConfig(Schema):
    """`runtime_config.json`."""

    npu_queue_limit: int
    max_processing_samples: int
    spare_blocks_ratio: float
    is_offline: bool
    paged_attention_num_blocks: int | None
    prefill_buckets: tuple[tuple[int, int], ...]
    decode_buckets: tuple[tuple[int, int], ...]
    prefill_chunk_size: int | None


class FileEntry(Schema):
    size_bytes: int
    sha256: str | None
    """None for a hard-linked file: it can change through its other name."""


class BinaryEntry(Schema):
    bucket: Annotated[str, AfterValidator(_bucket_name)]
    file: str


class ParameterEntry(Schema):
    shape: tuple[int, ...]
    dtype: Annotated[str, AfterValidator(_known_dtype)]
    file: str | None
    """None if the artifact was built without weights."""

    @property
    def numpy(self) -> np.dtype[Any]:
        return DTYPE_NAMED[self.dtype]


class Manifest(Schema):
    """`manifest.json`. Lists every file but itself."""

    format_version: int
    built_by: str
    """Distribution and version, e.g. `furiosa-llm-open 0.1.0`."""
    tools: dict[str, str]
    """Versions of the libraries that shaped the binaries."""
    model_id: str
    architecture: str
    weights: WeightsMode
    calculate_logit_only_for_last_token: bool
    optimization_level: OptimizationLevel
    partial_sum: PartialSum
    num_blocks_per_pp_stage: Annotated[tuple[int, ...], Field(min_length=1)]
    """Transformer blocks of each pipeline stage; a loader may divide them in another way."""
    tiling_pins: dict[str, dict[str, str]]
    """Pattern of buckets -> pattern of modules -> the tiling that the build was told to use."""
    binaries: tuple[BinaryEntry, ...]
    parameters: dict[str, ParameterEntry]
    tied: dict[str, str]
    """Another name that a checkpoint may have for a parameter -> the parameter."""
    files: dict[str, FileEntry]


class TensorCutEntry(Schema):
    """How one tensor is cut over the tensor-parallel ranks; see `passes/shard_report.py`."""

    name: str
    shape: tuple[int | str, ...]
    part: tuple[int | str, ...]
    dim: int | None
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    zeros: float
    copies: float
    why: str


class ExchangeEntry(Schema):
    """What ranks send each other for one module."""

    kind: str
    module: str
    runs: int
    ranks: int
    bytes: int
    dtype: str
    algorithm: str | None
    cycles: int | None
    formula_cycles: int | None


class Sharding(Schema):
    """`sharding.json`, for people; artifacts of one rank have none."""

    tensors: tuple[TensorCutEntry, ...]
    exchanges: dict[str, tuple[ExchangeEntry, ...]]
    """By bucket."""


S = TypeVar("S", bound=Schema)


def to_json(content: Schema) -> str:
    """Indented by 2, as the 2025.1 files are."""
    return json.dumps(content.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_json(kind: type[S], path: Path) -> S:
    """Raises: ART006 if the file is not JSON of this kind."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise errors.broken_metadata(str(path), str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise errors.broken_metadata(str(path), reason) from None

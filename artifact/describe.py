"""Fill the JSON files of an artifact from what was built. The values depend on the input alone."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..backend_rngd.isa.program import Program
from ..frontend.parameters import ParameterSpec
from ..models.config_types import Bucket, SchedulerConfig
from ..models.mesh import Mesh
from ..models.quantization import Quantization, Storage
from . import schema
from .pipelines import tasks_of
from .schema import FileEntry, OptimizationLevel, PartialSum, WeightsMode

if TYPE_CHECKING:
    from ..passes.shard_report import ShardReport

BLOCK_SIZE = 1
"""Tokens per KV block."""
PADDING_BLOCK = 0
"""KV block that padding tokens write to."""
POSITION_PAD = 1
"""Position id of padding tokens."""

PIPELINE_VERSION = "0.1.0"
SHORT_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
"""numpy types -> type names of the 2025.1 schema."""
CODES: Mapping[Storage, str] = {"e4m3": "fp8-E4M3", "e5m2": "fp8-E5M2"}
PLAIN = "bf16"
"""Type names of Furiosa's quantiser."""


@dataclass(frozen=True)
class Binary:
    """One bucket's program, as written."""

    bucket: Bucket
    file: str
    program: Program


@dataclass(frozen=True)
class Build:
    """Everything that the descriptions say about one build."""

    name: str
    model_id: str
    hf_config: Mapping[str, Any]
    built_by: str
    tools: Mapping[str, str]
    weights: WeightsMode
    last_token_only: bool
    level: OptimizationLevel
    mesh: Mesh
    """Only its first replica shapes the artifact."""
    stage_sizes: Sequence[int]
    """Transformer blocks of each pipeline stage."""
    partial_sum: PartialSum
    tiling_pins: Mapping[str, Mapping[str, str]]
    scheduler: SchedulerConfig
    num_blocks: int | None
    """Most blocks that a loader's KV cache has; None if the loader decides."""
    quantization: Quantization | None
    binaries: Sequence[Binary]
    parameters: Sequence[ParameterSpec]
    parameter_file_of: Mapping[str, str]
    """Empty without weights."""
    tied: Mapping[str, str]
    """Another name that a checkpoint may have for a parameter -> the parameter."""

    @property
    def architecture(self) -> str:
        return str(self.hf_config["architectures"][0])

    @property
    def buckets(self) -> list[Bucket]:
        return [binary.bucket for binary in self.binaries]


def describe_artifact(build: Build, files: Mapping[str, FileEntry]) -> schema.ArtifactDescription:
    """`artifact.json`; `files` are all files of the artifact but the descriptions."""
    built_by = build.built_by.split()[-1]
    return schema.ArtifactDescription(
        metadata=schema.Metadata(
            artifact_id=_derived_id(build, files),
            name=build.name,
            timestamp=0,
            version=schema.Version(furiosa_llm=built_by, furiosa_compiler=built_by),
        ),
        devices=build.mesh.name,
        generator_config=_generator_config(build),
        hf_config=dict(build.hf_config),
        model_metadata=schema.ModelMetadata(
            pretrained_id=build.model_id,
            task_type="text-generation",
            llm_config=schema.LlmConfig(
                optimization_config=schema.OptimizationConfig(
                    optimize_paged_attention=True,
                    calculate_logit_only_for_last_token=build.last_token_only,
                ),
                quantization_config=_quantization_config(build.quantization),
            ),
            hf_configs={},
            model_weight_path=None,
            trust_remote_code=False,
        ),
        model_rewriting_config=schema.ModelRewritingConfig(
            do_decompositions_for_model_rewrite=False,
            use_blockwise_compile=True,
            num_blocks_per_supertask=1,
            embed_all_constants_into_graph=False,
            optimize_logit_shape=build.last_token_only,
        ),
        parallel_config=schema.Parallel(
            tensor_parallel_size=build.mesh.tp, pipeline_parallel_size=build.mesh.pp
        ),
        pipelines=tuple(_pipeline(build, binary) for binary in build.binaries),
        pipeline_metadata_list=tuple(
            schema.PipelineMetadata(output_logits_size=_logits_rows(build, bucket))
            for bucket in build.buckets
        ),
        max_prompt_len=max((b.attention_size for b in build.buckets if b.is_prefill), default=None),
    )


def describe_runtime(build: Build) -> schema.RuntimeConfig:
    """`runtime_config.json`."""
    shapes = {
        kind: tuple((b.batch_size, b.attention_size) for b in build.buckets if b.is_prefill == kind)
        for kind in (True, False)
    }
    return schema.RuntimeConfig(
        **asdict(build.scheduler),
        paged_attention_num_blocks=build.num_blocks,
        prefill_buckets=shapes[True],
        decode_buckets=shapes[False],
    )


def describe_files(build: Build, files: Mapping[str, FileEntry]) -> schema.Manifest:
    """`manifest.json`."""
    return schema.Manifest(
        format_version=schema.FORMAT_VERSION,
        built_by=build.built_by,
        tools=dict(build.tools),
        model_id=build.model_id,
        architecture=build.architecture,
        weights=build.weights,
        calculate_logit_only_for_last_token=build.last_token_only,
        optimization_level=build.level,
        partial_sum=build.partial_sum,
        num_blocks_per_pp_stage=tuple(build.stage_sizes),
        tiling_pins={bucket: dict(pins) for bucket, pins in build.tiling_pins.items()},
        binaries=tuple(
            schema.BinaryEntry(bucket=binary.bucket.name, file=binary.file)
            for binary in build.binaries
        ),
        parameters={
            spec.name: schema.ParameterEntry(
                shape=spec.shape,
                dtype=spec.dtype.name,
                file=build.parameter_file_of.get(spec.name),
            )
            for spec in sorted(build.parameters, key=lambda spec: spec.name)
        },
        tied=dict(build.tied),
        files=dict(sorted(files.items())),
    )


def describe_sharding(shards: Mapping[Bucket, ShardReport]) -> schema.Sharding:
    """`sharding.json`. Buckets share their weights, so tensors are cut alike in all of them."""
    first = next(iter(shards.values()))
    return schema.Sharding(
        tensors=tuple(schema.TensorCutEntry(**asdict(tensor)) for tensor in first.tensors),
        exchanges={
            bucket.name: tuple(schema.ExchangeEntry(**asdict(one)) for one in report.exchanges)
            for bucket, report in shards.items()
        },
    )


def _derived_id(build: Build, files: Mapping[str, FileEntry]) -> str:
    """A UUID of name, options and the files' contents; linked files count by their size."""
    content = [
        build.name,
        build.level,
        build.mesh.name,
        list(build.stage_sizes),
        build.partial_sum,
        asdict(build.scheduler),
        build.num_blocks,
        *([name, e.size_bytes, e.sha256] for name, e in sorted(files.items())),
    ]
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    return str(uuid.UUID(bytes=digest[:16], version=5))


def _quantization_config(quantization: Quantization | None) -> schema.QuantizationConfig | None:
    """None if nothing is quantised; a type is named if any layer has it."""
    if quantization is None:
        return None
    linears = quantization.linears
    weights = sorted({CODES[linear.storage] for linear in linears})
    inputs = any(linear.activation.mode != "none" for linear in linears)
    return schema.QuantizationConfig(
        weight=", ".join(weights) or PLAIN,
        activation=CODES["e4m3"] if inputs else PLAIN,
        kv_cache=CODES["e4m3"] if quantization.caches else PLAIN,
        use_mcp=quantization.format == "furiosa",
    )


def _generator_config(build: Build) -> schema.GeneratorConfig:
    return schema.GeneratorConfig(
        position_id_pad=POSITION_PAD,
        buckets=tuple(schema.BucketEntry(**asdict(bucket)) for bucket in build.buckets),
        model_qname=f"transformers.{build.architecture}",
        paged_attention_config=schema.PagedAttention(
            num_blocks=build.num_blocks, block_size=BLOCK_SIZE, padding_block_idx=PADDING_BLOCK
        ),
        packing_type="IDENTITY",
        kv_cache_sharing_across_beams_config=None,
        num_speculative_tokens=None,
        unpadded_vocab_size=build.hf_config.get("vocab_size"),
    )


def _pipeline(build: Build, binary: Binary) -> schema.Pipeline:
    """Inputs -> the binary's stages -> outputs."""
    bucket, program = binary.bucket, binary.program
    blob = binary.bucket.file_stem
    param_files = sorted(set(build.parameter_file_of.values()))
    inputs = {
        io.name: schema.PipelineTensor(shape=io.shape, dtype=io.dtype) for io in program.inputs
    }
    outputs = {
        io.name: schema.PipelineTensor(shape=io.whole_shape, dtype=io.dtype)
        for io in program.outputs
    }
    constants = _constants(build, program, param_files)
    tasks = tasks_of(program, build.stage_sizes, blob)
    return schema.Pipeline(
        name=(
            f"transformers.{build.architecture}-kv{bucket.kv_cache_size}"
            f"-b{bucket.batch_size}-attn{bucket.attention_size}"
        ),
        devices={str(i): run.name for i, run in enumerate(build.mesh.replicas[0])},
        tensors={**inputs, **constants, **tasks.sent, **outputs},
        supertasks=tasks.supertasks,
        metadata=schema.PipelineContent(bucket=bucket.name, stages=tasks.stages),
        blobs={blob: None},
        param_files={
            str(i): schema.ParamFile(path=name, format="safetensors")
            for i, name in enumerate(param_files)
        },
        device_constraints=(),
        version=PIPELINE_VERSION,
    )


def _constants(
    build: Build, program: Program, param_files: list[str]
) -> dict[str, schema.PipelineTensor]:
    """The whole tensors of which the program uses parts."""
    used = {relocation.tensor for relocation in program.parameters}
    constants = {}
    for spec in build.parameters:
        if spec.name in used:
            file = build.parameter_file_of.get(spec.name)
            constants[spec.name] = schema.PipelineTensor(
                shape=spec.shape,
                dtype=SHORT_NAMES.get(spec.dtype.name, spec.dtype.name),
                value=schema.ConstantValue(
                    param_file=None if file is None else str(param_files.index(file)),
                    name=spec.name,
                    name_in_graph=spec.name,
                    placements=tuple((0, size) for size in spec.shape),
                ),
            )
    return constants


def _logits_rows(build: Build, bucket: Bucket) -> int:
    return 1 if build.last_token_only else bucket.input_ids_size

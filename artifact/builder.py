"""`ArtifactBuilder`: a model in, an artifact directory out. The place that joins the stages."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from .. import errors
from ..backend_rngd.isa.container import read_program
from ..frontend.block_count import declared_blocks
from ..frontend.parameters import bind_parameters
from ..frontend.source import ModelSource, open_model
from ..models.config_types import Bucket
from ..models.mesh import make_mesh
from ..models.stages import stage_count, stage_sizes
from . import atomic, schema
from .buckets import BucketShape, fit_context, parse_buckets
from .compile import CompileOptions, Progress, compile_model
from .describe import (
    Binary,
    Build,
    describe_artifact,
    describe_files,
    describe_runtime,
    describe_sharding,
)
from .parameter_files import ParameterFiles, copy_parameters, link_parameters
from .reader import running_version, sha256_of
from .schema import FileEntry, OptimizationLevel, PartialSum, WeightsMode
from .tilings import NO_PINS, ExplainedTiling, read_pins

Explain = Callable[[Sequence[ExplainedTiling]], None]
"""Told how the products of a bucket are cut."""

COMPILER_LIBRARIES = ("torch", "transformers", "xdsl")

BINARIES_BYTES = 64_000_000
"""Disk space that is asked for besides the parameters: binaries and tokenizer, with room."""


class ArtifactBuilder:
    """Builds one model for one set of buckets.

    `model_id_or_path` is a Hugging Face directory, a hub id or a GGUF file. Buckets are pairs of
    batch size and attention length in tokens; with none at all there is one prefill and one
    decode bucket of batch 1 and 2,048 tokens, or the model's context if that is shorter. With
    `calculate_logit_only_for_last_token=False`, prefill gives logits of every prompt token.
    `optimization_level` 0 keeps commands in program order, 1 overlaps them inside each kernel, 2
    across the kernels of a block. `pin_tiling` is a file of tilings that products must have.

    `devices` is a list such as `npu:0:0-3,npu:1:0-3` (see `models/devices.py`); by default each
    pipeline stage is on a card of its own. Stages have as many transformer blocks as
    `num_blocks_per_pp_stage` says, else equally many; only they and the devices are what a loader
    may change. `partial_sum` is the type in which tensor-parallel ranks exchange parts of sums.

    Raises: BLD002, BLD003, BLD014, BLD015, BCK006, PAR001 to PAR009, PAR012, PAR014 to
    PAR018.
    """

    def __init__(
        self,
        model_id_or_path: str | Path,
        name: str = "",
        *,
        devices: str | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int | None = None,
        num_blocks_per_pp_stage: Sequence[int] | None = None,
        partial_sum: PartialSum = "f32",
        prefill_buckets: Sequence[BucketShape] = (),
        decode_buckets: Sequence[BucketShape] = (),
        calculate_logit_only_for_last_token: bool = True,
        optimization_level: OptimizationLevel = 2,
        pin_tiling: str | Path | None = None,
    ) -> None:
        stages = stage_count(pipeline_parallel_size, num_blocks_per_pp_stage)
        self.mesh = make_mesh(devices, tp=tensor_parallel_size, pp=stages)
        if partial_sum not in get_args(PartialSum):
            raise errors.unknown_partial_sum(partial_sum, get_args(PartialSum))
        if optimization_level not in get_args(OptimizationLevel):
            raise errors.unknown_optimization_level(optimization_level, get_args(OptimizationLevel))
        self.model_id_or_path = model_id_or_path
        self.model_id = _model_id(model_id_or_path)
        self.name = name or self.model_id
        self.buckets = parse_buckets(prefill_buckets, decode_buckets)
        self.last_token_only = calculate_logit_only_for_last_token
        self.level = optimization_level
        self.stage_list = num_blocks_per_pp_stage
        self.partial_sum = partial_sum
        self.pins = NO_PINS if pin_tiling is None else read_pins(Path(pin_tiling))

    def build(
        self,
        save_dir: str | Path,
        *,
        weights: WeightsMode = "copy",
        dump_ir: str | Path | None = None,
        progress: Progress = lambda _: None,
        warn: Progress = warnings.warn,
        explain: Explain | None = None,
    ) -> None:
        """Write the artifact to `save_dir`, which appears, or is replaced, only when it is whole.

        Weights are copied in the model's declared type, hard-linked, or left out. `dump_ir` names
        a directory for the IR after every pass. `warn` is told what the weights lose on their
        way to bf16. `explain` gets the tilings of each bucket, and the next best ones.

        Raises: ART002 to ART004, BLDxxx, PAR010, PAR011, and what the compiler's stages raise.
        """
        if weights not in get_args(WeightsMode):
            raise errors.unknown_weights_mode(weights, get_args(WeightsMode))
        target = Path(save_dir).absolute()
        atomic.check_replaceable(target)
        if dump_ir is not None and Path(dump_ir).exists() and any(Path(dump_ir).iterdir()):
            raise errors.ir_directory_in_use(str(dump_ir))
        # Before torch is imported or weights are fetched: an impossible request fails in no time.
        if self.mesh.pp > 1 and (blocks := declared_blocks(self.model_id_or_path)) is not None:
            self._stage_sizes(blocks)
        _check_libraries()
        progress("reading the model")
        source = open_model(self.model_id_or_path, weights=weights != "skip")
        self._stage_sizes(source.config.num_hidden_layers)
        buckets = fit_context(self.buckets, _context_of(source))
        self.pins.check_buckets(buckets)
        if weights != "skip":
            _check_weights(source, target, weights)
        with atomic.replacing_directory(target) as staging:
            self._fill(staging, source, buckets, weights, dump_ir, progress, warn, explain)

    def _fill(
        self,
        directory: Path,
        source: ModelSource,
        buckets: Sequence[Bucket],
        weights: WeightsMode,
        dump_ir: str | Path | None,
        progress: Progress,
        warn: Progress,
        explain: Explain | None,
    ) -> None:
        files = write_all(directory, {**source.config_files, **source.tokenizer_files})
        dump_ir = None if dump_ir is None else Path(dump_ir)
        model = compile_model(
            source.config, buckets, self._options(explain is not None), dump_ir, progress
        )
        # Before the long part: weights that do not fit, or cannot be linked, stop the build here.
        stored, bound = ParameterFiles({}, {}), None
        if weights != "skip":
            bound = bind_parameters(model.parameters, source.checkpoint, tied=source.tied)
        if bound is not None and weights == "link":
            stored = link_parameters(directory, bound)
        for kind, count in bound.conversions().items() if bound is not None else ():
            warn(f"tensors converted from {kind} to bf16: {count}")

        binaries, shards = [], {}
        for compiled in model.binaries:
            shards[compiled.bucket] = compiled.shards
            name = f"{compiled.bucket.file_stem}.vedf"
            files |= write_all(directory, {name: compiled.data})
            binaries.append(Binary(compiled.bucket, name, read_program(compiled.data)))
            if explain is not None:
                explain(compiled.tilings)

        if self.mesh.tp > 1:
            sharding = schema.to_json(describe_sharding(shards)).encode()
            files |= write_all(directory, {schema.SHARDING_FILE: sharding})
        if bound is not None and weights == "copy":
            progress("storing the weights")
            stored = copy_parameters(directory, bound)

        build = Build(
            name=self.name,
            model_id=self.model_id,
            hf_config=json.loads(source.config.to_json_string(use_diff=False)),
            built_by=running_version(),
            tools={library: version(library) for library in COMPILER_LIBRARIES},
            weights=weights,
            last_token_only=self.last_token_only,
            level=self.level,
            mesh=self.mesh,
            stage_sizes=self._stage_sizes(source.config.num_hidden_layers),
            partial_sum=self.partial_sum,
            tiling_pins=self.pins.entries,
            binaries=binaries,
            parameters=model.parameters,
            parameter_file_of=stored.file_of,
            tied=source.tied,
        )
        describe_into(directory, build, {**files, **stored.files})

    def _options(self, compare_tilings: bool) -> CompileOptions:
        return CompileOptions(
            self.last_token_only,
            self.level,
            self.pins,
            compare_tilings,
            self.mesh.tp,
            self.partial_sum,
        )

    def _stage_sizes(self, blocks: int) -> tuple[int, ...]:
        """Transformer blocks of each stage. Raises: PAR010, PAR011."""
        return stage_sizes(blocks, self.mesh.pp, self.stage_list)


def _model_id(model: str | Path) -> str:
    """A hub id as it is; for a path its last part, so that no directory leaks into artifacts."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)


def _check_libraries() -> None:
    """Raises: ENV003 if only the runtime's libraries are installed."""
    for module in COMPILER_LIBRARIES:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise errors.library_missing(error.name or module) from error


def _context_of(source: ModelSource) -> int:
    """Tokens that the model can attend to. Raises: BLD012."""
    context = getattr(source.config, "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        raise errors.context_unknown(str(source.path))
    return context


def _check_weights(source: ModelSource, target: Path, weights: WeightsMode) -> None:
    """Whether the files are whole and there is room. Raises: CKPxxx, GGFxxx, BLD009."""
    stored_bytes = sum(tensor.nbytes for tensor in source.checkpoint.tensors.values())
    needed_bytes = BINARIES_BYTES + (stored_bytes if weights == "copy" else 0)
    atomic.check_free_space(target, needed_bytes)


def write_all(directory: Path, contents: Mapping[str, bytes]) -> dict[str, FileEntry]:
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return _entries(directory, contents)


def _entries(directory: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    return {
        name: FileEntry(
            size_bytes=(directory / name).stat().st_size, sha256=sha256_of(directory / name)
        )
        for name in names
    }


def describe_into(directory: Path, build: Build, files: Mapping[str, FileEntry]) -> None:
    """Write the three descriptions; the manifest, last, lists all other files."""
    descriptions = {
        schema.ARTIFACT_FILE: describe_artifact(build, files),
        schema.RUNTIME_CONFIG_FILE: describe_runtime(build),
    }
    written = write_all(
        directory, {name: schema.to_json(d).encode() for name, d in descriptions.items()}
    )
    manifest = describe_files(build, {**files, **written})
    write_all(directory, {schema.MANIFEST_FILE: schema.to_json(manifest).encode()})

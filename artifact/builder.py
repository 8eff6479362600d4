"""`ArtifactBuilder`: a model in, an artifact directory out. The place that joins the stages."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Unpack, get_args

from .. import errors
from ..backend_rngd.isa.container import read_program
from ..frontend.block_count import declared_blocks
from ..frontend.source import ModelSource, open_model
from ..models.config_types import Bucket, SchedulerConfig
from ..models.devices import is_device_list
from ..models.mesh import make_mesh
from ..models.stages import stage_count, stage_sizes
from . import atomic, schema
from .buckets import BucketShape, check_blocks, fit_context, parse_buckets
from .compile import CompileOptions, Progress, compile_model
from .describe import (
    Binary,
    Build,
    describe_artifact,
    describe_files,
    describe_runtime,
    describe_sharding,
)
from .ledger import LEDGER_FILE, check_losses, show_losses
from .option_checks import check_flag, check_number, check_scheduler, check_workers
from .parameter_files import ParameterFiles, copy_parameters, link_parameters
from .quantization import ModelTensors, open_directory, open_tensors
from .reader import running_version, sha256_of
from .schema import FileEntry, OptimizationLevel, PartialSum, WeightsMode
from .tilings import NO_PINS, ExplainedTiling, read_pins
from .vendor_options import VendorOptions, check_vendor_options

Explain = Callable[[Sequence[ExplainedTiling]], None]
"""Told how the products of a bucket are cut."""

SEED_TENSOR_PARALLEL = 4
"""Ranks by default, where devices are given as the vendor's builder takes them."""

DEFAULT_SCHEDULER = SchedulerConfig()

COMPILER_LIBRARIES = ("torch", "transformers", "xdsl")

BINARIES_BYTES = 64_000_000
"""Disk space that is asked for besides the parameters: binaries and tokenizer, with room."""


class ArtifactBuilder:
    """Builds one model for one set of buckets: `ArtifactBuilder(model, name)`.

    `model_id_or_path` is a Hugging Face directory, a hub id or a GGUF file. The second position is
    a list of devices (see `models/devices.py`) if there is a name besides or if it begins like one:
    `ArtifactBuilder(model, "npu:0", name)`. Such a builder has tensor-parallel size 4 by default,
    any other 1. Without devices each pipeline stage is on a card of its own; stages have as many
    transformer blocks as `num_blocks_per_pp_stage` says, else equally many. Only devices, stages
    and replicas (`data_parallel_size`) are what a loader may change.

    Buckets are pairs of batch size and attention length in tokens; with none at all there is one of
    each kind of batch 1 and `max_seq_len_to_capture` tokens; by default 2,048, or the model's
    context if that is shorter. With `calculate_logit_only_for_last_token=False`, prefill gives
    logits of every prompt token. `quantize_artifact_path` is a directory of Furiosa's quantiser.
    `paged_attention_num_blocks` is the most tokens that a loader's KV cache has, one of them for
    padding; `default_scheduler_config` is recorded for the loader.

    `optimization_level` 0 keeps commands in program order, 1 overlaps them inside each kernel, 2
    across the kernels of a block. `pin_tiling` is a file of tilings that products must have.
    `partial_sum` is the type in which tensor-parallel ranks exchange parts of sums. `allow_lossy`
    are patterns of tensors that need not be carried over exactly (`artifact/ledger.py`).

    Raises: BLD002, BLD003, BLD014, BLD015, BLD022 to BLD025, BLD027, BCK006, PAR001 to PAR009,
    PAR012, PAR014 to PAR018, QNT006, QNT012.
    """

    def __init__(
        self,
        model_id_or_path: str | Path,
        devices_or_name: str = "",
        name: str | None = None,
        *,
        devices: str | None = None,
        tensor_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        data_parallel_size: int | None = None,
        num_blocks_per_pp_stage: Sequence[int] | None = None,
        partial_sum: PartialSum = "f32",
        prefill_buckets: Sequence[BucketShape] = (),
        decode_buckets: Sequence[BucketShape] = (),
        max_seq_len_to_capture: int | None = None,
        calculate_logit_only_for_last_token: bool = True,
        quantize_artifact_path: str | Path | None = None,
        paged_attention_num_blocks: int | None = None,
        default_scheduler_config: SchedulerConfig = DEFAULT_SCHEDULER,
        optimization_level: OptimizationLevel = 2,
        pin_tiling: str | Path | None = None,
        allow_lossy: Sequence[str] = (),
        **vendor_options: Unpack[VendorOptions],
    ) -> None:
        check_vendor_options(vendor_options)
        check_flag("calculate_logit_only_for_last_token", calculate_logit_only_for_last_token)
        check_number("max_seq_len_to_capture", max_seq_len_to_capture)
        check_number("paged_attention_num_blocks", paged_attention_num_blocks)
        check_scheduler(default_scheduler_config)
        default_tp = 1
        if devices_or_name and (name is not None or is_device_list(devices_or_name)):
            if devices is not None:
                raise errors.devices_given_twice(devices_or_name, devices)
            devices, default_tp = devices_or_name, SEED_TENSOR_PARALLEL
        else:
            name = devices_or_name or name
        tp = default_tp if tensor_parallel_size is None else tensor_parallel_size
        stages = stage_count(pipeline_parallel_size, num_blocks_per_pp_stage)
        self.mesh = make_mesh(devices, tp=tp, pp=stages, dp=data_parallel_size)
        if partial_sum not in get_args(PartialSum):
            raise errors.unknown_partial_sum(partial_sum, get_args(PartialSum))
        if optimization_level not in get_args(OptimizationLevel):
            raise errors.unknown_optimization_level(optimization_level, get_args(OptimizationLevel))
        self.model_id_or_path = model_id_or_path
        self.model_id = _model_id(model_id_or_path)
        self.name = name or self.model_id
        self.buckets = parse_buckets(prefill_buckets, decode_buckets, max_seq_len_to_capture)
        self.last_token_only = calculate_logit_only_for_last_token
        self.num_blocks = paged_attention_num_blocks
        check_blocks(self.num_blocks, self.buckets)
        self.scheduler = default_scheduler_config
        self.level = optimization_level
        self.stage_list = num_blocks_per_pp_stage
        self.partial_sum = partial_sum
        self.pins = NO_PINS if pin_tiling is None else read_pins(Path(pin_tiling))
        self.allow_lossy = allow_lossy
        self.quantized = None
        if quantize_artifact_path is not None:
            self.quantized = open_directory(quantize_artifact_path)

    def build(
        self,
        save_dir: str | Path,
        *,
        num_pipeline_builder_workers: int = 1,
        num_compile_workers: int = 1,
        weights: WeightsMode = "copy",
        dump_ir: str | Path | None = None,
        progress: Progress = lambda _: None,
        warn: Progress = warnings.warn,
        explain: Explain | None = None,
    ) -> None:
        """Write the artifact to `save_dir`, which appears, or is replaced, only when it is whole.

        At most `num_compile_workers` processes compile buckets, no more than there are processors.
        The model is traced once for all of them, so one of `num_pipeline_builder_workers` is used,
        however many there may be. What is built depends on neither.

        Weights are copied in the model's declared type, hard-linked, or left out. `dump_ir` names
        a directory for the IR after every pass. `warn` is told what is lost of the weights, if
        anything may be. `explain` gets the tilings of each bucket, and the next best ones.

        Raises: ART002 to ART004, BLDxxx, PAR010, PAR011, and what the compiler's stages raise.
        """
        if weights not in get_args(WeightsMode):
            raise errors.unknown_weights_mode(weights, get_args(WeightsMode))
        check_workers("num_pipeline_builder_workers", num_pipeline_builder_workers)
        check_workers("num_compile_workers", num_compile_workers)
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
        check_blocks(self.num_blocks, buckets)
        self.pins.check_buckets(buckets)
        tensors = open_tensors(source, self.quantized)
        if weights != "skip":
            _check_weights(source, target, weights)
        with atomic.replacing_directory(target) as staging:
            self._fill(
                staging,
                tensors,
                buckets,
                weights,
                num_compile_workers,
                dump_ir,
                progress,
                warn,
                explain,
            )

    def _fill(
        self,
        directory: Path,
        tensors: ModelTensors,
        buckets: Sequence[Bucket],
        weights: WeightsMode,
        workers: int,
        dump_ir: str | Path | None,
        progress: Progress,
        warn: Progress,
        explain: Explain | None,
    ) -> None:
        source = tensors.source
        files = write_all(directory, {**source.config_files, **source.tokenizer_files})
        dump_ir = None if dump_ir is None else Path(dump_ir)
        model = compile_model(
            source.config,
            tensors.compiled,
            buckets,
            self._options(explain is not None),
            dump_ir,
            progress,
            workers,
        )
        # Before the long part: weights that do not fit, or cannot be linked, stop the build here.
        stored, bound = ParameterFiles({}, {}), None
        if weights != "skip":
            bound = tensors.bind(model.parameters)
        if bound is not None and weights == "link":
            stored = link_parameters(directory, bound)
        ledger = tensors.ledger(bound, model.frequencies)
        for line in show_losses(check_losses(ledger, self.allow_lossy)):
            warn(line)
        files |= write_all(directory, {LEDGER_FILE: schema.to_json(ledger).encode()})

        binaries, shards = [], {}
        with closing(model.binaries) as compiled_buckets:
            for compiled in compiled_buckets:
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
            scheduler=self.scheduler,
            num_blocks=self.num_blocks,
            quantization=tensors.described,
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

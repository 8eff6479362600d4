"""What `ArtifactBuilder` does around the compiler, which is replaced here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from model_zoo import make_model
from small_artifact import idle_program

from furiosa_llm.artifact import builder as builder_module
from furiosa_llm.artifact.builder import ArtifactBuilder
from furiosa_llm.artifact.compile import CompiledBucket, CompiledModel, CompileOptions
from furiosa_llm.artifact.reader import read_artifact
from furiosa_llm.backend_rngd.isa.container import write_program
from furiosa_llm.cli.main import main
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.frontend.parameters import ParameterSpec
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsFile
from furiosa_llm.models.config_types import Bucket, SchedulerConfig
from furiosa_llm.models.quantization import Quantization
from furiosa_llm.passes.shard_report import Exchange, ShardReport, TensorCut

BUCKETS: dict[str, Any] = {"prefill_buckets": [(1, 16)], "decode_buckets": [(1, 32), (4, 32)]}


SHARDS = ShardReport(
    (
        TensorCut("layers.0.w", (6, 4), (4, 4), 0, (((0, 3),), ((3, 6),)), 0.25, 1.0, "rows"),
        TensorCut(
            "kv_cache.0", ("slots", 3), ("slots", 2), 1, (((0, 2),), ((1, 3),)), 0, 4 / 3, "heads"
        ),
    ),
    (
        Exchange("all_reduce", "layers.*.w", 2, 2, 64, "f32", "switch", 7654, formula_cycles=321),
        Exchange("all_gather", "layers.*.v", 2, 2, 32, "f32", None, None, formula_cycles=None),
    ),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("zoo") / "tiny-llama", tokenizer=True)


def specs_in(directory: Path) -> tuple[ParameterSpec, ...]:
    tensors = SafetensorsFile(directory / "model.safetensors").tensors.values()
    return tuple(ParameterSpec(info.name, info.shape, info.dtype) for info in tensors)


@pytest.fixture(autouse=True)
def compiled(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the compiler; the list gets what it is asked for."""
    asked: list[Any] = []

    def compile_model(
        config: Any,
        quantization: Quantization | None,
        buckets: Sequence[Bucket],
        options: CompileOptions,
        dump_ir: Path | None,
        progress: Any,
        workers: int,
    ) -> CompiledModel:
        asked.append(
            (config.architectures[0], tuple(buckets), options.last_token_only, options.level)
        )
        binaries = (
            CompiledBucket(bucket, write_program(idle_program(bucket)), (), SHARDS)
            for bucket in buckets
        )
        return CompiledModel(specs_in(model), None, binaries)

    monkeypatch.setattr(builder_module, "compile_model", compile_model)
    return asked


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_artifact_holds_binaries_weights_tokenizer_and_configs(
    model: Path, tmp_path: Path
) -> None:
    ArtifactBuilder(model, **BUCKETS).build(tmp_path / "out")
    assert sorted(files_of(tmp_path / "out")) == [
        "artifact.json",
        "config.json",
        "decode-1-32.vedf",
        "decode-4-32.vedf",
        "generation_config.json",
        "manifest.json",
        "params-00001-of-00001.safetensors",
        "prefill-1-16.vedf",
        "quantization_ledger.json",
        "runtime_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    artifact = read_artifact(tmp_path / "out")
    assert artifact.manifest.model_id == "tiny-llama"
    assert artifact.description.metadata.name == "tiny-llama"
    assert artifact.vocabulary_size == 320
    source = artifact.parameters()
    own = SafetensorsFile(model / "model.safetensors")
    for name in own.tensors:
        assert source(name).tobytes() == own.read(name).tobytes()


def test_equal_builds_give_equal_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        ArtifactBuilder(model, **BUCKETS).build(tmp_path / name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_seeds_import_path_and_name_work(model: Path, tmp_path: Path) -> None:
    ArtifactBuilder(str(model), "my-name", **BUCKETS).build(str(tmp_path / "out"))
    assert read_artifact(tmp_path / "out").description.metadata.name == "my-name"


def test_default_buckets_are_capped_to_the_context(
    model: Path, tmp_path: Path, compiled: list[Any]
) -> None:
    ArtifactBuilder(model).build(tmp_path / "out", weights="skip")
    expected = (Bucket.prefill(1, 512), Bucket.decode(1, 512))
    assert compiled == [("LlamaForCausalLM", expected, True, 2)]


def test_all_logits_are_recorded_when_asked_for(
    model: Path, tmp_path: Path, compiled: list[Any]
) -> None:
    options = {**BUCKETS, "calculate_logit_only_for_last_token": False}
    ArtifactBuilder(model, **options).build(tmp_path / "out", weights="skip")
    assert compiled[0][2] is False
    rows = read_artifact(tmp_path / "out").description.pipeline_metadata_list
    assert [entry.output_logits_size for entry in rows] == [16, 1, 1]


def test_linked_weights_are_the_checkpoints_own(model: Path, tmp_path: Path) -> None:
    out = model.parent / "linked"  # on the same file system
    ArtifactBuilder(model, **BUCKETS).build(out, weights="link")
    linked = out / "params-00001-of-00001.safetensors"
    assert linked.samefile(model / "model.safetensors")
    assert read_artifact(out).parameters()("model.norm.weight").shape == (64,)


def test_without_weights_there_are_no_parameter_files(model: Path, tmp_path: Path) -> None:
    ArtifactBuilder(model, **BUCKETS).build(tmp_path / "out", weights="skip")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    artifact = read_artifact(tmp_path / "out")
    with pytest.raises(FuriosaLLMError, match="RUN006"):
        artifact.parameters()
    assert artifact.parameters(model)("model.norm.weight").shape == (64,)


def test_a_config_alone_builds_without_weights(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config-only").mkdir()
    config = (model / "config.json").read_bytes()
    (tmp_path / "config-only" / "config.json").write_bytes(config)
    builder = ArtifactBuilder(tmp_path / "config-only", **BUCKETS)
    builder.build(tmp_path / "out", weights="skip")
    with pytest.raises(FuriosaLLMError, match="CKP001"):
        builder.build(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_progress_is_told(model: Path, tmp_path: Path) -> None:
    told: list[str] = []
    ArtifactBuilder(model, **BUCKETS).build(tmp_path / "out", progress=told.append)
    assert told == ["reading the model", "storing the weights"]


def test_a_bucket_beyond_the_context_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, compiled: list[Any]
) -> None:
    with pytest.raises(FuriosaLLMError, match="BLD004"):
        ArtifactBuilder(model, prefill_buckets=[(1, 513)]).build(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert compiled == []


def test_an_output_that_is_something_else_is_refused_first(
    model: Path, tmp_path: Path, compiled: list[Any]
) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(FuriosaLLMError, match="ART002"):
        ArtifactBuilder(model, **BUCKETS).build(tmp_path)
    with pytest.raises(FuriosaLLMError, match="ART002"):
        ArtifactBuilder(model, **BUCKETS).build(model)  # the model's own directory
    assert compiled == []


def test_a_config_without_a_context_length_is_refused(model: Path, tmp_path: Path) -> None:
    fields = json.loads((model / "config.json").read_text())
    fields["max_position_embeddings"] = 0
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(FuriosaLLMError, match="BLD012"):
        ArtifactBuilder(tmp_path / "model").build(tmp_path / "out", weights="skip")


def test_the_optimization_level_is_recorded_and_part_of_the_identity(
    model: Path, tmp_path: Path, compiled: list[Any]
) -> None:
    ArtifactBuilder(model, **BUCKETS).build(tmp_path / "2")
    ArtifactBuilder(model, **BUCKETS, optimization_level=0).build(tmp_path / "0")
    assert [asked[3] for asked in compiled] == [2, 0]
    two, zero = (read_artifact(tmp_path / name) for name in "20")
    assert (two.manifest.optimization_level, zero.manifest.optimization_level) == (2, 0)
    # The replaced compiler gives the same binaries for both.
    assert two.description.metadata.artifact_id != zero.description.metadata.artifact_id


def test_devices_may_stand_in_the_second_position_as_in_the_seed(model: Path) -> None:
    builder = ArtifactBuilder(model, "npu:0", "llama")
    assert (builder.mesh.name, builder.name) == ("npu:0:0-3,npu:0:4-7", "llama")
    builder = ArtifactBuilder(model, "npu:1:0-1", tensor_parallel_size=2)
    assert (builder.mesh.name, builder.name) == ("npu:1:0-1", "tiny-llama")
    builder = ArtifactBuilder(model, "npu:1", name="llama", tensor_parallel_size=8)
    assert (builder.mesh.name, builder.name) == ("npu:1", "llama")


def test_two_positions_are_model_and_name(model: Path) -> None:
    builder = ArtifactBuilder(model, "llama", devices="npu:1:3")
    assert (builder.mesh.name, builder.name) == ("npu:1:3", "llama")
    assert ArtifactBuilder(model, name="llama").name == "llama"
    assert ArtifactBuilder(model).name == "tiny-llama"


@pytest.mark.parametrize(
    ("positions", "keywords", "code"),
    [
        (("gpu", "llama"), {}, "PAR001"),  # three positions: the second one is devices
        (("npu:x",), {}, "PAR001"),  # begins like devices, so it is no name
        (("npu:0", "llama"), {"devices": "npu:1"}, "BLD025"),
        (("npu:0:0",), {}, "PAR005"),  # the seed's default of four ranks
    ],
)
def test_positions_that_fit_neither_form_are_refused(
    model: Path, positions: tuple[str, ...], keywords: dict[str, Any], code: str
) -> None:
    with pytest.raises(FuriosaLLMError) as caught:
        ArtifactBuilder(model, *positions, **keywords)
    assert caught.value.code == code


def test_replicas_are_recorded(model: Path, tmp_path: Path) -> None:
    ArtifactBuilder(model, **BUCKETS, data_parallel_size=3).build(tmp_path / "out")
    assert read_artifact(tmp_path / "out").description.devices == "npu:0:0,npu:0:1,npu:0:2"


def test_the_longest_sequence_bounds_buckets_and_is_their_default(
    model: Path, tmp_path: Path, compiled: list[Any]
) -> None:
    ArtifactBuilder(model, max_seq_len_to_capture=64).build(tmp_path / "out", weights="skip")
    assert compiled[0][1] == (Bucket.prefill(1, 64), Bucket.decode(1, 64))
    ArtifactBuilder(model, **BUCKETS, max_seq_len_to_capture=32)
    with pytest.raises(FuriosaLLMError, match="BLD022"):
        ArtifactBuilder(model, **BUCKETS, max_seq_len_to_capture=31)
    with pytest.raises(FuriosaLLMError, match="BLD004"):
        ArtifactBuilder(model, max_seq_len_to_capture=513).build(tmp_path / "long", weights="skip")


def test_scheduler_and_blocks_are_recorded_and_part_of_the_identity(
    model: Path, tmp_path: Path
) -> None:
    scheduler = SchedulerConfig(max_processing_samples=24576, spare_blocks_ratio=0.6)
    for name, options in (
        ("plain", {}),
        ("scheduler", {"default_scheduler_config": scheduler}),
        ("blocks", {"paged_attention_num_blocks": 512_000}),
    ):
        ArtifactBuilder(model, **{**BUCKETS, **options}).build(tmp_path / name)
    plain, with_scheduler, with_blocks = (
        read_artifact(tmp_path / name) for name in ("plain", "scheduler", "blocks")
    )
    assert plain.runtime_config.max_processing_samples == 65536
    assert with_scheduler.runtime_config.max_processing_samples == 24576
    assert with_scheduler.runtime_config.spare_blocks_ratio == 0.6
    assert plain.runtime_config.paged_attention_num_blocks is None
    assert with_blocks.runtime_config.paged_attention_num_blocks == 512_000
    paged = with_blocks.description.generator_config.paged_attention_config
    assert paged.num_blocks == 512_000
    artifacts = (plain, with_scheduler, with_blocks)
    assert len({one.description.metadata.artifact_id for one in artifacts}) == 3


def test_a_cache_that_does_not_hold_a_sequence_is_refused(model: Path, tmp_path: Path) -> None:
    ArtifactBuilder(model, **BUCKETS, paged_attention_num_blocks=33)
    with pytest.raises(FuriosaLLMError, match="BLD024"):
        ArtifactBuilder(model, **BUCKETS, paged_attention_num_blocks=32)
    with pytest.raises(FuriosaLLMError, match="BLD024"):  # the default buckets hold 512 tokens
        ArtifactBuilder(model, paged_attention_num_blocks=512).build(tmp_path / "out")


def test_chunked_prefill_is_refused(model: Path) -> None:
    with pytest.raises(FuriosaLLMError, match="BLD023"):
        ArtifactBuilder(model, default_scheduler_config=SchedulerConfig(prefill_chunk_size=64))


@pytest.mark.parametrize("option", ["num_compile_workers", "num_pipeline_builder_workers"])
def test_less_than_one_worker_is_refused(model: Path, tmp_path: Path, option: str) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(FuriosaLLMError, match="BLD020") as caught:
        ArtifactBuilder(model, **BUCKETS).build(tmp_path / "out", **options)
    assert caught.value.at == option


@pytest.mark.parametrize(
    "options",
    [
        {"calculate_logit_only_for_last_token": "False"},
        {"calculate_logit_only_for_last_token": None},
        {"max_seq_len_to_capture": "64"},
        {"paged_attention_num_blocks": 512e3},
        {"default_scheduler_config": {"npu_queue_limit": 2}},
        {"prefill_buckets": [(1, "16")]},
        {"prefill_buckets": [(1, 16, 0)]},
        {"prefill_buckets": (1, 16)},
        {"decode_buckets": ["1,32"]},
        {"decode_buckets": [(True, 32)]},
        {"decode_buckets": None},
    ],
)
def test_values_of_another_type_are_refused(model: Path, options: dict[str, Any]) -> None:
    with pytest.raises(FuriosaLLMError) as caught:
        ArtifactBuilder(model, **options)
    assert caught.value.code == "BLD027"
    assert caught.value.at in options


@pytest.mark.parametrize("count", ["2", 1.0, None, True])
def test_workers_are_whole_numbers(model: Path, tmp_path: Path, count: Any) -> None:
    with pytest.raises(FuriosaLLMError, match="BLD027"):
        ArtifactBuilder(model, **BUCKETS).build(tmp_path / "out", num_compile_workers=count)


def test_a_quantisation_directory_is_checked_at_once(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FuriosaLLMError, match="QNT012"):
        ArtifactBuilder(model, quantize_artifact_path=tmp_path / "absent")
    directory = tmp_path / "quantized"
    directory.mkdir()
    for name in ("qformat.yaml", "qparam.npy"):
        with pytest.raises(FuriosaLLMError, match="QNT006") as caught:
            ArtifactBuilder(model, quantize_artifact_path=directory)
        assert f"no {name}" in caught.value.message
        (directory / name).touch()
    ArtifactBuilder(model, quantize_artifact_path=directory)


def test_options_that_mean_nothing_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FuriosaLLMError, match="BLD010"):
        ArtifactBuilder(model).build(tmp_path / "out", weights="move")  # type: ignore[arg-type]
    with pytest.raises(FuriosaLLMError, match="BLD014"):
        ArtifactBuilder(model, optimization_level=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bucket"):
        ArtifactBuilder(model, bucket=[(1, 16)])  # type: ignore[call-arg]


def test_ir_does_not_go_where_files_are(model: Path, tmp_path: Path) -> None:
    (tmp_path / "ir").mkdir()
    (tmp_path / "ir" / "00-import.mlir").write_text("of another build")
    with pytest.raises(FuriosaLLMError) as caught:
        ArtifactBuilder(model, **BUCKETS).build(tmp_path / "out", dump_ir=tmp_path / "ir")
    assert caught.value.code == "BLD013"
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_division_over_devices_is_recorded_and_part_of_the_identity(
    model: Path, tmp_path: Path
) -> None:
    ArtifactBuilder(model, **BUCKETS).build(tmp_path / "one")
    ArtifactBuilder(
        model, **BUCKETS, devices="npu:2:0-1", num_blocks_per_pp_stage=[1, 1], partial_sum="bf16"
    ).build(tmp_path / "two")
    one, two = read_artifact(tmp_path / "one"), read_artifact(tmp_path / "two")
    assert one.description.devices == "npu:0:0"
    assert one.manifest.num_blocks_per_pp_stage == (2,)
    assert one.manifest.partial_sum == "f32"
    assert two.description.devices == "npu:2:0,npu:2:1"
    assert two.description.parallel_config.pipeline_parallel_size == 2
    assert two.description.pipelines[0].devices == {"0": "npu:2:0", "1": "npu:2:1"}
    assert two.manifest.num_blocks_per_pp_stage == (1, 1)
    assert two.manifest.partial_sum == "bf16"
    assert one.description.metadata.artifact_id != two.description.metadata.artifact_id


def test_an_unknown_type_of_partial_sums_is_refused(model: Path) -> None:
    with pytest.raises(FuriosaLLMError, match="PAR017"):
        ArtifactBuilder(model, partial_sum="f16")  # type: ignore[arg-type]


def test_how_tensors_are_cut_is_stored_and_shown(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ArtifactBuilder(model, **BUCKETS).build(tmp_path / "one")
    assert read_artifact(tmp_path / "one").sharding is None
    ArtifactBuilder(model, **BUCKETS, tensor_parallel_size=2).build(tmp_path / "two")
    sharding = read_artifact(tmp_path / "two").sharding
    assert sharding is not None
    assert [(t.name, t.part, t.why) for t in sharding.tensors] == [
        ("layers.0.w", (4, 4), "rows"),
        ("kv_cache.0", ("slots", 2), "heads"),
    ]
    assert [one.bytes for one in sharding.exchanges["decode:4,32"]] == [64, 32]
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "two")])
    assert result.exit_code == 0, result.output
    for shown in (
        "layers.*.w",
        "slots x 2",
        "25%",
        "1.3",
        "exchanges of decode:4,32",
        "7,654",
        "321",
    ):
        assert shown in result.stdout

"""What `build` makes of its options, without building anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from furiosa_llm.artifact.builder import ArtifactBuilder
from furiosa_llm.cli.build import command
from furiosa_llm.cli.main import main
from furiosa_llm.cli.model_options import KEYS


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments that reach `ArtifactBuilder`."""
    seen: list[dict[str, Any]] = []

    def build(self: ArtifactBuilder, save_dir: Path, **options: Any) -> None:
        del options["progress"], options["warn"], options["explain"]
        seen.append(
            {
                "model": self.model_id_or_path,
                "name": self.name,
                "devices": self.mesh.name,
                "buckets": [bucket.name for bucket in self.buckets],
                "last_token_only": self.last_token_only,
                "level": self.level,
                "output": save_dir,
                **options,
            }
        )

    monkeypatch.setattr(ArtifactBuilder, "build", build)
    return seen


def build(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["build", *arguments])


def invoke(*arguments: str) -> Any:
    return build("MODEL", "OUT", *arguments)


def test_defaults(calls: list[dict[str, Any]]) -> None:
    result = invoke()
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "Artifact Build Completed"
    assert calls == [
        {
            "model": "MODEL",
            "name": "MODEL",
            "devices": "npu:0:0",
            "buckets": [],
            "last_token_only": True,
            "level": 2,
            "output": Path("OUT"),
            "num_pipeline_builder_workers": 1,
            "num_compile_workers": 1,
            "weights": "copy",
            "dump_ir": None,
        }
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-tp", "1", "-pb", "1,128", "-db", "1,256", "-db", "4,256"],
        ["--pb", "1,128", "--db", "1,256", "--db", "4,256"],
        ["-pb=1,128", "--decode-buckets", "1,256", "--decode-buckets=4,256"],
        ["--prefill-buckets", "1,128", "-db", "4,256", "-db", "1,256"],
    ],
)
def test_all_spellings_of_buckets(calls: list[dict[str, Any]], arguments: list[str]) -> None:
    assert invoke(*arguments).exit_code == 0
    assert calls[0]["buckets"] == ["prefill:1,128", "decode:1,256", "decode:4,256"]


def test_other_options_are_passed_on(calls: list[dict[str, Any]]) -> None:
    key = "calculate_logit_only_for_last_token"
    result = invoke(
        "-O1", "--weights", "skip", "--dump-ir", "ir", "--additional-model-config", f"{key}=false"
    )
    assert result.exit_code == 0
    assert calls[0]["level"] == 1
    assert calls[0]["weights"] == "skip"
    assert calls[0]["dump_ir"] == Path("ir")
    assert calls[0]["last_token_only"] is False


MODEL_STAGES = ["--additional-model-config", "num_blocks_per_pp_stage=2,1"]

SEED = """
    OUT
    --model-id MODEL
    --devices npu:0
    --name mlperf-llama3-1-8b-fp8
    -tp 4 -pp 1
    -pb 1,512 -pb 1,1024
    -db 1,2048 -db 8,2048 -db 16,2048 -db 64,2048 -db 128,2048
    --paged-attention-num-blocks 512000
    --additional-model-config calculate_logit_only_for_last_token=True
    --num-pipeline-builder-workers 4
    --num-compile-workers 4
"""


def test_the_seeds_command_line(calls: list[dict[str, Any]]) -> None:
    result = build(*SEED.split())
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "Artifact Build Completed"
    assert calls == [
        {
            "model": "MODEL",
            "name": "mlperf-llama3-1-8b-fp8",
            "devices": "npu:0:0-3,npu:0:4-7",
            "buckets": [
                *("prefill:1,512", "prefill:1,1024", "decode:1,2048", "decode:8,2048"),
                *("decode:16,2048", "decode:64,2048", "decode:128,2048"),
            ],
            "last_token_only": True,
            "level": 2,
            "output": Path("OUT"),
            "num_pipeline_builder_workers": 4,
            "num_compile_workers": 4,
            "weights": "copy",
            "dump_ir": None,
        }
    ]


def test_beside_a_model_id_four_ranks_are_the_default(calls: list[dict[str, Any]]) -> None:
    assert build("--model-id", "MODEL", "OUT").exit_code == 0
    assert build("OUT", "--model-id", "MODEL", "-tp", "1").exit_code == 0
    assert [(call["model"], call["devices"]) for call in calls] == [
        ("MODEL", "npu:0:0-3"),
        ("MODEL", "npu:0:0"),
    ]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], "ENV004"),
        (["ONE"], "BLD018"),
        (["--model-id", "M"], "ENV004"),
        (["--model-id", "M", "A", "B", "C"], "ENV004"),
    ],
)
def test_positional_arguments_of_neither_dialect(
    calls: list[dict[str, Any]], arguments: list[str], code: str
) -> None:
    result = build(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error[{code}]")
    assert calls == []


@pytest.mark.parametrize(
    "item",
    [
        "use_blockwise_compile=True",
        "num_blocks_per_supertask=1",
        "embed_all_constants_into_graph=False",
        "do_decompositions_for_model_rewrite=False",
        "add_prefill_last_block_slice=False",
    ],
)
def test_what_a_build_does_anyway_may_be_said(calls: list[dict[str, Any]], item: str) -> None:
    assert invoke("--additional-model-config", item).exit_code == 0
    assert len(calls) == 1


def test_stages_may_be_in_the_model_config(calls: list[dict[str, Any]]) -> None:
    assert invoke(*MODEL_STAGES).exit_code == 0
    assert calls[0]["devices"] == "npu:0:0,npu:1:0"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-pb", "1"], "BLD001"),
        (["-pb", "1,2,3"], "BLD001"),
        (["--db", "1,x"], "BLD001"),
        (["-pb", "0,128"], "BLD002"),
        (["-db", "1,1"], "BLD002"),
        (["-pb", "1,8", "-pb", "1,8"], "BLD003"),
        (["--additional-model-config", "num_layers=2"], "BLD006"),
        (["--additional-model-config", "num_hidden_layers=2"], "BLD023"),
        (["--additional-model-config", "num_hidden_layers=two"], "BLD026"),
        (["--additional-model-config", "seed=1"], "BLD023"),
        (["--additional-model-config", "seed_for_random_weight=1"], "BLD023"),
        (["--additional-model-config", "use_blockwise_compile=false"], "BLD023"),
        (["--additional-model-config", "num_blocks_per_supertask=2"], "BLD023"),
        (["--additional-model-config", "embed_all_constants_into_graph=true"], "BLD023"),
        (["--additional-model-config", "do_decompositions_for_model_rewrite=true"], "BLD023"),
        (["--additional-model-config", "add_prefill_last_block_slice=true"], "BLD023"),
        (["--additional-model-config", "optimize_logit_shape=true"], "BLD023"),
        (["--additional-model-config", "num_blocks_per_pp_stage=a"], "PAR013"),
        (["--kv-cache-sharing-across-beams-config", "4,128"], "BLD023"),
        (["-pb", "1,128", "--max-seq-len-to-capture", "64"], "BLD022"),
        (["--max-seq-len-to-capture", "1"], "BLD002"),
        (["-db", "1,128", "--paged-attention-num-blocks", "128"], "BLD024"),
        (["--quantization-artifact-path", "nowhere"], "QNT012"),
        (["-dp", "0"], "PAR014"),
        (["--model-id", "MODEL"], "BLD017"),
        (["ANOTHER"], "ENV004"),
        (["--num-blocks-per-pp-stage", "1,1", *MODEL_STAGES], "ENV004"),
        ([*MODEL_STAGES, "--num-blocks-per-pp-stage", "1,1"], "ENV004"),
        (["--additional-model-config", "calculate_logit_only_for_last_token=yes"], "BLD007"),
        (["--additional-model-config", "calculate_logit_only_for_last_token"], "BLD011"),
    ],
)
def test_wrong_values_are_coded_usage_errors(
    calls: list[dict[str, Any]], arguments: list[str], code: str
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error[{code}]")
    assert calls == []


def test_a_malformed_bucket_names_the_option_that_was_used(calls: list[dict[str, Any]]) -> None:
    assert "-db" in invoke("-db", "1").stderr


USAGE = """
    --model-id --name --devices -tp --tensor-parallel-size -pp --pipeline-parallel-size
    -dp --data-parallel-size -pb --prefill-buckets -db --decode-buckets --max-seq-len-to-capture
    --additional-model-config --quantization-artifact-path --kv-cache-sharing-across-beams-config
    --paged-attention-num-blocks --num-pipeline-builder-workers --num-compile-workers
"""
"""All options of the seed's usage text."""


def test_every_option_of_the_seed_is_known_and_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "build.md").read_text()
    known = {name for option in command.params for name in option.opts}
    for name in USAGE.split():
        assert name in known
    for option in command.params:
        if set(option.opts) & set(USAGE.split()):
            assert any(f"`{name}" in page for name in option.opts), option.name
    for key in KEYS:
        assert f"`{key}`" in page

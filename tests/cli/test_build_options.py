"""What `build` makes of its options, without building anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from furiosa_llm.artifact.builder import ArtifactBuilder
from furiosa_llm.cli.main import main


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments that reach `ArtifactBuilder`."""
    seen: list[dict[str, Any]] = []

    def build(self: ArtifactBuilder, save_dir: Path, **options: Any) -> None:
        del options["progress"], options["warn"], options["explain"]
        seen.append(
            {
                "model": self.model_id_or_path,
                "buckets": [bucket.name for bucket in self.buckets],
                "last_token_only": self.last_token_only,
                "level": self.level,
                "output": save_dir,
                **options,
            }
        )

    monkeypatch.setattr(ArtifactBuilder, "build", build)
    return seen


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["build", "MODEL", "OUT", *arguments])


def test_defaults(calls: list[dict[str, Any]]) -> None:
    result = invoke()
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "Artifact Build Completed"
    assert calls == [
        {
            "model": "MODEL",
            "buckets": [],
            "last_token_only": True,
            "level": 2,
            "output": Path("OUT"),
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

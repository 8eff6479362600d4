from __future__ import annotations

from click.testing import CliRunner

from furiosa_llm.cli.main import main


def test_stdin_is_read() -> None:
    result = CliRunner().invoke(main, ["opt", "-"], input="builtin.module {\n}\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("builtin.module")


def test_what_is_not_text_is_refused() -> None:
    result = CliRunner().invoke(main, ["opt", "-"], input=b"\xff\xfe")
    assert (result.exit_code, result.stderr[:13]) == (1, "error[IRV008]")
    assert "Traceback" not in result.output

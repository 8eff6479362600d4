from __future__ import annotations

import json

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


def test_json_has_the_text_of_each_module() -> None:
    text = "builtin.module {\n}\n"
    arguments = ["opt", "-", "--json", "--split-input-file"]
    result = CliRunner().invoke(main, arguments, input=f"{text}// -----\n{text}")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"modules": ["builtin.module {\n} loc(unknown)\n"] * 2}

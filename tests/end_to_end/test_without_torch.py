"""An artifact runs where only the runtime's libraries are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from furiosa_llm.cli.main import main

WITHOUT_COMPILER_LIBRARIES = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "xdsl", "gguf"}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refuse())
from furiosa_llm.cli.main import main
main()
"""


def test_all_commands_on_an_artifact(artifact: Path) -> None:
    for arguments in (
        ["run", str(artifact), "--prompt", "hello", "--max-tokens", "3", "--json"],
        ["run", str(artifact), "--prompt", "hello", "--max-tokens", "3", "--json", "-pp", "2"],
        ["profile", str(artifact), "--json"],
        ["inspect", str(artifact), "--json"],
    ):
        command = [sys.executable, "-c", WITHOUT_COMPILER_LIBRARIES, *arguments]
        alone = subprocess.run(command, capture_output=True, text=True)
        assert alone.returncode == 0, alone.stderr
        with_torch = CliRunner().invoke(main, arguments)
        assert json.loads(alone.stdout) == json.loads(with_torch.stdout)

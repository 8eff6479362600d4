from __future__ import annotations

import subprocess
import sys

import pytest

import furiosa_llm

WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Refuse())
"""
COMPILER = {"torch", "transformers", "xdsl", "gguf"}


def python(program: str, blocked: set[str]) -> str:
    """What `program` prints in a process that cannot import some libraries."""
    command = [sys.executable, "-c", WITHOUT.format(blocked=blocked) + program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", furiosa_llm.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(furiosa_llm, name).__name__ == name


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Nonsense"):
        furiosa_llm.Nonsense  # noqa: B018


def test_the_import_itself_needs_no_library() -> None:
    libraries = {"numpy", "pydantic", "click", *COMPILER}
    assert python("import furiosa_llm; print('ok')", libraries) == "ok\n"


def test_running_needs_no_compiler_library() -> None:
    modules = ["artifact.profile", "artifact.summary", "llm.llm", "llm.device", "cli.run"]
    imports = "\n".join(f"import furiosa_llm.{module}" for module in modules)
    assert python(f"{imports}\nprint('ok')", COMPILER) == "ok\n"


def test_building_without_the_compilers_libraries_is_a_coded_error() -> None:
    program = """
from furiosa_llm import ArtifactBuilder
from furiosa_llm.errors import FuriosaLLMError
try:
    ArtifactBuilder("model").build("out")
except FuriosaLLMError as error:
    print(error.code)
"""
    assert python(program, COMPILER) == "ENV003\n"

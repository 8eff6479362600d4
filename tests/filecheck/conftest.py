"""Runs FileCheck tests inside pytest: every `.mlir` file here says in a RUN line how it is tested.

    // RUN: furiosa-llm opt %s --passes "canonicalize,dce" --split-input-file | filecheck %s
    // RUN: not furiosa-llm opt %s --split-input-file | filecheck %s

The pipeline runs in this process. With `not`, each `// -----` part must be refused, and the texts
of the errors are what is checked.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import parse_argv_options
from filecheck.parser import Parser

from furiosa_llm.errors import FuriosaLLMError

SEPARATOR = "// -----"


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> FileCheckFile | None:
    if file_path.suffix != ".mlir":
        return None
    return FileCheckFile.from_parent(parent, path=file_path)


class FileCheckFile(pytest.File):
    def collect(self) -> Iterator[FileCheckTest]:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        commands = [line.split("RUN:", 1)[1] for line in lines if line.startswith("// RUN:")]
        for index, command in enumerate(commands, start=1):
            yield FileCheckTest.from_parent(self, name=f"run{index}", command=command)
        if not commands:
            yield FileCheckTest.from_parent(self, name="run", command="")


class FileCheckFailure(Exception):
    """What was expected and what came, ready to be read."""


class FileCheckTest(pytest.Item):
    def __init__(self, *, command: str, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.command = command

    def runtest(self) -> None:
        run_line = RunLine.parse(self.command)
        text = self.path.read_text(encoding="utf-8")
        output = run_line.expect_errors(text) if run_line.fails else run_line.output(text)
        check(self.path, output, run_line.filecheck_options)

    def repr_failure(  # type: ignore[override]
        self, excinfo: pytest.ExceptionInfo[BaseException]
    ) -> object:
        if isinstance(excinfo.value, FileCheckFailure | FuriosaLLMError):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.name


@dataclass(frozen=True)
class RunLine:
    """One parsed RUN line."""

    fails: bool
    passes: str
    split_input_file: bool
    filecheck_options: tuple[str, ...]

    @staticmethod
    def parse(command: str) -> RunLine:
        words = shlex.split(command)
        if words.count("|") != 1:
            raise FileCheckFailure("a RUN line is `furiosa-llm opt %s … | filecheck %s`")
        opt, filecheck = words[: words.index("|")], words[words.index("|") + 1 :]
        fails = opt[:1] == ["not"]
        opt = [word for word in opt[fails:] if word != "2>&1"]
        if opt[:3] != ["furiosa-llm", "opt", "%s"] or filecheck[:2] != ["filecheck", "%s"]:
            raise FileCheckFailure(f"cannot run `{command.strip()}`")
        options = opt[3:]
        passes = ""
        if "--passes" in options:
            index = options.index("--passes")
            passes = options[index + 1]
            del options[index : index + 2]
        split_input_file = "--split-input-file" in options
        unknown = [word for word in options if word != "--split-input-file"]
        if unknown:
            raise FileCheckFailure(f"unknown in a RUN line: {' '.join(unknown)}")
        return RunLine(fails, passes, split_input_file, tuple(filecheck[2:]))

    def output(self, text: str) -> str:
        return opt(text, self.passes, self.split_input_file)

    def expect_errors(self, text: str) -> str:
        parts = text.split(SEPARATOR) if self.split_input_file else [text]
        messages = []
        for number, part in enumerate(parts, start=1):
            try:
                output = opt(part, self.passes, split_input_file=False)
            except FuriosaLLMError as error:
                messages.append(str(error))
            else:
                raise FileCheckFailure(f"part {number} should be refused, but it gave\n{output}")
        return f"\n{SEPARATOR}\n".join(messages)


def opt(text: str, passes: str, split_input_file: bool) -> str:
    """What `furiosa-llm opt` prints, the backend's passes and dialect included."""
    from furiosa_llm.backend_rngd.pipeline import DIALECTS, PASSES
    from furiosa_llm.passes.opt_tool import run_opt

    return run_opt(text, passes, split_input_file, registry=PASSES, extra_dialects=DIALECTS)


def check(path: Path, output: str, options: tuple[str, ...]) -> None:
    """Raises FileCheckFailure with filecheck's message and the whole output."""
    parsed = parse_argv_options(["filecheck", str(path), *options])
    stderr = io.StringIO()
    with redirect_stderr(stderr):
        file = FInput("<output of furiosa-llm opt>", output)
        code = Matcher(parsed, file, Parser.from_opts(parsed)).run()
    if code != 0:
        raise FileCheckFailure(f"{stderr.getvalue()}\nthe output was\n{output}")

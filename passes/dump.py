"""IR files of a pipeline: one per pass that changed something, each with a header that tells
what made it and what comes next.

    // pass: prune-logits
    // options: {rows=1}
    // next: specialize-bucket{kind=decode batch=4 length=256}

`furiosa-llm opt FILE --passes NEXT`, with the first passes of `next`, gives the following file
byte for byte, header and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from xdsl.passes import ModulePass

from .. import errors
from .pipeline_text import show_options, show_passes

_PASS, _OPTIONS, _NEXT = "// pass:", "// options:", "// next:"


@dataclass(frozen=True)
class Header:
    """The comment at the top of an IR file."""

    made_by: str
    options: str
    following: tuple[str, ...]
    """The passes that come next and change something, each as a pipeline of its own."""

    def text(self) -> str:
        lines = (
            f"{_PASS} {self.made_by}",
            f"{_OPTIONS} {self.options}",
            f"{_NEXT} {','.join(self.following)}".rstrip(),
        )
        return "".join(f"{line}\n" for line in lines)

    def after(self, one: ModulePass, *, changed: bool) -> Header:
        """The header once `one` has run: it stays the same if the pass had nothing to do."""
        (name,) = pipeline_items([one])
        following = self.following
        if name in following:
            following = following[following.index(name) + 1 :]
        if not changed:
            return replace(self, following=following)
        return Header(one.name, show_options(one), following)


def pipeline_items(passes: Sequence[ModulePass]) -> tuple[str, ...]:
    """Each pass as text."""
    return tuple(show_passes([one]) for one in passes)


def read_header(text: str) -> tuple[str, str, str] | None:
    """Pass, options and what comes next, as they are written; None if the text has no header."""
    lines = text.lstrip("\n").split("\n", 3)[:3]
    marks = (_PASS, _OPTIONS, _NEXT)
    if len(lines) < 3 or not all(map(str.startswith, lines, marks)):
        return None
    made_by, options, following = map(str.removeprefix, lines, marks)
    return made_by.strip(), options.strip(), following.strip()


@dataclass
class IrDump:
    """Writes the files of one pipeline.

    Files are numbered by the pass's place in the pipeline, so a gap is a pass without effect. As
    which passes those are is only known at the end, `finish` takes them out of the headers; if
    the pipeline fails, the files so far still name all passes.
    """

    directory: Path
    passes: Sequence[ModulePass]
    input_name: str
    written: list[tuple[Path, int, str]] = field(default_factory=list)
    """File, number of the pass that made it (0 is the input), module text."""

    def add(self, number: int, text: str) -> None:
        """Write what pass `number` made, unless it equals the file before. Raises: PAS011."""
        if self.written and self.written[-1][2] == text:
            return
        name = self._name(number)
        path = self.directory / f"{number:02}-{name}.mlir"
        self.written.append((path, number, text))
        self._write(path, number, text, range(number + 1, len(self.passes) + 1))

    def finish(self) -> None:
        """Leave only passes with an effect in what comes next. Raises: PAS011."""
        numbers = [number for _, number, _ in self.written]
        for path, number, text in self.written:
            self._write(path, number, text, [later for later in numbers if later > number])

    def _name(self, number: int) -> str:
        return self.passes[number - 1].name if number else self.input_name

    def _write(self, path: Path, number: int, text: str, later: Sequence[int]) -> None:
        options = show_options(self.passes[number - 1]) if number else "{}"
        following = pipeline_items([self.passes[index - 1] for index in later])
        header = Header(self._name(number), options, following)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            path.write_text(header.text() + text, encoding="utf-8")
        except OSError as error:
            raise errors.cannot_dump_ir(str(self.directory), errors.in_words(error)) from error

"""Every error has one code, is documented, and is provoked by a test."""

from __future__ import annotations

import inspect
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

from furiosa_llm import errors

ROOT = Path(__file__).parent.parent
CODE = re.compile(r'^\s+"([A-Z]{3}\d{3})",$', re.MULTILINE)


def codes() -> list[str]:
    """Codes that the factories pass on, from their source text."""
    return sorted(CODE.findall(inspect.getsource(errors)))


@cache
def generator() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "generate_errors.py"))


def all_tests() -> str:
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("tests/**/*.mlir")]
    return "\n".join(path.read_text() for path in files)


def test_no_code_has_two_meanings() -> None:
    assert len(codes()) == len(set(codes()))


def test_every_docstring_names_the_code_that_its_factory_uses() -> None:
    assert sorted(generator()["documented"]()) == codes()
    for _, factory in inspect.getmembers(errors, inspect.isfunction):
        used = CODE.findall(inspect.getsource(factory))
        assert used == [(inspect.getdoc(factory) or "")[:6]][: len(used)]


def test_every_family_is_described() -> None:
    assert {code[:3] for code in codes()} <= set(generator()["FAMILIES"])


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert page == generator()["render"](), "run `make docs`"


def test_every_code_has_a_test() -> None:
    text = all_tests()
    missing = [code for code in codes() if code not in text]
    assert not missing, f"no test provokes {', '.join(missing)}"


def test_the_text_has_four_parts() -> None:
    error = errors.malformed_bucket("-pb", "7")
    assert str(error).splitlines() == [
        "error[BLD001]: -pb 7: not a bucket",
        "  at: -pb",
        "  cause: a bucket is two integers joined by a comma: batch size, then length in tokens",
        "  next: write it as `-pb 1,512`",
    ]

"""Pipelines as text, and the errors of those who mistype them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from furiosa_llm.errors import CompileError
from furiosa_llm.passes.opt_tool import run_opt
from furiosa_llm.passes.pipeline_text import parse_passes, show_options, show_passes
from furiosa_llm.passes.prune_logits import PruneLogitsPass
from furiosa_llm.passes.registry import PASSES
from furiosa_llm.passes.specialize_bucket import SpecializeBucketPass


def test_options_are_read_and_written() -> None:
    text = "cse, prune-logits{rows=all},specialize-bucket{kind=prefill batch=1 length=128}"
    passes = parse_passes(text)
    assert passes[1:] == [PruneLogitsPass("all"), SpecializeBucketPass("prefill", 1, 128)]
    assert show_passes(passes) == text.replace(", ", ",")
    assert show_options(passes[0]) == "{}"
    assert parse_passes("") == []
    assert parse_passes("prune-logits") == parse_passes("prune-logits{rows=1}")


@dataclass(frozen=True)
class Options(ModulePass):
    """Every kind of option."""

    name = "options"
    text: str
    number: float
    flag: bool
    sizes: tuple[int, ...]
    maybe: int | None = None

    def apply(self, ctx: Context, op: ModuleOp) -> None: ...


@given(
    text=st.text("abc xyz-_0123", min_size=1),
    number=st.floats(allow_nan=False, allow_infinity=False, width=32),
    flag=st.booleans(),
    sizes=st.lists(st.integers(-9, 9), max_size=3).map(tuple),
    maybe=st.none() | st.integers(),
)
def test_any_options_survive(
    text: str, number: float, flag: bool, sizes: tuple[int, ...], maybe: int | None
) -> None:
    one = Options(text, number, flag, sizes, maybe)
    assert parse_passes(show_passes([one]), {"options": lambda: Options}) == [one]


@pytest.mark.parametrize(
    ("passes", "code", "shown"),
    [
        ("canonicalise", "PAS001", "did you mean `canonicalize`?"),
        ("outline", "PAS001", "did you mean `outline-blocks`?"),
        ("x", "PAS001", "use one of these names"),
        ("prune-logits{row=1}", "PAS002", "`prune-logits{rows=0|1|all}`"),
        ("prune-logits{rows=2}", "PAS002", "rows=0|1|all"),
        ("specialize-bucket", "PAS002", "{kind=prefill|decode batch=<int> length=<int>}"),
        (
            "specialize-bucket{kind=train batch=1 length=1}",
            "PAS002",
            "{kind=prefill|decode batch=<int> length=<int>}",
        ),
        ("specialize-bucket{kind=decode batch=x length}", "PAS002", "batch=<int>"),
        ("cse{opt=1}", "PAS002", "write `cse` alone"),
        ("specialize-bucket{kind=decode batch=0 length=1}", "PAS008", "set batch to 1 or more"),
        ("specialize-bucket{kind=decode batch=1 length=-3}", "PAS008", "set length to 1 or more"),
        ("cse dce", "PAS003", "separate passes by commas"),
        ("prune-logits{rows=1", "PAS003", "separate passes by commas"),
        ("builtin.module(cse)", "PAS003", "separate passes by commas"),
        ("cse,,dce", "PAS003", "separate passes by commas"),
    ],
)
def test_mistakes_are_named(passes: str, code: str, shown: str) -> None:
    with pytest.raises(CompileError) as caught:
        run_opt("builtin.module {}", passes)
    assert caught.value.code == code
    assert shown in caught.value.next_step
    assert caught.value.exit_code == 2


def test_every_wrong_option_is_named() -> None:
    with pytest.raises(CompileError) as caught:
        parse_passes("specialize-bucket{batch=x length size=1}")
    assert caught.value.cause == (
        "it has no option size; option kind is missing; batch cannot be x; "
        "length cannot be without a value"
    )


def test_registry_names_are_the_names_of_the_passes() -> None:
    for name, load in PASSES.items():
        assert load().name == name
        assert load().__name__ == name.title().replace("-", "") + "Pass"
        assert load().__module__ == f"furiosa_llm.passes.{name.replace('-', '_')}"
        assert load().__doc__


def test_registry_and_dialects_can_be_extended() -> None:
    class More(Options):
        name = "more"

    text = "builtin.module {\n} loc(unknown)\n"
    options = "{text=a number=1.5 flag=true sizes=1,2}"
    assert run_opt(text, f"cse,more{options}", registry={"more": lambda: More}) == text
    with pytest.raises(CompileError, match="PAS001"):
        run_opt(text, "more")

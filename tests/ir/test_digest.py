"""Content addresses: equal computations agree, in every process; different ones do not."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from xdsl.dialects.builtin import ModuleOp

from furiosa_llm.ir import nn
from furiosa_llm.ir.digest import digest
from furiosa_llm.ir.text import parse_module
from furiosa_llm.ir.verification import functions

TEXT = """
func.func @NAME(%x: tensor<1x2x3x4xbf16>) -> tensor<1x3x2x4xbf16> {
  %n = nn.neg %x : tensor<1x2x3x4xbf16> loc("LOC")
  %y = nn.attention %n, %x, %x scale 0.5 causal layer LAYER : tensor<1x2x3x4xbf16>, tensor<1x2x3x4xbf16>, tensor<1x2x3x4xbf16> -> tensor<1x3x2x4xbf16>
  func.return %y : tensor<1x3x2x4xbf16>
}
"""  # noqa: E501


def module(name: str = "f", loc: str = "a", layer: int = 0) -> ModuleOp:
    text = TEXT.replace("NAME", name).replace("LOC", loc).replace("LAYER", str(layer))
    return parse_module(text)


def test_locations_and_value_names_do_not_count_unless_asked() -> None:
    renamed = parse_module(TEXT.replace("%x", "%hidden").replace("NAME", "f").replace("LAYER", "0"))
    assert digest(module()) == digest(module(loc="b")) == digest(renamed)
    assert digest(module(), locations=True) == digest(module(), locations=True)
    assert digest(module(), locations=True) != digest(module(loc="b"), locations=True)


def test_attributes_and_names_count_unless_ignored() -> None:
    first, second = module(layer=0), module(name="g", layer=1)
    assert digest(first) != digest(module(layer=1))
    assert digest(first) != digest(module(name="g"))

    f, g = functions(first)["f"], functions(second)["g"]
    assert digest(f) != digest(g)
    ignore = {"sym_name", "layer"}
    assert digest(f, ignore=ignore) == digest(g, ignore=ignore)


@pytest.mark.parametrize(
    "change",
    [
        ("nn.neg %x", "nn.silu %x"),
        ("scale 0.5", "scale 0.25"),
        ("%n, %x, %x scale", "%n, %n, %x scale"),
        ("xbf16", "xf16"),
    ],
)
def test_every_part_of_an_op_counts(change: tuple[str, str]) -> None:
    text = TEXT.replace("NAME", "f").replace("LAYER", "0")
    assert digest(parse_module(text)) != digest(parse_module(text.replace(*change)))


def test_bits_count_where_text_and_equality_do_not_tell_them_apart() -> None:
    def constants(*values: float) -> str:
        return digest(ModuleOp([nn.ConstantOp(np.array(values, np.float32))]))

    assert constants(0.0, -0.0) != constants(0.0, 0.0)
    assert constants(-0.0, 0.0) != constants(0.0, -0.0)

    def scaled(factor: float) -> str:
        constant = nn.ConstantOp(np.zeros(1, np.float32))
        first = nn.ScaleOp(constant.y, factor=0.0)
        return digest(ModuleOp([constant, first, nn.ScaleOp(first.y, factor=factor)]))

    assert scaled(0.0) != scaled(-0.0)


def test_the_hash_seed_does_not_count() -> None:
    code = (
        "from furiosa_llm.ir.text import parse_module\n"
        "from furiosa_llm.ir.digest import digest\n"
        "import sys; print(digest(parse_module(sys.argv[1])))"
    )
    text = TEXT.replace("NAME", "f").replace("LOC", "a").replace("LAYER", "0")
    for seed in ("0", "1"):
        command = [sys.executable, "-c", code, text]
        result = subprocess.run(
            command, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == digest(module())

"""Layers that are traced once: the same module as if each were traced, or no reuse at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import KINDS, make_config
from torch import Tensor
from transformers.models.llama import modeling_llama
from xdsl.dialects.builtin import ModuleOp

from furiosa_llm.frontend.layer_reuse import LAYER, LayerIndex, NotShown, share_layers
from furiosa_llm.frontend.torch_export import ExportedDecoder, export_decoder, trace
from furiosa_llm.frontend.torch_import import translate
from furiosa_llm.ir import provenance
from furiosa_llm.ir.interpreter import run
from furiosa_llm.ir.verification import verify_module


def copies(exported: ExportedDecoder) -> int:
    """How many layers were not traced."""
    return sum(str(node.target) == LAYER for node in exported.graph.nodes)


# --- whole models ---

MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    **{kind: (kind, {}, 3) for kind in KINDS},
    "windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        2,
    ),
}
"""Kind, config fields, and how many of four layers are copies."""


@pytest.mark.parametrize("name", MODELS)
def test_copies_give_the_module_of_a_whole_trace(name: str) -> None:
    """Operators, types, parameters and module paths; only the source nodes are one layer's."""
    kind, fields, expected = MODELS[name]
    config = make_config(kind, num_hidden_layers=4, **fields)
    shared = export_decoder(config, torch.bfloat16)
    whole = export_decoder(config, torch.bfloat16, reuse_layers=False)
    assert (copies(shared), copies(whole)) == (expected, 0)
    ours, theirs = translate(shared, "shared"), translate(whole, "whole")
    verify_module(ours)
    assert str(ours) == str(theirs)
    assert paths(ours) == paths(theirs)


def paths(module: ModuleOp) -> list[str | None]:
    return [provenance.module_path(op) for op in module.walk()]


# --- one property at a time, on a toy ---


class Layer(torch.nn.Module):
    """hidden + bias of this layer, changed by what a test sets."""

    def __init__(self, index: int, change: Callable[[Layer], None]) -> None:
        super().__init__()
        self.layer_idx = index
        self.bias = torch.nn.Parameter(torch.empty(4, device="meta"))
        self.factor = 2.0
        self.table = [1, (2, "a"), {"b": None}]
        self.compute: Callable[[Layer, Tensor], Any] = plain
        change(self)

    def forward(self, hidden: Tensor, flag: object = None) -> Any:
        return self.compute(self, hidden)


def plain(layer: Layer, hidden: Tensor) -> Tensor:
    return hidden * layer.factor + layer.bias


class Toy(torch.nn.Module):
    """Three layers between ids and output [B, T, 4]; `arguments` is what each layer is given."""

    def __init__(self, change: Callable[[Layer], None], arguments: list[object]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(index, change) for index in range(3)])
        self.arguments = arguments

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = input_ids.unsqueeze(-1).float().expand(-1, -1, 4)
        for layer, argument in zip(self.layers, self.arguments, strict=True):
            hidden = layer(hidden, argument)
        return hidden


def exported(change: Callable[[Layer], None], arguments: list[object]) -> ExportedDecoder:
    toy = Toy(change, arguments)
    share_layers(toy)
    names = {name: name for name, _ in toy.named_parameters()}
    return trace(toy, names, {})


def unchanged(layer: Layer) -> None:
    """All layers are alike."""


def test_each_copy_reads_its_own_parameters() -> None:
    decoder = exported(unchanged, [None] * 3)
    assert copies(decoder) == 2
    module = translate(decoder, "toy")
    verify_module(module)
    biases = {f"layers.{i}.bias": torch.arange(4.0) * 10**i for i in range(3)}
    ids = torch.tensor([[1, 2, 3]], dtype=torch.int32)
    (found,) = run(module, "forward", [ids, ids], lambda name: biases[name])
    hidden = ids[..., None].float().expand(-1, -1, 4)
    for bias in biases.values():
        hidden = hidden * 2 + bias
    torch.testing.assert_close(found, hidden, rtol=0, atol=0)


def set_in_last(name: str, value: object) -> Callable[[Layer], None]:
    """Only layer 2 has another value."""

    def change(layer: Layer) -> None:
        if layer.layer_idx == 2:
            setattr(layer, name, value)

    return change


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("factor", 3.0),
        ("factor", 2),
        ("table", [1, (2, "b"), {"b": None}]),
        ("compute", lambda layer, hidden: hidden + layer.bias),
        ("bias", torch.nn.Parameter(torch.empty(1, device="meta"))),
        ("extra", torch.nn.Identity()),
        ("layer_idx", 7),
    ],
)
def test_a_layer_that_differs_is_traced(name: str, value: object) -> None:
    decoder = exported(set_in_last(name, value), [None] * 3)
    assert copies(decoder) == 1


def test_a_layer_whose_buffer_differs_is_traced() -> None:
    def change(layer: Layer) -> None:
        layer.register_buffer("scale", torch.full((4,), float(layer.layer_idx // 2)))

    toy = Toy(change, [None] * 3)
    share_layers(toy)
    traced = [layer for layer in toy.layers if "stand_in" not in layer.forward.__qualname__]
    assert len(traced) == 2


def uses_index(compute: Callable[[Layer, Tensor], Any]) -> Callable[[Layer], None]:
    def change(layer: Layer) -> None:
        layer.compute = compute

    return change


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer, hidden: hidden * layer.layer_idx,
        lambda layer, hidden: hidden * layer.layer_idx % 2,
        lambda layer, hidden: hidden + float([1, 2, 3][layer.layer_idx]),
        lambda layer, hidden: hidden if layer.layer_idx == 1 else -hidden,
        lambda layer, hidden: hidden if layer.layer_idx in (0, 1) else -hidden,
        lambda layer, hidden: hidden if layer.layer_idx else -hidden,
        lambda layer, hidden: hidden * {0: 1.0, 1: 2.0, 2: 3.0}[layer.layer_idx],
        lambda layer, hidden: hidden * getattr(layer, f"factor{layer.layer_idx}", 1.0),
        lambda layer, hidden: (hidden, hidden),
        lambda layer, hidden: hidden.double(),
    ],
)
def test_layers_that_may_differ_are_not_reused(
    compute: Callable[[Layer, Tensor], Any],
) -> None:
    """Their index matters, or they return something else than hidden states."""
    with pytest.raises(NotShown):
        exported(uses_index(compute), [None] * 3)


def test_other_arguments_are_not_reused() -> None:
    same = torch.zeros(1, device="meta")
    assert copies(exported(unchanged, [(same, 1.5)] * 3)) == 2
    assert copies(exported(unchanged, [(same, {"a": 1}), (same, {"a": 1}), (same, {"a": 1})])) == 2
    for other in [(torch.zeros(1, device="meta"), 1.5), (same, 2.5), (same,), (same, True)]:
        with pytest.raises(NotShown, match="different arguments"):
            exported(unchanged, [(same, 1.5), (same, 1.5), other])


def test_an_index_is_good_for_nothing_else() -> None:
    index = LayerIndex(3)
    assert index.value == 3
    for use in (str, int, bool, hash, repr, [1].__getitem__, lambda i: i > 2, lambda i: 1 + i):
        with pytest.raises(NotShown):
            use(index)


def test_where_reuse_fails_the_whole_model_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = modeling_llama.LlamaAttention.forward

    def attend(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = attention(self, *args, **kwargs)
        return output * float(self.layer_idx + 1), weights

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", attend)
    decoder = export_decoder(make_config("llama"), torch.bfloat16)
    assert copies(decoder) == 0
    assert "nn.scale" in str(translate(decoder, "llama"))

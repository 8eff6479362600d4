"""Trace one decoder layer of each kind, and let the others be copies of it.

Tracing costs 0.2 s a layer, whatever the layers have in common. Here the first layer of each kind
is traced between two marks, `enter` and `leave`, and every other one becomes a single operator,
`layer`, which the importer replaces by the marked operators with that layer's parameters.

That is right only if the layers do the same, so all of the following is checked, and `NotShown`
is raised otherwise; the caller then traces the whole model:

- they have the same class and the same attributes, all the way down; parameters may differ in
  value, buffers may not;
- they get the same arguments, hidden states apart, and return hidden states;
- `layer_idx`, the one attribute that differs, is used for nothing but to tell `attention` which
  layer it is: it is replaced by an object for which everything else is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

NAMESPACE = "furiosa_llm"
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
"""Types whose values say everything about themselves."""


class NotShown(Exception):
    """Why layers cannot be taken for copies of one another."""


class LayerIndex:
    """A layer's number, for `attention` alone: any other use is an error."""

    def __init__(self, value: int) -> None:
        self.value = value

    def _refuse(self, *_: Any) -> NoReturn:
        raise NotShown("the index of a layer decides what the layer does")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __bool__ = __int__ = __index__ = __float__ = __str__ = __repr__ = __format__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = _refuse
    __hash__ = _refuse


# `number` tells the kinds of layers apart, `index` is the layer's place in its list.
SCHEMAS = {
    "enter": "(Tensor x, int number) -> Tensor",
    "leave": "(Tensor x, int number) -> Tensor",
    "layer": "(Tensor x, int number, int index) -> Tensor",
}
for name, schema in SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{name}", schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda x, *_: torch.empty_like(x))

ENTER, LEAVE, LAYER = (f"{NAMESPACE}.{name}.default" for name in SCHEMAS)
"""Names of the operators in a traced graph."""


def share_layers(model: torch.nn.Module) -> None:
    """Make the layers that are like an earlier one in the same list stand-ins for it."""
    number = 0
    for layers in _layer_lists(model):
        kinds: list[tuple[Any, _Kind]] = []
        for index, layer in enumerate(layers):
            signature = _signature(layer, index)
            known = next((kind for other, kind in kinds if other == signature), None)
            if known is None:
                kinds.append((signature, _Kind(number)))
                kinds[-1][1].trace(layer)
                number += 1
            else:
                known.stand_in(layer, index)
        for index, layer in enumerate(layers):
            _hide_index(layer, index)


def _layer_lists(module: torch.nn.Module) -> Iterator[torch.nn.ModuleList]:
    """The outermost lists, since what is in a layer is traced or copied with it."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield child
        else:
            yield from _layer_lists(child)


def _hide_index(layer: torch.nn.Module, index: int) -> None:
    for module in layer.modules():
        if module.__dict__.get("layer_idx") == index:
            module.__dict__["layer_idx"] = LayerIndex(index)


@dataclass
class _Kind:
    """Layers that do the same: the one that is traced, and how it was called."""

    number: int
    hidden: torch.Tensor | None = None
    arguments: Any = None

    def trace(self, layer: torch.nn.Module) -> None:
        """Put the marks around what the layer does."""
        run = layer.forward

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            if self.hidden is not None:
                raise NotShown("a layer is called twice")
            self.hidden, self.arguments = _hidden_and_rest(args, kwargs)
            inside = _operator("enter")(self.hidden, self.number)
            rest, keywords = self.arguments
            output = run(inside, *rest, **keywords)
            if not isinstance(output, torch.Tensor) or not _alike(output, self.hidden):
                raise NotShown("a layer returns more or other than hidden states")
            marked: torch.Tensor = _operator("leave")(output, self.number)
            return marked

        layer.forward = forward

    def stand_in(self, layer: torch.nn.Module, index: int) -> None:
        """Replace what the layer does by the one operator."""

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            hidden, arguments = _hidden_and_rest(args, kwargs)
            if self.hidden is None or not _alike(hidden, self.hidden):
                raise NotShown("layers get different hidden states")
            if not _same(arguments, self.arguments):
                raise NotShown("layers get different arguments")
            output: torch.Tensor = _operator("layer")(hidden, self.number, index)
            return output

        layer.forward = forward


def _operator(name: str) -> Callable[..., Any]:
    operator: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name)
    return operator


def _hidden_and_rest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    if args and isinstance(args[0], torch.Tensor):
        return args[0], (args[1:], kwargs)
    raise NotShown("a layer is not called with hidden states first")


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same objects, or equal plain values."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, PLAIN) and a == b


# --- what a layer is ---


def _signature(module: torch.nn.Module, index: int) -> Any:
    """Equal for two modules that do the same, given their parameters."""
    fields = dict(module.__dict__)
    parameters = fields.pop("_parameters")
    buffers = fields.pop("_buffers")
    modules = fields.pop("_modules")
    if fields.get("layer_idx") == index:
        del fields["layer_idx"]
    return (
        type(module),
        _describe(fields),
        [(name, None if p is None else (p.shape, p.dtype)) for name, p in parameters.items()],
        [(name, _describe_buffer(buffer)) for name, buffer in buffers.items()],
        [(name, None if m is None else _signature(m, index)) for name, m in modules.items()],
    )


def _describe_buffer(buffer: torch.Tensor | None) -> Any:
    if buffer is None:
        return None
    return buffer.shape, buffer.dtype, buffer.flatten().tolist()


def _describe(value: Any) -> Any:
    """Equal for equal values; what is not known by its value is equal to itself alone."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), [_describe(item) for item in value]
    if isinstance(value, dict):
        return type(value), [(_describe(k), _describe(v)) for k, v in value.items()]
    if isinstance(value, (set, frozenset)) and all(isinstance(item, PLAIN) for item in value):
        return type(value), value
    if isinstance(value, functools.partial):
        return "partial", [_describe(part) for part in (value.func, value.args, value.keywords)]
    return "object", id(value)

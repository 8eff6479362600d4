"""Import a decoder: its config in, an `nn` module with named parameters and provenance out."""

from __future__ import annotations

import inspect
import re
from collections import ChainMap
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.fx import Node
from xdsl.dialects.builtin import ModuleOp, UnrealizedConversionCastOp
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, Operation, Region, SSAValue
from xdsl.utils.exceptions import VerifyException

from .. import errors
from ..ir import nn
from ..ir.provenance import located, make
from ..ir.types import Dim, show_dims, tensor
from .aten import ATTENTION, CAT, DTYPES, EMPTY, TABLE, Builder, Result, Unsupported, Value
from .layer_reuse import ENTER, LAYER, LEAVE
from .torch_export import INPUTS, WRAPPER_PREFIX, Constant, ExportedDecoder, export_decoder

FUNCTION = "forward"


def import_model(config: Any, dtype: torch.dtype | None = None) -> ModuleOp:
    """The decoder that a transformers config describes, straight from its ATen graph.

    `@forward(input_ids, position_ids) -> logits` over the dims `batch` and `seq`; parameters are
    declared in `dtype` (the config's own if not given) under their checkpoint names, tied ones
    once. No weights are read.

    Raises: FRO007 with everything in the model that cannot be represented.
    """
    dtype = dtype or config.dtype or torch.bfloat16
    return translate(export_decoder(config, dtype), config.architectures[0])


def translate(exported: ExportedDecoder, name: str) -> ModuleOp:
    """The traced graph as an `nn` module; `name` is for messages. Raises: FRO007."""
    translator = _Translator(exported)
    translator.run()
    if translator.reasons:
        raise errors.cannot_import(name, _listed(translator.reasons))
    return translator.module()


@dataclass(frozen=True)
class _Place:
    """Where the operators go that are translated now: into the traced layer or into a copy."""

    traced: str = ""
    """Path of the layer that was traced."""
    here: str = ""
    """Path of the layer that it stands for; the same if it is no copy."""
    layer: int | None = None
    """Number of that layer, if it is a copy."""

    def path(self, path: str) -> str:
        """The path of a module or parameter here, by its path where it was traced."""
        if path == self.traced or path.startswith(f"{self.traced}."):
            return self.here + path.removeprefix(self.traced)
        return path


@dataclass
class _Translator:
    """One walk over the graph. Goes on after a node that has no translation, to find them all."""

    exported: ExportedDecoder
    arguments: Block = field(default_factory=Block)
    parameters: dict[str, nn.GetParameterOp] = field(default_factory=dict)
    """By checkpoint name, in the order of their first use."""
    operations: list[Operation] = field(default_factory=list)
    values: MutableMapping[Node, Value] = field(default_factory=dict)
    layers: dict[int, _TracedLayer] = field(default_factory=dict)
    place: _Place = _Place()
    reasons: dict[str, list[str]] = field(default_factory=dict)
    """What cannot be represented -> the module paths of the places."""

    def run(self) -> None:
        live = _live_nodes(self.exported)
        nodes = [node for node in self.exported.graph.nodes if node in live]
        self.layers = _traced_layers(nodes)
        for node in nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._return(node)
            else:
                self._refuse(node, f"graph node {node.op}")

    def module(self) -> ModuleOp:
        """What `run` built, unless there are reasons against it."""
        order = dict.fromkeys(self.exported.names.values())
        gets = [self.parameters[name] for name in order if name in self.parameters]
        declared = [
            located(nn.ParameterOp(get.parameter_name, get.y.type), make(_owner(get)))
            for get in gets
        ]
        block = self.arguments
        block.add_ops([*gets, *self.operations])
        returned = block.last_op
        assert isinstance(returned, ReturnOp)
        types = ([arg.type for arg in block.args], [x.type for x in returned.operands])
        function = FuncOp(FUNCTION, types, Region(block))
        return ModuleOp([*declared, located(function, make(""))])

    # --- placeholders ---

    def _placeholder(self, node: Node) -> None:
        if node.name in self.exported.constants:
            self._constant(node, self.exported.constants[node.name])
        elif node.name in INPUTS and (result := self._result(node)) is not None:
            type = tensor(result.dims, result.dtype)
            argument = self.arguments.insert_arg(type, len(self.arguments.args))
            argument.name_hint = node.name
            self.values[node] = argument

    def _constant(self, node: Node, constant: Constant) -> None:
        op = nn.ConstantOp(constant.value)
        try:
            op.verify()
        except VerifyException as error:  # it is too large
            self._refuse(node, f"buffer {constant.path}: {error}")
        self._insert(op, constant.path.rpartition(".")[0], node.name)
        self.values[node] = op.y

    def _parameter(self, node: Node) -> SSAValue | None:
        """The value of a parameter here; in a copy of a layer it is that layer's own."""
        name = self.exported.names[self.place.path(self.exported.parameters[node.name])]
        if name not in self.parameters:
            result = self._result(node)
            if result is None:
                return None
            get = nn.GetParameterOp(name, tensor(result.dims, result.dtype))
            owner, _, last = name.rpartition(".")
            self.parameters[name] = located(get, make(owner, last))
        return self.parameters[name].y

    # --- operators ---

    def _call(self, node: Node) -> None:
        target = _target_name(node)
        inputs = [a for a in _flat((*node.args, *node.kwargs.values())) if isinstance(a, Node)]
        known = all(self._value(a) is not None for a in inputs if _holds_tensors(a))
        shown = "attention" if target == ATTENTION else f"operator {target}"
        result = self._result(node)
        if target == LAYER:
            if known:
                self._copy_layer(node)
        elif target not in TABLE:
            self._refuse(node, shown)
        elif known and (result is not None or isinstance(node.meta["val"], (tuple, list))):
            try:
                self.values[node] = self._translate(node, target, result)
            except (Unsupported, VerifyException) as error:
                self._refuse(node, f"{shown} with {error}")
        if node not in self.values and result is not None:
            self.values[node] = _stand_in(result)

    def _translate(self, node: Node, target: str, result: Result | None) -> Value:
        """Raises Unsupported or VerifyException."""
        path = self.place.path(_module_path(node))
        builder = Builder(lambda op: self._insert(op, path, node.name), result)
        arguments = [self._resolve(argument) for argument in node.args]
        keywords = {name: self._resolve(argument) for name, argument in node.kwargs.items()}
        if target == ATTENTION and self.place.layer is not None:
            keywords["layer"] = self.place.layer
        if target != CAT and any(argument is EMPTY for argument in arguments):
            raise Unsupported("a tensor without elements")
        try:
            _signature(target).bind(builder, *arguments, **keywords)
        except TypeError as error:  # an argument that the translation knows nothing of
            raise Unsupported(str(error)) from error
        return TABLE[target](builder, *arguments, **keywords)

    def _copy_layer(self, node: Node) -> None:
        """The operators of the traced layer once more, with this layer's parameters."""
        hidden, number, index = node.args
        assert isinstance(hidden, Node)
        assert isinstance(number, int)
        assert isinstance(index, int)
        layer = self.layers[number]
        outer_values, outer_place = self.values, self.place
        self.values = ChainMap({layer.enter: outer_values[hidden]}, outer_values)
        self.place = _Place(_module_path(layer.enter), _module_path(node), index)
        for inner in layer.body:
            self._call(inner)
        output = self.values.get(layer.output)
        self.values, self.place = outer_values, outer_place
        if output is not None:
            self.values[node] = output

    def _resolve(self, argument: Any) -> Any:
        """The argument with each node replaced by its value; sizes stay nodes."""
        if isinstance(argument, (tuple, list)):
            return [self._resolve(item) for item in argument]
        if isinstance(argument, Node) and _holds_tensors(argument):
            return self._value(argument)
        return argument

    def _value(self, node: Node) -> Value | None:
        if node.name in self.exported.parameters:
            return self._parameter(node)
        return self.values.get(node)

    def _return(self, node: Node) -> None:
        if self.reasons:
            return
        (outputs,) = node.args
        assert isinstance(outputs, (tuple, list))
        values = [self._value(output) for output in outputs if isinstance(output, Node)]
        self._insert(ReturnOp(*(x for x in values if isinstance(x, SSAValue))), "", node.name)

    # --- helpers ---

    def _insert(self, op: Operation, module: str, node: str) -> None:
        self.operations.append(located(op, make(module, node)))

    def _refuse(self, node: Node, reason: str) -> None:
        self.reasons.setdefault(reason, []).append(self.place.path(_module_path(node)))

    def _result(self, node: Node) -> Result | None:
        """The type of the node's value; None (and a reason) if the IR has no such type.

        None without a reason if the value is several tensors, or of an operator that is refused
        anyway.
        """
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return None
        if value.dtype not in DTYPES:
            if node.op == "placeholder" or _target_name(node) in TABLE:
                self._refuse(node, f"a tensor of type {value.dtype}")
            return None
        dims = tuple(self._dim(size) for size in value.shape)
        if any(isinstance(dim, str) and not dim.isidentifier() for dim in dims):
            self._refuse(node, f"a tensor of shape {show_dims(dims)}")
            return None
        return Result(dims, DTYPES[value.dtype])

    def _dim(self, size: int | torch.SymInt) -> Dim:
        """A size, the name of a dim, or an expression over names such as `batch*seq`."""
        if isinstance(size, int):
            return size
        factors = [self.exported.dims.get(factor, factor) for factor in str(size).split("*")]
        return "*".join(sorted(factors))  # torch orders them by its own names for the dims


@dataclass(frozen=True)
class _TracedLayer:
    """A layer that others are copies of: the nodes between its marks."""

    enter: Node
    body: Sequence[Node]
    output: Node


def _traced_layers(nodes: Sequence[Node]) -> dict[int, _TracedLayer]:
    """By number. The graph is in the order of execution, so what a layer did is in one piece."""
    enters = {n.args[1]: n for n in nodes if _target_name(n) == ENTER}
    leaves = {n.args[1]: n for n in nodes if _target_name(n) == LEAVE}
    place = {node: index for index, node in enumerate(nodes)}
    layers = {}
    for number, enter in enters.items():
        leave = leaves[number]
        body = nodes[place[enter] + 1 : place[leave]]
        output = leave.args[0]
        assert isinstance(number, int)
        assert isinstance(output, Node)
        layers[number] = _TracedLayer(enter, body, output)
    return layers


def _owner(get: nn.GetParameterOp) -> str:
    return get.parameter_name.rpartition(".")[0]


def _stand_in(result: Result) -> SSAValue:
    """A value for what has no translation; the module that would hold it is never made."""
    type = tensor(result.dims, result.dtype)
    return UnrealizedConversionCastOp(operands=[[]], result_types=[[type]]).results[0]


@cache
def _signature(target: str) -> inspect.Signature:
    return inspect.signature(TABLE[target])


def _live_nodes(exported: ExportedDecoder) -> set[Node]:
    """The nodes whose values reach the output, and the inputs in any case.

    Shapes are known without computing them, so what only feeds sizes is dead.
    """
    live = {node for node in exported.graph.nodes if node.name in INPUTS}
    waiting = [exported.graph.output_node()]
    while waiting:
        node = waiting.pop()
        if node not in live and (node.op == "output" or _holds_tensors(node)):
            live.add(node)
            waiting.extend(node.all_input_nodes)
    return live


def _holds_tensors(node: Node) -> bool:
    return any(isinstance(item, torch.Tensor) for item in _flat((node.meta.get("val"),)))


def _flat(argument: Any) -> Iterator[Any]:
    if isinstance(argument, (tuple, list)):
        for item in argument:
            yield from _flat(item)
    else:
        yield argument


def _target_name(node: Node) -> str:
    """Such as `aten.mul.Tensor`; a Python function's own name."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _module_path(node: Node) -> str:
    """The innermost module that the node was traced in, by its Hugging Face path."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path: str = stack[-1][0] if stack else ""
    return f"{path}.".removeprefix(WRAPPER_PREFIX).rstrip(".")


def _listed(reasons: dict[str, list[str]]) -> list[str]:
    """One line a reason, with its module paths."""
    return [f"{reason} in {_summary(paths)}" for reason, paths in reasons.items()]


def _summary(paths: list[str]) -> str:
    """The paths, those that differ only in the layer's number as one."""
    groups: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", path, count=1), []).append(path)
    shown = [
        same[0] if len(same) == 1 else f"{general} ({len(same)} layers, first {same[0]})"
        for general, same in groups.items()
    ]
    return ", ".join(path or "the model" for path in shown)

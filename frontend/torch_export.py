"""Trace a transformers decoder into one graph, without weights and for every batch and length.

The model is built from its config with its parameters on the `meta` device, where tensors have a
shape and no memory; only buffers, such as RoPE frequencies, get values. Layers that are shown to
do the same are traced once (`layer_reuse`). Attention becomes one
operator, `furiosa_llm::attention`, through transformers' own attention and mask interfaces; what
that operator cannot say (soft-capping, sinks, chunked masks, ...) is written into the call, so
that the importer can refuse it with its module path instead of dropping it in silence.

Shape letters: B sequences, T tokens, Q query heads, G KV heads, H head size.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.export.graph_signature import InputKind
from torch.fx import Graph
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from .. import errors
from .checkpoint import Array
from .layer_reuse import LayerIndex, share_layers

INTERFACE = "furiosa_llm"
"""Name under which transformers finds our attention and mask functions."""

INPUTS = ("input_ids", "position_ids")

SAMPLE_BATCH, SAMPLE_SEQ = 2, 3
"""Sizes during tracing: unequal, and neither 0 nor 1, which torch would take for constants."""

IGNORED_KEYWORDS = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions"})
"""Attention keywords that change nothing here: RoPE is done and there is no cache."""


@dataclass(frozen=True)
class MaskRule:
    """What stands in for a mask tensor: which keys a query sees."""

    window: int | None
    unsupported: tuple[str, ...]


@dataclass(frozen=True)
class Constant:
    """A buffer or a literal tensor of the model, with its path."""

    path: str
    value: Array


@dataclass(frozen=True)
class ExportedDecoder:
    """The traced graph, and what its placeholders stand for (all by placeholder name)."""

    graph: Graph
    parameters: Mapping[str, str]
    """Placeholder -> path in the model."""
    names: Mapping[str, str]
    """Path -> checkpoint name, in the model's order; tied parameters share the first name."""
    constants: Mapping[str, Constant]
    """Placeholder -> value, of what is no part of a checkpoint."""
    dims: Mapping[str, str]
    """Symbol in the graph's shapes -> name of the dimension."""


def export_decoder(
    config: Any, dtype: torch.dtype, *, reuse_layers: bool = True
) -> ExportedDecoder:
    """Trace `(input_ids, position_ids) -> logits` for the text decoder that `config` describes.

    With `reuse_layers` layers that are shown to do the same are traced once, where that works.
    Raises: FRO007 if the model cannot be built or traced.
    """
    if reuse_layers:
        # Whatever goes wrong with copies, tracing without them gives the model or the reason.
        with contextlib.suppress(Exception):
            return _export(config, dtype, share_layers)
    try:
        return _export(config, dtype, lambda model: None)
    except Exception as error:  # any line of any model's code may fail under tracing
        raise errors.cannot_import(config.architectures[0], [_reason(error)]) from error


def declared_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of the parameters of the decoder that `config` describes, in order.

    Raises: FRO007 if the model cannot be built.
    """
    try:
        model = _build(config, torch.bfloat16)
    except Exception as error:  # any line of any model's code may fail
        raise errors.cannot_import(config.architectures[0], [_reason(error)]) from error
    names = _canonical_names(model)
    return {names[path]: tuple(tensor.shape) for path, tensor in model.named_parameters()}


def _export(
    config: Any, dtype: torch.dtype, prepare: Callable[[torch.nn.Module], None]
) -> ExportedDecoder:
    model = _build(config, dtype)
    prepare(model)
    names = _canonical_names(model)
    buffers = _move_to_meta(model)
    return trace(_Logits(model), names, buffers)


def trace(
    module: torch.nn.Module, names: Mapping[str, str], buffers: Mapping[str, Array]
) -> ExportedDecoder:
    """Export a module of two i64 tensors [B, T], `input_ids` and `position_ids`.

    `names` gives the checkpoint name of each parameter, `buffers` the value of each buffer.
    Raises whatever torch raises.
    """
    # One tensor object for both inputs would make torch treat them as one input.
    ids, positions = (
        torch.zeros(SAMPLE_BATCH, SAMPLE_SEQ, dtype=torch.int64, device="meta") for _ in INPUTS
    )
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            module,
            (ids, positions),
            dynamic_shapes=dict.fromkeys(INPUTS, free),
            strict=False,
        )
    return _describe(program, names, buffers)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args == (INTERFACE,):
        return "its attention does not go through transformers' AttentionInterface"
    lines = str(error).strip().splitlines()
    return f"it cannot be traced: {type(error).__name__}: {lines[0] if lines else ''}"


class _Logits(torch.nn.Module):
    """The model with the inputs and the output that we want."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        logits: torch.Tensor = output.logits
        return logits


WRAPPER_PREFIX = "model."
"""What `_Logits` puts before every module path and parameter name."""


class _EmptyOnMeta(TorchFunctionMode):
    """Puts what `torch.empty` makes, which is what parameters are made of, on `meta`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _build(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The model with large parameters on `meta` and its buffers on the CPU, with their values."""
    config = copy.deepcopy(config)
    with _EmptyOnMeta():
        model: torch.nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=INTERFACE, trust_remote_code=False
        )
    return model.eval()


def _canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Each parameter's and buffer's path -> the first path of the same tensor, which ties them."""
    first: dict[int, str] = {}
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {path: first.setdefault(id(tensor), path) for path, tensor in tensors}


def _move_to_meta(model: torch.nn.Module) -> dict[str, Array]:
    """Take the values of the buffers, and leave everything on one device, as tracing needs it."""
    values = {name: _to_numpy(buffer) for name, buffer in model.named_buffers()}
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                meta = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
                module._parameters[name] = moved.setdefault(id(parameter), meta)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("meta")
    return values


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's advice and graph dumps off stderr; what goes wrong is raised anyway."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# --- attention and masks as transformers calls them ---


torch.library.define(
    f"{INTERFACE}::attention",
    "(Tensor q, Tensor k, Tensor v, *, float scale, int layer, int? window, str unsupported)"
    " -> Tensor",
)


@torch.library.register_fake(f"{INTERFACE}::attention")  # type: ignore[untyped-decorator]
def _attention_shape(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    layer: int,
    window: int | None,
    unsupported: str,
) -> torch.Tensor:
    """q [B, Q, T, H], k and v [B, G, T, H] -> [B, T, Q, H]."""
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[-1]))


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskRule | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: one call of the operator."""
    layer = getattr(module, "layer_idx", None)
    if isinstance(layer, LayerIndex):
        layer = layer.value
    rule = attention_mask if isinstance(attention_mask, MaskRule) else MaskRule(None, ())
    unsupported = list(rule.unsupported)
    if rule is not attention_mask:
        unsupported.append("no causal mask")
    if dropout:
        unsupported.append(f"argument dropout={dropout}")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        unsupported.append("queries that see later keys")
    if sliding_window not in (None, rule.window):
        unsupported.append(f"argument sliding_window={sliding_window} but a mask of {rule.window}")
    if layer is None:
        unsupported.append("no layer index")
    for name, argument in sorted(keywords.items()):
        if argument is not None and argument is not False and name not in IGNORED_KEYWORDS:
            unsupported.append(f"argument {name}")

    attend = getattr(torch.ops, INTERFACE).attention
    output = attend(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        layer=-1 if layer is None else layer,
        window=rule.window,
        unsupported="; ".join(unsupported),
    )
    return output, None


def _mask_rule(*, mask_function: Callable[..., Any], **_: Any) -> MaskRule:
    """transformers' mask function: the rule instead of a tensor.

    A rule is a tree of closures, so its leaves are told apart by their names.
    """
    window: int | None = None
    unsupported = []
    for leaf in _leaves(mask_function):
        kind = leaf.__qualname__.split(".")[0]
        if kind == "sliding_window_overlay":
            window = _closure(leaf)["sliding_window"]
        elif kind not in ("causal_mask_function", "packed_sequence_mask_function"):
            unsupported.append(f"a mask made by {kind}")
    return MaskRule(window, tuple(unsupported))


def _leaves(mask_function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions whose conjunction `mask_function` is; anything else is a leaf itself."""
    match mask_function.__qualname__.split(".")[0]:
        case "and_masks":
            parts = _closure(mask_function)["mask_functions"]
        case "remap_positions_for_packed_sequence":
            parts = (_closure(mask_function)["mask_function"],)
        case _:
            return [mask_function]
    return [leaf for part in parts for leaf in _leaves(part)]


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


AttentionInterface.register(INTERFACE, _attention)
AttentionMaskInterface.register(INTERFACE, _mask_rule)


# --- what the placeholders stand for ---


def _describe(
    program: torch.export.ExportedProgram,
    names: Mapping[str, str],
    buffers: Mapping[str, Array],
) -> ExportedDecoder:
    parameters, constants = {}, {}
    for spec in program.graph_signature.input_specs:
        name, path = spec.arg.name, (spec.target or "").removeprefix(WRAPPER_PREFIX)
        if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent):
            parameters[name] = path
        elif spec.kind is InputKind.BUFFER:
            constants[name] = Constant(path, buffers[path])
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            assert spec.target is not None
            value = program.constants[spec.target]
            assert isinstance(value, torch.Tensor)
            constants[name] = Constant(path, _to_numpy(value))
    return ExportedDecoder(program.graph, parameters, names, constants, _dim_names(program))


def _to_numpy(tensor: torch.Tensor) -> Array:
    """The same values; whole numbers become i32, as everywhere in the IR."""
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy() if tensor.is_floating_point() else tensor.numpy().astype(np.int32)


def _dim_names(program: torch.export.ExportedProgram) -> dict[str, str]:
    """The symbols in the shape of `input_ids`, by the names that the IR gives its dims."""
    ids = next(node for node in program.graph.nodes if node.name == INPUTS[0])
    batch, seq = ids.meta["val"].shape
    return {str(batch): "batch", str(seq): "seq"}

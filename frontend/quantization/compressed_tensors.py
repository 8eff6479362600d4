"""compressed-tensors, `float-quantized`: what llm-compressor writes and vLLM reads.

The library's own classes parse the config and match its targets, so `ignore`, `re:` expressions,
classes and defaults mean what they mean there. They need torch; only this file imports them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ... import errors
from ...models.quantization import (
    DYNAMIC_TOKEN,
    NO_ACTIVATION,
    PER_CHANNEL,
    PER_TENSOR,
    STATIC_TENSOR,
    ActivationScheme,
    Quantization,
    WeightScheme,
    per_block,
    per_group,
)
from ..checkpoint import Checkpoint
from .assemble import FormatRules, LinearScheme, assemble
from .config_fields import ConfigFields
from .modules import Modules

if TYPE_CHECKING:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

FORMATS = ("float-quantized", "naive-quantized")
"""Formats that store one code a byte, unpacked."""


def read(config: ConfigFields, checkpoint: Checkpoint) -> Quantization:
    """Raises: QNT001 for what is not 8-bit float, QNT002 to QNT004."""
    parsed = _parsed(config)
    modules = Modules(checkpoint.tensors)
    try:
        groups = _groups_of(parsed, modules)
        refused = [*_attention_groups(parsed, modules), *_embedding_groups(parsed, modules)]
    except re.error as error:
        raise config.invalid(f"{error.pattern!r} is no expression: {error}") from error
    schemes = {id(group): _scheme(group) for group in groups.values()}
    refused += [
        (name, [f"{module}.weight" for module, group in groups.items() if _refusal(group) == name])
        for name in dict.fromkeys(filter(None, map(_refusal, groups.values())))
    ]
    refused += [(name, []) for name in _other_refusals(config, parsed)]
    if refused:
        raise errors.unsupported_quantization(config.file, refused)

    rules = FormatRules(
        name="compressed-tensors",
        config_file=config.file,
        scheme_of=lambda module: schemes[id(groups[module])] if module in groups else None,
        caches_quantized=parsed.kv_cache_scheme is not None,
        scale_dtype="bf16",
    )
    return assemble(checkpoint, rules)


def _parsed(config: ConfigFields) -> QuantizationConfig:
    """The library's config object. Raises: QNT002 with the library's first complaint."""
    from compressed_tensors.quantization import QuantizationConfig

    try:
        return QuantizationConfig.model_validate(dict(config.fields))
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise config.invalid(f"{type(error).__name__}: {errors.in_words(error)}") from error


def _groups_of(config: QuantizationConfig, modules: Modules) -> Mapping[str, QuantizationScheme]:
    """Linear module -> the group of its most specific target; ignored modules are not there."""
    from compressed_tensors.utils import is_match, match_targets
    from torch.nn import Linear

    linear = Linear(1, 1, device="meta")  # only its class matters to the library
    group_of = {target: group for group in _groups(config) for target in group.targets}
    ignore = config.ignore or []
    found = {}
    for module in modules.linears:
        targets = match_targets(module, linear, group_of)
        if targets and not is_match(module, linear, ignore):
            found[module] = group_of[targets[0]]
    return found


def _groups(config: QuantizationConfig) -> list[QuantizationScheme]:
    """The library has turned names of presets into groups."""
    return [group for group in config.config_groups.values() if not isinstance(group, list)]


def _scheme(group: QuantizationScheme) -> LinearScheme:
    return LinearScheme(_weight(group.weights), _activation(group.input_activations))


def _weight(args: QuantizationArgs | None) -> WeightScheme:
    if args is None or args.strategy == "tensor":
        return PER_TENSOR
    if args.strategy == "group" and args.group_size:
        return per_group(args.group_size)
    if args.strategy == "block" and args.block_structure:
        return per_block(*args.block_structure)
    return PER_CHANNEL


def _activation(args: QuantizationArgs | None) -> ActivationScheme:
    if args is None:
        return NO_ACTIVATION
    if not args.dynamic:
        return STATIC_TENSOR
    if args.strategy == "token":
        return DYNAMIC_TOKEN
    if args.strategy == "group":
        return ActivationScheme("dynamic", "group", args.group_size)
    return ActivationScheme("dynamic", "tensor")


def _refusal(group: QuantizationScheme) -> str | None:
    """The name of a group's scheme if it is not one of those above."""
    weights, inputs = group.weights, group.input_activations
    if weights is None:
        return "quantised activations of unquantised weights"
    if not _is_fp8(weights) or weights.dynamic:
        return f"{_named(weights)} weights"
    if weights.strategy not in ("tensor", "channel", "group", "block"):
        return f"weights with a scale per {weights.strategy}"
    if inputs is not None and not _is_fp8(inputs):
        return f"{_named(inputs)} activations"
    if inputs is not None and inputs.strategy not in ("tensor", "token", "group"):
        return f"activations with a scale per {inputs.strategy}"
    if inputs is not None and not inputs.dynamic and inputs.strategy != "tensor":
        return f"static activations with a scale per {inputs.strategy}"
    if group.output_activations is not None:
        return "quantised outputs of linear layers"
    if group.format is not None and group.format not in FORMATS:
        return str(group.format)
    return None


def _attention_groups(config: QuantizationConfig, modules: Modules) -> list[tuple[str, list[str]]]:
    """Groups that mean attention modules, by class or by a name that no linear in them has: the
    library quantises queries there, beside keys and values."""
    from compressed_tensors.utils import match_name

    targets = [target for group in _groups(config) for target in group.targets]
    found = []
    for target in targets:
        linears = [module for module in modules.linears if match_name(module, target)]
        attentions = [a for a in modules.attentions if match_name(a, target)]
        inside = [m for m in linears if m.startswith(tuple(f"{a}." for a in attentions))]
        if target.endswith("Attention") or (attentions and not inside):
            scales = [name for name in sorted(modules.scales) if name.endswith(".q_scale")]
            found.append((f"quantised queries of attention (target `{target}`)", scales))
    return found


def _embedding_groups(config: QuantizationConfig, modules: Modules) -> list[tuple[str, list[str]]]:
    """Groups that mean tables of embeddings, which files without codes do not show."""
    from compressed_tensors.utils import is_match
    from torch.nn import Embedding

    table = Embedding(1, 1, device="meta")
    targets = [target for group in _groups(config) for target in group.targets]
    return [
        ("quantised embeddings", [info.name])
        for module, info in modules.embeddings.items()
        if is_match(module, table, targets, config.ignore or [])
    ]


def _other_refusals(config: ConfigFields, parsed: QuantizationConfig) -> list[str]:
    """What concerns the model as a whole: packing, sparsity, rotations, KV caches."""
    refused = []
    only_caches = parsed.format == "dense" and not parsed.config_groups
    if parsed.format not in (*FORMATS, "mixed-precision") and not only_caches:
        refused.append(f"compressed-tensors {parsed.format}")
    sparsity = config.section("sparsity_config")
    if sparsity is not None and sparsity.fields.get("format", "dense") != "dense":
        refused.append(f"sparsity {sparsity.fields['format']}")
    if config.fields.get("transform_config"):
        refused.append("transforms of weights (transform_config)")
    cache = parsed.kv_cache_scheme
    if cache is not None and (not _is_fp8(cache) or cache.strategy != "tensor" or cache.dynamic):
        when = "dynamic" if cache.dynamic else "static"
        refused.append(f"{_named(cache)} KV cache, {when}, a scale per {cache.strategy}")
    return refused


def _is_fp8(args: QuantizationArgs) -> bool:
    return bool(args.type == "float" and args.num_bits == 8 and args.symmetric)


def _named(args: QuantizationArgs) -> str:
    """Such as INT8, FP4 or asymmetric INT4."""
    letters: Any = {"int": "INT", "float": "FP"}[args.type]
    return f"{'' if args.symmetric else 'asymmetric '}{letters}{args.num_bits}"

"""Fine-grained FP8 of `transformers`, as DeepSeek and Qwen3 publish it.

Weights have a scale per block (or one each, without `weight_block_size`), called `weight_scale_inv`
although it is a multiplier. Inputs are quantised on the fly, each token in groups as wide as a
block, or by a stored `activation_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ... import errors
from ...models.quantization import (
    DYNAMIC_TOKEN,
    PER_TENSOR,
    STATIC_TENSOR,
    ActivationScheme,
    Quantization,
    per_block,
)
from ..checkpoint import Checkpoint
from .assemble import FormatRules, LinearScheme, assemble
from .config_fields import ConfigFields
from .modules import OUTPUT_HEAD

SCALE_NAMES = ("weight_scale_inv", "scale", "qscale_weight")
"""The usual name, and what DeepSeek-V4 and Mistral Large call it."""

Entry = tuple[re.Pattern[str], str]


def read(config: ConfigFields, checkpoint: Checkpoint) -> Quantization:
    """Raises: QNT001 for what else the format can hold, QNT002 to QNT004."""
    _check_types(config, checkpoint)
    block = config.block_size("weight_block_size")
    scheme = LinearScheme(
        weight=per_block(*block) if block else PER_TENSOR,
        activation=_activation(config, block),
        weight_scales=SCALE_NAMES,
        input_scale="activation_scale",
    )
    listed = config.names("modules_to_not_convert")
    kept = listed if listed is not None else config.names("ignored_layers")
    patterns = _compiled(config, (OUTPUT_HEAD,) if kept is None else kept)
    rules = FormatRules(
        name="fine-grained-fp8",
        config_file=config.file,
        scheme_of=lambda module: None if is_kept(module, patterns) else scheme,
        caches_quantized=False,
        scale_dtype="e8m0" if config.text("scale_fmt", "float") == "ue8m0" else "f32",
        may_stay=lambda module, shape: block is not None and not _divides(block, shape),
    )
    return assemble(checkpoint, rules)


def _check_types(config: ConfigFields, checkpoint: Checkpoint) -> None:
    """Raises: QNT001 for quantised embeddings; QNT002 for a type that the format does not have.

    `scale_fmt` is about how scales are stored, which their tensors say themselves. Scales of inputs
    stay f32 numbers; transformers rounds them up to powers of two on some GPUs, not on others.
    """
    for key, known in (("scale_fmt", ("float", "ue8m0")), ("fmt", ("e4m3",))):
        if config.text(key, known[0]) not in known:
            raise config.invalid(f"`{key}` is {config.fields[key]!r}, not {' or '.join(known)}")
    converted = config.names("modules_to_convert") or ()
    if converted:
        endings = tuple(f"{module}.weight" for module in converted)
        embeddings = [name for name in checkpoint.tensors if name.endswith(endings)]
        scheme = "quantised embeddings (modules_to_convert)"
        raise errors.unsupported_quantization(config.file, [(scheme, embeddings)])


def _activation(config: ConfigFields, block: tuple[int, int] | None) -> ActivationScheme:
    mode = config.text("activation_scheme", "dynamic")
    if mode == "static":
        return STATIC_TENSOR
    if mode != "dynamic":
        raise config.invalid(f"`activation_scheme` is {mode!r}, neither dynamic nor static")
    return ActivationScheme("dynamic", "group", block[1]) if block else DYNAMIC_TOKEN


def _divides(block: tuple[int, int], shape: tuple[int, int]) -> bool:
    """The writer leaves weights alone that have partial blocks; other writers do not."""
    return not (shape[0] % block[0] or shape[1] % block[1])


def _compiled(config: ConfigFields, entries: Sequence[str]) -> Sequence[Entry]:
    try:
        return compile_entries(entries)
    except re.error as error:
        raise config.invalid(f"`modules_to_not_convert`: {error.pattern!r}: {error}") from error


def compile_entries(entries: Sequence[str]) -> Sequence[Entry]:
    """Each entry as an expression that ends where a part of a module's name ends, and as it is.

    Raises: re.error for one that is no expression.
    """
    return [(re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.)|\Z)"), entry) for entry in entries]


def is_kept(module: str, patterns: Sequence[Entry]) -> bool:
    """Whether an entry names the module by its beginning, as an expression, or by its end."""
    return any(regex.match(module) or module.endswith(entry) for regex, entry in patterns)

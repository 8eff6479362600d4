"""AutoFP8, static form: one scale per weight, one per input, optionally one per KV cache.

Its config has the same `quant_method` as fine-grained FP8; names of tensors tell them apart.
Legacy files keep one `kv_scale` for keys and values.
"""

from __future__ import annotations

from ... import errors
from ...models.quantization import PER_TENSOR, STATIC_TENSOR, Quantization
from ..checkpoint import Checkpoint
from .assemble import KV_NAMES, FormatRules, LinearScheme, assemble
from .config_fields import ConfigFields, excluded_by_globs
from .modules import OUTPUT_HEAD

SCHEME = LinearScheme(PER_TENSOR, STATIC_TENSOR)


def read(config: ConfigFields, checkpoint: Checkpoint) -> Quantization:
    """Raises: QNT001 for dynamic activations, whose granularity no file says; QNT002 to QNT004."""
    activation = config.text("activation_scheme")
    if activation != "static":
        weights = [name for name in checkpoint.tensors if name.endswith(".weight_scale")]
        scheme = f"AutoFP8 with {activation} activations"
        raise errors.unsupported_quantization(config.file, [(scheme, weights)])

    ignored = config.names("ignored_layers")
    ignored = (OUTPUT_HEAD,) if ignored is None else ignored
    rules = FormatRules(
        name="autofp8",
        config_file=config.file,
        scheme_of=lambda module: None if excluded_by_globs(module, ignored) else SCHEME,
        caches_quantized=_has_cache_scales(checkpoint),
    )
    return assemble(checkpoint, rules)


def _has_cache_scales(checkpoint: Checkpoint) -> bool:
    """The config does not say whether caches are quantised, so the tensors do."""
    endings = tuple(f".{name}" for pair in KV_NAMES for name in pair)
    return any(name.endswith(endings) for name in checkpoint.tensors)

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
        caches_quantized=_caches_are_quantized(config, checkpoint),
        cache_scales=("kv_scale", "kv_scale"),
    )
    return assemble(checkpoint, rules)


def _caches_are_quantized(config: ConfigFields, checkpoint: Checkpoint) -> bool:
    """Newer files have a `kv_cache_scheme`; of older ones only the tensors tell."""
    scheme = config.text("kv_cache_scheme", "")
    if scheme not in ("", "static"):
        raise config.invalid(f"`kv_cache_scheme` is {scheme!r}, not static")
    endings = tuple(f".{name}" for pair in KV_NAMES for name in pair)
    return scheme == "static" or any(name.endswith(endings) for name in checkpoint.tensors)

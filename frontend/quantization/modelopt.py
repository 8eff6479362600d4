"""NVIDIA ModelOpt FP8: `hf_quant_config.json`, or the same in config.json.

Scales are f32: one number, one per row [O], or [O/b, 1, I/b, 1] for blocks, whose size no file
says: it follows from the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ... import errors
from ...models.quantization import (
    DYNAMIC_TOKEN,
    NO_ACTIVATION,
    PER_CHANNEL,
    PER_TENSOR,
    STATIC_TENSOR,
    Quantization,
    per_block,
)
from ..checkpoint import Checkpoint
from .assemble import FormatRules, LinearScheme, assemble
from .config_fields import ConfigFields, excluded_by_globs
from .modules import Modules, is_quantized

PER_BLOCK_ALGORITHM = "FP8_PB_WO"
DEFAULT_BLOCK = 128
BLOCK_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Sizes that are considered, in both directions alike."""

Grid = tuple[tuple[int, int], tuple[int, int]]
"""Shape of a weight, and how many blocks it has in each direction."""

SCHEMES: Mapping[str, LinearScheme] = {
    "FP8": LinearScheme(PER_TENSOR, STATIC_TENSOR),
    "FP8_PER_CHANNEL_PER_TOKEN": LinearScheme(PER_CHANNEL, DYNAMIC_TOKEN),
}


def read(config: ConfigFields, checkpoint: Checkpoint) -> Quantization:
    """`config` has `quant_algo`, `kv_cache_quant_algo`, `exclude_modules`.

    Raises: QNT001 for another algorithm, QNT002 to QNT004.
    """
    cache = config.text("kv_cache_quant_algo", "none").upper()
    # Where only caches are quantised, nothing is said about weights.
    algorithm = config.text("quant_algo", None if cache == "NONE" else "none").upper()
    scheme: LinearScheme | None
    if algorithm == PER_BLOCK_ALGORITHM:
        size = _block_size(config, Modules(checkpoint.tensors))
        scheme = LinearScheme(per_block(size, size), NO_ACTIVATION)
    elif algorithm == "NONE":
        scheme = None
    elif algorithm in SCHEMES:
        scheme = SCHEMES[algorithm]
    else:
        raise errors.unsupported_quantization(
            config.file, [(f"modelopt {algorithm}", _scaled(checkpoint))]
        )
    if cache not in ("NONE", "FP8"):
        raise errors.unsupported_quantization(config.file, [(f"modelopt KV cache {cache}", [])])

    excluded = config.names("exclude_modules") or ()
    rules = FormatRules(
        name="modelopt",
        config_file=config.file,
        scheme_of=lambda module: None if excluded_by_globs(module, excluded) else scheme,
        caches_quantized=cache == "FP8",
        cache_scales=("k_proj.k_scale", "v_proj.v_scale"),
    )
    return assemble(checkpoint, rules)


def embedded(config: ConfigFields) -> ConfigFields:
    """The fields of config.json in the words of `hf_quant_config.json`. Raises: QNT001, QNT002."""
    words: dict[str, Any] = {
        "quant_algo": config.fields.get("quant_algo"),
        "exclude_modules": config.fields.get("ignore", config.fields.get("exclude_modules")),
        "kv_cache_quant_algo": config.fields.get("kv_cache_quant_algo"),
    }
    _check_groups(config)
    cache = config.section("kv_cache_scheme")
    if cache is not None:
        scheme = tuple(cache.fields.get(key) for key in ("num_bits", "type", "dynamic"))
        if scheme != (8, "float", False):
            shown = f"modelopt KV cache {dict(cache.fields)}"
            raise errors.unsupported_quantization(config.file, [(shown, [])])
        words["kv_cache_quant_algo"] = "FP8"
    return ConfigFields(config.file, words)


def _check_groups(config: ConfigFields) -> None:
    """The groups repeat what the algorithm says. Raises: QNT001 where they say something else."""
    groups = config.section("config_groups")
    for name in groups.fields if groups else ():
        group = groups.section(name) if groups else None
        for key in ("weights", "input_activations"):
            args = group.section(key) if group else None
            if args and (args.fields.get("num_bits"), args.fields.get("type")) != (8, "float"):
                scheme = f"modelopt {key} {dict(args.fields)} ({name})"
                raise errors.unsupported_quantization(config.file, [(scheme, [])])


def check_agreement(file: ConfigFields, other: ConfigFields) -> None:
    """Raises: QNT002 if the two places that hold a config say different things."""
    for key in ("quant_algo", "kv_cache_quant_algo", "exclude_modules"):
        here, there = file.fields.get(key), other.fields.get(key)
        if _unordered(here) != _unordered(there):
            raise file.invalid(f"`{key}` is {here!r} here and {there!r} in {other.file}")


def _unordered(value: Any) -> Any:
    """Lists of names mean the same in any order, and nothing the same as none."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return sorted(value) or None
    return value or None


def _scaled(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors if name.endswith(".weight_scale")]


def _block_size(config: ConfigFields, modules: Modules) -> int:
    """Raises: QNT002 if the shapes of scales do not tell it."""
    grids: dict[str, Grid] = {
        scale.name: ((info.shape[0], info.shape[1]), (scale.shape[0], scale.shape[2]))
        for module, info in modules.linears.items()
        if is_quantized(info)
        and (scale := modules.tensors.get(f"{module}.weight_scale")) is not None
        and len(scale.shape) == 4
    }
    size = block_size_of(list(grids.values()))
    if size is None:
        shown = ", ".join(f"`{name}` {list(grid)}" for name, (_, grid) in list(grids.items())[:3])
        raise config.invalid(
            f"no block size is said, and the shapes of scales do not tell it: {shown}"
        )
    return size


def block_size_of(grids: Sequence[Grid]) -> int | None:
    """The size of square blocks that most of these grids fit; the usual one if it does, None if
    most fit none, or several others.

    Whatever does not fit the size of most is found to be misshapen later.
    """
    fits = {size: sum(_fits(size, *grid) for grid in grids) for size in BLOCK_SIZES}
    most = max(fits.values())
    best = [size for size in BLOCK_SIZES if fits[size] == most]
    if 2 * most < len(grids):
        return None
    if DEFAULT_BLOCK in best:
        return DEFAULT_BLOCK
    return best[0] if len(best) == 1 else None


def _fits(size: int, shape: tuple[int, int], grid: tuple[int, int]) -> bool:
    return (-(-shape[0] // size), -(-shape[1] // size)) == grid

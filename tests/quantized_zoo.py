"""Tiny quantised checkpoints as the original libraries write them.

compressed-tensors and transformers quantise and write here; AutoFP8 has no installable library, so
its files are made by hand. What ModelOpt wrote is recorded in `tests/recorded/modelopt`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from model_zoo import make_config, make_model
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

WEIGHTS_FILE = "model.safetensors"
FP8_CACHE = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False)
E4M3_MAX = 448.0


def write_compressed_tensors(
    directory: Path,
    groups: dict[str, QuantizationScheme],
    *,
    kind: str = "llama",
    ignore: tuple[str, ...] = ("lm_head",),
    kv_cache_scheme: QuantizationArgs | None = None,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """A tiny random model that the library quantised with these groups."""
    config = make_config(kind, **overrides)
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config).to(torch.bfloat16).eval()
    return quantize_by_library(model, directory, groups, ignore, kv_cache_scheme, max_shard_size)


def quantize_by_library(
    model: Any,
    directory: Path,
    groups: dict[str, QuantizationScheme],
    ignore: tuple[str, ...] = ("lm_head",),
    kv_cache_scheme: QuantizationArgs | None = None,
    max_shard_size: str = "1GB",
) -> Path:
    """compressed-tensors quantises and writes the model; static scales are made up."""
    scheme = QuantizationConfig(
        config_groups=groups, ignore=list(ignore), kv_cache_scheme=kv_cache_scheme
    )
    apply_quantization_config(model, scheme, show_progress=False)
    for module in model.modules():
        _fill_scales(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    compressor.update_config(directory)
    return directory


def _fill_scales(module: torch.nn.Module) -> None:
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        return
    weight = getattr(module, "weight_scale", None)
    if weight is not None:
        scale, _ = calculate_qparams(*_ranges(module, scheme.weights), scheme.weights)
        weight.data.copy_(scale.reshape(weight.shape))
    for name in ("input_scale", "k_scale", "v_scale"):
        if getattr(module, name, None) is not None:
            getattr(module, name).data.uniform_(0.01, 0.05)
    module.quantization_status = QuantizationStatus.FROZEN


def _ranges(module: Any, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest weight of each part that shares a scale."""
    weight = module.weight.data
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.min(), weight.max()
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    height, width = args.block_structure or (1, args.group_size)
    # The last blocks may be partial; zeros do not change the largest magnitude.
    whole = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    parts = whole.reshape(-(-rows // height), height, -(-columns // width), width)
    return parts.amin((1, 3)), parts.amax((1, 3))


def write_fine_grained(
    directory: Path,
    *,
    block: tuple[int, int] = (16, 32),
    scale_fmt: str = "float",
    config_fields: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """A tiny random Llama, quantised by `quantize_fine_grained`."""
    make_model("llama", directory, **overrides)
    return quantize_fine_grained(directory, block, scale_fmt, config_fields)


def quantize_fine_grained(
    directory: Path,
    block: tuple[int, int],
    scale_fmt: str = "float",
    config_fields: dict[str, Any] | None = None,
) -> Path:
    """transformers' own operation quantises the linear weights of a plain checkpoint."""
    config = transformers.FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    operation: Any = Fp8Quantize
    quantize = operation(SimpleNamespace(quantization_config=config))

    def quantized(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = quantize.convert({name: tensor})
        return result

    fields = {**config.to_dict(), **(config_fields or {})}
    return _rewrite(directory, fields, quantized)


def write_autofp8(directory: Path, *, cache: bool = False, **overrides: Any) -> Path:
    """A tiny random Llama, quantised by `quantize_autofp8`."""
    return quantize_autofp8(make_model("llama", directory, **overrides), cache)


def quantize_autofp8(directory: Path, cache: bool) -> Path:
    """By hand: one f32 number per weight and per input, and the legacy scale of a cache."""

    def quantized(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        module = name.removesuffix(".weight")
        scale = tensor.float().abs().amax() / E4M3_MAX
        codes = (tensor.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        tensors = {name: codes, f"{module}.weight_scale": scale}
        tensors[f"{module}.input_scale"] = torch.tensor(0.02)
        if cache and module.endswith("k_proj"):
            attention = module.removesuffix(".k_proj")
            tensors[f"{attention}.kv_scale"] = torch.tensor(0.03)
        return tensors

    fields: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static"}
    fields |= {"ignored_layers": ["lm_head"]} | ({"kv_cache_scheme": "static"} if cache else {})
    return _rewrite(directory, fields, quantized)


def _rewrite(
    directory: Path,
    fields: dict[str, Any],
    quantized: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
) -> Path:
    """Replace the weights of all linears but the output head, and add the config."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / WEIGHTS_FILE).items():
        plain = tensor.ndim != 2 or "embed_tokens" in name or "lm_head" in name
        tensors.update({name: tensor} if plain else quantized(name, tensor))
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    edit_config(directory, quantization_config=fields)
    return directory


def edit_config(directory: Path, **fields: Any) -> None:
    """Set fields of config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def dequantize_by_library(directory: Path) -> dict[str, torch.Tensor]:
    """The weights as the library makes them: transformers in f32, compressed-tensors in bf16."""
    fields = json.loads((directory / "config.json").read_text())["quantization_config"]
    if fields["quant_method"] == "fp8":
        return _dequantized_by_transformers(load_file(directory / WEIGHTS_FILE))
    config = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=config
    )
    return dict(model.state_dict())


def _dequantized_by_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Its operation alone: loading a model this way needs the package `accelerate` as well."""
    operation: Any = Fp8Dequantize
    dequantize = operation(None)
    made = {}
    for name, codes in tensors.items():
        if codes.dtype == torch.float8_e4m3fn:
            pair = {"weight": codes, "weight_scale_inv": tensors[f"{name}_scale_inv"]}
            made[name] = dequantize.convert(pair)["weight"].float()
    return made

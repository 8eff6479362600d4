"""Which format a checkpoint is in, and its description: config and tensors decide together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ... import errors
from ...models.quantization import Quantization
from ..checkpoint import Checkpoint
from . import autofp8, compressed_tensors, fine_grained, modelopt
from .config_fields import ConfigFields
from .declared import DeclaredTensors
from .modules import SCALES_OF_QUANTIZERS, is_quantized
from .refused import holds_integers, refused_schemes

MODELOPT_FILE = "hf_quant_config.json"
CONFIG_FILE = "config.json"
CONFIG_NAMES = ("quantization_config", "compression_config")

Reader = Callable[[ConfigFields, Checkpoint], Quantization]


def read_quantization(directory: Path, checkpoint: Checkpoint) -> Quantization | None:
    """How the checkpoint in `directory` is quantised, None if it is not; reads no tensor's data.

    Raises: QNT001 for a scheme that cannot be imported, QNT002 for a config that cannot be read,
    QNT003 for scales that do not fit, QNT004 where config and tensors contradict each other.
    """
    found = _find_config(directory)
    if found is None:
        problems = _unexplained(checkpoint)
        if problems:
            raise errors.quantization_config_contradicted(str(directory / CONFIG_FILE), problems)
        return None
    method, config = found
    refused = refused_schemes(checkpoint.tensors)
    if refused:
        raise errors.unsupported_quantization(config.file, refused)
    return _reader_of(method, config, checkpoint)(config, checkpoint)


def _unexplained(checkpoint: Checkpoint) -> list[str]:
    """What a checkpoint without a config cannot hold: codes, and scales of weights or caches."""
    tensors = checkpoint.tensors.values()
    codes = [info for info in tensors if is_quantized(info) or holds_integers(info)]
    scales = [info for info in tensors if info.name.endswith(SCALES_OF_QUANTIZERS)]
    return [f"`{info.name}` is {info.stored}, no config says how" for info in codes] + [
        f"`{info.name}` is a scale, no config says of what" for info in scales
    ]


def _find_config(directory: Path) -> tuple[str, ConfigFields] | None:
    """The method's name and its fields, from either file. Raises: QNT001, QNT002."""
    embedded = _embedded(directory / CONFIG_FILE)
    file = directory / MODELOPT_FILE
    if not file.is_file():
        return embedded
    section = ConfigFields(str(file), _read_json(file)).section("quantization")
    if section is None:
        raise errors.quantization_config_invalid(str(file), "it has no `quantization`")
    if embedded is not None:
        method, other = embedded
        if method != "modelopt":
            raise section.invalid(f"config.json has the quantisation method `{method}`")
        modelopt.check_agreement(section, other)
    return "modelopt", section


def _embedded(file: Path) -> tuple[str, ConfigFields] | None:
    if not file.is_file():
        return None
    whole = ConfigFields(str(file), _read_json(file))
    config = _quantization_of(whole)
    if config is None:
        return None
    method = config.text("quant_method")
    return method, modelopt.embedded(config) if method == "modelopt" else config


def _quantization_of(whole: ConfigFields) -> ConfigFields | None:
    """Under today's name or an older one, for the whole model or for the part that writes text."""
    parts = (part for part in (whole, whole.section("text_config")) if part is not None)
    named = (part.section(name) for part in parts for name in CONFIG_NAMES)
    return next((config for config in named if config is not None), None)


def _reader_of(method: str, config: ConfigFields, checkpoint: Checkpoint) -> Reader:
    """Two formats are called `fp8`. Raises: QNT001 for a method without a reader."""
    if method == "fp8":
        return fine_grained.read if _is_fine_grained(config, checkpoint) else autofp8.read
    readers: Mapping[str, Reader] = {
        "compressed-tensors": compressed_tensors.read,
        "modelopt": modelopt.read,
    }
    if method not in readers:
        concerned = [info.name for info in checkpoint.tensors.values() if is_quantized(info)]
        raise errors.unsupported_quantization(config.file, [(method, concerned)])
    return readers[method]


def _is_fine_grained(config: ConfigFields, checkpoint: Checkpoint) -> bool:
    """AutoFP8 has no blocks, and it calls its scales `weight_scale`.

    Where there are no scales yet, transformers is known by the field, which it writes in any case.
    """
    if config.block_size("weight_block_size") is not None:
        return True
    if isinstance(checkpoint, DeclaredTensors):
        return "weight_block_size" in config.fields
    return not any(name.endswith(".weight_scale") for name in checkpoint.tensors)


def _read_json(file: Path) -> dict[str, Any]:
    """Raises: QNT002."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise errors.quantization_config_invalid(str(file), errors.in_words(error)) from error
    if not isinstance(fields, dict):
        raise errors.quantization_config_invalid(str(file), "it is not a JSON object")
    return fields

"""A model directory as `save_pretrained` or the hub writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from .. import errors
from .checkpoint import Checkpoint
from .safetensors_checkpoint import SafetensorsCheckpoint, has_weights, no_weights_in
from .source import ModelSource

CONFIG_FILE = "config.json"
CONFIG_FILES = (CONFIG_FILE, "generation_config.json")
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
QUANTIZATION_FIELDS = ("quantization_config", "compression_config")
"""Fields that `quantization` reads: to transformers, the model is the unquantised one."""
SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")
"""Older tokenizer formats, of which transformers makes a `tokenizer.json`."""


@dataclass(frozen=True)
class HuggingFaceSource(ModelSource):
    """config.json, optionally safetensors and a tokenizer."""

    kind: ClassVar[Literal["huggingface", "gguf"]] = "huggingface"

    @staticmethod
    def open(name: str, directory: Path) -> HuggingFaceSource:
        """Raises: FRO003, FRO004, FRO005."""
        return HuggingFaceSource(name, directory, _load_config(directory))

    @property
    def has_weights(self) -> bool:
        return has_weights(self.path)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        if not self.has_weights:
            raise no_weights_in(self.path)
        return SafetensorsCheckpoint(self.path)

    @cached_property
    def config_files(self) -> Mapping[str, bytes]:
        return _read_present(self.path, CONFIG_FILES)

    @cached_property
    def tokenizer_files(self) -> Mapping[str, bytes]:
        files = _read_present(self.path, TOKENIZER_FILES)
        if TOKENIZER_FILE in files:
            return files
        if not any((self.path / name).is_file() for name in SLOW_TOKENIZER_FILES):
            return {}
        return {**files, TOKENIZER_FILE: _convert_tokenizer(self.path)}


def _read_present(directory: Path, names: tuple[str, ...]) -> Mapping[str, bytes]:
    paths = [directory / name for name in names]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _convert_tokenizer(directory: Path) -> bytes:
    """tokenizer.json of an older tokenizer. Raises: FRO009."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        text: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # every tokenizer class fails in its own way
        reason = f"{type(error).__name__}: {error}"
        raise errors.tokenizer_unusable(str(directory), reason) from error
    return text.encode()


def _load_config(directory: Path) -> Any:
    """The config of a text decoder, as if it was not quantised. Raises: FRO003 to FRO005."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise errors.config_missing(str(directory))
    fields = _read_json(file)
    plain = {key: value for key, value in fields.items() if key not in QUANTIZATION_FIELDS}
    return load_config(file, plain)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise errors.config_invalid(str(file), f"it is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise errors.config_invalid(str(file), "it is not a JSON object")
    return fields


def load_config(file: Path, fields: dict[str, Any]) -> Any:
    """The transformers config of a text decoder with these fields; its dtype is never None.

    Raises: FRO004 for values that do not fit together, FRO005 for what is no known text decoder.
    """
    import torch
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = str(fields.get("model_type"))
    architectures = fields.get("architectures") or [None]
    shown = str(architectures[0] or model_type)
    if model_type not in CONFIG_MAPPING:
        reason = f"transformers has no model type `{model_type}`"
        raise errors.unknown_architecture(str(file), shown, reason)
    decoder = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if decoder is None or architectures[0] not in (None, decoder):
        reason = f"the text decoder of model type `{model_type}` is {decoder or 'not known'}"
        raise errors.unknown_architecture(str(file), shown, reason)

    try:
        config = CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # config classes validate in many ways
        reason = f"{type(error).__name__}: {error}"
        raise errors.config_invalid(str(file), reason) from error
    config.architectures = [decoder]
    if config.dtype is None:
        config.dtype = torch.bfloat16
    return config

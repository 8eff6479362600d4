"""A GGUF file: weights, config and tokenizer in one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from .checkpoint import Checkpoint
from .gguf_checkpoint import GgufCheckpoint
from .gguf_config import config_fields
from .gguf_file import GgufFile
from .gguf_tokenizer import generation_config, tokenizer_files
from .huggingface_source import load_config
from .source import ModelSource


@dataclass(frozen=True)
class GgufSource(ModelSource):
    """A `llama` GGUF file, seen as the Hugging Face model that it was converted from."""

    file: GgufFile = field(repr=False)
    tokenizer: Mapping[str, bytes] = field(repr=False)
    """Rebuilt when the file is opened, so that an unknown tokenizer fails early."""
    kind: ClassVar[Literal["huggingface", "gguf"]] = "gguf"

    @staticmethod
    def open(name: str, path: Path) -> GgufSource:
        """Raises: GGF001 to GGF004."""
        file = GgufFile.open(path)
        config = load_config(path, config_fields(file))
        tokenizer = tokenizer_files(file, config.max_position_embeddings)
        return GgufSource(name, path, config, file, tokenizer)

    @property
    def tokenizer_files(self) -> Mapping[str, bytes]:
        return self.tokenizer

    @property
    def has_weights(self) -> bool:
        return True

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return GgufCheckpoint(
            self.file, self.config.num_attention_heads, self.config.num_key_value_heads
        )

    @cached_property
    def config_files(self) -> Mapping[str, bytes]:
        generation = json.dumps(generation_config(self.file.metadata), indent=2, sort_keys=True)
        return {
            "config.json": self.config.to_json_string().encode(),
            "generation_config.json": (generation + "\n").encode(),
        }

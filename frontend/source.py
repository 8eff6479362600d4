"""Open a model, wherever it comes from, as one kind of thing: config, weights, tokenizer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from .. import errors
from .checkpoint import Checkpoint

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
CONFIG_PATTERNS = ["*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
WEIGHT_PATTERNS = ["*.safetensors"]


@dataclass(frozen=True)
class ModelSource(ABC):
    """A model that is known to be readable so far: its config is valid, its weights are unread."""

    name: str
    """What the user asked for."""
    path: Path
    """The directory or the .gguf file."""
    config: Any = field(repr=False)
    """The transformers `PretrainedConfig`; `config.architectures[0]` names the model class."""

    kind: ClassVar[Literal["huggingface", "gguf"]]

    @property
    @abstractmethod
    def has_weights(self) -> bool:
        """Whether there is a checkpoint at all; a directory may hold only config.json."""

    @property
    @abstractmethod
    def checkpoint(self) -> Checkpoint:
        """The weights, unread. Raises: CKP001 if there are none."""

    @property
    def tied(self) -> Mapping[str, str]:
        """Other name -> parameter of each tied tensor, `{}` if the config ties none."""
        import transformers

        if not self.config.tie_word_embeddings:
            return {}
        model_class = getattr(transformers, self.config.architectures[0])
        return dict(model_class._tied_weights_keys or {})

    @property
    @abstractmethod
    def config_files(self) -> Mapping[str, bytes]:
        """`config.json`, and `generation_config.json` if there is one."""

    @property
    @abstractmethod
    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Tokenizer files by name, with the chat template; empty for a model without tokenizer.

        Where not empty, `tokenizer.json` is among them. Raises: FRO009.
        """


def open_model(model: str | Path, *, weights: bool = True) -> ModelSource:
    """Open a Hugging Face directory, a .gguf file, or a hub id such as `owner/name`.

    A hub id is looked up in the local cache and downloaded if need be; without `weights` only the
    config and the tokenizer are.

    Raises: FRO001 to FRO005 for what is no usable model, GGF001 to GGF004 for a GGUF file.
    """
    from .gguf_source import GgufSource
    from .huggingface_source import HuggingFaceSource

    path = locate_model(model, weights=weights)
    if path.is_file():
        return GgufSource.open(str(model), path)
    return HuggingFaceSource.open(str(model), path)


def locate_model(model: str | Path, *, weights: bool) -> Path:
    """The .gguf file or the directory of a model; a hub id's files are fetched if need be.

    Raises: FRO001, FRO002.
    """
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and _is_gguf(path)):
        return path
    if not path.exists() and HUB_ID.fullmatch(str(model)):
        return _from_hub(str(model), weights)
    raise errors.model_not_found(str(model))


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


def _from_hub(model_id: str, weights: bool) -> Path:
    """The local directory of a hub id. Raises: FRO002."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = CONFIG_PATTERNS + (WEIGHT_PATTERNS if weights else [])
    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        reason = "it is not in the local cache, and the hub cannot be reached"
        raise errors.hub_unreachable(model_id, reason) from error
    except (OSError, HFValidationError, ValueError) as error:  # HTTP errors are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise errors.hub_unreachable(model_id, reason) from error

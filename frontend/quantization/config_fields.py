"""Typed access to a config that anybody may have written."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ... import errors


@dataclass(frozen=True)
class ConfigFields:
    """Fields of a `quantization_config`, with the file that they come from."""

    file: str
    fields: Mapping[str, Any]

    def text(self, key: str, default: str | None = None) -> str:
        """Raises: QNT002 if it is no text, or missing without a default."""
        value = self.fields.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.invalid(f"`{key}` is {value!r}, not a text")
        return value

    def names(self, key: str) -> tuple[str, ...] | None:
        """A list of names; None if there is no such field. Raises: QNT002."""
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.invalid(f"`{key}` is {value!r}, not a list of names")
        return tuple(value)

    def section(self, key: str) -> ConfigFields | None:
        """The fields of a part; None if it is not there. Raises: QNT002."""
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.invalid(f"`{key}` is {value!r}, not a table")
        return ConfigFields(self.file, value)

    def block_size(self, key: str) -> tuple[int, int] | None:
        """Two positive integers, rows and columns. Raises: QNT002."""
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or [type(size) for size in value] != [int, int]:
            raise self.invalid(f"`{key}` is {value!r}, not two integers")
        if min(value) < 1:
            raise self.invalid(f"`{key}` is {value!r}: a block has at least one row and column")
        return value[0], value[1]

    def invalid(self, reason: str) -> Exception:
        """QNT002 for this file."""
        return errors.quantization_config_invalid(self.file, reason)


def excluded_by_globs(module: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern names the module or one that it is part of; `*` also crosses dots."""
    parts = module.split(".")
    ancestors = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(name, pattern) for name in ancestors for pattern in patterns)

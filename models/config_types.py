"""Configuration types that builder, compiler and runtime share: plain data."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .. import errors

_BUCKET_NAME = re.compile(r"(prefill|decode):([1-9]\d*),([1-9]\d*)")


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape that one binary serves.

    `attention_size` counts the tokens that a sequence attends to, `kv_cache_size` those of them
    that are in the cache before the step; the rest are the step's own input.
    """

    batch_size: int
    attention_size: int
    kv_cache_size: int

    @classmethod
    def prefill(cls, batch_size: int, attention_size: int) -> Bucket:
        """A prompt step: nothing is cached yet."""
        return cls(batch_size, attention_size, 0)

    @classmethod
    def decode(cls, batch_size: int, attention_size: int) -> Bucket:
        """A one-token step: all tokens but the new one are cached."""
        return cls(batch_size, attention_size, attention_size - 1)

    @classmethod
    def parse(cls, name: str) -> Bucket:
        """The bucket called `name`, e.g. `decode:4,256`. Raises: ValueError for another form."""
        match = _BUCKET_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not of the form prefill:B,L or decode:B,L")
        kind, batch_size, attention_size = match.groups()
        make = cls.prefill if kind == "prefill" else cls.decode
        return make(int(batch_size), int(attention_size))

    @property
    def input_ids_size(self) -> int:
        """Tokens per sequence that the step takes."""
        return self.attention_size - self.kv_cache_size

    @property
    def is_prefill(self) -> bool:
        return self.kv_cache_size == 0

    @property
    def is_decode(self) -> bool:
        return self.kv_cache_size > 0

    @property
    def kind(self) -> str:
        """`prefill` or `decode`."""
        return "prefill" if self.is_prefill else "decode"

    @property
    def name(self) -> str:
        """`prefill:1,128` or `decode:4,256`, as the command line writes it."""
        return f"{self.kind}:{self.batch_size},{self.attention_size}"

    @property
    def file_stem(self) -> str:
        """`decode-4-256`: the name in a form that file names can have."""
        return self.name.replace(":", "-").replace(",", "-")


@dataclass(frozen=True)
class PagedAttentionConfig:
    """How the KV cache is cut into blocks; block `padding_block_idx` takes what padding writes."""

    num_blocks: int
    block_size: int = 1
    padding_block_idx: int | None = None

    def __post_init__(self) -> None:
        if self.num_blocks <= 0 or self.block_size <= 0:
            raise ValueError("num_blocks and block_size must be positive")


@dataclass(frozen=True)
class SchedulerConfig:
    """How a loader queues requests; `runtime_config.json` carries it in an artifact.

    Raises: BLD021 for a value that means nothing.
    """

    npu_queue_limit: int = 2
    """Runs of a binary that wait at the device."""
    max_processing_samples: int = 65536
    """Requests that are worked on at the same time."""
    spare_blocks_ratio: float = 0.2
    """Share of the KV blocks that no new request gets."""
    is_offline: bool = False
    prefill_chunk_size: int | None = None
    """Tokens of a chunk of a prompt; None for prompts in one piece."""

    def __post_init__(self) -> None:
        for name in ("npu_queue_limit", "max_processing_samples", "prefill_chunk_size"):
            value = getattr(self, name)
            optional = name == "prefill_chunk_size" and value is None
            if not optional and (type(value) is not int or value < 1):
                raise errors.bad_scheduler_value(name, value, "integers from 1")
        ratio: object = self.spare_blocks_ratio
        if type(ratio) not in (int, float) or not 0 <= self.spare_blocks_ratio < 1:
            raise errors.bad_scheduler_value("spare_blocks_ratio", ratio, "0 to below 1")
        if type(self.is_offline) is not bool:
            raise errors.bad_scheduler_value("is_offline", self.is_offline, "True and False")

    def export(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SchedulerConfig:
        """Read what `export` wrote. Raises: BLD021, OSError, ValueError if it is no JSON."""
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a JSON object")
        known = [field.name for field in fields(cls)]
        for name in content:
            if name not in known:
                raise errors.bad_scheduler_value(name, content[name], f"{', '.join(known)}")
        return cls(**content)

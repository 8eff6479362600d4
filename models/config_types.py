"""Configuration types that builder, compiler and runtime share: plain data, nothing imported."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """How the runtime queues requests; `runtime_config.json` carries it in an artifact."""

    npu_queue_limit: int = 2
    max_processing_samples: int = 65536
    spare_blocks_ratio: float = 0.2
    is_offline: bool = False
    prefill_chunk_size: int | None = None

    def export(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SchedulerConfig:
        """Read what `export` wrote."""
        return cls(**json.loads(Path(path).read_text()))

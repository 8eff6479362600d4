"""`SamplingParams`: how the next token is chosen and when a sequence ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import errors

GREEDY_BELOW = 1e-5
"""Temperatures below this mean: always the likeliest token."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Names and defaults are those of `furiosa-llm`. Raises: RUN007 for what is not supported."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    """None: as many as the longest decode bucket holds."""
    min_tokens: int = 0
    seed: int | None = None
    """None: the seed of the `LLM`. A sequence's draws do not depend on its batch."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        limit = self.max_tokens
        checks: list[tuple[str, bool, str]] = [
            ("n", self.n == 1, "1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("top_k", self.top_k == -1 or self.top_k >= 1, "-1 (all tokens) or at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 2, "more than 0, at most 2"),
            ("max_tokens", limit is None or limit >= 1, "at least 1, or None"),
            ("min_tokens", 0 <= self.min_tokens <= (limit or self.min_tokens), "0 to max_tokens"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more, or None"),
        ]
        for field, valid, allowed in checks:
            if not valid:
                value: Any = getattr(self, field)
                raise errors.bad_sampling_value(field, value, allowed)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

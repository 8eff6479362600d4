"""`SamplingParams`: how the next token is chosen and when a sequence ends."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from .. import errors

GREEDY_BELOW = 1e-5
"""Temperatures below this mean: always the likeliest token."""
TINY = sys.float_info.min
"""The least that is more than 0."""


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
        ids = self.stop_token_ids
        self._check("stop_token_ids", "a list of token ids", isinstance(ids, list | tuple | set))
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        self._check("n", "1", _whole(self.n, 1, 1))
        self._check("temperature", "0 (greedy) or more", _number(self.temperature, 0, math.inf))
        self._check("top_p", "more than 0, at most 1", _number(self.top_p, TINY, 1))
        top_k = _whole(self.top_k, -1, -1) or _whole(self.top_k, 1)
        self._check("top_k", "-1 (all tokens) or at least 1", top_k)
        self._check("min_p", "0 to 1", _number(self.min_p, 0, 1))
        penalty = _number(self.repetition_penalty, TINY, 2)
        self._check("repetition_penalty", "more than 0, at most 2", penalty)
        limit = self.max_tokens
        self._check("max_tokens", "at least 1, or None", limit is None or _whole(limit, 1))
        self._check("min_tokens", "0 to max_tokens", _whole(self.min_tokens, 0, limit))
        self._check("seed", "0 or more, or None", self.seed is None or _whole(self.seed, 0))
        self._check("ignore_eos", "True or False", isinstance(self.ignore_eos, bool))
        stops = all(_whole(number, 0) for number in self.stop_token_ids)
        self._check("stop_token_ids", "token ids of 0 or more", stops)

    def _check(self, field: str, allowed: str, valid: bool) -> None:
        """Raises: RUN007."""
        if not valid:
            raise errors.bad_sampling_value(field, getattr(self, field), allowed)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


def _whole(value: object, low: int, high: int | None = None) -> bool:
    """Whether `value` is a whole number from `low` to `high`, if there is an end."""
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return low <= value and (high is None or value <= high)


def _number(value: object, low: float, high: float) -> bool:
    """Whether `value` is a number between both; nan lies nowhere, infinity is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return low <= value <= high and math.isfinite(value)

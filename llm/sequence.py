"""One prompt on its way through the device."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from .outputs import FinishReason
from .sampler import Logits, next_token
from .sampling_params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """A prompt, its answer so far, and where its keys and values are cached."""

    index: int
    prompt: Seq[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int]
    """Tokens that end the answer; they are part of it."""
    random: np.random.Generator

    answer: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    """KV block of every token that will ever be cached, by position."""
    cached: int = 0
    """Tokens whose keys and values are in the cache."""
    finish_reason: FinishReason | None = None
    token_cycles: list[int] = field(default_factory=list)
    """Simulated cycle, since the call began, at which each token of the answer was there."""

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.answer]

    @property
    def length(self) -> int:
        """Tokens so far: what the next step attends to."""
        return len(self.prompt) + len(self.answer)

    @property
    def blocks_needed(self) -> int:
        """The last token of the answer is never fed back, so it is not cached."""
        return len(self.prompt) + self.max_tokens - 1

    def accept(self, logits: Logits, now_cycles: int) -> None:
        """Append the token that `logits` [V] ask for, after a step that cached all tokens."""
        self.cached = self.length
        too_early = len(self.answer) < self.params.min_tokens
        token = next_token(
            logits,
            self.params,
            seen=self.tokens,
            forbidden=self.stop_ids if too_early else (),
            random=self.random,
        )
        self.answer.append(token)
        self.token_cycles.append(now_cycles)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.answer) == self.max_tokens:
            self.finish_reason = "length"

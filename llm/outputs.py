"""What `LLM.generate` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..models.config_types import Bucket

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. `text` leaves out special tokens, `token_ids` does not."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True)
class RequestOutput:
    """One prompt with its answer; `prompt` is None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass(frozen=True)
class Step:
    """One run of a binary on the simulated device."""

    bucket: Bucket
    cycles: int
    """From its inputs to its logits: all pipeline stages, and what they send."""
    interval_cycles: int
    """What its slowest stage takes: so many cycles later the stages could take another step."""
    replica: int = 0


@dataclass(frozen=True)
class Metrics:
    """Simulated times of one `generate` call; Python's own time is not in them."""

    ttft_us: float
    """From the call to a request's first token, mean over requests, in microseconds."""
    tpot_us: float | None
    """Time per token after the first, mean over requests; None if no request had a second."""
    cycles: int
    """From the call to the last token. Every replica has a clock of its own."""
    tokens_per_s: float
    """All answers' tokens by that time."""
    full_pipeline_tokens_per_s: float
    """The same if other requests kept every pipeline stage busy."""
    steps: list[Step]
    """Replica by replica, in the order in which they ran."""

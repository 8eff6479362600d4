"""The project's rule for equal tokens, and the eager reference that it needs.

Greedy tokens of the simulated artifact and of `transformers` in bf16 are equal, or at the first
difference the two tokens are tied: their f32 logits differ by at most three times the RMS error,
over the vocabulary, of eager bf16's own logits at that position. (Measured on SmolLM2, eager bf16
disagrees with itself, with and without cache, on ties up to 2.1 times that error.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from furiosa_llm import LLM, SamplingParams

Array = np.ndarray[Any, Any]
TIE_FACTOR = 3.0


@dataclass(frozen=True)
class Tie:
    """Where two greedy runs part, and why that is allowed."""

    position: int
    expected: int
    found: int
    gap: float
    """Between the two tokens' f32 logits."""
    allowed: float

    def __str__(self) -> str:
        return (
            f"token {self.position}: {self.found} instead of {self.expected}, "
            f"f32 gap {self.gap:.4f}, tie up to {self.allowed:.4f}"
        )


class EagerReference:
    """One model in f32 and in bf16, by transformers' eager attention.

    Both have bf16 weights; rotary frequencies stay f32, as in a loaded model.
    """

    def __init__(self, exact: Any) -> None:
        """`exact` is a transformers model whose parameters are f32 copies of bf16 values."""
        import copy

        self.exact = exact.eval()
        self.rounded = copy.deepcopy(exact)
        for parameter in self.rounded.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """`count` tokens of bf16 eager with a KV cache, end of text or not."""
        ids = torch.tensor([list(prompt)])
        past, tokens = None, list[int]()
        for _ in range(count):
            out = self.rounded(ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            tokens.append(int(out.logits[0, -1].float().argmax()))
            ids = torch.tensor([[tokens[-1]]])
        return tokens

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> tuple[Array, Array]:
        """(f32, bf16) logits of every position: [T, V] each."""
        ids = torch.tensor([list(tokens)])
        exact, rounded = (model(ids).logits[0].float() for model in (self.exact, self.rounded))
        return exact.numpy(), rounded.numpy()

    def tie(self, prompt: Sequence[int], expected: list[int], found: list[int]) -> Tie | None:
        """None if the tokens are equal. Fails if they part where there is no tie."""
        parts = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
        if not parts:
            return None
        at = parts[0]
        exact, rounded = (x[-1] for x in self.logits([*prompt, *expected[:at]]))
        allowed = TIE_FACTOR * rms(rounded - exact)
        gap = abs(float(exact[expected[at]] - exact[found[at]]))
        tie = Tie(at, expected[at], found[at], gap, allowed)
        assert gap <= allowed, str(tie)
        return tie


def greedy_tokens(llm: LLM, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` greedy tokens for each prompt, end of text or not, decoded together."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params)
    assert isinstance(outputs, list)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    assert all(len(tokens) == count for tokens in found)
    return found


def rms(error: Array) -> float:
    return float(np.sqrt(np.mean(np.square(error, dtype=np.float64))))

"""Choose the next token of one sequence from its row of logits, in numpy.

V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from .sampling_params import SamplingParams

Logits = NDArray[np.float32]
Scores = NDArray[np.float64]


def next_token(
    logits: Logits,
    params: SamplingParams,
    *,
    seen: Sequence[int],
    forbidden: Collection[int],
    random: np.random.Generator,
) -> int:
    """The token that follows. `logits` is [V]; `seen` are prompt and answer so far.

    `forbidden` tokens are never chosen: those that end a sequence before `min_tokens`.
    """
    scores = _penalised(logits.astype(np.float64), seen, params.repetition_penalty)
    scores[list(forbidden)] = -np.inf
    if params.greedy:
        return int(np.argmax(scores))
    probabilities = _softmax(scores / params.temperature)
    kept = _kept(probabilities, params)
    weights = np.where(kept, probabilities, 0.0)
    return int(random.choice(len(weights), p=weights / weights.sum()))


def _penalised(logits: Scores, seen: Sequence[int], penalty: float) -> Scores:
    """Move the logits of `seen` tokens towards unlikely: divided if positive, else multiplied."""
    if penalty != 1.0:
        ids = np.unique(np.asarray(seen, np.int64))
        logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return logits


def _kept(probabilities: Scores, params: SamplingParams) -> NDArray[np.bool_]:
    """Which tokens top_k, top_p and min_p leave; the likeliest always stays.

    top_p sees what top_k left, min_p compares with the likeliest token.
    """
    order = np.argsort(-probabilities, kind="stable")
    descending = probabilities[order]
    if params.top_k > 0:
        descending[params.top_k :] = 0.0
    before = np.cumsum(descending) - descending  # probability of all likelier tokens
    stays = (descending > 0) & (before < params.top_p * descending.sum())
    stays &= descending >= params.min_p * descending[0]
    kept = np.zeros(len(probabilities), np.bool_)
    kept[order] = stays
    return kept


def _softmax(scores: Scores) -> Scores:
    exponentials = np.exp(scores - scores.max())
    probabilities: Scores = exponentials / exponentials.sum()
    return probabilities

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.llm.sampler import next_token
from furiosa_llm.llm.sampling_params import SamplingParams

LOGITS = np.array([0.0, 3.0, 2.0, -1.0], np.float32)


def draw(
    params: SamplingParams,
    *,
    logits: np.ndarray[Any, np.dtype[np.float32]] = LOGITS,
    seen: tuple[int, ...] = (),
    forbidden: tuple[int, ...] = (),
    count: int = 1,
) -> list[int]:
    random = np.random.default_rng(0)
    return [
        next_token(logits, params, seen=seen, forbidden=forbidden, random=random)
        for _ in range(count)
    ]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(SamplingParams(temperature=0)) == [1]
    assert draw(SamplingParams(temperature=1e-6)) == [1]


def test_forbidden_tokens_are_never_taken() -> None:
    assert draw(SamplingParams(temperature=0), forbidden=(1, 2)) == [0]
    assert set(draw(SamplingParams(), forbidden=(1,), count=200)) == {0, 2, 3}


def test_frequencies_follow_the_probabilities() -> None:
    taken = np.bincount(draw(SamplingParams(), count=20000), minlength=4) / 20000
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum()
    deviation = np.sqrt(expected * (1 - expected) / 20000)
    assert (np.abs(taken - expected) <= 4 * deviation).all()


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        (SamplingParams(top_k=1), {1}),
        (SamplingParams(top_k=2), {1, 2}),
        (SamplingParams(top_p=0.5), {1}),  # p = 0.70, 0.26, 0.03, 0.01
        (SamplingParams(top_p=0.8), {1, 2}),
        (SamplingParams(top_p=0.96), {0, 1, 2}),
        (SamplingParams(top_p=0.96, top_k=3), {1, 2}),  # of what top_k left
        (SamplingParams(min_p=0.3), {1, 2}),
        (SamplingParams(min_p=1.0), {1}),
    ],
)
def test_unlikely_tokens_are_cut_off(params: SamplingParams, possible: set[int]) -> None:
    assert set(draw(params, count=500)) == possible


def test_seen_tokens_become_less_likely() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert draw(params, seen=(1,)) == [2]  # 3.0 / 2 < 2.0
    # A negative logit is multiplied, not divided.
    assert draw(params, logits=np.array([-1.0, -1.5], np.float32), seen=(0,)) == [1]


def test_equal_seeds_draw_equal_tokens() -> None:
    assert draw(SamplingParams(), count=50) == draw(SamplingParams(), count=50)


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    temperature=st.floats(1e-4, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(1, 30),
    min_p=st.floats(0, 1),
)
def test_some_token_is_always_taken(
    logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    (token,) = draw(params, logits=np.array(logits, np.float32))
    assert 0 <= token < len(logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", 0),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.5),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("seed", -1),
        ("n", "1"),
        ("temperature", "a"),
        ("temperature", None),
        ("temperature", float("inf")),
        ("top_p", "x"),
        ("top_k", 1.5),
        ("min_p", [0.5]),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("min_tokens", "0"),
        ("seed", "a"),
        ("ignore_eos", "no"),
        ("stop_token_ids", "12"),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [-1]),
    ],
)
def test_values_that_are_not_supported_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(FuriosaLLMError, match="RUN007") as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.at == f"SamplingParams.{field}"

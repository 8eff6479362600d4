"""The rectifier and the error function."""

from __future__ import annotations

import math

import numpy as np

from furiosa_llm.runtime_sim import numerics


def test_relu_keeps_nan_and_makes_every_zero_positive() -> None:
    values = np.array([1.5, -2.0, -0.0, 0.0, np.nan, np.inf, -np.inf], np.float32)
    got = numerics.relu(values)
    assert not np.signbit(got[:4]).any()
    assert np.array_equal(
        got, np.array([1.5, 0, 0, 0, np.nan, np.inf, 0], np.float32), equal_nan=True
    )
    assert numerics.relu(np.array([-3, 4], np.int32)).tolist() == [0, 4]


def test_erf_is_right_to_the_last_place() -> None:
    x = np.concatenate([np.linspace(-5, 5, 2001), [1e-6, -1e-20, 0.0]]).astype(np.float32)
    want = np.array([math.erf(v) for v in x.astype(np.float64)])
    assert np.abs(numerics.erf(x) - want).max() <= 2.0**-24
    assert math.isnan(numerics.erf(np.array([np.nan], np.float32))[0])

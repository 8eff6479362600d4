"""What the ledger says of tensors that are converted, or that nothing uses."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from memory_checkpoint import MemoryCheckpoint

from furiosa_llm.artifact.ledger import Decision
from furiosa_llm.artifact.losses import losses
from furiosa_llm.frontend.parameters import ParameterSpec, bind_parameters

BF16 = np.dtype(ml_dtypes.bfloat16)
EXACT = Decision("BF16", "exact", "every value is a BF16 number")
ROUNDED = Decision("BF16", "requantized", "rounded to BF16")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.ones((3, 4), BF16), {}),
        (np.full((3, 4), 1.5, np.float32), {"w": EXACT}),
        (np.full((3, 4), np.nan, np.float16), {"w": EXACT}),
        (np.full((3, 4), 1.001, np.float16), {"w": ROUNDED}),
        (np.array([[1.0] * 4] * 2 + [[1.001] * 4], np.float32), {"w": ROUNDED}),
    ],
)
def test_conversions_are_losses_unless_every_value_survives(
    stored: np.ndarray, expected: dict[str, Decision]
) -> None:
    bound = bind_parameters([ParameterSpec("w", (3, 4), BF16)], MemoryCheckpoint({"w": stored}))
    assert losses(bound) == expected


def test_tensors_without_a_use_are_dropped() -> None:
    tensors = {"w": np.ones(3, BF16), "rotary.inv_freq": np.ones(3, np.float32)}
    bound = bind_parameters([ParameterSpec("w", (3,), BF16)], MemoryCheckpoint(tensors))
    decided = losses(bound)
    assert decided == {
        "rotary.inv_freq": Decision("", "dropped", "the model has no parameter of this name")
    }


THETA = 10000.0
FREQUENCIES = [THETA ** (-2 * index / 64) for index in range(32)]
ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"


def decide(stored: np.ndarray, frequencies: list[float] | None = FREQUENCIES) -> Decision:
    tensors = {"w": np.ones(3, BF16), ROTARY: stored}
    bound = bind_parameters([ParameterSpec("w", (3,), BF16)], MemoryCheckpoint(tensors))
    return losses(bound, frequencies)[ROTARY]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64])
def test_stored_frequencies_are_those_of_the_config(dtype: type) -> None:
    """As old versions of transformers computed and stored them, in whatever type the model has."""
    exponents = np.arange(0, 64, 2, dtype=np.float32) / np.float32(64)
    stored: np.ndarray = (np.float32(1.0) / np.float32(THETA) ** exponents).astype(dtype)
    assert decide(stored).verdict == "exact"
    assert decide(stored, None).verdict == "dropped"
    changed = stored.copy()
    changed[17] *= np.array(1.05, dtype)
    for other in (changed, stored[:-1], stored * 0, stored * np.array(np.nan, dtype)):
        reason = "these are not the frequencies that the config gives"
        assert decide(other) == Decision("", "dropped", reason)


def test_a_tied_tensor_is_judged_by_the_name_it_is_stored_under() -> None:
    tensors = {"lm_head.weight": np.full((2, 2), 1.001, np.float32)}
    spec = ParameterSpec("embed.weight", (2, 2), BF16)
    tied = {"lm_head.weight": "embed.weight"}
    bound = bind_parameters([spec], MemoryCheckpoint(tensors), tied)
    assert losses(bound) == {"lm_head.weight": ROUNDED}

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


def test_a_tied_tensor_is_judged_by_the_name_it_is_stored_under() -> None:
    tensors = {"lm_head.weight": np.full((2, 2), 1.001, np.float32)}
    spec = ParameterSpec("embed.weight", (2, 2), BF16)
    tied = {"lm_head.weight": "embed.weight"}
    bound = bind_parameters([spec], MemoryCheckpoint(tensors), tied)
    assert losses(bound) == {"lm_head.weight": ROUNDED}

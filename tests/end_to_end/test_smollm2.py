"""The demo model from its GGUF file to text, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sequences import decode_inputs, prefill_inputs
from token_equality import EagerReference, greedy_tokens, rms

from furiosa_llm import LLM
from furiosa_llm.artifact.reader import read_artifact
from furiosa_llm.llm.device import SimulatedDevice
from furiosa_llm.models.config_types import Bucket

Array = np.ndarray[Any, Any]
NEW_TOKENS = 48
ERROR_RATIO = 1.5

FIVE_SENTENCES = (
    "The lighthouse stood on the last rock before the open sea. Every evening the keeper climbed "
    "its stairs, cleaned the lamp, and wrote the weather into a book. "
)
PROMPTS = {
    "one token": "The",
    "capital": "The capital of France is",
    "german": "Übermäßig große Bäche fließen im Frühling durch die Täler; im Sommer",
    "code": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "numbers": "1, 1, 2, 3, 5, 8, 13, 21,",
    "list": "Three things that you need to bake bread:\n1. Flour\n2.",
    "question": "Question: How many legs does a spider have?\nAnswer:",
    "story": "Once upon a time, in a village by the sea, there lived a",
    "symbols": '∑ x² ≤ 4·π — is that so? {"key": [true, null]} <|',
    "long": FIVE_SENTENCES * 3,
}


class Alone:
    """Greedy tokens of each prompt by itself, simulated once for all tests."""

    def __init__(self, demo: LLM) -> None:
        self._demo = demo
        self.prompts = prompt_ids(demo)
        self._found: dict[str, list[int]] = {}

    def tokens(self, name: str) -> list[int]:
        if name not in self._found:
            (self._found[name],) = greedy_tokens(self._demo, [self.prompts[name]], NEW_TOKENS)
        return self._found[name]


@pytest.fixture(scope="module")
def alone(demo: LLM) -> Alone:
    return Alone(demo)


def prompt_ids(demo: LLM) -> dict[str, list[int]]:
    """The prompts' tokens, with a chat and one that fills the bucket exactly."""
    ids = {name: demo.tokenizer.encode(text) for name, text in PROMPTS.items()}
    ids["chat"] = demo.tokenizer.encode_chat(
        [{"role": "user", "content": "Name two colours of a rainbow."}]
    )
    ids["exactly the bucket"] = (ids["long"] * 3)[:128]
    return ids


def test_greedy_tokens_are_those_of_eager(alone: Alone, reference: EagerReference) -> None:
    prompts = alone.prompts
    assert len(prompts["one token"]) == 1
    assert len(prompts["exactly the bucket"]) == 128
    for name, prompt in prompts.items():
        found = alone.tokens(name)
        assert len(found) == NEW_TOKENS
        tie = reference.tie(prompt, reference.greedy(prompt, NEW_TOKENS), found)
        print(f"{name}: {tie or 'equal'}")


def test_a_batch_of_four_gives_the_tokens_of_each_alone(
    demo: LLM, alone: Alone, reference: EagerReference
) -> None:
    names = ("one token", "german", "chat", "long")
    four = [alone.prompts[name] for name in names]
    assert len({len(prompt) for prompt in four}) == 4
    together = greedy_tokens(demo, four, NEW_TOKENS)
    assert demo.metrics is not None
    assert Bucket.decode(4, 256).name in {step.bucket.name for step in demo.metrics.steps}
    for name, found in zip(names, together, strict=True):
        reference.tie(alone.prompts[name], alone.tokens(name), found)


def test_teacher_forced_logits_err_no_more_than_eager(
    demo_artifact: Path, demo: LLM, reference: EagerReference
) -> None:
    device = SimulatedDevice(
        opened := read_artifact(demo_artifact), opened.parameters(None), slots=257, machine=None
    )
    for name in ("capital", "code", "german"):
        tokens = prompt_ids(demo)[name]
        tokens = [*tokens, *reference.greedy(tokens, 12)]
        first = len(tokens) - 12
        found = [device.run(Bucket.prefill(1, 128), prefill_inputs(tokens[:first], 128))[0, -1]]
        for length in range(first + 1, len(tokens) + 1):
            inputs = decode_inputs(tokens[length - 1], length, 256)
            found.append(device.run(Bucket.decode(1, 256), inputs)[0, 0])
        exact, rounded = (x[first - 1 :] for x in reference.logits(tokens))
        ratio = rms(np.stack(found) - exact) / rms(rounded - exact)
        print(f"{name}: {ratio:.2f} x eager bf16's RMS error")
        assert ratio <= ERROR_RATIO


def test_the_head_works_on_one_row_only(demo_artifact: Path) -> None:
    timing = read_artifact(demo_artifact).timing(Bucket.prefill(1, 128))
    macs = {module.path: module.macs for module in timing.modules}
    assert macs["lm_head"] == 576 * 49152
    assert macs["model.layers.29.mlp.down_proj"] == 128 * 576 * 1536
    assert sum(module.cycles for module in timing.modules) == timing.cycles
    assert sum(module.macs for module in timing.modules) == timing.macs

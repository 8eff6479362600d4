"""What takes minutes: the demo model's dumps, and more prompts than the quick tests have."""

from __future__ import annotations

from pathlib import Path

import pytest
from dump_chain import check_dumps
from token_equality import EagerReference, greedy_tokens

from furiosa_llm import LLM, ArtifactBuilder
from furiosa_llm.models.demo import demo_model_path

pytestmark = pytest.mark.long

NEW_TOKENS = 48
PROMPTS = [
    "Der schnellste Weg von Hamburg nach München ist",
    "SELECT name, COUNT(*) FROM users WHERE",
    "La recette de la tarte aux pommes commence par",
    "import numpy as np\n\nx = np.arange(10)\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "E = mc^2 means that",
    "The quick brown fox",
    "Q: What is 17 + 25?\nA:",
    "<html><head><title>",
    "In 1969, the first humans landed on",
]


@pytest.mark.parametrize("text", PROMPTS)
def test_more_prompts_give_the_tokens_of_eager(
    text: str, demo: LLM, reference: EagerReference
) -> None:
    prompt = demo.tokenizer.encode(text)
    (found,) = greedy_tokens(demo, [prompt], NEW_TOKENS)
    tie = reference.tie(prompt, reference.greedy(prompt, NEW_TOKENS), found)
    print(f"{text!r}: {tie or 'equal'}")


def test_each_dump_of_the_demo_model_leads_to_the_next(tmp_path: Path) -> None:
    builder = ArtifactBuilder(demo_model_path(), prefill_buckets=[(1, 128)])
    builder.build(tmp_path / "artifact", weights="skip", dump_ir=tmp_path / "dumps")
    assert check_dumps(tmp_path / "dumps") >= 4
    assert check_dumps(tmp_path / "dumps" / "prefill-1-128") == 4

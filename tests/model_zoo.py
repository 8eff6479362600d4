"""Tiny random models of every supported family, written as Hugging Face directories.

`make_model("qwen2", tmp_path / "model")` takes well under a second; the same kind, seed and
overrides give the same bytes. Weights are random with norms near 1 and biases near 0, at scales
that keep activations of order one, so a wrong operator shows in the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_head_dim": ("Llama", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}
"""Kind -> (prefix of the transformers classes, what differs from `BASE`)."""

RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "smollm3": ("SmolLM3", {"pad_token_id": 0, "num_hidden_layers": 4}),
    "exaone4": ("Exaone4", {}),
    "granite": (
        "Granite",
        {
            "logits_scaling": 2.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
}
"""Families that are made of the same operators, in the same form as `KINDS`."""


def make_config(kind: str, **overrides: Any) -> Any:
    """The transformers config of one tiny model; `overrides` are config fields."""
    family, own = {**KINDS, **RELATIVES}[kind]
    fields = {**BASE, **own, **overrides}
    config = getattr(transformers, f"{family}Config")(**fields)
    config.architectures = [f"{family}ForCausalLM"]
    config.dtype = torch.bfloat16
    return config


def make_model(
    kind: str, directory: Path, seed: int = 0, *, tokenizer: bool = False, **overrides: Any
) -> Path:
    """Write config.json and bf16 model.safetensors (and a byte tokenizer on request)."""
    config = make_config(kind, **overrides)
    model = getattr(transformers, config.architectures[0])(config).to(torch.bfloat16)
    _fill(model, seed)
    model.save_pretrained(directory)
    if tokenizer:
        _write_byte_tokenizer(directory)
    return directory


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers runs it, with eager attention: what ours is compared with."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Random weights from `seed` alone, whatever the state of torch's global generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                value = 0.1 * noise
            elif parameter.ndim == 1:
                value = 1.0 + 0.1 * noise
            else:
                value = noise * parameter.shape[-1] ** -0.5
            parameter.copy_(value)


def _write_byte_tokenizer(directory: Path) -> None:
    """One token a byte (ids 0..255), then <s> and </s>: every text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

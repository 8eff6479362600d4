"""The transformers config that a GGUF file's metadata describes (`llama` architecture).

Every `llama.*` key is either used or refused by name: a setting that is skipped in silence would
give a model that runs and is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gguf import dequantize

from .. import errors
from .checkpoint import Array
from .gguf_checkpoint import ROPE_FREQS
from .gguf_file import GgufFile

ARCHITECTURE = "llama"

REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)

IGNORED = {"vocab_size", "rope.scaling.finetuned"}
"""Keys that say what other keys or tensors say already, or nothing about the values."""

NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "expert_count": lambda value: value == 0,
    "expert_used_count": lambda value: value == 0,
    "tensor_data_layout": lambda value: value == "Meta AI original pth",
    "attention.causal": lambda value: value is True,
    "attention.sliding_window": lambda value: value == 0,
    "rope.scaling.type": lambda value: value in ("none", "linear"),
}
"""Keys that are fine while they hold a value for which nothing has to be done."""

USED = {
    *REQUIRED,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
}

LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of every Llama 3.x; GGUF keeps only their effect, which `_llama3_rope` checks."""


def config_fields(file: GgufFile) -> dict[str, Any]:
    """`config.json` of the model in `file`, as a dictionary.

    Raises: GGF002 for another architecture or a setting that is not supported; lists all of them.
    """
    name = file.metadata.get("general.architecture")
    if name != ARCHITECTURE:
        raise errors.unsupported_gguf(
            str(file.path), [f"architecture `{name}`; supported is `{ARCHITECTURE}`"]
        )
    prefix = f"{ARCHITECTURE}."
    own = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    if problems := _problems(own, file):
        raise errors.unsupported_gguf(str(file.path), problems)
    return _fields(own, file)


def _problems(own: Mapping[str, Any], file: GgufFile) -> list[str]:
    """Everything about the settings that cannot be represented."""
    problems = [f"`llama.{key}` is missing" for key in REQUIRED if key not in own]
    if "token_embd.weight" not in file.tensors:
        problems.append("tensor `token_embd.weight` is missing")
    for key, value in own.items():
        if key in NEUTRAL and not NEUTRAL[key](value):
            problems.append(f"`llama.{key}` = {value!r}")
        elif key not in USED and key not in NEUTRAL and key not in IGNORED:
            problems.append(f"the setting `llama.{key}` = {str(value)[:40]} is unknown")
        elif key in USED and (isinstance(value, bool) or not isinstance(value, int | float)):
            problems.append(f"`llama.{key}` = {str(value)[:40]} is not one number for all layers")
        elif key in USED and value <= 0:
            problems.append(f"`llama.{key}` = {value} is not positive")
    if problems:
        return problems

    head_dim = _head_dim(own)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            problems.append(f"`llama.{key}` = {own[key]} differs from the head size {head_dim}")
    return problems


def _head_dim(own: Mapping[str, Any]) -> int:
    default = own["embedding_length"] // own["attention.head_count"]
    return int(own.get("attention.key_length", default))


def _fields(own: Mapping[str, Any], file: GgufFile) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own.get("attention.head_count_kv", own["attention.head_count"]),
        "head_dim": _head_dim(own),
        "hidden_act": "silu",
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": _shortest_f32(own["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": _rope(own, file),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "bfloat16",
        **token_ids(file.metadata),
    }


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` (a list if there are several), `pad_token_id`, or None."""

    def of(kind: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        return None if value is None else int(value)

    found = [of(kind) for kind in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in found if end is not None))
    eos = ends if len(ends) > 1 else next(iter(ends), None)
    return {"bos_token_id": of("bos"), "eos_token_id": eos, "pad_token_id": of("padding")}


def _shortest_f32(value: float) -> float:
    """The decimal that was meant: 9.999999747378752e-06, an f32, is 1e-05."""
    return float(str(np.float32(value)))


def _rope(own: Mapping[str, Any], file: GgufFile) -> dict[str, Any]:
    theta = _shortest_f32(own.get("rope.freq_base", 10000.0))
    if own.get("rope.scaling.type") == "linear":
        factor = _shortest_f32(own.get("rope.scaling.factor", 1.0))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if ROPE_FREQS in file.tensors:
        return _llama3_rope(theta, _head_dim(own), file)
    return {"rope_type": "default", "rope_theta": theta}


def _llama3_rope(theta: float, head_dim: int, file: GgufFile) -> dict[str, Any]:
    """llama3 scaling, recovered from the divisor of each frequency and checked against it.

    Raises: GGF002 if the divisors are those of another rule.
    """
    kind = file.tensors[ROPE_FREQS].type
    divisors = dequantize(file.rows(ROPE_FREQS), kind).reshape(-1)
    scaling = {"factor": _shortest_f32(divisors.max()), **LLAMA3_SCALING}
    expected = llama3_divisors(theta, head_dim, **scaling)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5):
        raise errors.unsupported_gguf(
            str(file.path), [f"`{ROPE_FREQS}` holds factors that are not those of Llama 3.x"]
        )
    return {"rope_type": "llama3", "rope_theta": theta, **scaling}


def llama3_divisors(
    theta: float,
    head_dim: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Array:
    """What llama3 scaling divides each of the D/2 frequencies by.

    1 for short wavelengths, `factor` for long ones, in between interpolated in the frequency.
    """
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    periods = original_max_position_embeddings * frequency / (2 * math.pi)
    smooth = (periods - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    divisors: Array = 1.0 / ((1.0 - smooth) / factor + smooth)
    return divisors

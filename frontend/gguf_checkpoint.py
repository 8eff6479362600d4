"""A GGUF file's tensors under their Hugging Face names, dequantised one by one to bf16.

Llama files store the rows of q and k so that the two halves of a rotary pair are neighbours
(row 2i and 2i + 1 of a head); Hugging Face keeps them half a head apart (rows i and i + D/2).
Reading puts them back. D is the head size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from .. import errors
from .checkpoint import Array, TensorInfo
from .gguf_file import GgufFile, GgufTensor

BF16 = np.dtype(ml_dtypes.bfloat16)

CHUNK_ELEMENTS = 1 << 22
"""Elements dequantised at once: the f32 intermediate stays at 16 MiB."""

MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF module -> Hugging Face module, of the `llama` architecture."""

ROPE_FREQS = "rope_freqs.weight"
"""Not a weight: the factors of llama3 rope scaling, which belong to the config."""


@dataclass(frozen=True)
class GgufCheckpoint:
    """Tensors of a `llama` GGUF file; `q_heads` and `kv_heads` are needed to restore q and k."""

    file: GgufFile
    q_heads: int
    kv_heads: int

    @property
    def path(self) -> str:
        return str(self.file.path)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Raises: GGF004 with every tensor whose name or type is unknown."""
        problems = []
        tensors = {}
        for tensor in self.file.tensors.values():
            name = huggingface_name(tensor.name)
            if tensor.name == ROPE_FREQS:
                continue
            if name is None:
                problems.append(f"`{tensor.name}` has no place in a Llama model")
            elif not _can_dequantize(tensor.type):
                problems.append(f"`{tensor.name}` has the type {tensor.type.name}")
            else:
                tensors[name] = TensorInfo(name, tensor.shape, BF16, tensor.type.name)
        if problems:
            raise errors.unsupported_gguf_tensors(self.path, problems)
        return tensors

    def read(self, name: str) -> Array:
        info = self._info(name)
        return self.read_rows(name, 0, info.shape[0])

    def read_rows(self, name: str, begin: int, end: int) -> Array:
        info = self._info(name)
        tensor = self.file.tensors[self._gguf_name[name]]
        stored = self._stored_rows(tensor, begin, end)
        rows = self.file.rows(tensor.name)
        if len(info.shape) == 1:  # one stored row, whose elements are our rows
            return _dequantize(rows, tensor.type).reshape(-1)[stored]
        return _dequantize(rows[stored], tensor.type).reshape(-1, *info.shape[1:])

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise errors.unknown_tensor(self.path, name)
        return self.tensors[name]

    def _stored_rows(self, tensor: GgufTensor, begin: int, end: int) -> slice | Array:
        """Where rows [begin, end) of the Hugging Face tensor lie in the file's."""
        if ".attn_q." in tensor.name:
            return _row_order(begin, end, self.q_heads, tensor.shape[0])
        if ".attn_k." in tensor.name:
            return _row_order(begin, end, self.kv_heads, tensor.shape[0])
        return slice(begin, end)

    @cached_property
    def _gguf_name(self) -> Mapping[str, str]:
        names = {huggingface_name(name): name for name in self.file.tensors}
        return {name: gguf for name, gguf in names.items() if name is not None}


def huggingface_name(gguf_name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None if unknown."""
    module, _, kind = gguf_name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in MODEL_NAMES:
        return f"{MODEL_NAMES[module]}.{kind}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if block and block[2] in BLOCK_NAMES:
        return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.{kind}"
    return None


def _row_order(begin: int, end: int, heads: int, rows: int) -> Array:
    """Stored row of each Hugging Face row in [begin, end)."""
    row = np.arange(begin, end)
    head_dim = rows // heads
    head, within = row // head_dim, row % head_dim
    half, pair = within // (head_dim // 2), within % (head_dim // 2)
    order: Array = head * head_dim + 2 * pair + half
    return order


def _dequantize(rows: Array, kind: GGMLQuantizationType) -> Array:
    """Stored rows [R, bytes] -> bf16 [R, elements], by chunks so that little f32 is alive."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    width = rows.shape[1] // block_bytes * block
    values = np.empty((rows.shape[0], width), BF16)
    step = max(1, CHUNK_ELEMENTS // width)
    for begin in range(0, rows.shape[0], step):
        chunk = np.ascontiguousarray(rows[begin : begin + step])
        values[begin : begin + step] = dequantize(chunk, kind)
    return values


def _can_dequantize(kind: GGMLQuantizationType) -> bool:
    """The library knows more types than it can dequantise, and says so only when called."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True

"""Programs of true-size models for the benchmarks, compiled from configs without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from build_cost import LLAMA_3_1_8B

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

    from furiosa_llm.backend_rngd.isa.program import Program
    from furiosa_llm.models.config_types import Bucket

TP8_SHARD: Mapping[str, Any] = {
    **LLAMA_3_1_8B,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "intermediate_size": 1792,
    "vocab_size": 16032,
}
"""What one of 8 processing elements holds of Llama-3.1-8B; exchanges are not in it."""

LLAMA_3_1_70B: Mapping[str, Any] = {
    **LLAMA_3_1_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}

SHAPES: Mapping[str, Mapping[str, Any]] = {"8B": LLAMA_3_1_8B, "8B shard of 8": TP8_SHARD}


def model_config(fields: Mapping[str, Any]) -> Any:
    """The transformers config of a Llama with these fields."""
    from transformers import LlamaConfig

    return LlamaConfig(**dict(fields))


class Model:
    """A model, imported once; `program` compiles it for a bucket."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        import torch

        from furiosa_llm.frontend.torch_import import import_model
        from furiosa_llm.passes.pipeline import import_phase, model_phase, run_passes

        self.config = model_config(fields)
        self._module: ModuleOp = import_model(self.config, torch.bfloat16)
        run_passes(self._module, [*import_phase(), *model_phase(rows=1)])

    def program(self, bucket: Bucket, level: int, ranks: int = 1) -> Program:
        """The bucket's program at `-O level` for some tensor-parallel ranks."""
        from furiosa_llm.backend_rngd.encode import encode_program
        from furiosa_llm.backend_rngd.isa.container import read_program, write_program
        from furiosa_llm.backend_rngd.pipeline import DIALECTS, backend_phase
        from furiosa_llm.ir.text import make_context
        from furiosa_llm.passes.pipeline import bucket_phase, run_passes, shard_phase

        module = self._module.clone()
        passes = [*bucket_phase(bucket), *shard_phase(ranks), *backend_phase(bucket, level)]
        run_passes(module, passes, context=make_context(DIALECTS))
        return read_program(write_program(encode_program(module, "benchmark")))

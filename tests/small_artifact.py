"""An artifact of a model with two small parameters, made without a compiler.

Its binaries hold one harmless command each; use it for what does not run them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from furiosa_llm.artifact import builder
from furiosa_llm.artifact.describe import Binary, Build
from furiosa_llm.artifact.parameter_files import ParameterFiles, copy_parameters
from furiosa_llm.artifact.reader import running_version
from furiosa_llm.artifact.schema import WeightsMode
from furiosa_llm.backend_rngd.isa.container import write_program
from furiosa_llm.backend_rngd.isa.instructions import Control
from furiosa_llm.backend_rngd.isa.program import (
    Binding,
    Block,
    CacheIo,
    Call,
    Header,
    Program,
    Provenance,
    Region,
    StageCut,
)
from furiosa_llm.frontend.checkpoint import Array, TensorInfo
from furiosa_llm.frontend.parameters import ParameterSpec, bind_parameters
from furiosa_llm.models.config_types import Bucket, SchedulerConfig
from furiosa_llm.models.mesh import Mesh, make_mesh
from furiosa_llm.models.stages import stage_sizes

BF16 = np.dtype(ml_dtypes.bfloat16)
VOCABULARY = {"a": 0, "b": 1, "c": 2, "d": 3, "<end>": 4, "x": 5, "y": 6, "z": 7}
EOS = VOCABULARY["<end>"]
BLOCKS = 4
HF_CONFIG = {
    "architectures": ["TinyForCausalLM"],
    "vocab_size": len(VOCABULARY),
    "eos_token_id": EOS,
    "max_position_embeddings": 64,
    "num_hidden_layers": BLOCKS,
}
ONE_PE = make_mesh()
BUCKETS = (Bucket.prefill(1, 16), Bucket.decode(1, 32), Bucket.decode(4, 32))


class MemoryCheckpoint:
    """Tensors of a dictionary as a checkpoint."""

    path = "<memory>"

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = arrays
        self.tensors = {
            name: TensorInfo(name, array.shape, array.dtype, str(array.dtype))
            for name, array in arrays.items()
        }

    def read(self, name: str) -> Array:
        return self.arrays[name]

    def read_rows(self, name: str, begin: int, end: int) -> Array:
        return self.arrays[name][begin:end]


ARRAYS: Mapping[str, Array] = {
    "model.embed_tokens.weight": np.arange(32, dtype=np.float32).reshape(8, 4).astype(BF16),
    "model.norm.weight": np.ones(4, BF16),
}


def specs_of(arrays: Mapping[str, Array]) -> list[ParameterSpec]:
    return [ParameterSpec(name, array.shape, array.dtype) for name, array in arrays.items()]


def idle_program(bucket: Bucket) -> Program:
    """A program with a call of one command for each layer, which no test runs."""
    layers = range(BLOCKS)
    caches = [CacheIo(layer=i, kv_heads=1, head_dim=16, padded=16) for i in layers]
    header = Header(
        model_name="tiny",
        bucket=bucket.name,
        regions=tuple(
            Region(name=f"cache.{number}", cache=cache) for number, cache in enumerate(caches)
        ),
        blocks=(Block(name="block", first=0, count=1, provenance=(Provenance(path="model"),)),),
        calls=tuple(
            Call(
                block=0,
                prefix=f"model.layers.{layer}",
                bindings=(Binding(register_number=0, region=layer),),
            )
            for layer in layers
        ),
        stage_cuts=tuple(StageCut(call=layer, sends=()) for layer in layers[1:]),
    )
    return Program(header, (Control(count=1, length=1),))


def tokenizer_json() -> bytes:
    """One token per letter of the vocabulary, special tokens apart."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    return str(tokenizer.to_str()).encode()


def write_artifact(
    directory: Path,
    *,
    buckets: Sequence[Bucket] = BUCKETS,
    weights: WeightsMode = "copy",
    extra_files: Mapping[str, bytes] | None = None,
    hf_config: Mapping[str, Any] = HF_CONFIG,
    mesh: Mesh = ONE_PE,
    num_blocks: int | None = None,
) -> Path:
    """Write an artifact as a build does, and return its directory."""
    directory.mkdir(parents=True)
    contents = {"config.json": json.dumps(dict(hf_config)).encode(), **(extra_files or {})}
    files = builder.write_all(directory, contents)
    binaries = []
    for bucket in buckets:
        name = f"{bucket.file_stem}.vedf"
        files |= builder.write_all(directory, {name: write_program(idle_program(bucket))})
        binaries.append(Binary(bucket, name, idle_program(bucket)))
    stored = ParameterFiles({}, {})
    specs = specs_of(ARRAYS)
    if weights == "copy":
        stored = copy_parameters(directory, bind_parameters(specs, MemoryCheckpoint(ARRAYS)))
    build = Build(
        name="tiny",
        model_id="tiny",
        hf_config=hf_config,
        built_by=running_version(),
        tools={"torch": "0"},
        weights=weights,
        last_token_only=True,
        level=2,
        mesh=mesh,
        stage_sizes=stage_sizes(BLOCKS, mesh.pp),
        partial_sum="f32",
        tiling_pins={},
        scheduler=SchedulerConfig(),
        num_blocks=num_blocks,
        quantization=None,
        binaries=binaries,
        parameters=specs,
        parameter_file_of=stored.file_of,
        tied={},
    )
    builder.describe_into(directory, build, {**files, **stored.files})
    return directory

"""What an artifact or a binary holds, as plain data for `inspect`."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from .. import errors
from ..backend_rngd.isa.container import read_program
from ..backend_rngd.isa.program import Program
from .reader import Artifact, read_artifact, sha256_of


def summarize(path: Path) -> dict[str, Any]:
    """An artifact directory or a `.vedf` file. Raises: ART001, ART005 to ART007, ART009, VEDxxx."""
    return summarize_binary(path) if path.is_file() else summarize_artifact(path)


def summarize_artifact(path: Path) -> dict[str, Any]:
    """Model, binaries and parameters. Raises: ART001, ART005 to ART007, VEDxxx."""
    artifact = read_artifact(path)
    manifest, metadata = artifact.manifest, artifact.description.metadata
    return {
        "artifact_id": metadata.artifact_id,
        "name": metadata.name,
        "built_by": manifest.built_by,
        "tools": manifest.tools,
        "model": {
            "id": manifest.model_id,
            "architecture": manifest.architecture,
            "vocabulary_size": artifact.vocabulary_size,
        },
        "weights": manifest.weights,
        "optimization_level": manifest.optimization_level,
        "parallel": {
            "devices": artifact.description.devices,
            "tensor_parallel_size": artifact.description.parallel_config.tensor_parallel_size,
            "num_blocks_per_pp_stage": list(manifest.num_blocks_per_pp_stage),
            "partial_sum": manifest.partial_sum,
        },
        "kv_cache": _kv_cache(artifact.program(artifact.buckets[0])),
        "tokenizer": artifact.has_file("tokenizer.json"),
        "buckets": [
            {
                "bucket": entry.bucket,
                "file": entry.file,
                "sha256": manifest.files[entry.file].sha256,
                **_code(artifact.program(bucket)),
            }
            for entry, bucket in zip(manifest.binaries, artifact.buckets, strict=True)
        ],
        "parameters": _parameters(artifact),
        "ledger": artifact.ledger and artifact.ledger.model_dump(mode="json"),
        "sharding": artifact.sharding and artifact.sharding.model_dump(mode="json"),
    }


def summarize_binary(path: Path) -> dict[str, Any]:
    """One `.vedf` file. Raises: ART009 if there is none, VEDxxx."""
    program = open_binary(path)
    return {
        "bucket": program.bucket,
        "file": path.name,
        "sha256": sha256_of(path),
        **_code(program),
        "blocks": [
            {
                "name": block.name,
                "commands": block.count,
                "code_bytes": program.block_code_bytes(block),
                "calls": sum(program.blocks[call.block] is block for call in program.calls),
            }
            for block in program.blocks
        ],
        "kv_cache": _kv_cache(program),
        "inputs": [_tensor(io.name, io.shape, io.dtype) for io in program.inputs],
        "outputs": [_tensor(io.name, io.whole_shape, io.dtype) for io in program.outputs],
        "parameters": [
            {"name": part.tensor, "shape": list(part.shape), "bytes": part.layout.bytes}
            for part in program.parameters
        ],
    }


def disassembly(path: Path) -> str:
    """The commands of a `.vedf` file as text. Raises: ART009, ART010 for a directory, VEDxxx."""
    if path.is_dir():
        raise errors.nothing_to_disassemble(str(path))
    from ..backend_rngd.isa.assembly import disassemble

    return disassemble(open_binary(path))


def open_binary(path: Path) -> Program:
    """Raises: ART009 if `path` is no file, VEDxxx."""
    if not path.is_file():
        raise errors.nothing_to_inspect(str(path))
    return read_program(path)


def _code(program: Program) -> dict[str, int]:
    """Entries of the issue list, and bytes of code. Both count a shared block once."""
    return {
        "commands": sum(block.count for block in program.blocks),
        "code_bytes": sum(program.block_code_bytes(block) for block in program.blocks),
        "calls": len(program.calls),
    }


def _kv_cache(program: Program) -> dict[str, Any]:
    """Types of keys and values, and the bytes of a token on one rank, in all layers."""
    return {
        "dtypes": sorted({io.dtype for io in program.caches}),
        "bytes_per_token": sum(io.slot_bytes for io in program.caches),
    }


def _parameters(artifact: Artifact) -> list[dict[str, Any]]:
    return [
        {**_tensor(name, entry.shape, entry.dtype), "file": entry.file}
        for name, entry in artifact.manifest.parameters.items()
    ]


def _tensor(name: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "dtype": dtype, "elements": prod(shape)}

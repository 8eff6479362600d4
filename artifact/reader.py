"""Open an artifact: binaries, parameters, tokenizer. Works without any compiler library.

A file's hash is checked when the file is first used, so opening an artifact costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import errors
from ..backend_rngd.isa.container import read_program
from ..backend_rngd.isa.machine import DEFAULT_MACHINE, load_machine
from ..backend_rngd.isa.program import Program
from ..frontend.checkpoint import Array, Checkpoint, TensorInfo
from ..frontend.parameters import BoundParameters, ParameterSpec, bind_parameters
from ..frontend.safetensors_checkpoint import SafetensorsCheckpoint, SafetensorsFile
from ..models.config_types import Bucket
from ..runtime_sim.pipeline_timing import PipelineTiming, time_stages
from ..runtime_sim.timing import ProgramTiming, time_program
from . import schema
from .ledger import LEDGER_FILE, Ledger
from .other_weights import check_alike, check_other_weights
from .schema import ArtifactDescription, Manifest, RuntimeConfig, Sharding

HASH_CHUNK_BYTES = 1 << 20

Warn = Callable[[str], None]
"""Told what a user should know, a line at a time."""


def running_version() -> str:
    """This distribution and its version, as manifests name it."""
    return f"{schema.PRODUCT} {version(schema.PRODUCT)}"


@dataclass(frozen=True)
class Artifact:
    """What a build wrote. Get one from `read_artifact`."""

    path: Path
    manifest: Manifest

    @cached_property
    def description(self) -> ArtifactDescription:
        """`artifact.json`. Raises: ART006, ART007."""
        return schema.read_json(ArtifactDescription, self.file(schema.ARTIFACT_FILE))

    @cached_property
    def runtime_config(self) -> RuntimeConfig:
        """`runtime_config.json`. Raises: ART006, ART007."""
        return schema.read_json(RuntimeConfig, self.file(schema.RUNTIME_CONFIG_FILE))

    @cached_property
    def sharding(self) -> Sharding | None:
        """`sharding.json`; None for one rank. Raises: ART006, ART007."""
        if not self.has_file(schema.SHARDING_FILE):
            return None
        return schema.read_json(Sharding, self.file(schema.SHARDING_FILE))

    @cached_property
    def ledger(self) -> Ledger | None:
        """`quantization_ledger.json`; None if an older version built it. Raises: ART006, ART007."""
        if not self.has_file(LEDGER_FILE):
            return None
        return schema.read_json(Ledger, self.file(LEDGER_FILE))

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """In the order of the build: prefill first."""
        return tuple(Bucket.parse(entry.bucket) for entry in self.manifest.binaries)

    @property
    def hf_config(self) -> dict[str, Any]:
        """The model's config, as Hugging Face writes it."""
        return self.description.hf_config

    @property
    def vocabulary_size(self) -> int:
        return int(self.hf_config["vocab_size"])

    def binary_file(self, bucket: Bucket) -> Path:
        """The `.vedf` file of `bucket`. Raises: ART007, ART008."""
        files = {entry.bucket: entry.file for entry in self.manifest.binaries}
        if bucket.name not in files:
            raise errors.no_such_bucket(bucket.name, files)
        return self.file(files[bucket.name])

    def program(self, bucket: Bucket) -> Program:
        """The program that serves `bucket`, read once. Raises: ART007, ART008, VEDxxx."""
        if bucket not in self._programs:
            self._programs[bucket] = read_program(self.binary_file(bucket))
        return self._programs[bucket]

    def programs(self) -> dict[Bucket, Program]:
        """The programs of all buckets. Raises: ART007, VEDxxx."""
        return {bucket: self.program(bucket) for bucket in self.buckets}

    def timing(
        self, bucket: Bucket, machine: str | Path = DEFAULT_MACHINE, *, sharers: int = 1
    ) -> ProgramTiming:
        """What one run of `bucket` takes on a machine description, given by name or file.

        `sharers` PEs load from HBM at the same time.
        Raises: ART007, ART008, VEDxxx, SIMxxx.
        """
        return time_program(self.program(bucket), load_machine(machine), sharers=sharers)

    def stage_timing(
        self,
        bucket: Bucket,
        starts: Sequence[int],
        machine: str | Path = DEFAULT_MACHINE,
        *,
        sharers: int,
        cards: Sequence[int],
    ) -> PipelineTiming:
        """The same with calls cut into stages on these cards. Raises: SIM029, and as `timing`."""
        program, loaded = self.program(bucket), load_machine(machine)
        return time_stages(program, loaded, starts, sharers=sharers, cards=cards)

    def parameters(
        self, weights_from: Path | None = None, warn: Warn = warnings.warn
    ) -> BoundParameters:
        """A source of parameters by name: the artifact's own, or those of another directory.

        Nothing is read before a tensor is asked for, but codes, scales and what is of another type
        in another directory. `warn` is told what is rounded of its tensors, or not used.
        Raises: RUN006 without weights, ART007, CKP001 to CKP005 and CKP007; for another directory
        QNT003, QNT005, QNT011 and QNT023, too.
        """
        declared, checkpoint = self._declared(), self._checkpoint(weights_from)
        if weights_from is not None:
            check_alike(declared, checkpoint)
        bound = bind_parameters(declared, checkpoint, self.manifest.tied)
        if weights_from is not None:
            for line in check_other_weights(bound):
                warn(line)
        return bound

    def has_file(self, name: str) -> bool:
        return name in self.manifest.files

    def file(self, name: str) -> Path:
        """The path of one of the artifact's files, found whole. Raises: ART007."""
        self._check(name)
        return self.path / name

    def _checkpoint(self, weights_from: Path | None) -> Checkpoint:
        if weights_from is not None:
            if (weights_from / schema.MANIFEST_FILE).is_file():
                return read_artifact(weights_from)._checkpoint(None)
            return SafetensorsCheckpoint(weights_from)
        if self.manifest.weights == "skip":
            raise errors.no_parameters(str(self.path))
        return _OwnParameters(self)

    def _declared(self) -> list[ParameterSpec]:
        return [
            ParameterSpec(name, entry.shape, entry.numpy)
            for name, entry in self.manifest.parameters.items()
        ]

    @cached_property
    def _checked(self) -> set[str]:
        return set()

    @cached_property
    def _programs(self) -> dict[Bucket, Program]:
        return {}

    def _check(self, name: str) -> None:
        """Raises: ART007 if the file is not what the manifest says. Each file is read once."""
        if name in self._checked:
            return
        path, entry = self.path / name, self.manifest.files.get(name)
        if entry is None:
            raise errors.damaged_file(str(path), f"{schema.MANIFEST_FILE} does not list it")
        if not path.is_file():
            raise errors.damaged_file(str(path), "it is missing")
        size = path.stat().st_size
        if size != entry.size_bytes:
            reason = f"it has {size} bytes, the build wrote {entry.size_bytes}"
            raise errors.damaged_file(str(path), reason)
        # Parameters are too large to read twice; the size shows a broken copy.
        is_parameters = path.suffix == ".safetensors"
        if not is_parameters and entry.sha256 is not None and sha256_of(path) != entry.sha256:
            raise errors.damaged_file(str(path), "its SHA-256 is not the one that the build wrote")
        self._checked.add(name)


@dataclass(frozen=True)
class _OwnParameters:
    """The artifact's parameter files as a checkpoint."""

    artifact: Artifact

    @property
    def path(self) -> str:
        return str(self.artifact.path)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: file.tensors[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> Array:
        return self._file_of[name].read(name)

    def read_rows(self, name: str, begin: int, end: int) -> Array:
        return self._file_of[name].read_rows(name, begin, end)

    @cached_property
    def _file_of(self) -> dict[str, SafetensorsFile]:
        names = {entry.file for entry in self.artifact.manifest.parameters.values()}
        files = [SafetensorsFile(self.artifact.file(name)) for name in sorted(filter(None, names))]
        return {name: file for file in files for name in file.tensors}


def read_artifact(path: Path) -> Artifact:
    """Open the artifact at `path`.

    Raises: ART001 if there is none, ART005 if another version wrote it, ART006.
    """
    manifest = path / schema.MANIFEST_FILE
    if not path.is_dir():
        reason = "it is a file" if path.exists() else "there is no such directory"
        raise errors.not_an_artifact(str(path), reason)
    if not manifest.is_file():
        raise errors.not_an_artifact(str(path), f"the directory has no {schema.MANIFEST_FILE}")
    _check_format(manifest)
    return Artifact(path, schema.read_json(Manifest, manifest))


def _check_format(manifest: Path) -> None:
    """Before anything else is believed: a file of another format has other keys."""
    try:
        content = json.loads(manifest.read_bytes())
        found, built_by = content["format_version"], content["built_by"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise errors.broken_metadata(str(manifest), reason) from error
    if found != schema.FORMAT_VERSION:
        reason = f"its format version is {found}, this version reads {schema.FORMAT_VERSION}"
        raise errors.format_mismatch(str(manifest), built_by, running_version(), reason)


def sha256_of(path: Path) -> str:
    """Raises: OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

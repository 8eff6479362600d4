"""How a model is quantised, from its checkpoint or from a directory beside it, and what is lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from .. import errors
from ..frontend.checkpoint import Checkpoint
from ..frontend.parameters import BoundParameters, ParameterSpec, bind_parameters
from ..frontend.quantization.codes import check_codes
from ..frontend.quantization.declared import DeclaredTensors
from ..frontend.quantization.furiosa import FORMAT_FILE, FuriosaDirectory, describe
from ..frontend.quantization.quantizing import quantizing
from ..frontend.quantization.reader import CONFIG_FILE, read_quantization
from ..frontend.quantization.scales import check_scale_values
from ..frontend.source import ModelSource
from ..models.quantization import Quantization
from ..models.quantization_support import unsupported
from .ledger import Ledger, make_gguf_ledger, make_ledger
from .losses import losses


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a model, and how they are quantised."""

    source: ModelSource
    described: Quantization | None
    """As checkpoint or directory say it; None if nothing is quantised."""
    compiled: Quantization | None
    """As `checkpoint` has it: codes and scales under names of their own."""
    stored: Checkpoint
    """The model's own checkpoint; without weights, shapes and types alone."""
    checkpoint: Checkpoint
    """What parameters are read from: the same, or one that quantises its weights."""

    def bind(self, declared: Iterable[ParameterSpec]) -> BoundParameters:
        """The parameters, found to fit. Raises: CKP005."""
        return bind_parameters(declared, self.checkpoint, tied=self.source.tied)

    def ledger(
        self, bound: BoundParameters | None, frequencies: Sequence[float] | None = None
    ) -> Ledger:
        """A row for each tensor of the checkpoint; values are looked at if there are `bound` ones.

        `frequencies` are those of the model's rotary embeddings, which old checkpoints store.
        Raises: QNT005 for scales, QNT011 for codes.
        """
        if self.source.kind == "gguf":
            return make_gguf_ledger(self.stored.tensors)
        decisions, remarks = {}, {}
        if bound is not None:
            decisions = losses(bound, frequencies)
            if self.compiled is not None and self.described is not None:
                check_scale_values(self.compiled, self.checkpoint.path, self.checkpoint.read)
                remarks = check_codes(self.described, self.stored)
        return make_ledger(self.described, self.stored.tensors, decisions, remarks)


def open_directory(path: str | Path) -> FuriosaDirectory:
    """What Furiosa's quantiser wrote. Raises: QNT012 if it is no directory, QNT006."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise errors.not_a_quantization_directory(str(path))
    return FuriosaDirectory.open(directory)


def open_tensors(source: ModelSource, beside: FuriosaDirectory | None) -> ModelTensors:
    """`beside` is a quantisation of the source's plain checkpoint.

    Without weights, the checkpoint's tensors are those that the config gives.
    Raises: QNT001 to QNT004, QNT007, QNT022; FRO007 if the config does not make a model.
    """
    checkpoint = source.checkpoint if source.has_weights else _declared(source)
    stored = None
    if source.kind != "gguf":
        stored = read_quantization(source.path, checkpoint)
    if beside is None:
        _check_tied(source, stored)
        _check_compiled(stored)
        return ModelTensors(source, stored, stored, checkpoint, checkpoint)
    file = str(beside.path / FORMAT_FILE)
    if stored is not None or source.kind == "gguf":
        method = source.kind if stored is None else stored.format
        problem = f"`{source.name}` is quantised already, as {method}"
        raise errors.quantization_config_contradicted(file, [problem])
    described = describe(beside, checkpoint)
    check_scale_values(described, file, beside.read)
    compiled, quantized = quantizing(checkpoint, described, beside.read)
    _check_compiled(compiled)
    return ModelTensors(source, described, compiled, checkpoint, quantized)


def _check_tied(source: ModelSource, quantization: Quantization | None) -> None:
    """Raises: QNT004 for codes of a layer that the config ties to another tensor.

    One library then uses both tensors, another one the embeddings alone.
    """
    tied = source.tied
    problems = [
        f"`{linear.weight}` has codes of its own, the config says it is `{tied[linear.weight]}`"
        for linear in (quantization.linears if quantization is not None else ())
        if linear.weight in tied
    ]
    if problems:
        raise errors.quantization_config_contradicted(
            str(source.path / CONFIG_FILE),
            problems,
            next_step="set `tie_word_embeddings` to false there, so that both tensors are used",
        )


def _check_compiled(quantization: Quantization | None) -> None:
    """Raises: QNT022 before the model is imported, which takes longer."""
    refused = unsupported(quantization) if quantization is not None else []
    if refused:
        raise errors.quantization_not_compiled(refused)


def _declared(source: ModelSource) -> Checkpoint:
    from ..frontend.torch_export import declared_shapes

    bf16 = np.dtype(ml_dtypes.bfloat16)
    shapes = declared_shapes(source.config)
    specs = [ParameterSpec(name, shape, bf16) for name, shape in shapes.items()]
    return DeclaredTensors.of(str(source.path), specs)

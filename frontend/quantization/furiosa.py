"""A directory of Furiosa's quantiser, beside the unquantised checkpoint that it was made from.

`qformat.yaml` says the types, `qparam.npy` the largest magnitudes that calibration found. The
quantised weights (`exported_model.qckpt`) are in a layout that is not published, and so are the
names of quantizers in language models: the description says what it assumes.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ... import errors
from ...models.quantization import (
    E4M3_MAX,
    PER_CHANNEL,
    PER_TENSOR,
    STATIC_TENSOR,
    ActivationScheme,
    Quantization,
    QuantizedCache,
    QuantizedLinear,
    ScaleTensor,
)
from ..checkpoint import Array, Checkpoint, TensorInfo
from .modules import OUTPUT_HEAD, SCALE_DTYPE, Modules, is_quantized
from .qparam_file import Quantizers, read_qparam

FORMAT_FILE = "qformat.yaml"
PARAMETER_FILE = "qparam.npy"
WEIGHTS_FILE = "exported_model.qckpt"

FP8 = "fp8-E4M3"
LONGEST_LINE = 1 << 16
WEIGHT, INPUT = "._weight_quantizer", "._input_quantizer"
PRODUCT = re.compile(r"(?:.*\.)?matmul(?:_(\d+))?\._input_1_quantizer")
"""Quantizer of the second operand of a product of two activations."""


class Types(NamedTuple):
    """Of weights, activations and KV caches, as the command line of the quantiser gave them."""

    weight: str
    activation: str
    cache: str | None


@dataclass(frozen=True)
class FuriosaDirectory:
    """Both files, read when they are first asked for."""

    path: Path

    @staticmethod
    def open(path: Path) -> FuriosaDirectory:
        """Raises: QNT006 if one of the two files is not there."""
        for name in (FORMAT_FILE, PARAMETER_FILE):
            if not (path / name).is_file():
                raise errors.quantization_directory_incomplete(str(path), name)
        return FuriosaDirectory(path)

    @cached_property
    def types(self) -> Types:
        """Raises: QNT002 if the first line of qformat.yaml does not say them."""
        return _read_types(self.path / FORMAT_FILE)

    @cached_property
    def quantizers(self) -> Quantizers:
        """Raises: QNT007."""
        return read_qparam(self.path / PARAMETER_FILE)

    def read(self, name: str) -> Array:
        """The largest magnitudes of a quantizer that a description names."""
        return np.asarray(self.quantizers[name]["amax"])


def describe(directory: FuriosaDirectory, checkpoint: Checkpoint) -> Quantization:
    """Every linear but the output head in e4m3, by the stored magnitudes.

    Raises: QNT001 for types other than fp8 and for asymmetric quantizers; QNT002; QNT003 with every
    quantizer that is missing, misshapen or of no module; QNT004 for a checkpoint that is quantised
    already; QNT007.
    """
    types = directory.types
    _refuse_other_types(directory, types)
    codes = [info for info in checkpoint.tensors.values() if is_quantized(info)]
    if codes:
        lines = [f"`{info.name}` is {info.stored} already" for info in codes]
        raise errors.quantization_config_contradicted(str(directory.path / FORMAT_FILE), lines)
    reading = _Reading(directory.quantizers)
    modules = Modules(checkpoint.tensors)
    linears = [
        reading.linear(module, info)
        for module, info in modules.linears.items()
        if module != OUTPUT_HEAD or module + WEIGHT in directory.quantizers
    ]
    caches = reading.caches(modules.attentions) if types.cache == FP8 else []
    reading.finish(directory)
    return Quantization(
        "furiosa",
        tuple(linear for linear in linears if linear),
        tuple(caches),
        _assumptions(bool(caches), reading.unused()),
    )


def _read_types(file: Path) -> Types:
    try:
        with file.open(encoding="utf-8") as text:
            line = text.readline(LONGEST_LINE)
        words = shlex.split(line.lstrip("# "))
    except (OSError, ValueError) as error:
        raise errors.quantization_config_invalid(str(file), errors.in_words(error)) from error
    said = {}
    for word, following in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        said[option] = value if equals else following
    missing = [option for option in ("--weight_dtype", "--act_dtype") if option not in said]
    if missing:
        reason = f"its first line, the quantiser's command, has no {' and no '.join(missing)}"
        raise errors.quantization_config_invalid(str(file), reason)
    return Types(said["--weight_dtype"], said["--act_dtype"], said.get("--kv_dtype"))


def _refuse_other_types(directory: FuriosaDirectory, types: Types) -> None:
    """Raises: QNT001 with all types that are not fp8 (a cache may be bf16)."""
    refused = []
    if types.weight != FP8:
        refused.append(f"{types.weight} weights")
    if types.activation != FP8:
        refused.append(f"{types.activation} activations")
    if types.cache not in (FP8, "bf16", None):
        refused.append(f"{types.cache} KV caches")
    if refused:
        file = str(directory.path / FORMAT_FILE)
        raise errors.unsupported_quantization(file, [(name, []) for name in refused])


@dataclass
class _Reading:
    """Takes quantizers by name, and remembers what was wrong and what was taken."""

    quantizers: Quantizers
    used: set[str] = field(default_factory=set)
    asymmetric: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def linear(self, module: str, info: TensorInfo) -> QuantizedLinear | None:
        rows, columns = info.shape
        scale = self.scale(module + WEIGHT, [(1, 1), (rows, 1)])
        input_scale = self.scale(module + INPUT, [(1, 1), (1, columns)])
        if scale is None or input_scale is None:
            return None
        static_channel = ActivationScheme("static", "channel")
        return QuantizedLinear(
            module=module,
            weight=info.name,
            shape=(rows, columns),
            storage="e4m3",
            scheme=PER_TENSOR if scale.grid == (1, 1) else PER_CHANNEL,
            scale=scale,
            activation=STATIC_TENSOR if input_scale.grid == (1, 1) else static_channel,
            input_scale=input_scale,
            codes_are_stored=False,
        )

    def caches(self, attentions: tuple[str, ...]) -> list[QuantizedCache]:
        """Two products an attention module, in the model's order: with keys, then with values."""
        products = {
            int(match[1] or 0): name
            for name in self.quantizers
            if (match := PRODUCT.fullmatch(name))
        }
        found = []
        for index, attention in enumerate(attentions):
            scales = [
                self.scale(products.get(number, f"matmul_{number}._input_1_quantizer"), [(1, 1)])
                for number in (2 * index, 2 * index + 1)
            ]
            if scales[0] is not None and scales[1] is not None:
                found.append(QuantizedCache(attention, scales[0], scales[1]))
        return found

    def scale(self, name: str, grids: list[tuple[int, int]]) -> ScaleTensor | None:
        """The quantizer's amax, in the first of these grids that has as many values."""
        if name not in self.quantizers:
            self.problems.append(f"`{name}` is missing")
            return None
        self.used.add(name)
        amax = self.quantizers[name].get("amax")
        if amax is None:
            self.asymmetric.append(name)
            return None
        values = np.asarray(amax)
        dtype = SCALE_DTYPE.get(values.dtype.newbyteorder("="))
        grid = next((grid for grid in grids if grid[0] * grid[1] == values.size), None)
        if dtype is None or grid is None:
            self.problems.append(f"`{name}` has an amax of {values.dtype} {list(values.shape)}")
            return None
        return ScaleTensor(name, dtype, values.shape, grid, divisor=E4M3_MAX)

    def unused(self) -> list[str]:
        return [name for name in self.quantizers if name not in self.used]

    def finish(self, directory: FuriosaDirectory) -> None:
        """Raises: QNT001, QNT003."""
        file = str(directory.path / PARAMETER_FILE)
        if self.asymmetric:
            raise errors.unsupported_quantization(file, [("asymmetric ranges", self.asymmetric)])
        foreign = [name for name in self.unused() if name.endswith((WEIGHT, INPUT))]
        self.problems += [f"`{name}` is of no linear layer of the checkpoint" for name in foreign]
        if self.problems:
            raise errors.scales_do_not_fit(file, self.problems)


def _assumptions(has_caches: bool, unused: list[str]) -> tuple[str, ...]:
    assumed = [
        f"quantizers are named after modules, as `MODULE{WEIGHT}` and `MODULE{INPUT}`",
        f"a scale is the stored amax / {E4M3_MAX:g}",
        f"weights are quantised from the checkpoint; `{WEIGHTS_FILE}` is not read, "
        "as its layout is not published",
    ]
    if has_caches:
        assumed.append("products of activations are numbered layer by layer: keys, then values")
    if unused:
        shown = ", ".join(unused[:3])
        assumed.append(f"{len(unused)} quantizers belong to no known operand ({shown}, ...)")
    return tuple(assumed)

"""Join what a config says with the tensors that are there; every contradiction is an error.

The formats differ in how their config is written and how scales are called. What has to fit is the
same: every quantised weight has its scales, in the right shape, and every scale has its use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ... import errors
from ...models.quantization import (
    ActivationScheme,
    FormatName,
    Granularity,
    Quantization,
    QuantizedCache,
    QuantizedLinear,
    ScaleDtype,
    ScaleTensor,
    WeightScheme,
)
from ..checkpoint import Checkpoint, TensorInfo
from .declared import DeclaredTensors, codes_like, scale_like
from .modules import SCALE_DTYPE, STORAGE, Modules, is_quantized

T = TypeVar("T")

KV_NAMES = (
    ("k_scale", "v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("qkv_proj.k_scale", "qkv_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("kv_scale", "kv_scale"),
)
"""Where formats keep the scales of an attention module's keys and values. `output_scale` is what
compressed-tensors wrote while it quantised the outputs of both projections."""


@dataclass(frozen=True)
class LinearScheme:
    """What a config says about one linear layer, and how its scales are called."""

    weight: WeightScheme
    activation: ActivationScheme
    weight_scales: tuple[str, ...] = ("weight_scale",)
    """Names that the weight's scale may have; the first is the usual one."""
    input_scale: str = "input_scale"


@dataclass(frozen=True)
class FormatRules:
    """How to read one checkpoint, as its config has it."""

    name: FormatName
    config_file: str
    """For messages."""
    scheme_of: Callable[[str], LinearScheme | None]
    """Linear module -> its scheme; None if the config leaves it as it is."""
    caches_quantized: bool
    may_stay: Callable[[str, tuple[int, int]], bool] = lambda module, shape: False
    """Whether a linear that the config means may be unquantised all the same."""
    scale_dtype: ScaleDtype = "f32"
    """Type in which the format's library writes scales; a checkpoint may have others."""
    cache_scales: tuple[str, str] = ("k_scale", "v_scale")
    """What it calls those of keys and values."""


@dataclass
class _Assembly:
    """Collects what is used and what is wrong, so that one error can name everything."""

    modules: Modules
    rules: FormatRules
    used: set[str] = field(default_factory=set)
    scale_problems: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)

    def linear(self, module: str, info: TensorInfo) -> QuantizedLinear | None:
        shape = info.shape[0], info.shape[1]
        scheme = self.rules.scheme_of(module)
        if not is_quantized(info):
            if scheme is not None and not self.rules.may_stay(module, shape):
                self.conflicts.append(f"`{info.name}` is {info.stored}, the config quantises it")
            return None
        if scheme is None:
            self.conflicts.append(f"`{info.name}` is {info.stored}, the config leaves it out")
            self.used.update(name for name in self.modules.scales if name.startswith(module + "."))
            return None
        return self._quantized(module, info, shape, scheme)

    def _quantized(
        self, module: str, info: TensorInfo, shape: tuple[int, int], scheme: LinearScheme
    ) -> QuantizedLinear | None:
        names = [f"{module}.{name}" for name in scheme.weight_scales]
        scale = self.scale(names, scheme.weight.grid_of(shape), f"`{info.name}`")
        input_scale = None
        if scheme.activation.mode == "static":
            owner = f"the input of `{module}`"
            input_scale = self.scale([f"{module}.{scheme.input_scale}"], (1, 1), owner)
            if input_scale is None:
                return None
        if scale is None:
            return None
        return QuantizedLinear(
            module=module,
            weight=info.name,
            shape=shape,
            storage=STORAGE[info.dtype],
            scheme=scheme.weight,
            scale=scale,
            activation=scheme.activation,
            input_scale=input_scale,
        )

    def cache(self, attention: str) -> QuantizedCache | None:
        """The scales of one attention module, under whichever names it has them."""
        for key_name, value_name in KV_NAMES:
            key, value = f"{attention}.{key_name}", f"{attention}.{value_name}"
            if key in self.modules.tensors or value in self.modules.tensors:
                break
        else:
            key, value = (f"{attention}.{name}" for name in KV_NAMES[0])
        key_scale = self.scale([key], (1, 1), f"the keys of `{attention}`")
        value_scale = self.scale([value], (1, 1), f"the values of `{attention}`")
        if key_scale is None or value_scale is None:
            return None
        return QuantizedCache(attention, key_scale, value_scale)

    def scale(self, names: list[str], grid: tuple[int, int], owner: str) -> ScaleTensor | None:
        """The scale under the first name that is there, if it has this grid's shape."""
        name = next((name for name in names if name in self.modules.tensors), None)
        if name is None:
            self.scale_problems.append(f"`{names[0]}` is missing: the scale of {owner}")
            return None
        self.used.add(name)
        info = self.modules.tensors[name]
        if info.dtype not in SCALE_DTYPE:
            self.scale_problems.append(f"`{name}` is {info.stored}, no type of a scale")
            return None
        if info.shape not in shapes_of(grid):
            wanted = _shown(shapes_of(grid)[-1])
            self.scale_problems.append(
                f"`{name}` has the shape {_shown(info.shape)}, {owner} needs {wanted}"
            )
            return None
        return ScaleTensor(name, SCALE_DTYPE[info.dtype], info.shape, grid)

    def finish(self, checkpoint: Checkpoint) -> None:
        """Raises: QNT003, QNT004 with everything that does not fit."""
        unused = sorted(self.modules.scales - self.used)
        self.scale_problems += [f"`{name}` scales nothing that is quantised" for name in unused]
        known = {info.name for info in self.modules.linears.values()}
        self.conflicts += [
            f"`{info.name}` is {info.stored} and no linear layer's weight"
            for info in self.modules.tensors.values()
            if is_quantized(info) and info.name not in known
        ]
        if self.conflicts:
            raise errors.quantization_config_contradicted(self.rules.config_file, self.conflicts)
        if self.scale_problems:
            raise errors.scales_do_not_fit(checkpoint.path, self.scale_problems)


def assemble(checkpoint: Checkpoint, rules: FormatRules) -> Quantization:
    """Describe every quantised tensor; reads no tensor's data.

    Raises: QNT003 with every scale that is missing, misshapen or never used; QNT004 with every
    weight whose type contradicts the config.
    """
    tensors = checkpoint.tensors
    if isinstance(checkpoint, DeclaredTensors):
        tensors = _as_written(Modules(tensors), rules)
    assembly = _Assembly(Modules(tensors), rules)
    linears = [assembly.linear(*item) for item in assembly.modules.linears.items()]
    caches = (
        [assembly.cache(attention) for attention in assembly.modules.attentions]
        if rules.caches_quantized
        else []
    )
    assembly.finish(checkpoint)
    return Quantization(rules.name, _present(linears), _present(caches))


def _as_written(modules: Modules, rules: FormatRules) -> Mapping[str, TensorInfo]:
    """The tensors of a model that is not there yet, as the format's library would write them."""
    tensors = dict(modules.tensors)

    def add(name: str, granularity: Granularity, grid: tuple[int, int]) -> None:
        tensors[name] = scale_like(name, rules.name, granularity, grid, rules.scale_dtype)

    for module, info in modules.linears.items():
        scheme, shape = rules.scheme_of(module), (info.shape[0], info.shape[1])
        if scheme is None or rules.may_stay(module, shape):
            continue
        tensors[info.name] = codes_like(info)
        grid = scheme.weight.grid_of(shape)
        add(f"{module}.{scheme.weight_scales[0]}", scheme.weight.granularity, grid)
        if scheme.activation.mode == "static":
            add(f"{module}.{scheme.input_scale}", "tensor", (1, 1))
    for attention in modules.attentions if rules.caches_quantized else ():
        for name in rules.cache_scales:
            add(f"{attention}.{name}", "tensor", (1, 1))
    return tensors


def shapes_of(grid: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes in which formats store a grid of scales; the last is the plainest."""
    rows, columns = grid
    shapes: list[tuple[int, ...]] = [(rows, 1, columns, 1), (rows, columns)]
    if columns == 1:
        shapes.append((rows,))
    if grid == (1, 1):
        shapes.append(())
    return shapes


def _shown(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _present(items: Iterable[T | None]) -> tuple[T, ...]:
    return tuple(item for item in items if item is not None)

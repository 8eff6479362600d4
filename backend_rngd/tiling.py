"""How one matrix product is cut: a typed record, its text, and pins that prescribe it.

y[M, N] = x[M, K] · w[N, K]ᵀ. Two roles:

- `weights-stream`: weights are fetched, tokens stand in the lanes of the register file. Best for
  few tokens.
- `tokens-stream`: 16 features per slice stand in the register file, tokens are fetched from all
  slices over the ring, and one command serves all of them. Best for many tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from fnmatch import fnmatchcase

from .. import errors


class Role(Enum):
    """Which operand is the stream; the other one stands in the register file."""

    WEIGHTS = "weights-stream"
    TOKENS = "tokens-stream"


@dataclass(frozen=True)
class Cycles:
    """What a tiling is predicted to keep each context busy for, and the whole with overlap."""

    main: int
    sub: int
    dma: int
    total: int

    @property
    def score(self) -> float:
        """Halfway between the busiest context and the whole: neighbours hide some of the rest."""
        return (max(self.main, self.sub, self.dma) + self.total) / 2


@dataclass(frozen=True)
class MatmulTiling:
    """How one product is cut into loads, fills and products."""

    role: Role
    tokens: int
    """Tokens that one command multiplies."""
    rows: int
    """Output features per slice of one product command."""
    load_rows: int
    """Output features per slice that one load of weights brings; a multiple of `rows`."""
    load_chunks: int
    """Chunks of 16 positions per source slice of K that one load brings."""
    command_chunks: int
    """Chunks of K that one product command sums; divides the work, not the sums' precision."""
    k_split: int = 1
    """Parts of K that different slices sum; they are added over the ring."""
    run_per_row: bool = False
    """Walk slices inside rows, so that HBM is read in runs of the load's rows of one chunk."""
    every_slice: bool = True
    """Load weights for all slices; else only for those that hold features, and zero the others."""
    groups: int = 1
    """Groups of slices that have tokens of their own; `tokens` are those of one."""
    predicted: Cycles | None = None
    """Filled by the search; not part of what a pin prescribes."""

    def to_text(self) -> str:
        """One line that `parse_tiling` reads."""
        words = [self.role.value]
        for field in fields(self)[1:-1]:
            if field.name != "groups" or self.groups > 1:
                words.append(f"{field.name}={int(getattr(self, field.name))}")
        if self.predicted is not None:
            words += [f"{f.name}_cycles={getattr(self.predicted, f.name)}" for f in fields(Cycles)]
        return " ".join(words)


_CYCLES = {f"{field.name}_cycles": field.name for field in fields(Cycles)}
_FLAGS = ("run_per_row", "every_slice")
_REQUIRED = ("tokens", "rows", "load_rows", "load_chunks", "command_chunks")


def parse_tiling(text: str, where: str) -> MatmulTiling:
    """The inverse of `to_text`. Raises: BCK006."""
    role, *words = text.split() or [""]
    if role not in {known.value for known in Role}:
        choices = ", ".join(known.value for known in Role)
        raise errors.invalid_tiling(where, f"{role!r} is no role; roles are {choices}")
    values: dict[str, int] = {}
    for word in words:
        name, equals, number = word.partition("=")
        known = name in _CYCLES or name in {field.name for field in fields(MatmulTiling)[1:-1]}
        if not (known and equals and number.isdecimal()) or name in values:
            raise errors.invalid_tiling(where, f"cannot read {word!r}")
        values[name] = int(number)
        if name in _FLAGS and values[name] > 1:
            raise errors.invalid_tiling(where, f"{name} is 0 or 1, not {number}")
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise errors.invalid_tiling(where, f"{', '.join(missing)} not given")
    cycles = {_CYCLES[name]: values.pop(name) for name in list(values) if name in _CYCLES}
    if cycles and len(cycles) < len(_CYCLES):
        raise errors.invalid_tiling(where, "predicted cycles are given all or none")
    return MatmulTiling(
        Role(role),
        tokens=values["tokens"],
        rows=values["rows"],
        load_rows=values["load_rows"],
        load_chunks=values["load_chunks"],
        command_chunks=values["command_chunks"],
        k_split=values.get("k_split", 1),
        run_per_row=bool(values.get("run_per_row", False)),
        every_slice=bool(values.get("every_slice", True)),
        groups=values.get("groups", 1),
        predicted=Cycles(**cycles) if cycles else None,
    )


@dataclass(frozen=True)
class ProductName:
    """What names a product of a bucket, as text `FUNCTION/MODULE#PART@TOKENS`."""

    function: str
    module: str
    """Inside the function."""
    part: int
    """From 1 on where a module's weight is the weights of several products; else 0."""
    tokens: int
    """A prompt may be worked on in parts, whose products have fewer tokens than the bucket."""

    def __str__(self) -> str:
        return f"{self.function}/{self.place}@{self.tokens}"

    @property
    def place(self) -> str:
        """Module and part."""
        return f"{self.module}#{self.part}" if self.part else self.module

    @staticmethod
    def parse(text: str) -> ProductName:
        """The inverse of `str`."""
        function, module, part, tokens = _split(text)
        return ProductName(function, module, int(part or 0), int(tokens))

    def matches(self, pattern: str) -> bool:
        """Whether a pin's pattern, `[FUNCTION/]MODULE[#PART][@TOKENS]`, is for this product.

        `*` and `?` match as in file names; what is left out matches all.
        """
        own = (self.function, self.module, str(self.part), str(self.tokens))
        return all(
            fnmatchcase(name, wanted or "*")
            for name, wanted in zip(own, _split(pattern), strict=True)
        )


def _split(text: str) -> tuple[str, str, str, str]:
    """Function, module, part and tokens; empty where they are not given."""
    function, _, rest = text.rpartition("/")
    rest, _, tokens = rest.partition("@")
    module, _, part = rest.partition("#")
    return function, module, part, tokens


Pins = Mapping[str, MatmulTiling]
"""Tilings by a pattern of products."""


def parse_pins(lines: Iterable[str], where: str) -> dict[str, MatmulTiling]:
    """Lines `pattern: tiling`; empty ones and those that begin with # say nothing.

    Of two lines with one pattern the first counts. Raises: BCK006.
    """
    pins: dict[str, MatmulTiling] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        pattern, colon, text = line.partition(":")
        at = f"{where}:{number}"
        if not colon:
            raise errors.invalid_tiling(at, "a pin is a pattern of products, ':' and a tiling")
        pins.setdefault(pattern.strip(), parse_tiling(text, at))
    return pins


def pinned(pins: Pins, product: ProductName) -> MatmulTiling | None:
    """The first pin whose pattern matches the product."""
    return next((tiling for pattern, tiling in pins.items() if product.matches(pattern)), None)

"""How products are cut: pins from a file, and an explanation that is such a file.

A file of pins is YAML (or JSON): patterns of products -> tiling records, either for all buckets or
below patterns of buckets. A pattern is `[FUNCTION/]MODULE[#PART][@TOKENS]`: a module path inside a
block; if it says so, of one block's function, one of the module's several products, or so many
tokens at a time. A record is the line that an explanation prints, or the same as a table of fields.

    decode:1,*:
      mlp.down_proj: weights-stream tokens=1 rows=16 load_rows=16 load_chunks=14 command_chunks=14
    prefill:1,300:
      mlp.down_proj@48: tokens-stream tokens=48 rows=16 load_rows=16 load_chunks=1 command_chunks=1
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import errors
from ..backend_rngd.tiling import MatmulTiling, ProductName, parse_tiling
from ..models.config_types import Bucket

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

ALL_BUCKETS = "*"
_WILDCARD = re.compile(r"[*?]|\[.[^]]*\]")


@dataclass(frozen=True)
class TilingPins:
    """Pattern of buckets -> pattern of products -> text of a record."""

    entries: Mapping[str, Mapping[str, str]]

    def lines(self, bucket: Bucket) -> tuple[str, ...]:
        """What `TilePass` takes for `bucket`, where the first pattern that matches counts.

        The more specific pattern of buckets comes first, and below it the more specific pattern
        of products; equals stay in the file's order.
        """
        patterns = [pattern for pattern in self.entries if fnmatchcase(bucket.name, pattern)]
        return tuple(
            f"{module}: {self.entries[pattern][module]}"
            for pattern in sorted(patterns, key=_vagueness)
            for module in sorted(self.entries[pattern], key=_vagueness)
        )

    def check_buckets(self, buckets: Sequence[Bucket]) -> None:
        """Raises: BLD016 if a pattern is of no bucket of the build."""
        names = [bucket.name for bucket in buckets]
        for pattern in self.entries:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise errors.pin_without_target(pattern, "bucket", names)

    def check_modules(self, bucket: Bucket, explained: Iterable[ExplainedTiling]) -> None:
        """Raises: BLD016 if a pattern is of no product of the bucket."""
        products = list(dict.fromkeys(tiling.product for tiling in explained))
        for line in self.lines(bucket):
            pattern = line.partition(":")[0]
            if not any(product.matches(pattern) for product in products):
                names = [f"{product.place}@{product.tokens}" for product in products]
                raise errors.pin_without_target(pattern, "product", sorted(set(names)))


def _vagueness(pattern: str) -> tuple[bool, int]:
    """Least for a plain name, then for the pattern that spells out most characters."""
    spelled_out = _WILDCARD.sub("", pattern)
    return spelled_out != pattern, -len(spelled_out)


NO_PINS = TilingPins({})


def read_pins(file: Path) -> TilingPins:
    """Raises: BLD015 (not such a file), BCK006 (a record)."""
    name = str(file)
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise errors.bad_pin_file(name, errors.in_words(error)) from None
    if not isinstance(document, dict) or not document:
        raise errors.bad_pin_file(name, "it is not a table of patterns")
    entries: dict[str, dict[str, str]] = {}
    for pattern, value in document.items():
        if isinstance(value, dict) and "role" not in value:
            records = {str(module): _record(name, module, text) for module, text in value.items()}
            entries.setdefault(str(pattern), {}).update(records)
        else:
            entries.setdefault(ALL_BUCKETS, {})[str(pattern)] = _record(name, pattern, value)
    return TilingPins(entries)


def _record(file: str, module: object, value: object) -> str:
    """The record's text. Raises: BLD015, BCK006."""
    if isinstance(value, dict):
        role, *rest = [value.get("role"), *(item for item in value.items() if item[0] != "role")]
        value = " ".join([str(role), *(f"{key}={_number(number)}" for key, number in rest)])
    if not isinstance(value, str):
        raise errors.bad_pin_file(file, f"{module} has no record but {value!r}")
    return parse_tiling(value, f"{file}: {module}").to_text()


def _number(value: object) -> object:
    return int(value) if isinstance(value, bool) else value


# --- explanations ---


@dataclass(frozen=True)
class ExplainedTiling:
    """One product of a bucket: how it is cut, and what came next in the search."""

    bucket: str
    block: str
    product: ProductName
    tiling: MatmulTiling
    runner_up: MatmulTiling | None
    """The best other tiling; for a pinned product what the search would have taken."""

    @property
    def distance(self) -> float | None:
        """By what share the runner-up costs more, by the search's measure (`Cycles.score`).

        Below 0 if a pin costs more than it, or if it is as good to within what the search does
        not care about, and moves more bytes or needs larger loads.
        """
        if self.runner_up is None:
            return None
        ours, theirs = self.tiling.predicted, self.runner_up.predicted
        assert ours is not None
        assert theirs is not None
        return theirs.score / ours.score - 1

    def to_json(self) -> dict[str, Any]:
        return {
            "bucket": self.bucket,
            "block": self.block,
            "module": self.product.place,
            "tokens": self.product.tokens,
            "tiling": _fields(self.tiling),
            "runner_up": None if self.runner_up is None else _fields(self.runner_up),
            "distance": self.distance,
        }


def _fields(tiling: MatmulTiling) -> dict[str, Any]:
    return {**asdict(tiling), "role": tiling.role.value}


def explain(module: ModuleOp, bucket: Bucket) -> Iterator[ExplainedTiling]:
    """The products of a bucket's module after `tile`, in its order."""
    from ..backend_rngd.rngd import BlockOp, TilingOp

    for block in module.ops:
        if not isinstance(block, BlockOp):
            continue
        for op in block.walk():
            if isinstance(op, TilingOp):
                runner_up = op.runner_up.data if op.runner_up is not None else None
                yield ExplainedTiling(
                    bucket=bucket.name,
                    block=block.sym_name.data,
                    product=ProductName.parse(op.product.data),
                    tiling=parse_tiling(op.record.data, "rngd.tiling"),
                    runner_up=None if runner_up is None else parse_tiling(runner_up, "rngd.tiling"),
                )


def to_pin_file(explained: Iterable[ExplainedTiling]) -> str:
    """Text that `read_pins` reads; comments say what was predicted, and what came next."""
    lines: list[str] = []
    for bucket, own in itertools.groupby(explained, lambda one: one.bucket):
        lines.append(f'"{bucket}":')
        for name, one in _by_pin(Bucket.parse(bucket), list(own)).items():
            lines.append(f"  # {one.block}: {_prediction(one)}")
            lines.append(f"  {name}: {_pin_text(one.tiling)}")
    return "\n".join(lines)


def _by_pin(bucket: Bucket, explained: Sequence[ExplainedTiling]) -> dict[str, ExplainedTiling]:
    """Each product below the shortest pattern that is for it and for no other one cut otherwise.

    A part of a prompt always has its tokens: while the compiler tries how many tokens fit in
    data memory, the pin must not apply to other parts.
    """
    whole = bucket.batch_size * bucket.input_ids_size
    tilings: dict[str, set[MatmulTiling]] = {}
    for one in explained:
        tilings.setdefault(_place(one, whole), set()).add(one.tiling)
    found: dict[str, ExplainedTiling] = {}
    for one in explained:
        name = _place(one, whole)
        if len(tilings[name]) > 1:
            name = f"{one.product.function}/{name}"
        known = found.setdefault(name, one)
        assert known.tiling == one.tiling, f"{name} is two products"
    return found


def _place(one: ExplainedTiling, whole: int) -> str:
    """Module and part, and the tokens if they are not all."""
    place, tokens = one.product.place, one.product.tokens
    return place if tokens == whole else f"{place}@{tokens}"


def _prediction(one: ExplainedTiling) -> str:
    cycles = one.tiling.predicted
    assert cycles is not None
    text = f"{cycles.total:,} cycles (main {cycles.main:,}, sub {cycles.sub:,}, dma {cycles.dma:,})"
    if one.runner_up is None or one.distance is None:
        return f"{text}; the only candidate"
    return f"{text}; next {one.distance:+.1%}: {_pin_text(one.runner_up)}"


def _pin_text(tiling: MatmulTiling) -> str:
    """The record without what the search predicted."""
    words = tiling.to_text().split()
    return " ".join(word for word in words if "_cycles=" not in word)

"""Measured rows, and the binary of the stated mapping for each."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from .all_reduce import GIVEN, all_reduce
from .attention import Heads, decode, prefill
from .linear import linear
from .load_rate import load_rate
from .vector import activation, embedding, norm, rotary

SILICON = Path(__file__).parent.parent / "silicon"
LOAD_RATE = "HBM to DM load rate"
ALL_REDUCE = "all-reduce per decoder layer"
BF16_BYTES = 2


@dataclass(frozen=True)
class Model:
    """The layer that all rows are about: Llama-3.1-8B."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    feed_forward: int = 14336
    vocabulary: int = 128256


@dataclass(frozen=True)
class Row:
    """One measurement: a time in us, or a rate in B/cycle that counts by its shape alone."""

    kind: str
    """dense, attention, all-reduce or load-rate."""
    group: str
    """What is left out together: a layer, or one of attention's two steps."""
    name: str
    measured: float
    build: Callable[[], bytes]
    """The binary's bytes."""
    moved_bytes: int = 0
    """Of a load-rate row."""
    given: str | None = None
    """Module of the binary that the measurement leaves out: it makes what the rest begins with."""


def dense_builders(tp: int, model: Model) -> Mapping[str, Callable[[int], bytes]]:
    """Binary of a layer for so many tokens, for one of `tp` PEs that share the layer."""
    query, kv = (heads * model.head_dim // tp for heads in (model.heads, model.kv_heads))
    hidden, feed_forward = model.hidden, model.feed_forward // tp
    return MappingProxyType(
        {
            "gate_up_proj": lambda m: linear(hidden, 2 * feed_forward, m),
            "down_proj": lambda m: linear(feed_forward, hidden, m),
            "o_proj": lambda m: linear(query, hidden, m),
            "qkv_proj": lambda m: linear(hidden, query + 2 * kv, m),
            "layernorm": lambda m: norm(hidden, m),
            "act_fn": lambda m: activation(feed_forward, m),
            "rotary_emb": lambda m: rotary((query, kv), model.head_dim, m),
            "lm_head": lambda m: linear(hidden, model.vocabulary // tp, m),
            "embedding": lambda m: embedding(hidden, model.vocabulary, m),
        }
    )


def read_rows(path: Path, tp: int, model: Model | None = None) -> list[Row]:
    """The rows of a CSV file with the columns of one of `benchmarks/silicon`.

    Raises: SystemExit naming the file, for other columns or an unknown layer.
    """
    model = model or Model()
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        lines = list(reader)
    if columns >= {"layer", "tokens", "time_us"}:
        builders = dense_builders(tp, model)
        unknown = {line["layer"] for line in lines} - set(builders)
        if unknown:
            raise SystemExit(f"{path}: no mapping for {sorted(unknown)}, only {sorted(builders)}")
        return [_dense(line, builders) for line in lines]
    if columns >= {"prefill_chunk", "n_decode", "kv_decode", "time_us"}:
        heads = Heads(model.heads // tp, max(1, model.kv_heads // tp), model.head_dim)
        return [_attention(line, heads) for line in lines]
    if columns >= {"what", "condition", "value"}:
        return [
            *(_load_rate(line) for line in lines if line["what"] == LOAD_RATE),
            *(_all_reduce(line, model) for line in lines if line["what"].startswith(ALL_REDUCE)),
        ]
    raise SystemExit(f"{path}: columns {sorted(columns)} are those of no kind of row")


def _dense(line: Mapping[str, str], builders: Mapping[str, Callable[[int], bytes]]) -> Row:
    layer, tokens = line["layer"], int(line["tokens"])
    build = builders[layer]
    measured = float(line["time_us"])
    return Row("dense", layer, f"{layer} {tokens}", measured, lambda: build(tokens))


def _attention(line: Mapping[str, str], heads: Heads) -> Row:
    chunk, sequences, cached = (int(line[c]) for c in ("prefill_chunk", "n_decode", "kv_decode"))
    measured = float(line["time_us"])
    if chunk and sequences:
        raise SystemExit(f"a row is a prefill chunk or decode, not both: {dict(line)}")
    if chunk:
        name = f"prefill {chunk}"
        return Row("attention", "prefill", name, measured, lambda: prefill(heads, chunk))
    name = f"decode {sequences} x {cached}"
    return Row("attention", "decode", name, measured, lambda: decode(heads, sequences, cached))


def _all_reduce(line: Mapping[str, str], model: Model) -> Row:
    pes = int(line["condition"].split()[0])
    measured = float(line["value"])
    result_bytes = model.hidden * BF16_BYTES
    name = f"all-reduce {pes} PEs"
    build = functools.partial(all_reduce, pes, result_bytes)
    return Row("all-reduce", "all-reduce", name, measured, build, given=GIVEN)


def _load_rate(line: Mapping[str, str]) -> Row:
    run = int(line["condition"].split()[0])
    binary, moved = load_rate(run)
    name = f"load {run} B runs"
    return Row("load-rate", "load-rate", name, float(line["value"]), lambda: binary, moved)

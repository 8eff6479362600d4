"""`quantization_ledger.json`: what became of every tensor of the checkpoint, and whether it may.

Anything but `exact` fails a build unless the user allows it by name. Three sources allow
themselves, with a warning: tensors of a GGUF file are `dequantized` by design; what a Furiosa
directory says is `unverified`, because its format is not public; and a checkpoint in f32 or f16
that is not quantised is rounded to bf16, in which everything is computed.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from .. import errors
from ..frontend.checkpoint import TensorInfo
from ..models.quantization import FormatName, Quantization, QuantizedLinear
from .schema import Schema

LEDGER_FILE = "quantization_ledger.json"

Verdict = Literal["exact", "rescaled", "requantized", "dequantized", "dropped", "unverified"]
"""exact: same codes, same multipliers. rescaled: other codes, same values. requantized: rounded
anew. dequantized: wider type. dropped: not in the artifact. unverified: depends on assumptions."""

Source = FormatName | Literal["plain", "gguf"]

ALLOWS_ITSELF: Mapping[Source, Verdict] = {
    "plain": "requantized",
    "gguf": "dequantized",
    "furiosa": "unverified",
}
"""Source -> the verdict that is a warning there, not an error."""


class LedgerRow(Schema):
    tensor: str
    scheme_in: str
    """What the checkpoint holds, e.g. `e4m3, scale per channel, inputs static per tensor`."""
    scheme_out: str
    """What the artifact holds, in the same words; empty if it was dropped."""
    verdict: Verdict
    reason: str = ""


class Ledger(Schema):
    """Rows are sorted by tensor."""

    source: Source
    rows: tuple[LedgerRow, ...]


class Decision(NamedTuple):
    """What happens to a tensor that does not stay as it is."""

    scheme_out: str
    verdict: Verdict
    reason: str


def make_ledger(
    quantization: Quantization | None,
    tensors: Mapping[str, TensorInfo],
    decisions: Mapping[str, Decision],
    remarks: Mapping[str, str] | None = None,
) -> Ledger:
    """One row for each tensor: exact unless `decisions` or the format's assumptions say else.

    `remarks` are said about exact rows (`check_codes`).
    """
    schemes = _schemes(quantization) if quantization else {}
    assumed = _assumed(quantization) if quantization else {}
    rows = [
        _row(
            name,
            schemes.get(name, info.stored),
            decisions.get(name) or assumed.get(name),
            (remarks or {}).get(name, ""),
        )
        for name, info in sorted(tensors.items())
    ]
    return Ledger(source=quantization.format if quantization else "plain", rows=tuple(rows))


def make_gguf_ledger(tensors: Mapping[str, TensorInfo]) -> Ledger:
    """GGUF tensors reach the build in bf16; only those that were bf16 before are the same."""
    decision = Decision("BF16", "dequantized", "GGUF blocks have no counterpart on the device")
    rows = [
        _row(name, info.stored, None if info.stored == "BF16" else decision)
        for name, info in sorted(tensors.items())
    ]
    return Ledger(source="gguf", rows=tuple(rows))


def check_complete(ledger: Ledger, tensors: Iterable[str], file: str) -> None:
    """Raises: QNT008 unless the ledger has exactly one row for each of the tensors."""
    rows = Counter(row.tensor for row in ledger.rows)
    expected = set(tensors)
    problems = [f"`{name}` has no row" for name in sorted(expected - rows.keys())]
    problems += [f"`{name}` is no tensor" for name in sorted(rows.keys() - expected)]
    problems += [f"`{name}` has {count} rows" for name, count in rows.items() if count > 1]
    if problems:
        raise errors.ledger_incomplete(file, problems)


def check_losses(ledger: Ledger, allow_lossy: Sequence[str]) -> tuple[LedgerRow, ...]:
    """Rows that are not exact and may stay, to be shown to the user.

    `allow_lossy` are patterns of tensor names, as a shell has them. Raises: QNT009 with every row
    that nothing allows; QNT010 for a pattern that names no tensor with a loss.
    """
    lossy = [row for row in ledger.rows if row.verdict != "exact"]
    for pattern in allow_lossy:
        if not any(fnmatch.fnmatchcase(row.tensor, pattern) for row in lossy):
            raise errors.pattern_without_loss(pattern, [row.tensor for row in lossy])
    refused = [
        f"`{row.tensor}` is {row.verdict}, {row.scheme_in} -> {row.scheme_out or '-'}: {row.reason}"
        for row in lossy
        if row.verdict != ALLOWS_ITSELF.get(ledger.source)
        and not any(fnmatch.fnmatchcase(row.tensor, pattern) for pattern in allow_lossy)
    ]
    if refused:
        raise errors.loss_not_allowed(refused)
    return tuple(lossy)


def show_losses(rows: Sequence[LedgerRow]) -> list[str]:
    """A line for each verdict and reason, with how many tensors it is about."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row.scheme_in, row.verdict, row.reason), []).append(row.tensor)
    return [
        f"{len(names):,} {'tensor is' if len(names) == 1 else 'tensors are'} {verdict} "
        f"({scheme}, such as {names[0]}): {reason}"
        for (scheme, verdict, reason), names in groups.items()
    ]


def _row(name: str, scheme: str, decision: Decision | None, remark: str = "") -> LedgerRow:
    if decision is None:
        return LedgerRow(
            tensor=name, scheme_in=scheme, scheme_out=scheme, verdict="exact", reason=remark
        )
    return LedgerRow(tensor=name, scheme_in=scheme, **decision._asdict())


def _schemes(quantization: Quantization) -> dict[str, str]:
    """Tensor -> its scheme in words, of all tensors that quantisation is about."""
    words = {}
    for linear in quantization.linears:
        if not linear.codes_are_stored:
            continue
        words[linear.weight] = linear_scheme(linear)
        words[linear.scale.name] = f"{linear.scale.dtype} scale of {linear.weight}"
        if linear.input_scale:
            words[linear.input_scale.name] = (
                f"{linear.input_scale.dtype} scale of the inputs of {linear.module}"
            )
    for cache in quantization.caches:
        for scale, of in ((cache.value_scale, "values"), (cache.key_scale, "keys")):
            shared = cache.key_scale == cache.value_scale
            what = "keys and values" if shared else of
            words[scale.name] = f"{scale.dtype} scale of {what} of {cache.module}"
    return words


def linear_scheme(linear: QuantizedLinear) -> str:
    """A weight's scheme in words, such as `e4m3, scale per block 128x128, inputs unquantised`."""
    scheme, activation = linear.scheme, linear.activation
    size = {"group": f" {scheme.columns}", "block": f" {scheme.rows}x{scheme.columns}"}
    weight = f"scale per {scheme.granularity}{size.get(scheme.granularity, '')}"
    inputs = "inputs unquantised"
    if activation.mode != "none":
        group = f" {activation.group_size}" if activation.granularity == "group" else ""
        inputs = f"inputs {activation.mode} per {activation.granularity}{group}"
    return f"{linear.storage}, {weight}, {inputs}"


def _assumed(quantization: Quantization) -> dict[str, Decision]:
    """Weights that are to be quantised by what an unpublished format is taken to say."""
    reason = "assumed: " + "; ".join(quantization.assumptions)
    return {
        linear.weight: Decision(linear_scheme(linear), "unverified", reason)
        for linear in quantization.linears
        if not linear.codes_are_stored
    }

"""`furiosa-llm inspect`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--disasm", is_flag=True, help="Print the commands of a .vedf file as text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: Path, disasm: bool, as_json: bool) -> None:
    """Show what PATH, an artifact or a .vedf file, holds."""
    from ..artifact.summary import disassembly, summarize

    if disasm:
        text = disassembly(path)
        click.echo(json.dumps({"disassembly": text}) if as_json else text)
        return
    summary = summarize(path)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    elif path.is_file():
        _print_binary(summary)
    else:
        _print_artifact(summary)


def _print_artifact(summary: dict[str, Any]) -> None:
    from .tables import print_table

    model, parameters = summary["model"], summary["parameters"]
    parallel = summary["parallel"]
    print_table(
        summary["name"],
        ("", "value"),
        [
            ("artifact id", summary["artifact_id"]),
            ("model", f"{model['id']} ({model['architecture']})"),
            ("built by", summary["built_by"]),
            ("weights", summary["weights"]),
            ("optimization level", f"-O{summary['optimization_level']}"),
            ("devices", parallel["devices"]),
            ("tensor-parallel ranks", f"{parallel['tensor_parallel_size']}"),
            ("blocks of pipeline stages", _joined(parallel["num_blocks_per_pp_stage"])),
            ("parts of sums exchanged as", parallel["partial_sum"]),
            ("parameters", f"{sum(p['elements'] for p in parameters):,}"),
            ("parameter tensors", f"{len(parameters):,}"),
            (
                "checkpoint tensors",
                _verdicts(summary["ledger"]) if summary["ledger"] else "unknown",
            ),
            ("KV cache of a rank", _kv_cache(summary["kv_cache"])),
            ("tokenizer", "yes" if summary["tokenizer"] else "no"),
        ],
    )
    print_table(
        "binaries",
        ("bucket", "file", "commands", "code bytes", "calls", "SHA-256"),
        [
            (
                bucket["bucket"],
                bucket["file"],
                f"{bucket['commands']:,}",
                f"{bucket['code_bytes']:,}",
                f"{bucket['calls']:,}",
                bucket["sha256"],
            )
            for bucket in summary["buckets"]
        ],
    )
    if summary["ledger"] is not None:
        _print_ledger(summary["ledger"])
    if summary["sharding"] is not None:
        _print_sharding(summary["sharding"])


def _kv_cache(cache: dict[str, Any]) -> str:
    return f"{cache['bytes_per_token']:,} B for a token, {_joined(cache['dtypes'])}"


def _verdicts(ledger: dict[str, Any]) -> str:
    """Such as `290 exact, 1 dropped`."""
    verdicts = Counter(row["verdict"] for row in ledger["rows"])
    return ", ".join(f"{count:,} {verdict}" for verdict, count in verdicts.most_common())


def _print_ledger(ledger: dict[str, Any]) -> None:
    """Equal tensors of all layers are one row; nothing, if no tensor is quantised or changed."""
    from ..artifact.profile import LAYER
    from .tables import print_table

    if ledger["source"] == "plain" and all(row["verdict"] == "exact" for row in ledger["rows"]):
        return
    counts = Counter(
        (
            *(LAYER.sub(".*", row[key]) for key in ("tensor", "scheme_in", "scheme_out")),
            row["verdict"],
            row["reason"],
        )
        for row in ledger["rows"]
    )
    print_table(
        f"tensors of the checkpoint ({ledger['source']})",
        ("tensor", "tensors", "stored as", "in the artifact", "verdict", "why"),
        [
            (tensor, f"{count:,}", stored, "the same" if held == stored else held, verdict, reason)
            for (tensor, stored, held, verdict, reason), count in counts.items()
        ],
    )


def _print_sharding(sharding: dict[str, Any]) -> None:
    from ..artifact.profile import LAYER
    from .tables import print_table

    rows = {
        (
            LAYER.sub(".*", tensor["name"]),
            _joined(tensor["shape"], " x "),
            _joined(tensor["part"], " x "),
            f"{tensor['zeros']:.0%}" if tensor["zeros"] else "",
            f"{tensor['copies']:.2g}" if tensor["copies"] > 1 else "",
            tensor["why"],
        ): None
        for tensor in sharding["tensors"]
    }
    header = ("tensor", "shape", "each rank has", "zeros", "copies", "why")
    print_table("how tensors are cut", header, rows)
    for bucket, exchanges in sharding["exchanges"].items():
        print_table(
            f"exchanges of {bucket}",
            (
                "module",
                "kind",
                "ranks",
                "runs",
                "bytes",
                "type",
                "algorithm",
                "cycles",
                "by formula",
            ),
            [
                (
                    exchange["module"],
                    exchange["kind"],
                    f"{exchange['ranks']}",
                    f"{exchange['runs']:,}",
                    f"{exchange['bytes']:,}",
                    exchange["dtype"],
                    exchange["algorithm"] or "",
                    *(_cell(exchange[cycles]) for cycles in ("cycles", "formula_cycles")),
                )
                for exchange in exchanges
            ],
        )


def _print_binary(summary: dict[str, Any]) -> None:
    from .tables import print_table

    print_table(
        f"{summary['file']} ({summary['bucket']})",
        ("block", "commands", "code bytes", "calls"),
        [
            (b["name"], f"{b['commands']:,}", f"{b['code_bytes']:,}", f"{b['calls']:,}")
            for b in summary["blocks"]
        ],
    )
    print_table(
        "inputs and outputs",
        ("name", "type", "shape"),
        [
            (io["name"], io["dtype"], _joined(io["shape"], " x "))
            for io in (*summary["inputs"], *summary["outputs"])
        ],
    )
    print_table(
        "parameters",
        ("tensor", "shape", "bytes on the device"),
        [(p["name"], _joined(p["shape"], " x "), f"{p['bytes']:,}") for p in summary["parameters"]],
    )


def _cell(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _joined(numbers: list[Any], by: str = ", ") -> str:
    return by.join(map(str, numbers))

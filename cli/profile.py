"""`furiosa-llm profile`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .progress import progress

if TYPE_CHECKING:
    from ..runtime_sim.timing import ModuleTiming, ProgramTiming

LAYER = re.compile(r"\.\d+(?=\.|$)")
"""The number of a layer in a module path."""


@click.command("profile")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--bucket", metavar="KIND:B,L", help="Time this bucket alone, and show its modules.")
@click.option(
    "--machine",
    metavar="FILE",
    help="Machine description to take the costs from, or the name of one that is included.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write what every engine does when, as a trace for ui.perfetto.dev. Of one bucket.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every layer.")
def command(
    artifact: Path, bucket: str | None, machine: str | None, trace: Path | None, as_json: bool
) -> None:
    """Show simulated cycles and bytes of ARTIFACT's binaries, per bucket and per module.

    Needs no weights. The table of modules adds up the layers; --json has each of them.
    """
    from ..artifact.profile import profile_artifact, trace_artifact

    options = {} if machine is None else {"machine": machine}
    with progress() as report:
        report("timing the binaries")
        timings = profile_artifact(artifact, bucket=bucket, **options)
        if trace is not None:
            report("writing the trace")
            trace_artifact(artifact, trace, bucket=bucket, **options)
    if as_json:
        click.echo(json.dumps({"buckets": [_to_json(timing) for timing in timings]}, indent=2))
        return
    _print_buckets(timings)
    for timing in timings if bucket else ():
        _print_modules(timing)


def _to_json(timing: ProgramTiming) -> dict[str, Any]:
    return {
        "bucket": timing.bucket,
        "cycles": timing.cycles,
        "time_us": timing.time_us,
        "hbm_bytes": timing.hbm_bytes,
        "macs": timing.macs,
        "hbm_utilization": timing.hbm_utilization,
        "mac_utilization": timing.mac_utilization,
        "modules": [
            {
                "path": module.path,
                "cycles": module.cycles,
                "time_us": module.time_us,
                "hbm_bytes": module.hbm_bytes,
                "macs": module.macs,
            }
            for module in timing.modules
        ],
    }


def _print_buckets(timings: Iterable[ProgramTiming]) -> None:
    from .tables import print_table

    print_table(
        "simulated, one run of each binary",
        ("bucket", "cycles", "time", "HBM bytes", "MACs", "HBM utilisation", "MAC utilisation"),
        [
            (
                timing.bucket,
                *_counts(timing),
                f"{timing.hbm_utilization:.1%}",
                f"{timing.mac_utilization:.1%}",
            )
            for timing in timings
        ],
    )


def _print_modules(timing: ProgramTiming) -> None:
    from .tables import print_table

    print_table(
        f"modules of {timing.bucket}",
        ("module", "cycles", "time", "HBM bytes", "MACs", "of all cycles"),
        [
            (module.path, *_counts(module), f"{module.cycles / timing.cycles:.1%}")
            for module in fold_layers(timing.modules)
        ],
    )


def fold_layers(modules: Iterable[ModuleTiming]) -> list[ModuleTiming]:
    """One row for a module of all layers: `model.layers.*.mlp.up_proj`."""
    folded: dict[str, ModuleTiming] = {}
    for module in modules:
        path = LAYER.sub(".*", module.path)
        so_far = folded.get(path)
        folded[path] = replace(module, path=path) if so_far is None else _sum(so_far, module)
    return list(folded.values())


def _sum(left: ModuleTiming, right: ModuleTiming) -> ModuleTiming:
    return replace(
        left,
        cycles=left.cycles + right.cycles,
        time_us=left.time_us + right.time_us,
        hbm_bytes=left.hbm_bytes + right.hbm_bytes,
        macs=left.macs + right.macs,
    )


def _counts(timing: ProgramTiming | ModuleTiming) -> tuple[str, str, str, str]:
    return (
        f"{timing.cycles:,}",
        f"{timing.time_us:,.1f} us",
        f"{timing.hbm_bytes:,}",
        f"{timing.macs:,}",
    )

"""`furiosa-llm profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .parallel import devices_option, pipeline_options
from .progress import progress

if TYPE_CHECKING:
    from ..artifact.profile import Profile
    from ..runtime_sim.timing import ModuleTiming, ProgramTiming


@click.command("profile")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--bucket", metavar="KIND:B,L", help="Time this bucket alone, and show its modules.")
@click.option(
    "--machine",
    metavar="FILE|NAME",
    help="Machine description to take the costs from: a file, or the name of one that is included.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write what every engine does when, as a trace for ui.perfetto.dev. Of one bucket.",
)
@pipeline_options("Pipeline stages to time one by one; by default those of the build.")
@devices_option("By default those of the build.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every layer.")
def command(
    artifact: Path,
    bucket: str | None,
    machine: str | None,
    trace: Path | None,
    pipeline_parallel_size: int | None,
    num_blocks_per_pp_stage: tuple[int, ...] | None,
    devices: str | None,
    as_json: bool,
) -> None:
    """Show simulated cycles and bytes of ARTIFACT's binaries, per bucket and per module.

    Needs no weights. The table of modules adds up the layers; --json has each of them.
    """
    from ..artifact.profile import profile_artifact, trace_artifact
    from ..artifact.reader import read_artifact
    from ..llm.placement import place

    options = {} if machine is None else {"machine": machine}
    with progress() as report:
        if trace is not None:  # before the timing: it may be refused
            report("writing the trace")
            trace_artifact(artifact, trace, bucket=bucket, **options)
        report("timing the binaries")
        placement = place(
            read_artifact(artifact),
            devices=devices,
            pp=pipeline_parallel_size,
            sizes=num_blocks_per_pp_stage,
        )
        profile = profile_artifact(artifact, bucket=bucket, stages=placement.replica(0), **options)
    if as_json:
        traced = {} if trace is None else {"trace": str(trace)}
        click.echo(json.dumps({**profile.to_json(), **traced}, indent=2))
        return
    _print_buckets(profile.machine, profile.timings)
    _print_breakdowns(profile)
    _print_pipelines(profile)
    _print_by_formula(profile)
    _print_together(profile)
    for timing in profile.timings if bucket else ():
        _print_modules(timing)
        _print_engines(timing)
    if trace is not None:
        click.echo(f"trace written to {trace}: open it in https://ui.perfetto.dev")


def _print_buckets(machine: str, timings: tuple[ProgramTiming, ...]) -> None:
    from .tables import print_table

    print_table(
        f"one run of each binary, simulated on {machine}",
        ("bucket", "cycles", "time", "off by", "bound", "roofline", "HBM", "MAC"),
        [
            (
                timing.bucket,
                f"{timing.cycles:,}",
                _time(timing.time_us),
                _interval(timing.time_us, timing.low_us, timing.high_us),
                timing.bound,
                _share(timing.roofline_cycles, timing.cycles),
                f"{timing.hbm_utilization:.0%}",
                f"{timing.mac_utilization:.1%}",
            )
            for timing in timings
        ],
        compact=True,
    )
    for name in dict.fromkeys(timing.dominant_us for timing in timings if timing.dominant_us):
        buckets = ", ".join(timing.bucket for timing in timings if timing.dominant_us == name)
        click.echo(f"most uncertain: {name} ({buckets})")


def _print_breakdowns(profile: Profile) -> None:
    """What the runs wait for, command after command."""
    from .tables import print_table

    names = [name for name in profile.breakdowns[0] if any(b[name] for b in profile.breakdowns)]
    click.echo()
    print_table(
        "on the critical path",
        ("bucket", *names),
        [
            (timing.bucket, *(_share(parts[name], timing.cycles) for name in names))
            for timing, parts in zip(profile.timings, profile.breakdowns, strict=True)
        ],
        compact=True,
    )


def _print_pipelines(profile: Profile) -> None:
    """Stages one by one, if there are several."""
    from .tables import print_table

    for timing, pipeline in zip(profile.timings, profile.pipelines, strict=False):
        click.echo()
        print_table(
            f"stages of {timing.bucket}",
            ("devices", "blocks", "cycles", "share", "received bytes", "until received"),
            [
                (
                    stage.run.name,
                    f"{stage.blocks}",
                    f"{own.cycles:,}",
                    _share(own.cycles, pipeline.latency_cycles),
                    f"{own.sent_bytes:,}",
                    f"{own.send_cycles:,}",
                )
                for stage, own in zip(profile.stages, pipeline.stages, strict=True)
            ],
            compact=True,
        )
        click.echo(
            f"a step takes {pipeline.latency_cycles:,} cycles, the next can follow after "
            f"{pipeline.slowest_cycles:,}"
        )


def _print_by_formula(profile: Profile) -> None:
    """What exchanges would cost if messages took no longer than their bytes."""
    if profile.by_formula:
        times = [f"{timing.cycles:,} cycles ({timing.bucket})" for timing in profile.by_formula]
        click.echo(f"with exchanges by formula, nothing fitted: {', '.join(times)}")


def _print_together(profile: Profile) -> None:
    """How much longer runs take when no PE is idle."""
    shares = [
        f"{shared.cycles / alone.cycles:.2f} x ({alone.bucket})"
        for alone, shared in zip(profile.timings, profile.together, strict=True)
    ]
    click.echo(f"time while all {profile.pes} PEs load from HBM: {', '.join(shares)}")


def _print_modules(timing: ProgramTiming) -> None:
    from ..artifact.profile import fold_layers
    from .tables import print_table, width

    header = ["module", "cycles", "share", "bound", "roofline"]
    wide = width() >= WIDE_COLUMNS
    if wide:
        header += ["DMA busy", "MAC busy", "vector busy", "HBM bytes", "MACs", "off by"]
    rows = []
    for module in fold_layers(timing.modules):
        row = [
            module.path,
            f"{module.cycles:,}",
            _share(module.cycles, timing.cycles),
            _bound(module),
            _share(module.roofline_cycles, module.cycles) if module.roofline_cycles else "",
        ]
        if wide:
            row += [
                *(_busy(module.engines.get(e, 0), module.cycles) for e in SHOWN_ENGINES),
                f"{module.hbm_bytes:,}",
                f"{module.macs:,}",
                _interval(module.cycles, module.low_cycles, module.high_cycles),
            ]
        rows.append(row)
    click.echo()
    print_table(f"modules of {timing.bucket}", header, rows, compact=True)


WIDE_COLUMNS = 150
"""From this width on modules show their bytes, products and engines too."""
SHOWN_ENGINES = ("dma", "contraction", "vector")


def _print_engines(timing: ProgramTiming) -> None:
    from .tables import print_table

    busy = {**timing.contexts, **{f"engine {e}": n for e, n in timing.engines.items()}}
    click.echo()
    print_table(
        f"contexts and engines of {timing.bucket}",
        ("", "busy cycles", "of all"),
        [(name, f"{n:,}", _share(n, timing.cycles)) for name, n in busy.items()],
        compact=True,
    )


# --- cells ---


def _bound(module: ModuleTiming) -> str:
    """What limits it; launch and finish have no engines, and hidden work takes no time."""
    if not module.engines:
        return ""
    return module.bound if module.cycles else "hidden"


def _time(microseconds: float) -> str:
    if microseconds >= 10_000:
        return f"{microseconds / 1000:,.1f} ms"
    return f"{microseconds:,.1f} us"


def _interval(cycles: float, low: float, high: float) -> str:
    """How much shorter and longer it may be: `-3% +12%`."""
    if not cycles or low == high:
        return ""
    return f"-{(cycles - low) / cycles:.0%} +{(high - cycles) / cycles:.0%}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _busy(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if part and whole else ""

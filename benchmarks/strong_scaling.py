"""One model on 1, 2, 4 and 8 PEs of a card: times, the roofline beside them, and what is between.

    python benchmarks/strong_scaling.py [--model 8B] [--ranks 1 2 4 8] [--machine silicon]
    python benchmarks/strong_scaling.py --model 70B --ranks 8 --stages 4

Compiled from the config at -O2, without weights. The roofline is what `headroom.py` compares with,
for one rank's part: decode, one long DMA command with a rank's share of the step's necessary bytes
while all ranks load; prefill, a rank's share of the useful multiplications at full rate. Cycles on
the critical path are those of `profile`. With exchanges by formula, messages cost what is
documented of transfers; the machine adds what was fitted to published all-reduces. With --stages
each row is followed by its pipeline stages, a card for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from build_cost import LLAMA_3_1_8B
from headroom import Case, macs_per_cycle, necessary_bytes, stream_cycles
from programs import LLAMA_3_1_70B, Model

if TYPE_CHECKING:
    from furiosa_llm.backend_rngd.isa.machine import Machine
    from furiosa_llm.backend_rngd.isa.program import Program
    from furiosa_llm.runtime_sim.breakdown import Part
    from furiosa_llm.runtime_sim.pipeline_timing import PipelineTiming

LEVEL = 2
MODELS: Mapping[str, Mapping[str, Any]] = {"8B": LLAMA_3_1_8B, "70B": LLAMA_3_1_70B}
CASES = (Case("decode", 1, 1024, (LEVEL,), 0.85), Case("prefill", 1, 1024, (LEVEL,), 0.8))


@dataclass(frozen=True)
class Row:
    """A run on some ranks."""

    ranks: int
    cycles: int
    time_us: float
    limit_cycles: float
    parts: Mapping[Part, int]
    """Cycles of the critical path."""
    formula_cycles: int
    """With exchanges by formula."""
    pipeline: PipelineTiming | None


def measure(model: Model, case: Case, ranks: int, stages: int, machine: Machine) -> Row:
    from furiosa_llm.backend_rngd.isa.machine import with_documented_exchanges
    from furiosa_llm.runtime_sim.breakdown import breakdown
    from furiosa_llm.runtime_sim.timing import time_program

    program = model.program(case.bucket(), LEVEL, ranks)
    timing = time_program(program, machine, sharers=ranks)
    by_formula = with_documented_exchanges(machine)
    return Row(
        ranks,
        timing.cycles,
        timing.time_us,
        limit_cycles(model.config, case, timing.macs, ranks, machine),
        breakdown(program, machine, sharers=ranks),
        time_program(program, by_formula, sharers=ranks).cycles,
        pipeline(program, model.config.num_hidden_layers, stages, machine),
    )


def pipeline(program: Program, blocks: int, stages: int, machine: Machine) -> PipelineTiming | None:
    """The program in stages, each on a card of its own; None for a single one."""
    from furiosa_llm.models.stages import stage_sizes
    from furiosa_llm.runtime_sim.pipeline_timing import time_stages
    from furiosa_llm.runtime_sim.stages import starts_after_layers

    if stages == 1:
        return None
    starts = starts_after_layers(program, stage_sizes(blocks, stages))
    ranks = program.header.tensor_parallel_size
    return time_stages(program, machine, starts, sharers=ranks)


def limit_cycles(config: Any, case: Case, macs: int, ranks: int, machine: Machine) -> float:
    """The least that a rank's share of the work needs; `macs` are a rank's."""
    if case.kind == "prefill":
        return macs / macs_per_cycle(machine)
    return stream_cycles(necessary_bytes(config, case) // ranks, machine, ranks)


def report(case: Case, rows: list[Row]) -> None:
    print(f"\n{case.bucket().name} at -O{LEVEL}")
    print(
        "  PEs        cycles        time  speed-up   roofline: cycles  speed-up   share"
        "    compute     HBM  exchanges  by formula"
    )
    for row in rows:
        shares = {name: f"{n / row.cycles:.1%}" for name, n in row.parts.items()}
        print(
            f"  {row.ranks:3} {row.cycles:13,} {row.time_us:8,.0f} us"
            f" {rows[0].cycles / row.cycles:9.2f}"
            f" {row.limit_cycles:18,.0f} {rows[0].limit_cycles / row.limit_cycles:9.2f}"
            f" {row.limit_cycles / row.cycles:7.1%}"
            f" {shares['compute']:>10} {shares['HBM']:>7} {shares['exchanges']:>10}"
            f" {row.formula_cycles:11,}"
        )
        if row.pipeline is not None:
            report_stages(row.pipeline)


def report_stages(timing: PipelineTiming) -> None:
    for number, stage in enumerate(timing.stages):
        full = stage.timing.hbm_capacity_utilization
        print(
            f"      stage {number}: {stage.cycles:13,} cycles, {stage.send_cycles:,} of them until"
            f" {stage.sent_bytes:,} B have come; weights fill {full:.0%} of the HBM"
        )
    print(
        f"      a step takes {timing.latency_cycles:,} cycles, the next can follow after"
        f" {timing.slowest_cycles:,}"
    )


def main() -> None:
    from furiosa_llm.backend_rngd.isa.machine import DEFAULT_MACHINE, load_machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="8B")
    parser.add_argument("--machine", default=DEFAULT_MACHINE)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--stages", type=int, default=1)
    options = parser.parse_args()
    machine = load_machine(options.machine)
    model = Model(MODELS[options.model])
    print(f"{options.model} on {machine.name}")
    for case in CASES:
        report(
            case,
            [measure(model, case, ranks, options.stages, machine) for ranks in options.ranks],
        )


if __name__ == "__main__":
    main()

"""How near compiled code comes to the machine's limits, on the same machine description.

    python benchmarks/headroom.py [--machine silicon] [--shapes 8B ...] [--classes]

Llama-3.1-8B on one processing element, and one element's shard of eight. The baselines are:

- decode, batch 1: one long DMA command with the step's necessary bytes (weights, keys and values
  once, logits), timed by the same model; for the shard with eight elements on the HBM;
- prefill of 1,024 tokens: the useful multiplications at the full rate of the contraction engine;
- decode, batch 64 at 2,048 tokens: the larger of both.

With --classes each class of operators gets its cycles (those in which one of its commands is the
oldest unfinished) and the share of its own bound: the longest of its HBM bytes in such a stream,
its useful multiplications at full rate, and the cycles that its passes keep the vector engine busy.
Ratios compare code with this model of the machine; they say nothing about a vendor's product.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from programs import SHAPES, Model

if TYPE_CHECKING:
    from furiosa_llm.backend_rngd.isa.machine import Machine
    from furiosa_llm.backend_rngd.isa.program import Program
    from furiosa_llm.models.config_types import Bucket

LEVELS = (0, 1, 2)
LOW = 0.5
"""A class below this share of its bound is marked; docs/measurements.md says why it is there."""
ELEMENT_BYTES = 2
"""Of bf16, which weights, keys and values are stored in."""
LOGIT_BYTES = 4


@dataclass(frozen=True)
class Case:
    """A bucket, the levels at which it is compiled, and the share of its bound to reach at -O2."""

    kind: str
    batch: int
    length: int
    levels: tuple[int, ...]
    goal: float

    def bucket(self) -> Bucket:
        from furiosa_llm.models.config_types import Bucket

        make = Bucket.prefill if self.kind == "prefill" else Bucket.decode
        return make(self.batch, self.length)


CASES = (
    Case("decode", 1, 1024, LEVELS, 0.9),
    Case("prefill", 1, 1024, (2,), 0.8),
    Case("decode", 64, 2048, (2,), 0.8),
)

CLASSES: Mapping[str, str] = {
    "embedding": r"embed_tokens$",
    "norm": r"norm$",
    "qkv": r"[qkv]_proj$",
    "o": r"o_proj$",
    "gate_up": r"(gate|up)_proj$",
    "down": r"down_proj$",
    "act": r"mlp(\.act_fn)?$",
    "head": r"lm_head$",
    "attention": r"self_attn$",
    "residual": r"layers\.\d+$",
}
"""Classes of operators and the module paths that belong to them; RoPE and the writes to the cache
are told from attention by what their commands do."""


# --- bounds ---


def necessary_bytes(config: Any, case: Case) -> int:
    """HBM traffic that a run cannot avoid: each weight once, keys and values once, logits."""
    d, f = config.hidden_size, config.intermediate_size
    heads, kv = (
        n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    layer = d * (2 * heads + 2 * kv) + 3 * d * f + 2 * d
    weights = config.num_hidden_layers * layer + d + config.vocab_size * d
    tokens = case.batch * (case.length if case.kind == "prefill" else 1)
    read = case.batch * case.length if case.kind == "decode" else 0
    cache = config.num_hidden_layers * 2 * kv * (read + tokens)
    elements: int = weights + cache + tokens * d
    logits: int = case.batch * config.vocab_size
    return elements * ELEMENT_BYTES + logits * LOGIT_BYTES


def stream_cycles(size_bytes: int, machine: Machine, sharers: int) -> float:
    """One long DMA command from HBM to all slices, scaled to `size_bytes`."""
    from furiosa_llm.backend_rngd.isa.instructions import Context, Dma, Head, Side, Space
    from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES
    from furiosa_llm.backend_rngd.isa.program import Block, Call, Header, Program, Provenance
    from furiosa_llm.runtime_sim.timing import time_program

    run, slices, rounds = 4096, 64, 4096
    source = Side(Space.HBM, 0, (slices * run, run))
    destination = Side(Space.DM, 0, (0, SLICE_ADDRESS_BYTES))
    command = Dma(Head(Context.DMA), (rounds, slices), run, source, destination)
    block = Block(name="stream", first=0, count=1, provenance=(Provenance(path="stream"),))
    call = Call(block=0, prefix="", bindings=())
    header = Header(
        model_name="stream", bucket="decode:1,1", regions=(), blocks=(block,), calls=(call,)
    )
    timing = time_program(Program(header, (command,)), machine, sharers=sharers)
    fixed = machine.control.launch_cycles + machine.control.finish_cycles
    return (timing.cycles - fixed) * size_bytes / (run * slices * rounds)


def macs_per_cycle(machine: Machine) -> int:
    per_lane: int = machine.contraction.macs_per_lane["bf16"]
    return machine.chip.slices_per_pe * machine.chip.lanes_per_slice * per_lane


@dataclass(frozen=True)
class Bound:
    """The least cycles for a run, and what sets them."""

    cycles: float
    name: str


def bound(config: Any, case: Case, macs: int, machine: Machine, sharers: int) -> Bound:
    multiply = Bound(macs / macs_per_cycle(machine), "MAC limit")
    stream = Bound(stream_cycles(necessary_bytes(config, case), machine, sharers), "linear stream")
    if case.kind == "prefill":
        return multiply
    return stream if case.batch == 1 else max(multiply, stream, key=lambda b: b.cycles)


# --- classes ---


@dataclass
class ClassRow:
    """Sums over the commands of a class."""

    cycles: int = 0
    hbm_bytes: int = 0
    macs: int = 0
    vector_cycles: int = 0

    def share(self, machine: Machine, sharers: int) -> float:
        """Of its own bound; above 1 where its loads run under other classes' work."""
        stream = stream_cycles(self.hbm_bytes, machine, sharers)
        best = max(stream, self.macs / macs_per_cycle(machine), self.vector_cycles)
        return best / self.cycles if self.cycles else 1.0


def class_rows(program: Program, machine: Machine, sharers: int) -> Mapping[str, ClassRow]:
    """The program's cycles by class of operators."""
    from furiosa_llm.backend_rngd.isa.cost import dma_cost, exec_cost
    from furiosa_llm.backend_rngd.isa.instructions import Control, Exec
    from furiosa_llm.backend_rngd.isa.plan import plan_dma, plan_exec
    from furiosa_llm.runtime_sim.timeline import timeline

    rows: dict[str, ClassRow] = defaultdict(ClassRow)
    end = machine.control.launch_cycles
    for timed in timeline(program, machine, sharers=sharers):
        call = program.calls[timed.call]
        block = program.blocks[call.block]
        command = program.commands[block.first + timed.entry]
        row = rows[class_of(block, command, timed.module)]
        row.cycles += max(0, timed.end - end)
        end = max(end, timed.end)
        assert not isinstance(command, Control), "a timeline has no repeats"
        if isinstance(command, Exec):
            row.vector_cycles += exec_cost(plan_exec(command, ""), machine).engines.get("vector", 0)
        else:
            cost = dma_cost(plan_dma(command, ""), machine, sharers)
            row.hbm_bytes += cost.hbm_bytes_read + cost.hbm_bytes_written
    for name, macs in _macs(program):
        rows[name].macs += macs
    return rows


def _macs(program: Program) -> Iterator[tuple[str, int]]:
    from furiosa_llm.backend_rngd.isa.expand import entry_path

    for call in program.calls:
        for entry in program.blocks[call.block].provenance:
            yield _named(entry_path(program, call, entry), entry.node), entry.macs


def class_of(block: Any, command: Any, module: str) -> str:
    from furiosa_llm.backend_rngd.isa.instructions import Dma, Indirect

    if isinstance(command, Dma) and command.indirect == Indirect.DESTINATION:
        return "cache write"
    return _named(module, block.provenance[command.head.provenance].node)


def _named(module: str, node: str) -> str:
    name = next((n for n, pattern in CLASSES.items() if re.search(pattern, module)), "other")
    return "rope" if name == "attention" and not node.startswith("attention") else name


# --- report ---


def main() -> None:
    from furiosa_llm.backend_rngd.isa.machine import DEFAULT_MACHINE, load_machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default=DEFAULT_MACHINE)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--classes", action="store_true")
    options = parser.parse_args()
    machine = load_machine(options.machine)
    print(f"machine {machine.name}: {macs_per_cycle(machine):,} bf16 MACs a cycle and PE")
    for shape in options.shapes:
        sharers = 1 if shape == "8B" else machine.chip.pes
        rate = 1e9 / stream_cycles(10**9, machine, sharers)
        print(f"\n{shape}: a linear stream brings {rate:.1f} B a cycle ({sharers} on the HBM)")
        model = Model(SHAPES[shape])
        for case in CASES:
            report(model, case, machine, sharers, options.classes)


def report(model: Model, case: Case, machine: Machine, sharers: int, classes: bool) -> None:
    from furiosa_llm.runtime_sim.timing import time_program

    for level in case.levels:
        program = model.program(case.bucket(), level)
        timing = time_program(program, machine, sharers=sharers)
        limit = bound(model.config, case, timing.macs, machine, sharers)
        share = limit.cycles / timing.cycles
        verdict = ""
        if level == max(LEVELS):
            verdict = f"   goal {case.goal:.0%}: {'reached' if share >= case.goal else 'MISSED'}"
        print(
            f"  {case.bucket().name:14} -O{level} {timing.cycles:14,} cycles,"
            f" {share:6.1%} of the {limit.name}{verdict}"
        )
    if classes:
        _print_classes(class_rows(program, machine, sharers), timing.cycles, machine, sharers)


def _print_classes(
    rows: Mapping[str, ClassRow], cycles: int, machine: Machine, sharers: int
) -> None:
    for name, row in rows.items():
        share = row.share(machine, sharers)
        mark = "  below half" if share < LOW else ""
        print(
            f"      {name:12} {row.cycles:14,} cycles {row.cycles / cycles:6.1%} of all,"
            f" {share:7.1%} of its bound{mark}"
        )


if __name__ == "__main__":
    main()

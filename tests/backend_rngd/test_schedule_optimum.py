"""Small schedules against what OR-Tools' CP-SAT solver proves about the same commands.

Kernels of 20 to 24 commands, cut from the lowered blocks of decoders of several shapes, and some
random ones, planned by the search of the `schedule` pass. What is claimed: wherever the solver
proves an optimum, the plan takes at most 10 % more. Of the others only a lower bound is known; how
far their plans are from it is reported, not judged: the distance is the solver's as much as the
plan's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from optimal_schedule import optimum
from random_stretches import check_plan, random_stretch
from small_decoder import Decoder
from xdsl.context import Context

from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.list_schedule import Plan, Stretch
from furiosa_llm.backend_rngd.rngd import BlockOp
from furiosa_llm.backend_rngd.schedule import BlockProblem, PlanSearch, parts
from furiosa_llm.backend_rngd.tile import TilePass
from furiosa_llm.models.config_types import Bucket

SLACK = 1.10
EFFORT = 1.0
LONGEST = 24
DECODERS = (
    Decoder(Bucket.decode(2, 40)),
    Decoder(Bucket.decode(8, 200), bias=True, head_norms=True),
    Decoder(Bucket.prefill(1, 80)),
    Decoder(Bucket.prefill(2, 48), hidden=256, heads=8, kv_heads=2, head_dim=32, feed_forward=512),
    Decoder(Bucket.decode(16, 128), hidden=256, heads=8, kv_heads=4, head_dim=32),
    Decoder(
        Bucket.decode(1, 1024),
        hidden=4096,
        heads=4,
        kv_heads=1,
        head_dim=128,
        feed_forward=1792,
        vocabulary=1024,
    ),
    Decoder(Bucket.decode(4, 64), hidden=512, heads=8, kv_heads=8, head_dim=64, feed_forward=1024),
    Decoder(Bucket.prefill(1, 32), hidden=512, heads=8, kv_heads=2, head_dim=64, bias=True),
    Decoder(Bucket.decode(32, 256), hidden=512, heads=8, kv_heads=2, head_dim=64),
    Decoder(Bucket.prefill(1, 200), hidden=256, heads=4, kv_heads=4, head_dim=64, head_norms=True),
)
RANDOM = 6


def lowered() -> Iterator[Stretch]:
    """Runs of commands of lowered blocks."""
    for decoder in DECODERS:
        module = decoder.module()
        TilePass.for_bucket(decoder.bucket).apply(Context(), module)
        for block in module.ops:
            if isinstance(block, BlockOp):
                for stretch in BlockProblem(block, load_machine()).stretches:
                    yield from _pieces(stretch)


def _pieces(stretch: Stretch) -> Iterator[Stretch]:
    n = len(stretch.tasks)
    bounds = [(i, min(i + LONGEST, n)) for i in range(0, n, LONGEST) if n - i >= 20]
    for piece in parts(stretch, bounds[:5]):
        if not any(task.blocking_cycles for task in piece.tasks):
            yield piece


def _shortest(piece: Stretch) -> Plan:
    """As the pass plans a block that has this piece alone; addresses are no part of the problem."""
    (plan,) = PlanSearch([piece], [[piece]], [1], lambda plans: True).best(2)
    return plan


def test_small_kernels_are_within_ten_percent_of_the_proven_optimum(
    record_property: Callable[[str, object], None],
) -> None:
    cut = list(lowered())
    assert len(cut) >= 20
    proven: list[float] = []
    others: list[float] = []
    for piece in [*cut, *(random_stretch(seed, LONGEST) for seed in range(RANDOM))]:
        plan = _shortest(piece)
        check_plan(piece, plan)
        best = optimum(piece, plan, EFFORT)
        assert plan.makespan >= best.bound
        (proven if best.proven else others).append(round(plan.makespan / best.bound, 3))
    record_property("ratios to proven optima", proven)
    record_property("ratios to bounds", others)
    assert len(proven) >= 20 + RANDOM, (proven, others)
    assert max(proven) <= SLACK, proven

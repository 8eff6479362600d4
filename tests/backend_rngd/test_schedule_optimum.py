"""Small schedules against the best that OR-Tools' CP-SAT solver finds for the same commands.

Two dozen kernels of 20 to 24 commands, cut from the lowered blocks of decoders of several shapes,
and some random ones. Each solver run has a time limit; the whole takes under a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from optimal_schedule import optimum
from random_stretches import check_plan, random_stretch
from small_decoder import Decoder
from xdsl.context import Context

from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.list_schedule import Policy, Stretch
from furiosa_llm.backend_rngd.rngd import BlockOp
from furiosa_llm.backend_rngd.schedule import POLICIES, BlockProblem, improved, parts, planned
from furiosa_llm.backend_rngd.tile import TilePass
from furiosa_llm.models.config_types import Bucket

SLACK = 1.10
SECONDS = 1.0
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


def test_small_kernels_are_within_ten_percent_of_the_optimum(
    record_property: Callable[[str, object], None],
) -> None:
    pieces = [*lowered(), *(random_stretch(seed, 24) for seed in range(RANDOM))]
    assert len(pieces) >= 20 + RANDOM
    ratios = []
    for piece in pieces:
        plans = [planned(piece, policy) for policy in (*POLICIES, Policy())]
        plan = improved(piece, min(plans, key=lambda plan: plan.makespan))
        check_plan(piece, plan)
        ratios.append(plan.makespan / optimum(piece, plan, SECONDS).makespan)
    record_property("ratios", [round(ratio, 3) for ratio in ratios])
    assert max(ratios) <= SLACK, [round(ratio, 3) for ratio in ratios]

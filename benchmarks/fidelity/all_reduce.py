"""The sums over PEs that a decoder layer needs, as the vendor's measurements show them.

Time grows with N (N - 1) for N PEs, so each PE seems to send its whole partial result to all
others, and the card to deliver one message after the other: the rotation below. A layer has two
sums, behind the attention's output and behind the feed-forward part, over slots of their own.
"""

from __future__ import annotations

from furiosa_llm.backend_rngd.isa.container import write_program
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Commit,
    Context,
    Counter,
    Dma,
    Exec,
    Fate,
    Head,
    Instruction,
    PeerSignal,
    Port,
    Reduce,
    Side,
    Space,
    Stream,
    Vector,
    Wait,
)
from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES
from furiosa_llm.backend_rngd.isa.program import Block, Call, Header, Program, Provenance
from furiosa_llm.backend_rngd.isa.rules import SLICES_PER_PE

GIVEN = "<partial>"
"""The module of the pass whose result is summed, which the measured times leave out."""
SUMS = ("o_proj", "down_proj")
PARTS = 1 << 16
"""Where the slots of a sum begin; one for each rank, in the order of the bits that differ."""
FREE, MADE, ARRIVED = range(3)


def all_reduce(pes: int, result_bytes: int) -> bytes:
    """The binary of a layer's two sums of a bf16 result spread over a PE's slices."""
    part = result_bytes // SLICES_PER_PE
    others = tuple(range(1, pes))
    commands: list[Instruction] = [_given(part, others)]
    for number in range(len(SUMS)):
        slots = PARTS * (1 + number)
        commands += [_push(peer, slots, part, number) for peer in others]
        commands.append(_sum(pes, slots, PARTS * (2 + number), part, number))
    provenance = tuple(Provenance(path=path) for path in (GIVEN, *SUMS))
    block = Block(name="layer", first=0, count=len(commands), provenance=provenance)
    header = Header(
        model_name="silicon",
        bucket="decode:1,1",
        tensor_parallel_size=pes,
        regions=(),
        blocks=(block,),
        calls=(Call(block=0, prefix="", bindings=()),),
    )
    return write_program(Program(header, tuple(commands)))


def _given(part: int, others: tuple[int, ...]) -> Exec:
    """Makes the partial result, and says that all slots are free."""
    head = Head(Context.MAIN, (), (MADE,), 0, (PeerSignal(FREE, others),))
    return _pass(head, (Counter(part // 32, a=32, commit=32),), 0, PARTS)


def _push(peer: int, slots: int, part: int, number: int) -> Dma:
    """The rank's own slot to a peer's slot for it."""
    first = peer == 1
    waits = (Wait(MADE, 1),) * first + (Wait(FREE, 1, (peer,)),) * (number == 0)
    return Dma(
        head=Head(Context.DMA, waits, (), 1 + number, (PeerSignal(ARRIVED, (peer,)),)),
        n=(SLICES_PER_PE,),
        run=part,
        source=Side(Space.DM, slots, (SLICE_ADDRESS_BYTES,)),
        destination=Side(Space.DM, slots + peer * part, (SLICE_ADDRESS_BYTES,), peer=peer),
    )


def _sum(pes: int, slots: int, target: int, part: int, number: int) -> Exec:
    """All slots added in f32, rounded to the own slot of the next sum."""
    last = number == len(SUMS) - 1
    others = tuple(range(1, pes))
    head = Head(Context.MAIN, (Wait(ARRIVED, 1, others),), () if last else (MADE,), 1 + number)
    counters = (Counter(part // 32, a=32, commit=32), Counter(pes, fate=Fate.VSUM, a=part))
    return _pass(head, counters, slots, target, Vector(reduce=Reduce.ADD))


def _pass(
    head: Head,
    counters: tuple[Counter, ...],
    source: int,
    target: int,
    vector: Vector | None = None,
) -> Exec:
    """A pass over bf16 in flits, computed in f32 if it computes."""
    return Exec(
        head=head,
        counters=counters,
        a=Port(source),
        stream=Stream(16, cast=DType.F32 if vector else None),
        vector=vector or Vector(),
        commit_port=Port(target),
        commit=Commit(columns=16, column_stride=2),
    )

"""The instruction set: what one command says, field by field.

A program is a list of three kinds of command. `Exec` is one pass of a tensor unit, a loop nest
over its pipeline fetch -> switch -> collect -> contraction -> vector -> cast -> transpose ->
commit. `Dma` moves runs of bytes between HBM and the slices' data memories. `Control` repeats
the commands that follow it. `records.py` gives the bytes, `plan.py` the meaning, `cost.py` the
cycles, `docs/isa.md` the prose.

The vector engine's fields are in `vector_fields.py`; their names can be had from here too.

Letters: s output slice, t counter values, l lane, e packet element, q output column.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from .dtypes import DType
from .vector_fields import Alu as Alu
from .vector_fields import Clipper as Clipper
from .vector_fields import Comparator as Comparator
from .vector_fields import Comparison as Comparison
from .vector_fields import Gate as Gate
from .vector_fields import Groups as Groups
from .vector_fields import Op as Op
from .vector_fields import Placement as Placement
from .vector_fields import Reduce as Reduce
from .vector_fields import Slot as Slot
from .vector_fields import Source as Source
from .vector_fields import Vector as Vector
from .vector_fields import VectorOp as VectorOp

MAX_COUNTERS = 8
"""Entries of a sequencer, shared by all counters of a pass."""
MAX_LOOPS = 8
"""Nested loops of a DMA command."""
MAX_STEPS = 8
"""Registers that one `Control` can advance per iteration."""
REGISTERS = 64
SEMAPHORES = 64
MAX_RANKS = 8
"""Tensor-parallel ranks of a program, one to a PE: those of a card."""


class Context(IntEnum):
    """The queues that run side by side; order inside one is program order."""

    MAIN = 0
    SUB = 1
    DMA = 2


@dataclass(frozen=True)
class Wait:
    """Block until `semaphore` holds `count` signals from each sender, then take them."""

    semaphore: int
    """Which counter of signals; each sender's are counted apart."""
    count: int
    """How many signals it takes from each sender."""
    peers: tuple[int, ...] = ()
    """The senders: ranks `rank ^ p` for each p, ascending; none: the rank itself."""


@dataclass(frozen=True)
class PeerSignal:
    """One signal to each of some other ranks."""

    semaphore: int
    """Which counter of theirs."""
    peers: tuple[int, ...]
    """Who gets it: ranks `rank ^ p` for each p, ascending."""


@dataclass(frozen=True)
class Head:
    """What every command has: its queue, its synchronisation, where it comes from."""

    context: Context
    """The queue that runs the command."""
    waits: tuple[Wait, ...] = ()
    """What must have been signalled before it starts, one per semaphore."""
    signals: tuple[int, ...] = ()
    """Semaphores that get one signal each when the command has finished."""
    provenance: int = 0
    """Index into the block's provenance table."""
    peer_signals: tuple[PeerSignal, ...] = ()
    """Semaphores of other ranks that get one then, too; with `signals` at most two."""


class Birth(IntEnum):
    """Where a counter's steps come from."""

    FETCH = 0
    """The fetch sequencer walks memory."""
    SLICE = 1
    """The switch brings the packet of another source slice."""
    REUSE = 2
    """The same packet meets another register-file row: no fetch."""


class Fate(IntEnum):
    """What becomes of a counter."""

    OUT = 0
    """Its steps reach the commit."""
    MSUM = 1
    """The time reducer of the contraction sums over it."""
    VSUM = 2
    """The vector engine's reducer folds it."""


class ValidDim(IntEnum):
    """What a counter counts for the valid counts of the vector engine's reducer."""

    NONE = 0
    PACKET = 1
    """The axis that lies in the packet, beyond it."""
    GATE0 = 2
    """The axis of the first gate."""
    GATE1 = 3
    GATE2 = 4


@dataclass(frozen=True)
class Counter:
    """One loop of a pass, with a stride in bytes for each port it moves."""

    n: int
    """Steps."""
    birth: Birth = Birth.FETCH
    """Where its packets come from."""
    fate: Fate = Fate.OUT
    """What becomes of it."""
    a: int = 0
    """Bytes that the fetch from port A advances per step."""
    b: int = 0
    """The same for port B."""
    trf: int = 0
    """Bytes per step in a lane of the TRF, read or stored."""
    vrf: int = 0
    """Bytes per step in the VRF, read or stored."""
    commit: int = 0
    """Bytes per step of what is committed to data memory; half bytes for 4-bit results."""
    slices: int = 0
    """Source slices per step; only with `Birth.SLICE`."""
    lanes: int = 0
    """Register-file lanes per step; only when the sink is the TRF."""
    valid_dim: ValidDim = ValidDim.NONE
    """Which index of the valid counts it advances."""
    valid_step: int = 0
    """What it adds to that index per step."""


@dataclass(frozen=True)
class Port:
    """A base address: `base` plus the value of `register`, inside [.., limit)."""

    base: int = 0
    """Bytes from the start of the memory, or from the register's value."""
    dtype: DType = DType.BF16
    """Type of the elements there."""
    register: int | None = None
    """Register whose value is added to `base`."""
    limit: int = 0
    """First byte past the buffer; an access beyond it is a fault. 0: the memory's own end."""


@dataclass(frozen=True)
class Stream:
    """The packet that the fetch engine makes each step, and what the adapter does to it.

    A packet is `runs` runs of `run` elements, `run_stride` bytes apart; inside a run elements
    are `run_step` (0 or 1) apart. Collect fills up with zeros to `pad` elements.
    """

    run: int
    """Elements of a run."""
    run_step: int = 1
    """0 repeats one element over the run."""
    runs: int = 1
    """Runs of a packet."""
    run_stride: int = 0
    """Bytes from one run to the next."""
    pad: int = 0
    """Elements of the packet after collect; 0: as many as were read."""
    lookup: DType | None = None
    """Type that the adapter's table gives for each code that is read."""
    cast: DType | None = None
    """Type that the fetch adapter converts to."""
    zero_point: int | None = None
    """Subtracted from i4 or i8, which become i5 or i9; only for a contraction."""
    pair: bool = False
    """Interleave the packets of ports A and B for the vector engine's two groups."""

    @property
    def valid(self) -> int:
        """Elements read per packet."""
        return self.run * self.runs

    @property
    def elements(self) -> int:
        """Elements per packet after collect."""
        return max(self.valid, self.pad)


class Topology(IntEnum):
    FORWARD = 0
    BROADCAST01 = 1
    BROADCAST1 = 2
    TRANSPOSE = 3
    INTER_TRANSPOSE = 4
    TRANSPOSED_BROADCAST1 = 5
    CUSTOM = 6


@dataclass(frozen=True)
class Digit:
    """A bit field of the output slice that selects where its packets come from."""

    shift: int
    """Lowest bit of the output slice that belongs to it."""
    bits: int
    """Number of bits."""
    slices: int = 0
    """Source slices per step of the digit."""
    bytes: int = 0
    """Bytes of fetch address per step of the digit (inter-transpose)."""


@dataclass(frozen=True)
class Switch:
    """Source slice = slice with the ring's bits cleared + the digits + the slice counters."""

    topology: Topology = Topology.FORWARD
    """Which pattern the routers follow."""
    ring: int = 1
    """Slices that exchange packets, a power of two; 1 forwards."""
    digits: tuple[Digit, ...] = ()
    """What the output slice's bits inside the ring select."""
    bitmap: int | None = None
    """Custom only: address in data memory of each slice's bitmap of source slices in its ring."""


class Fold(IntEnum):
    """How the lane folder orders its output: lanes side by side, or one after the other."""

    INTERLEAVED = 0
    SEQUENTIAL = 1


@dataclass(frozen=True)
class Contraction:
    """Multiply each packet with a register-file row in every lane, and sum.

    `trf_read` bytes of a row are replicated over the packet; the adder tree sums 2**depth
    neighbours, so a packet of P elements gives P / 2**depth columns.
    """

    pack: int = 2
    """Flits joined into one packet: 1 idles half of the multipliers."""
    lanes: int = 8
    """Register-file lanes that multiply, each with its own rows."""
    trf_read: int = 64
    """Bytes of a row per read, replicated over the packet."""
    depth: int = 5
    """Levels of the adder tree."""
    fold: Fold = Fold.INTERLEAVED
    """Order in which lanes and columns leave."""


class Sink(IntEnum):
    DM = 0
    TRF = 1
    VRF = 2


@dataclass(frozen=True)
class Commit:
    """Where results go: `columns` per lane, `lanes` lanes; columns that do not exist are zero.

    Bytes (half bytes for 4-bit results) between lanes and columns are `lane_stride` and
    `column_stride`. `transpose_rows` and
    `transpose_columns` describe the transposer's block when elements are not committed in the
    order they come; 0 when it is bypassed.
    """

    sink: Sink = Sink.DM
    """Memory that takes the results."""
    lanes: int = 1
    """Lanes that are committed."""
    columns: int = 1
    """Columns per lane that are committed."""
    lane_stride: int = 0
    """Bytes between lanes."""
    column_stride: int = 0
    """Bytes between columns."""
    transpose_rows: int = 0
    """Rows that the transposer stacks: what is contiguous behind it."""
    transpose_columns: int = 0
    """Elements of such a row: rows that leave it."""
    relu: bool = False
    """Clamp negative results to zero."""


@dataclass(frozen=True)
class Generate:
    """Numbers that the sub context's commit makes itself; nothing is fetched."""

    value: int = 0
    """Pattern of the constant, or the first number."""
    count_up: bool = False
    """i32: element k, counters outermost first and then columns, is `value` + k."""


@dataclass(frozen=True)
class Exec:
    """One pass of the tensor units of a group of processing elements."""

    head: Head
    """Queue, waits, signals, provenance."""
    counters: tuple[Counter, ...]
    """Loops of the pass, outermost first."""
    a: Port
    """What is fetched."""
    stream: Stream
    """The packet of a step."""
    commit_port: Port
    """Where results go, and their type."""
    commit: Commit
    """How results are laid out there."""
    b: Port = field(default_factory=Port)
    """The second tensor of a pair."""
    trf: Port = field(default_factory=Port)
    """Register-file operand of the contraction."""
    vrf: Port = field(default_factory=Port)
    """Register operand of the vector engine."""
    group: int = 0
    """log2 of the ranks whose PEs work together, as 64 << group slices, once all are ready."""
    valid_slices: int = 0
    """Slices from this one on neither fetch nor commit; 0: all slices work."""
    switch: Switch = field(default_factory=Switch)
    """How packets travel between slices."""
    contraction: Contraction | None = None
    """Products and sums; without it packets pass by."""
    trf_lanes: int = 8
    """Lanes that the register file is divided into; the contraction's lanes when there is one."""
    vector: Vector = field(default_factory=Vector)
    """What the vector engine does."""
    generate: Generate | None = None
    """Constants instead of a stream; `stream` then only says how long a packet is."""

    @property
    def stream_dtype(self) -> DType:
        """The type of the stream's elements behind the fetch adapter, a zero point aside."""
        return self.stream.cast or self.stream.lookup or self.a.dtype

    @property
    def file_lanes(self) -> int:
        """Lanes that the TRF has for this command."""
        return self.contraction.lanes if self.contraction else self.trf_lanes


class Space(IntEnum):
    HBM = 0
    DM = 1


class Indirect(IntEnum):
    """Which side of a DMA command takes its row numbers from a list in HBM."""

    NONE = 0
    SOURCE = 1
    DESTINATION = 2


@dataclass(frozen=True)
class Side:
    """One side of a DMA command; in DM a slice is 4 MiB of address.

    The executing rank may reach another rank's memory, and may start at an address of its own.
    """

    space: Space
    """HBM or data memory."""
    base: int
    """Address of the first run."""
    strides: tuple[int, ...] = ()
    """Bytes per loop, outermost first."""
    register: int | None = None
    """Register whose value is added to `base`."""
    limit: int = 0
    """First byte past the buffer, relative to the register's value; 0: the memory's own end."""
    peer: int = 0
    """Whose memory it is: that of rank `rank ^ peer`."""
    rank_stride: int = 0
    """`(rank ^ rank_mask) · rank_stride` bytes are added to `base`."""
    rank_mask: int = 0
    """Which bits of the executing rank are turned over before that."""


@dataclass(frozen=True)
class IndexList:
    """i32 numbers in HBM: (number - origin) · scale is added to the indirect side's address."""

    base: int
    """Address of the first row number in HBM."""
    strides: tuple[int, ...]
    """Bytes per loop, outermost first."""
    scale: int
    """Bytes per row."""
    register: int | None = None
    """Register whose value is added to `base`."""
    bound: int = 0
    """A row number must be below this; 0: only the memory's bounds count."""
    origin: int = 0
    """The number that means the first row: 1 when a list of lengths names last rows."""


@dataclass(frozen=True)
class Dma:
    """Copy `run` bytes for every step of the loops `n` (outermost first)."""

    head: Head
    """Queue, waits, signals, provenance."""
    n: tuple[int, ...]
    """Steps of each loop, outermost first."""
    run: int
    """Bytes that are contiguous on both sides."""
    source: Side
    """Where bytes come from."""
    destination: Side
    """Where they go."""
    indirect: Indirect = Indirect.NONE
    """Which side adds row numbers."""
    index: IndexList | None = None
    """The list of row numbers."""


@dataclass(frozen=True)
class Step:
    """Advance `register` by `bytes` each iteration."""

    register: int
    """The register."""
    bytes: int
    """What an iteration adds to it."""


@dataclass(frozen=True)
class Control:
    """Run the next `length` entries of the issue list `count` times.

    In iteration i each step's register stands i · bytes above its value before; after the last
    iteration it has that value again. Repeats nest.

    Every iteration is fenced: it starts when all that came before has finished in every
    context, and what follows starts when the last one has finished. So commands inside need to be
    ordered with `Wait` and signals only among themselves, and semaphores balance inside.
    """

    count: int
    """Iterations."""
    length: int
    """Entries of the issue list that are repeated."""
    steps: tuple[Step, ...] = ()
    """Registers that move."""


Instruction = Exec | Dma | Control

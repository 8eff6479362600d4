"""The switch's routers cycle by cycle: where the formula ring x time x flits comes from.

A router stands at every slice of a ring. It takes packets from its own slice and from its two
neighbours, keeps a few packets per input, and has three outputs: its slice and both neighbours. A
broadcast packet goes to all three and leaves its buffer when it has left by all that it must take.
Outputs keep the order of time first and source slice second, which is the order in which every
slice receives. Buffers of one packet, as documented, give the book's trace of two slices; larger
rings would stall in them, while with room enough they take the formula's cycles and one more per
hop. How the hardware avoids the stalls is not documented, so costs use the formula.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .machine import Machine

Packet = tuple[int, int]
"""(time, source slice): the order in which every output sends."""


@dataclass
class _Router:
    place: int
    ring: int
    times: int
    room: int
    """Packets that an input keeps."""
    own: int = 0
    """Time of the first packet that stands at the input of its own slice."""
    sent: list[set[Packet]] = field(default_factory=lambda: [set(), set(), set()])
    """What has left to the slice, to the left and to the right."""
    inputs: list[dict[Packet, int]] = field(default_factory=lambda: [{}, {}])
    """Packets from the left and from the right, with the cycle of their arrival."""

    def outputs_of(self, source: int) -> list[int]:
        """Where a packet must go: on, away from its source, as long as the ring's line goes."""
        left = [1] if self.place > 0 and source >= self.place else []
        right = [2] if self.place < self.ring - 1 and source <= self.place else []
        return [0, *left, *right]

    def next_for(self, output: int) -> Packet | None:
        """The packet that an output sends next."""
        sources = {0: (0, self.ring), 1: (self.place, self.ring), 2: (0, self.place + 1)}[output]
        first, end = sources
        done = len(self.sent[output])
        time, source = divmod(done, end - first)
        return (time, first + source) if time < self.times else None

    def holds(self, packet: Packet, cycle: int) -> bool:
        time, source = packet
        if source == self.place:
            return self.own <= time < self.own + self.room
        buffer = self.inputs[0 if source < self.place else 1]
        return buffer.get(packet, cycle + 1) <= cycle

    def drop_finished(self) -> None:
        """Make room for what has left by every output."""
        while self.own < self.times and self._finished((self.own, self.place)):
            self.own += 1
        for buffer in self.inputs:
            for packet in [packet for packet in buffer if self._finished(packet)]:
                del buffer[packet]

    def _finished(self, packet: Packet) -> bool:
        return all(packet in self.sent[output] for output in self.outputs_of(packet[1]))


def broadcast_trace(ring: int, times: int, machine: Machine) -> list[list[bool]]:
    """Whether each slice gets a packet in each cycle, until all have all; [slice][cycle].

    Every slice of the ring sends `times` packets of one flit to all slices.
    """
    room, hop_cycles = machine.switch.router_buffer_packets, machine.switch.hop_cycles
    routers = [_Router(place, ring, times, room) for place in range(ring)]
    trace: list[list[bool]] = [[] for _ in routers]
    cycle = 0
    while any(router.next_for(0) is not None for router in routers):
        for router, got in zip(routers, trace, strict=True):
            got.append(_send(router, 0, cycle))
            router.drop_finished()
        for router in routers:
            for output, step in ((1, -1), (2, 1)):
                _forward(routers, router, output, step, cycle, hop_cycles)
        for router in routers:
            router.drop_finished()
        cycle += 1
    return trace


def _send(router: _Router, output: int, cycle: int) -> bool:
    packet = router.next_for(output)
    if packet is None or not router.holds(packet, cycle):
        return False
    router.sent[output].add(packet)
    return True


def _forward(
    routers: list[_Router], router: _Router, output: int, step: int, cycle: int, hop_cycles: int
) -> None:
    """Send the next packet to a neighbour that has room for it."""
    place = router.place + step
    if not 0 <= place < len(routers):
        return
    buffer = routers[place].inputs[0 if step > 0 else 1]
    packet = router.next_for(output)
    if packet is None or len(buffer) >= router.room:
        return
    if _send(router, output, cycle):
        buffer[packet] = cycle + hop_cycles

"""A Perfetto trace as slices, read by the rules that the trace processor imports it by.

The trace processor itself is a program that the `perfetto` package downloads when it is first
used. What is checked here needs no network: every packet's message, string table, slice nesting and
arrow.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackDescriptor, TrackEvent


@dataclass
class Slice:
    process: str
    track: str
    name: str
    begin: int
    end: int
    arguments: dict[str, int | str]
    leaving: list[int]
    arriving: list[int]


@dataclass
class TraceContent:
    tracks: list[str] = field(default_factory=list)
    """`process/track`, in the order of their ranks."""
    slices: list[Slice] = field(default_factory=list)

    def on(self, track: str) -> list[Slice]:
        return [s for s in self.slices if f"{s.process}/{s.track}" == track]

    def arrows(self) -> list[tuple[Slice, Slice]]:
        """(sender, receiver) of every arrow; each number has one of both."""
        senders = {arrow: s for s in self.slices for arrow in s.leaving}
        receivers = {arrow: s for s in self.slices for arrow in s.arriving}
        assert senders.keys() == receivers.keys()
        assert len(senders) == sum(len(s.leaving) for s in self.slices)
        assert len(receivers) == sum(len(s.arriving) for s in self.slices)
        return [(senders[arrow], receivers[arrow]) for arrow in sorted(senders)]


def read_trace(data: bytes) -> TraceContent:
    """The trace's slices, in the order of their begins. Fails if a packet breaks a rule."""
    trace = Trace()
    trace.ParseFromString(data)
    assert trace.packet[0].sequence_flags == 1, "strings are defined first"
    strings = trace.packet[0].interned_data
    names = {entry.iid: entry.name for entry in strings.event_names}
    keys = {entry.iid: entry.name for entry in strings.debug_annotation_names}
    texts = {entry.iid: entry.str.decode() for entry in strings.debug_annotation_string_values}
    described: dict[int, Any] = {}
    open_slices: dict[int, list[Slice]] = defaultdict(list)
    clocks: dict[int, int] = defaultdict(int)
    content = TraceContent()
    for packet in trace.packet[1:]:
        assert packet.trusted_packet_sequence_id == (
            0 if packet.HasField("track_descriptor") else 1
        )
        if packet.HasField("track_descriptor"):
            described[packet.track_descriptor.uuid] = packet.track_descriptor
            continue
        assert packet.sequence_flags == 2
        event = packet.track_event
        track = described[event.track_uuid]
        assert packet.timestamp >= clocks[event.track_uuid], "a track's events are in order"
        clocks[event.track_uuid] = packet.timestamp
        if event.type == TrackEvent.TYPE_SLICE_END:
            open_slices[event.track_uuid].pop().end = packet.timestamp
            continue
        assert event.type == TrackEvent.TYPE_SLICE_BEGIN
        assert not open_slices[event.track_uuid], "slices of a track do not overlap"
        found = Slice(
            process=described[track.parent_uuid].process.process_name,
            track=track.name,
            name=names[event.name_iid],
            begin=packet.timestamp,
            end=-1,
            arguments={
                keys[a.name_iid]: texts[a.string_value_iid] if a.string_value_iid else a.uint_value
                for a in event.debug_annotations
            },
            leaving=list(event.flow_ids),
            arriving=list(event.terminating_flow_ids),
        )
        open_slices[event.track_uuid].append(found)
        content.slices.append(found)
    assert not any(open_slices.values()), "every slice ends"
    content.tracks = _tracks(described)
    return content


def _tracks(described: dict[int, TrackDescriptor]) -> list[str]:
    children = [track for track in described.values() if track.parent_uuid]
    children.sort(key=lambda track: (track.parent_uuid, track.sibling_order_rank))
    return [f"{described[t.parent_uuid].process.process_name}/{t.name}" for t in children]

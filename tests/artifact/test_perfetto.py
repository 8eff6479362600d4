"""What the writer encodes, as the `perfetto` package reads it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TracePacket

from furiosa_llm.artifact import perfetto
from furiosa_llm.artifact.perfetto import Edge, Pattern, Strings

U64 = st.integers(0, 2**64 - 1)
NANOSECONDS = st.integers(0, 2**56 - 1)


def packets(data: bytes) -> list[TracePacket]:
    trace = Trace()
    trace.ParseFromString(data)
    return list(trace.packet)


@given(U64)
def test_numbers(value: int) -> None:
    (packet,) = packets(perfetto.message(1, perfetto.number(8, value)))
    assert packet.timestamp == value


@given(NANOSECONDS)
def test_numbers_that_are_filled_in_have_one_width(value: int) -> None:
    wide = perfetto.wide_varint(value)
    assert len(wide) == perfetto.WIDE_VARINT_BYTES
    (packet,) = packets(perfetto.message(1, perfetto.varint(8 << 3) + wide))
    assert packet.timestamp == value


def test_tracks() -> None:
    process, track = packets(
        perfetto.process_track(7, "PE 3", 4) + perfetto.slice_track(8, 7, "main", 2)
    )
    assert process.track_descriptor.uuid == 7
    assert process.track_descriptor.process.process_name == "PE 3"
    assert track.track_descriptor.parent_uuid == 7
    assert (track.track_descriptor.name, track.track_descriptor.sibling_order_rank) == ("main", 2)


@given(
    times=st.lists(NANOSECONDS, min_size=3, max_size=3),
    leaving=st.lists(U64, max_size=3),
    arriving=st.lists(U64, max_size=3),
)
def test_a_pattern_is_filled_with_times_a_name_and_arrows(
    times: list[int], leaving: list[int], arriving: list[int]
) -> None:
    strings = Strings()
    name = strings.name("layers.0: product")
    pattern = Pattern()
    arguments = strings.arguments({"entry": 300, "bound": "fetch"})
    pattern.named_event(5, 0, arguments, len(leaving), len(arriving))
    pattern.event(Edge.BEGIN, 6, 2, strings.name("fetch"))
    pattern.event(Edge.END, 5, 1)
    data = strings.packet() + pattern.fill(times, name, leaving, arriving)
    table, begin, inner, end = packets(data)
    names = {entry.iid: entry.name for entry in table.interned_data.event_names}
    keys = {entry.iid: entry.name for entry in table.interned_data.debug_annotation_names}
    assert [p.timestamp for p in (begin, inner, end)] == [times[0], times[2], times[1]]
    assert [p.track_event.track_uuid for p in (begin, inner, end)] == [5, 6, 5]
    assert names[begin.track_event.name_iid] == "layers.0: product"
    assert names[inner.track_event.name_iid] == "fetch"
    assert list(begin.track_event.flow_ids) == leaving
    assert list(begin.track_event.terminating_flow_ids) == arriving
    entry, bound = begin.track_event.debug_annotations
    assert (keys[entry.name_iid], entry.uint_value) == ("entry", 300)
    values = table.interned_data.debug_annotation_string_values
    assert (keys[bound.name_iid], values[bound.string_value_iid - 1].str) == ("bound", b"fetch")


def test_slices_of_one_track() -> None:
    begin, end, *rest = packets(perfetto.slices(9, [(0, 5, 1), (5, 6, 2)]))
    assert (begin.track_event.type, end.track_event.type) == (1, 2)
    assert [p.timestamp for p in (begin, end, *rest)] == [0, 5, 5, 6]
    assert {p.track_event.track_uuid for p in (begin, end, *rest)} == {9}

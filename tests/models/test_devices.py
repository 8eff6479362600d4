"""The device grammar: what it means, and that every refusal names lists which are possible."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused, suggestions

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.models.devices import (
    RUN_SIZES,
    Devices,
    PeRun,
    device_list,
    is_device_list,
    parse_devices,
)

runs = st.builds(
    lambda card, size, place: PeRun(card, place % (8 // size) * size, size),
    card=st.integers(0, 12),
    size=st.sampled_from(RUN_SIZES),
    place=st.integers(0, 7),
)
numbers = st.integers(0, 12).map(str)
items = st.one_of(
    st.sampled_from(["cpu", "cpu:0", "cuda:1"]),
    runs.map(lambda run: run.name),
    st.builds("npu:{}:{}-{}".format, numbers, numbers, numbers),
    st.builds("npu:{}:{}".format, numbers, st.one_of(numbers, st.just("*"))),
)
lists = st.lists(items, min_size=1, max_size=6).map(",".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("npu:0", [(0, 0, 8)]),
        ("npu:3:*", [(3, 0, 8)]),
        ("npu:0:0-7", [(0, 0, 8)]),
        ("npu:0:5", [(0, 5, 1)]),
        ("npu:0:2-3", [(0, 2, 2)]),
        ("npu:0:4-7", [(0, 4, 4)]),
        ("npu:1:4-7, npu:0:0", [(1, 4, 4), (0, 0, 1)]),
    ],
)
def test_what_the_forms_mean(text: str, expected: list[tuple[int, int, int]]) -> None:
    assert parse_devices(text) == Devices("npu", tuple(PeRun(*run) for run in expected))


@pytest.mark.parametrize("text", ["cpu", "cpu:0", "cuda:0,cuda:1"])
def test_devices_without_cards_have_no_pes(text: str) -> None:
    devices = parse_devices(text)
    assert devices.runs == ()
    assert text.startswith(devices.name)


@pytest.mark.parametrize("value", [None, 0, ["npu:0"]])
def test_a_list_of_devices_is_a_text(value: Any) -> None:
    with pytest.raises(FuriosaLLMError, match="PAR001"):
        parse_devices(value)


@given(st.lists(runs, min_size=1, max_size=6))
def test_lists_of_runs_apart_survive_being_written(parts: list[PeRun]) -> None:
    apart = [r for i, r in enumerate(parts) if not any(map(r.overlaps, parts[:i]))]
    devices = parse_devices(device_list(apart))
    assert devices.runs == tuple(apart)
    assert parse_devices(devices.name) == devices


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "PAR001"),
        ("npu", "PAR001"),
        ("npu:0,", "PAR001"),
        ("gpu:0", "PAR001"),
        ("npu:0:*-3", "PAR001"),
        ("npu:-1", "PAR001"),
        ("npu:0:0-1-2", "PAR001"),
        ("npu:٣", "PAR001"),
        ("npu:0:1-2", "PAR002"),
        ("npu:0:0-2", "PAR002"),
        ("npu:0:2-5", "PAR002"),
        ("npu:0:3-0", "PAR002"),
        ("npu:0:8", "PAR002"),
        ("npu:0,cpu", "PAR003"),
        ("cuda:1,npu:0", "PAR003"),
        ("cpu:0,cuda:0", "PAR003"),
        ("npu:0,npu:0", "PAR004"),
        ("npu:0,npu:0:3", "PAR004"),
        ("cpu,cpu", "PAR004"),
        ("cuda:0,cuda:1,cuda:0", "PAR004"),
        ("cuda", "PAR001"),
    ],
)
def test_impossible_lists_are_coded_errors(text: str, code: str) -> None:
    with pytest.raises(FuriosaLLMError, match=code) as caught:
        parse_devices(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("npu:0:1-2", ["npu:0:0-1", "npu:0:2-3"]),
        ("npu:0:0-2", ["npu:0:0-1", "npu:0:0-3"]),
        ("npu:2:2-5", ["npu:2:0-3", "npu:2:4-7"]),
        ("npu:0:1-6", ["npu:0"]),
        ("npu:0:3-0", ["npu:0:0-3"]),
        ("npu:0:9", ["npu:0:7"]),
        ("npu:0:6-9", ["npu:0:6-7"]),
        ("npu:0:0-3,cpu,npu:1", ["npu:0:0-3,npu:1"]),
        ("npu:0:3,npu:1,npu:0:0-3", ["npu:1,npu:0:0-3"]),
        ("cpu:1,cuda:0", ["npu:0"]),
        ("cpu,cpu", ["cpu"]),
    ],
)
def test_the_nearest_lists_are_named(text: str, nearest: list[str]) -> None:
    with pytest.raises(FuriosaLLMError) as caught:
        parse_devices(text)
    assert suggestions(caught.value) == nearest


@given(lists)
def test_a_list_is_accepted_or_the_named_ones_are(text: str) -> None:
    error = refused(lambda: parse_devices(text))
    if error is None:
        pes = [(run.card, pe) for run in parse_devices(text).runs for pe in run.pes]
        assert len(pes) == len(set(pes))
        assert all(0 <= pe < 8 for _, pe in pes)
        return
    assert suggestions(error)
    for other in suggestions(error):
        parse_devices(other)


@given(st.lists(runs, min_size=1, max_size=6), st.sampled_from(RUN_SIZES))
def test_fused_runs_are_the_same_pes(parts: list[PeRun], size: int) -> None:
    apart = [r for i, r in enumerate(parts) if not any(map(r.overlaps, parts[:i]))]
    devices = Devices("npu", tuple(apart))
    named = {(run.card, pe) for run in apart for pe in run.pes}
    error = refused(lambda: devices.fuse(size))
    if error is not None:
        assert error.code == "PAR005"
        smaller = int(error.next_step.split()[-1])
        assert len(devices.fuse(smaller)) * smaller == len(named)
        whole = parse_devices(suggestions(error)[0])
        assert named < {(run.card, pe) for run in whole.fuse(size) for pe in run.pes}
        return
    fused = devices.fuse(size)
    assert {(run.card, pe) for run in fused for pe in run.pes} == named
    assert len(fused) * size == len(named)
    assert all(run.size == size and run.first % size == 0 for run in fused)


def test_single_pes_fuse_whatever_their_order() -> None:
    devices = parse_devices("npu:1:1,npu:1:0,npu:0:2,npu:0:3")
    assert device_list(devices.fuse(2)) == "npu:1:0-1,npu:0:2-3"


def test_pes_of_two_runs_do_not_fuse() -> None:
    with pytest.raises(FuriosaLLMError, match="PAR005") as caught:
        parse_devices("npu:0:0-1,npu:0:4-5").fuse(4)
    assert "`npu:0:0-3,npu:0:4-7`" in caught.value.next_step
    assert "--tensor-parallel-size 2" in caught.value.next_step


def test_no_binary_runs_on_the_host() -> None:
    with pytest.raises(FuriosaLLMError, match="PAR006") as caught:
        parse_devices("cpu").fuse(4)
    assert "`npu:0:0-3`" in caught.value.next_step


@given(lists)
def test_a_list_of_devices_is_known_as_one_even_if_it_is_impossible(text: str) -> None:
    assert is_device_list(text)


@pytest.mark.parametrize("text", ["npu", "npu:x", "npu:0,other", "cuda:0", "cpu:3", " npu:0"])
def test_what_begins_like_a_device_is_no_name(text: str) -> None:
    assert is_device_list(text)


@pytest.mark.parametrize("text", ["meta-llama/Llama-3.1-8B", "./npu:0", "cpu-model", "name", ""])
def test_names_are_no_devices(text: str) -> None:
    assert not is_device_list(text)

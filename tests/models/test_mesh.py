"""Meshes and stages: every PE has one place, and every refusal names what is possible."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused, suggestions

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.models.devices import RUN_SIZES, PeRun, device_list
from furiosa_llm.models.mesh import Mesh, default_mesh, make_mesh
from furiosa_llm.models.stages import parse_stage_list, stage_sizes

run_sizes = st.sampled_from(RUN_SIZES)


@st.composite
def device_lists(draw: st.DrawFn) -> str:
    """Runs of one size on a few cards, each at most once, in any order."""
    size = draw(run_sizes)
    places = st.tuples(st.integers(0, 2), st.integers(0, 8 // size - 1))
    chosen = draw(st.lists(places, min_size=1, max_size=8, unique=True))
    return device_list(PeRun(card, place * size, size) for card, place in chosen)


def check(mesh: Mesh, tp: int, pp: int) -> None:
    assert (mesh.tp, mesh.pp) == (tp, pp)
    pes = [(run.card, pe) for runs in mesh.replicas for run in runs for pe in run.pes]
    assert len(pes) == len(set(pes)) == mesh.tp * mesh.pp * mesh.dp
    for stages in mesh.replicas:
        for before, after in pairwise(stages):
            later_pes = after.card == before.card and after.first > before.pes[-1]
            assert after.card > before.card or later_pes


@given(device_lists(), run_sizes, st.integers(1, 4), st.one_of(st.none(), st.integers(1, 3)))
def test_a_mesh_is_made_or_the_named_devices_make_one(
    devices: str, tp: int, pp: int, dp: int | None
) -> None:
    error = refused(lambda: make_mesh(devices, tp=tp, pp=pp, dp=dp))
    if error is not None:
        nearest = suggestions(error)[0]
        if error.code == "PAR005":  # the devices of the named list fuse, though there may be few
            assert make_mesh(nearest, tp=tp).tp == tp
        else:
            assert error.code in {"PAR009", "PAR015", "PAR016"}
            check(make_mesh(nearest, tp=tp, pp=pp, dp=dp), tp, pp)
        return
    mesh = make_mesh(devices, tp=tp, pp=pp, dp=dp)
    check(mesh, tp, pp)
    assert mesh.dp == dp or dp is None
    assert make_mesh(mesh.name, tp=tp, pp=pp) == mesh


@given(run_sizes, st.integers(1, 8), st.integers(1, 9))
def test_without_devices_every_stage_has_its_card(tp: int, pp: int, dp: int) -> None:
    mesh = make_mesh(tp=tp, pp=pp, dp=dp)
    check(mesh, tp, pp)
    assert mesh.dp == dp
    assert mesh.name == make_mesh(mesh.name, tp=tp, pp=pp).name
    assert all(len({run.card for run in stages}) == pp for stages in mesh.replicas)


@pytest.mark.parametrize(
    ("devices", "tp", "pp", "dp", "expected"),
    [
        (None, 4, 2, None, [["npu:0:0-3", "npu:1:0-3"]]),
        (None, 4, 2, 3, [["npu:0:0-3", "npu:1:0-3"], ["npu:0:4-7", "npu:1:4-7"]]),
        ("npu:0", 4, 2, None, [["npu:0:0-3", "npu:0:4-7"]]),
        ("npu:0", 4, 1, None, [["npu:0:0-3"], ["npu:0:4-7"]]),
        ("npu:0", 4, 1, 1, [["npu:0:0-3"]]),
        ("npu:1,npu:0", 8, 1, None, [["npu:1"], ["npu:0"]]),
        (
            "npu:0:0-3,npu:1:0-3,npu:0:4-7,npu:1:4-7",
            4,
            2,
            None,
            [["npu:0:0-3", "npu:1:0-3"], ["npu:0:4-7", "npu:1:4-7"]],
        ),
    ],
)
def test_runs_fill_the_mesh_in_order(
    devices: str | None, tp: int, pp: int, dp: int | None, expected: list[list[str]]
) -> None:
    mesh = make_mesh(devices, tp=tp, pp=pp, dp=dp)
    names = [[run.name for run in stages] for stages in mesh.replicas]
    assert names[: len(expected)] == expected
    assert len(names) == (dp or len(expected))


@pytest.mark.parametrize(
    ("devices", "tp", "pp", "dp", "code", "nearest"),
    [
        ("npu:0", 3, 1, None, "PAR007", ["2", "4"]),
        ("npu:0", 0, 1, None, "PAR007", ["1"]),
        ("npu:0", 6, 1, None, "PAR007", ["4", "8"]),
        ("npu:0,npu:1", 16, 1, None, "PAR008", []),
        ("npu:1,npu:0", 8, 2, None, "PAR009", ["npu:0,npu:1"]),
        ("npu:0:4-7,npu:0:0-3", 4, 2, None, "PAR009", ["npu:0:0-3,npu:0:4-7"]),
        ("npu:0", 8, 2, None, "PAR015", ["npu:0,npu:1"]),
        ("npu:0", 4, 1, 3, "PAR015", ["npu:0:0-3,npu:0:4-7,npu:1:0-3"]),
        ("npu:0,npu:1,npu:2", 8, 2, None, "PAR016", ["npu:0,npu:1"]),
        ("npu:0:0-1", 4, 1, None, "PAR005", ["npu:0:0-3"]),
        ("npu:0:1-2", 2, 1, None, "PAR002", ["npu:0:0-1", "npu:0:2-3"]),
        ("cpu", 2, 1, None, "PAR006", ["cpu", "npu:0:0-1"]),
        ("npu:0", 1, 0, None, "PAR014", ["1"]),
        ("npu:0", 1, 1, -1, "PAR014", ["1"]),
    ],
)
def test_impossible_meshes_name_the_nearest(
    devices: str, tp: int, pp: int, dp: int | None, code: str, nearest: list[str]
) -> None:
    with pytest.raises(FuriosaLLMError, match=code) as caught:
        make_mesh(devices, tp=tp, pp=pp, dp=dp)
    assert suggestions(caught.value) == [n for n in nearest if n != "cpu"]


@pytest.mark.parametrize(
    "request_",
    [
        {"tp": "2"},
        {"tp": 2.0},
        {"tp": None},
        {"tp": True},
        {"pp": "2"},
        {"pp": 1.5},
        {"dp": "1"},
    ],
    ids=str,
)
def test_sizes_are_whole_numbers(request_: Any) -> None:
    with pytest.raises(FuriosaLLMError, match="PAR018"):
        make_mesh("npu:0", **request_)


@pytest.mark.parametrize("sizes", [[], "2,3", [2.0, 3.0], 5, ["2", "3"], [True, 4]], ids=repr)
def test_stages_are_a_list_of_whole_numbers(sizes: Any) -> None:
    with pytest.raises(FuriosaLLMError, match="PAR018") as caught:
        stage_sizes(5, None, sizes)
    assert "[16, 16]" in caught.value.next_step


def test_an_empty_stage_is_named() -> None:
    with pytest.raises(FuriosaLLMError, match="PAR011") as caught:
        stage_sizes(5, None, [2, 0, 3])
    assert caught.value.cause.endswith("stage 1 has 0")
    assert suggestions(caught.value) == ["2,2,1"]


def test_too_many_ranks_are_divided_over_stages() -> None:
    with pytest.raises(FuriosaLLMError, match="PAR008") as caught:
        make_mesh(tp=32)
    assert "--tensor-parallel-size to 8" in caught.value.next_step
    assert "--pipeline-parallel-size to 4" in caught.value.next_step


def test_replicas_share_the_memory_of_a_card_and_stages_take_turns() -> None:
    stages = make_mesh("npu:0", tp=4, pp=2)
    assert [stages.sharers(0, stage) for stage in (0, 1)] == [4, 4]
    replicas = make_mesh("npu:0", tp=2)
    assert {replicas.sharers(replica, 0) for replica in range(4)} == {8}
    assert default_mesh(8, 2, 2).sharers(1, 0) == 8


# --- stages ---


@given(st.integers(1, 130), st.integers(-1, 140))
def test_even_stages_differ_by_one_block_at_most(blocks: int, stages: int) -> None:
    error = refused(lambda: stage_sizes(blocks, stages))
    if error is not None:
        assert error.code == ("PAR010" if stages > blocks else "PAR014")
        assert not 1 <= stages <= blocks
        nearest = int(suggestions(error)[0])
        assert len(stage_sizes(blocks, nearest)) == nearest
        return
    sizes = stage_sizes(blocks, stages)
    assert len(sizes) == stages
    assert sum(sizes) == blocks
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(st.integers(1, 40), st.lists(st.integers(-1, 20), min_size=1, max_size=6))
def test_a_list_of_stages_is_taken_or_the_named_ones_are(blocks: int, sizes: list[int]) -> None:
    error = refused(lambda: stage_sizes(blocks, sizes=sizes))
    if error is None:
        assert stage_sizes(blocks, sizes=sizes) == tuple(sizes)
        return
    assert error.code == "PAR011"
    for text in suggestions(error):
        nearest = parse_stage_list("--num-blocks-per-pp-stage", text)
        assert stage_sizes(blocks, sizes=nearest) == nearest


def test_the_nearest_stages_keep_the_first_ones() -> None:
    with pytest.raises(FuriosaLLMError, match="PAR011") as caught:
        stage_sizes(30, sizes=(12, 12, 8))
    assert suggestions(caught.value) == ["12,12,6", "10,10,10"]


def test_a_list_and_a_number_of_stages_must_agree() -> None:
    assert stage_sizes(30, 3, (12, 12, 6)) == (12, 12, 6)
    with pytest.raises(FuriosaLLMError, match="PAR012") as caught:
        stage_sizes(30, 2, (12, 12, 6))
    assert suggestions(caught.value) == ["3"]


@pytest.mark.parametrize("text", ["", "1,", "a", "1;2"])
def test_a_malformed_list_of_stages_is_refused(text: str) -> None:
    with pytest.raises(FuriosaLLMError, match="PAR013"):
        parse_stage_list("--num-blocks-per-pp-stage", text)

"""Cuts: parts put together again are the whole tensor, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from xdsl.context import Context
from xdsl.parser import Parser
from xdsl.utils.exceptions import VerifyException

from furiosa_llm.ir.dist import DIST
from furiosa_llm.ir.dist_cut import CutAttr, Range, refined
from furiosa_llm.ir.dist_interpreter import assemble, take
from furiosa_llm.ir.types import bf16, tensor


@st.composite
def cuts(draw: st.DrawFn) -> CutAttr:
    """Ranges of up to `length` elements in the slots of 1 to 8 ranks, in any order and repeated."""
    ranks, length = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 5))
    ranges: list[Range | None] = []
    end = 0
    for size in draw(st.lists(st.integers(1, length), min_size=1, max_size=12)):
        ranges.append((end, end + size))
        end += size
    ranges += draw(st.lists(st.sampled_from([*ranges, None]), max_size=5))
    ranges += [None] * (-len(ranges) % ranks)
    order = draw(st.permutations(ranges))
    slots = len(order) // ranks
    return CutAttr(
        draw(st.integers(0, 2)),
        length,
        [order[rank * slots : (rank + 1) * slots] for rank in range(ranks)],
    )


def whole_of(cut: CutAttr) -> torch.Tensor:
    """Random bits: NaN, infinities and both zeros among them."""
    shape = [2, 3, 2]
    shape[cut.dim.data] = cut.whole_size
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    return bits.view(torch.bfloat16)


def bits_of(x: torch.Tensor) -> list[object]:
    return list(x.contiguous().view(torch.int16).tolist())


@given(cut=cuts())
def test_parts_are_the_whole_bit_for_bit(cut: CutAttr) -> None:
    whole = whole_of(cut)
    parts = [take(cut, whole, rank) for rank in range(cut.ranks)]
    assert bits_of(assemble(cut, parts)) == bits_of(whole)
    type = tensor(whole.shape, bf16)
    assert tensor(parts[0].shape, bf16) == cut.local_type(type)
    assert cut.whole_type(cut.local_type(type)) == type


@given(cut=cuts())
def test_what_a_rank_does_not_hold_is_zero(cut: CutAttr) -> None:
    ones = torch.ones(2, 3, 2)
    ones = ones.sum(cut.dim.data, keepdim=True).clamp(1, 1)
    whole = ones.repeat_interleave(cut.whole_size, cut.dim.data)
    for rank in range(cut.ranks):
        held = sum(stop - start for _, (start, stop) in cut.pieces(rank))
        along = take(cut, whole, rank).movedim(cut.dim.data, 0)[:, 0, 0]
        assert int(along.sum()) == held
        first = cut.first_zero(rank)
        zeros = (along == 0).nonzero().flatten().tolist()
        assert first == (zeros[0] if zeros else None)


@given(cut=cuts(), factor=st.integers(1, 4))
def test_scaled_and_divided_undo_each_other(cut: CutAttr, factor: int) -> None:
    scaled = cut.scaled(factor)
    assert scaled.local_size == factor * cut.local_size
    assert scaled.divided(factor) == cut
    assert scaled.at(1).at(scaled.dim.data) == scaled
    if factor > 1:
        assert CutAttr.even(0, factor + 1, 2).divided(factor + 7) is None


@given(cut=cuts())
def test_cuts_are_written_and_read(cut: CutAttr) -> None:
    context = Context()
    context.load_dialect(DIST)
    assert Parser(context, str(cut)).parse_attribute() == cut


@given(cut=cuts())
def test_refined_slots_are_the_same_cut(cut: CutAttr) -> None:
    assert CutAttr(cut.dim.data, 1, refined(cut, 1)) == cut
    assert CutAttr(cut.dim.data, cut.length.data, refined(cut, cut.length.data)) == cut


def test_slots_that_continue_each_other_are_one() -> None:
    cut = CutAttr(0, 3, [[(0, 3), (3, 6)], [(6, 8), None]])
    assert str(cut) == "#dist.cut<0, 6, [[0:6], [6:8]]>"
    gap = CutAttr(0, 3, [[(0, 3), (3, 6)], [None, (6, 8)]])
    assert str(gap) == "#dist.cut<0, 3, [[0:3, 3:6], [-, 6:8]]>"


@pytest.mark.parametrize(
    ("size", "ranks", "unit", "spare", "text"),
    [
        (9, 4, 1, 0, "#dist.cut<1, 3, [[0:3], [3:6], [6:9], [-]]>"),
        (10, 4, 1, 1, "#dist.cut<1, 4, [[0:3], [3:6], [6:9], [9:10]]>"),
        (12, 2, 4, 0, "#dist.cut<1, 8, [[0:8], [8:12]]>"),
        (2, 4, 1, 0, "#dist.cut<1, 1, [[0:1], [1:2], [-], [-]]>"),
    ],
)
def test_even_cuts(size: int, ranks: int, unit: int, spare: int, text: str) -> None:
    cut = CutAttr.even(1, size, ranks, unit=unit, spare=spare)
    assert str(cut) == text
    assert cut.is_disjoint
    assert cut.is_padded == (ranks * cut.local_size > size)


def test_repeated_elements_are_not_disjoint() -> None:
    assert not CutAttr(0, 1, [[(0, 1)], [(0, 1)]]).is_disjoint


@pytest.mark.parametrize(
    ("length", "slots", "reason"),
    [
        (0, [[(0, 1)]], "slots of 1 or more"),
        (1, [[(0, 1)], []], "the same number of slots"),
        (1, [[], []], "the same number of slots"),
        (1, [[None], [None]], "holds anything"),
        (1, [[(0, 2)]], "longer than a slot"),
        (2, [[(1, 2)]], "no rank of the cut holds elements 0 to 1"),
        (2, [[(0, 1)], [(3, 4)]], "no rank of the cut holds elements 1 to 3"),
        (2, [[(3, 1)], [(0, 2)]], "3:1 is not a range"),
    ],
)
def test_what_is_no_cut(length: int, slots: list[list[Range | None]], reason: str) -> None:
    with pytest.raises(VerifyException, match=reason):
        CutAttr(0, length, slots)


def test_types_that_cannot_be_cut_so() -> None:
    cut = CutAttr.even(1, 6, 2)
    with pytest.raises(VerifyException, match="no dimension 1 of 6 elements"):
        cut.local_type(tensor((6, 5), bf16))
    with pytest.raises(VerifyException, match="each rank's part"):
        cut.whole_type(tensor((6,), bf16))

from __future__ import annotations

import pytest

from furiosa_llm.artifact.buckets import BucketShape, fit_context, parse_buckets
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.models.config_types import Bucket


def test_prefill_comes_first_and_each_kind_is_sorted() -> None:
    buckets = parse_buckets([(1, 256), (1, 128)], [(4, 256), (1, 256)])
    assert [bucket.name for bucket in buckets] == [
        "prefill:1,128",
        "prefill:1,256",
        "decode:1,256",
        "decode:4,256",
    ]


@pytest.mark.parametrize(("context", "length"), [(8192, 2048), (512, 512)])
def test_without_any_bucket_one_of_each_kind_is_made(context: int, length: int) -> None:
    expected = (Bucket.prefill(1, length), Bucket.decode(1, length))
    assert fit_context((), context) == expected


def test_with_one_kind_given_the_other_stays_empty() -> None:
    given = parse_buckets([], [(1, 64)])
    assert fit_context(given, 64) == (Bucket.decode(1, 64),)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [([(0, 8)], []), ([(1, 0)], []), ([(-1, 8)], []), ([], [(1, 1)])],
)
def test_a_bucket_that_serves_nothing_is_refused(
    prefill: list[BucketShape], decode: list[BucketShape]
) -> None:
    with pytest.raises(FuriosaLLMError, match="BLD002") as caught:
        parse_buckets(prefill, decode)
    assert caught.value.exit_code == 2


def test_a_bucket_given_twice_is_refused_by_name() -> None:
    with pytest.raises(FuriosaLLMError, match="BLD003") as caught:
        parse_buckets([(1, 8)], [(2, 8), (1, 8), (2, 8)])
    assert "decode:2,8" in caught.value.message


def test_a_bucket_longer_than_the_context_is_refused_with_the_limit() -> None:
    with pytest.raises(FuriosaLLMError, match="BLD004") as caught:
        fit_context(parse_buckets([(1, 129)], []), 128)
    assert "at most 128" in caught.value.next_step

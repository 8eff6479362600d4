"""Which buckets a build makes, checked before anything else happens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from .. import errors
from ..models.config_types import Bucket
from ..models.stages import is_whole

DEFAULT_LENGTH = 2048
"""Tokens of the bucket that a build makes when it is given none."""

BucketShape = tuple[int, int]
"""Batch size and attention length in tokens."""


def parse_buckets(
    prefill: Iterable[BucketShape], decode: Iterable[BucketShape], limit: int | None = None
) -> tuple[Bucket, ...]:
    """The buckets of both kinds, prefill first, each sorted.

    No sequence is to be longer than `limit` tokens; if it is all that is given, there is one bucket
    of each kind, as long as it says. Raises: BLD002, BLD003, BLD022, BLD027.
    """
    prefill, decode = _shapes("prefill_buckets", prefill), _shapes("decode_buckets", decode)
    if not prefill and not decode and limit is not None:
        prefill = decode = [(1, limit)]
    buckets = [
        *(_checked("prefill", shape, least=1) for shape in sorted(prefill)),
        # A decode step attends to at least one cached token and the new one.
        *(_checked("decode", shape, least=2) for shape in sorted(decode)),
    ]
    for before, bucket in pairwise(buckets):
        if before == bucket:
            raise errors.duplicate_bucket(bucket.name)
    for bucket in buckets:
        if limit is not None and bucket.attention_size > limit:
            raise errors.bucket_beyond_limit(bucket.name, bucket.attention_size, limit)
    return tuple(buckets)


def check_blocks(num_blocks: int | None, buckets: Sequence[Bucket]) -> None:
    """Raises: BLD024 if so many blocks of one token do not hold one sequence of each bucket."""
    for bucket in buckets:
        needed = bucket.attention_size + 1  # one block is what padding writes to
        if num_blocks is not None and num_blocks < needed:
            raise errors.too_few_blocks(num_blocks, bucket.name, needed)


def fit_context(buckets: Sequence[Bucket], context: int) -> tuple[Bucket, ...]:
    """`buckets`, or one of each kind if there are none, for a model of `context` tokens.

    Raises: BLD004 if a bucket is longer than the model's context.
    """
    if not buckets:
        length = min(DEFAULT_LENGTH, context)
        return Bucket.prefill(1, length), Bucket.decode(1, length)
    for bucket in buckets:
        if bucket.attention_size > context:
            raise errors.bucket_beyond_context(bucket.name, bucket.attention_size, context)
    return tuple(buckets)


def _shapes(option: str, shapes: Iterable[BucketShape]) -> list[BucketShape]:
    """Raises: BLD027 for what is no list of pairs of whole numbers."""
    wanted = "a list of pairs such as (1, 512), of batch size and length"
    try:
        pairs = [tuple(shape) for shape in shapes]
    except TypeError:
        raise errors.option_of_another_type(option, shapes, wanted) from None
    for pair in pairs:
        if len(pair) != 2 or not all(map(is_whole, pair)):
            raise errors.option_of_another_type(option, pair, wanted)
    return [(int(batch_size), int(length)) for batch_size, length in pairs]


def _checked(kind: str, shape: BucketShape, least: int) -> Bucket:
    batch_size, length = shape
    if batch_size < 1 or length < least:
        raise errors.bucket_out_of_range(kind, batch_size, length, least)
    make = Bucket.prefill if kind == "prefill" else Bucket.decode
    return make(batch_size, length)

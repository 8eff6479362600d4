"""Which transformer blocks each pipeline stage runs."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from .. import errors


def stage_sizes(
    blocks: int, stages: int | None = None, sizes: Sequence[int] | None = None
) -> tuple[int, ...]:
    """How many of `blocks` each stage has: what `sizes` says, else as even as can be.

    Where `blocks` does not divide, the first stages have one more: the last has the head besides.
    Raises: PAR010 for an impossible number of stages, PAR011 for an impossible list, and what
    `stage_count` raises.
    """
    stages = stage_count(stages, sizes)
    if sizes is None:
        return _even(blocks, stages)
    if min(sizes, default=0) < 1 or sum(sizes) != blocks:
        raise errors.stages_do_not_sum(sizes, list_of(sizes), blocks, _nearest(blocks, sizes))
    return tuple(sizes)


def stage_count(stages: int | None, sizes: Sequence[int] | None, default: int = 1) -> int:
    """How many stages a number, a list, both or neither ask for.

    Raises: PAR012 if the two disagree, PAR014 for a number below one, PAR018 for other types.
    """
    if stages is not None:
        check_count("pipeline", stages)
    if sizes is None:
        return default if stages is None else stages
    if not _is_list_of_numbers(sizes):
        wanted = "a list of whole numbers"
        raise errors.not_whole_numbers("num_blocks_per_pp_stage", sizes, wanted, "[16, 16]")
    if stages is not None and stages != len(sizes):
        raise errors.stage_counts_differ(stages, list_of(sizes), len(sizes))
    return len(sizes)


def check_count(axis: str, size: int) -> None:
    """Raises: PAR018 for what is no whole number, PAR014 for one below one."""
    check_whole(f"{axis}_parallel_size", size)
    if size < 1:
        raise errors.no_parallelism(axis, size)


def check_whole(option: str, value: object) -> None:
    """Raises: PAR018."""
    if not is_whole(value):
        raise errors.not_whole_numbers(option, value, "a whole number", "2")


def is_whole(value: object) -> bool:
    """A whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_list_of_numbers(sizes: object) -> bool:
    """Of one or more; a text is none."""
    if not isinstance(sizes, Sequence) or isinstance(sizes, str | bytes):
        return False
    return bool(sizes) and all(map(is_whole, sizes))


def list_of(sizes: Sequence[int]) -> str:
    """As the command line writes it."""
    return ",".join(map(str, sizes))


def parse_stage_list(option: str, value: str) -> tuple[int, ...]:
    """`10,10,12` as numbers. Raises: PAR013."""
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise errors.malformed_stage_list(option, value) from None


def _even(blocks: int, stages: int) -> tuple[int, ...]:
    """Raises: PAR010."""
    if stages > blocks:
        raise errors.too_many_stages(stages, blocks)
    each, more = divmod(blocks, stages)
    return tuple(each + (stage < more) for stage in range(stages))


def _nearest(blocks: int, sizes: Sequence[int]) -> list[str]:
    """Lists that sum to `blocks`: the asked one with another last stage, and the even one."""
    nearest = [list_of(_even(blocks, max(1, min(len(sizes), blocks))))]
    rest = blocks - sum(sizes[:-1])
    if rest >= 1 and min(sizes[:-1], default=1) >= 1:
        nearest.insert(0, list_of([*sizes[:-1], rest]))
    return list(dict.fromkeys(nearest))

"""Options of the vendor's builder that have one possible value here.

Each is taken with that value and refused by name with any other one, so that none is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from .. import errors


class VendorOptions(TypedDict, total=False):
    """Keywords of `ArtifactBuilder`, for type checkers."""

    add_prefill_last_block_slice: bool
    compiler_config_overrides: Mapping[str, object] | None
    do_decompositions_for_model_rewrite: bool
    embed_all_constants_into_graph: bool
    kv_cache_sharing_across_beams_config: object
    num_blocks_per_supertask: int
    num_hidden_layers: int | None
    optimize_logit_shape: bool
    paged_attention_block_size: int
    seed_for_random_weight: int | None
    use_blockwise_compile: bool


@dataclass(frozen=True)
class OnlyValue:
    """The value that an option can have, why no other, and what does the job instead."""

    value: object
    why: str
    instead: str
    flag: str | None = None
    """What the command line calls it, if that is an option of its own."""


LEAVE_OUT = "leave it out"

ONLY_VALUES: Mapping[str, OnlyValue] = {
    "add_prefill_last_block_slice": OnlyValue(
        False,
        "which logits a prompt gives is said by one option",
        "set calculate_logit_only_for_last_token",
    ),
    "compiler_config_overrides": OnlyValue(
        None,
        "they are settings of the vendor's compiler",
        f"{LEAVE_OUT}; `-O` and `--pin-tiling` are settings of this one",
    ),
    "do_decompositions_for_model_rewrite": OnlyValue(
        False, "operators are divided over PEs as they are", LEAVE_OUT
    ),
    "embed_all_constants_into_graph": OnlyValue(
        False, "weights are never inside a binary, so that they can be linked", LEAVE_OUT
    ),
    "kv_cache_sharing_across_beams_config": OnlyValue(
        None,
        "no model that can be built shares its KV cache across beams",
        LEAVE_OUT,
        flag="--kv-cache-sharing-across-beams-config",
    ),
    "num_blocks_per_supertask": OnlyValue(
        1, "equal transformer blocks are compiled once, each alone", LEAVE_OUT
    ),
    "num_hidden_layers": OnlyValue(
        None,
        "models are built whole",
        f"{LEAVE_OUT}, or build a directory with another config.json, and `--weights skip`",
    ),
    "optimize_logit_shape": OnlyValue(
        None,
        "which logits a prompt gives is said by one option",
        "set calculate_logit_only_for_last_token",
    ),
    "paged_attention_block_size": OnlyValue(1, "a block of the KV cache is one token", LEAVE_OUT),
    "seed_for_random_weight": OnlyValue(
        None,
        "no weights are made up",
        f"{LEAVE_OUT}, and use `--weights skip` for an artifact that is only timed",
    ),
    "use_blockwise_compile": OnlyValue(
        True, "equal transformer blocks are compiled once", LEAVE_OUT
    ),
}


def check_vendor_options(options: Mapping[str, object]) -> None:
    """Raises: BLD023 for another value than the possible one; TypeError for another keyword."""
    for name, value in options.items():
        only = ONLY_VALUES.get(name)
        if only is None:
            raise TypeError(f"ArtifactBuilder() got an unexpected keyword argument {name!r}")
        if type(value) is not type(only.value) or value != only.value:
            raise errors.option_not_supported(only.flag or name, value, only.why, only.instead)

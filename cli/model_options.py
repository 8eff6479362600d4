"""`--additional-model-config KEY=VALUE`: keywords of `ArtifactBuilder`, as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from .. import errors
from ..models.stages import parse_stage_list

OPTION = "--additional-model-config"
STAGES = "num_blocks_per_pp_stage"
"""A key that is an option, too."""


def model_options(ctx: click.Context, option: click.Parameter, values: Sequence[str]) -> Any:
    """The last value of each key. Raises: BLD006, BLD007, BLD011, BLD026, PAR013."""
    options: dict[str, object] = {}
    for item in values:
        key, separator, value = item.partition("=")
        if not separator:
            raise errors.malformed_model_option(item)
        if key not in KEYS:
            raise errors.unknown_model_option(key, KEYS)
        options[KEYWORDS.get(key, key)] = KEYS[key](key, value)
    return options


def _boolean(key: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise errors.not_a_boolean(key, value)
    return value.lower() == "true"


def _integer(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise errors.not_an_integer(key, value) from None


def _stages(key: str, value: str) -> tuple[int, ...]:
    return parse_stage_list(f"{OPTION} {key}", value)


KEYS: Mapping[str, Callable[[str, str], object]] = {
    "calculate_logit_only_for_last_token": _boolean,
    STAGES: _stages,
    "add_prefill_last_block_slice": _boolean,
    "do_decompositions_for_model_rewrite": _boolean,
    "embed_all_constants_into_graph": _boolean,
    "num_blocks_per_supertask": _integer,
    "num_hidden_layers": _integer,
    "optimize_logit_shape": _boolean,
    "seed": _integer,
    "seed_for_random_weight": _integer,
    "use_blockwise_compile": _boolean,
}
"""Key -> how its value is read. What a key may be is for `ArtifactBuilder` to say."""

KEYWORDS = {"seed": "seed_for_random_weight"}
"""Keys that `ArtifactBuilder` calls otherwise."""

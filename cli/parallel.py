"""Options about devices, stages and replicas that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..models.stages import parse_stage_list

F = TypeVar("F", bound=Callable[..., Any])


def pipeline_options(about: str) -> Callable[[F], F]:
    """-pp and --num-blocks-per-pp-stage."""

    def decorate(function: F) -> F:
        stages = click.option("-pp", "--pipeline-parallel-size", type=int, metavar="N", help=about)
        sizes = click.option(
            "--num-blocks-per-pp-stage",
            callback=_stage_list,
            metavar="A,B,..",
            help="Transformer blocks of each stage; by default equally many.",
        )
        return stages(sizes(function))

    return decorate


def devices_option(about: str) -> Callable[[F], F]:
    """--devices."""
    return click.option(
        "--devices",
        metavar="LIST",
        help=f"PEs to run on: npu:CARD, npu:CARD:PE or npu:CARD:FIRST-LAST, joined by commas. "
        f"{about}",
    )


def _stage_list(ctx: click.Context, option: click.Parameter, value: str | None) -> Any:
    """`16,16` -> (16, 16). Raises: PAR013."""
    return None if value is None else parse_stage_list(option.opts[0], value)

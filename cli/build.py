"""`furiosa-llm build`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .. import errors
from .parallel import devices_option, pipeline_options
from .progress import progress


def _buckets(ctx: click.Context, option: click.Parameter, values: Sequence[str]) -> Any:
    """`1,512` -> (1, 512), each. Raises: BLD001."""
    return [_bucket(option.opts[0], value) for value in values]


def _bucket(option: str, value: str) -> tuple[int, int]:
    try:
        batch_size, length = (int(part) for part in value.split(","))
    except ValueError:
        raise errors.malformed_bucket(option, value) from None
    return batch_size, length


def _model_options(ctx: click.Context, option: click.Parameter, values: Sequence[str]) -> Any:
    """`key=value` pairs as keywords of `ArtifactBuilder`. Raises: BLD006, BLD007, BLD011."""
    options: dict[str, bool] = {}
    for item in values:
        key, separator, value = item.partition("=")
        if not separator:
            raise errors.malformed_model_option(item)
        if key not in MODEL_OPTIONS:
            raise errors.unknown_model_option(key, MODEL_OPTIONS)
        if value.lower() not in ("true", "false"):
            raise errors.not_a_boolean(key, value)
        options[key] = value.lower() == "true"
    return options


MODEL_OPTIONS = ("calculate_logit_only_for_last_token",)
"""Keys of --additional-model-config; all are booleans."""


LEVELS: dict[str, Any] = {"0": 0, "1": 1, "2": 2}
"""Values of -O."""


def _warn(message: str) -> None:
    click.echo(f"warning: {message}", err=True)


@click.command("build")
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "-tp",
    "--tensor-parallel-size",
    default=1,
    show_default=True,
    metavar="N",
    help="PEs of a card that share every operator: 1, 2, 4 or 8. Frozen in the artifact.",
)
@pipeline_options("Pipeline stages, which `run` may change.")
@devices_option("By default every stage is on a card of its own.")
@click.option(
    "--partial-sum",
    type=click.Choice(["f32", "bf16"]),
    default="f32",
    show_default=True,
    help="Type in which PEs exchange their parts of a sum.",
)
@click.option(
    "-pb",
    "--prefill-buckets",
    "--pb",
    multiple=True,
    callback=_buckets,
    metavar="B,L",
    help="Batch size and prompt length of a prefill bucket. Repeatable.",
)
@click.option(
    "-db",
    "--decode-buckets",
    "--db",
    multiple=True,
    callback=_buckets,
    metavar="B,L",
    help="Batch size and attention length of a decode bucket. Repeatable.",
)
@click.option(
    "--weights",
    type=click.Choice(["copy", "link", "skip"]),
    default="copy",
    show_default=True,
    help="Copy the weights into the artifact, hard-link the checkpoint's files, or leave them out.",
)
@click.option(
    "--additional-model-config",
    "model_options",
    multiple=True,
    callback=_model_options,
    metavar="KEY=VALUE",
    help=f"Keys: {', '.join(MODEL_OPTIONS)} (True or False). Repeatable.",
)
@click.option(
    "-O",
    "optimization_level",
    type=click.Choice(list(LEVELS)),
    default="2",
    show_default=True,
    help="0: commands in program order, 1: overlapped inside each kernel, 2: across kernels.",
)
@click.option(
    "--explain-tiling",
    is_flag=True,
    help="Print how each matrix product is cut, what it costs, and the next best way.",
)
@click.option(
    "--pin-tiling",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Cut products as a YAML or JSON file says; --explain-tiling prints such a file.",
)
@click.option(
    "--dump-ir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write the IR after every pass that changed it, as numbered files.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was built as one JSON object.")
def command(
    model: str,
    output: Path,
    tensor_parallel_size: int,
    pipeline_parallel_size: int | None,
    num_blocks_per_pp_stage: tuple[int, ...] | None,
    devices: str | None,
    partial_sum: Any,
    prefill_buckets: list[tuple[int, int]],
    decode_buckets: list[tuple[int, int]],
    weights: Any,
    model_options: dict[str, Any],
    optimization_level: str,
    explain_tiling: bool,
    pin_tiling: Path | None,
    dump_ir: Path | None,
    as_json: bool,
) -> None:
    """Build MODEL for the given buckets into the artifact directory OUTPUT.

    MODEL is a Hugging Face directory, a .gguf file, or a hub id. Without any bucket, one prefill
    and one decode bucket of batch 1 are built, 2048 tokens long or as long as the model's context.
    """
    from ..artifact.builder import ArtifactBuilder
    from ..artifact.summary import summarize_artifact
    from ..artifact.tilings import ExplainedTiling, to_pin_file

    builder = ArtifactBuilder(
        model,
        devices=devices,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        num_blocks_per_pp_stage=num_blocks_per_pp_stage,
        partial_sum=partial_sum,
        prefill_buckets=prefill_buckets,
        decode_buckets=decode_buckets,
        optimization_level=LEVELS[optimization_level],
        pin_tiling=pin_tiling,
        **model_options,
    )
    tilings: list[ExplainedTiling] = []
    with progress() as report:
        builder.build(
            output,
            weights=weights,
            dump_ir=dump_ir,
            progress=report,
            warn=_warn,
            explain=tilings.extend if explain_tiling else None,
        )
    if as_json:
        summary = summarize_artifact(output)
        if explain_tiling:
            summary["tilings"] = [tiling.to_json() for tiling in tilings]
        click.echo(json.dumps(summary, indent=2))
        return
    if explain_tiling:
        click.echo(to_pin_file(tilings))
    click.echo("Artifact Build Completed", err=explain_tiling)  # stdout is a file of pins

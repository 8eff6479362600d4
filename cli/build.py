"""`furiosa-llm build`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .. import errors
from .model_options import OPTION, STAGES, model_options
from .parallel import devices_option, pipeline_options
from .progress import progress, warn


def _buckets(ctx: click.Context, option: click.Parameter, values: Sequence[str]) -> Any:
    """`1,512` -> (1, 512), each. Raises: BLD001."""
    return [_bucket(option.opts[0], value) for value in values]


def _bucket(option: str, value: str) -> tuple[int, int]:
    try:
        batch_size, length = (int(part) for part in value.split(","))
    except ValueError:
        raise errors.malformed_bucket(option, value) from None
    return batch_size, length


def _model_and_output(model_id: str | None, positionals: Sequence[str]) -> tuple[str, Path]:
    """Either dialect: `MODEL OUTPUT`, or `OUTPUT` beside --model-id. Raises: BLD017, BLD018."""
    match model_id, positionals:
        case None, (model, output):
            return model, Path(output)
        case str(), (output,):
            return model_id, Path(output)
        case str(), (_, _):
            raise errors.model_named_twice(model_id, positionals)
        case None, (given,):
            raise errors.model_or_output_missing(given)
    wanted = "MODEL OUTPUT" if model_id is None else "OUTPUT"
    raise click.UsageError(f"Expected {wanted}, got {' '.join(positionals) or 'no argument'}")


LEVELS: dict[str, Any] = {"0": 0, "1": 1, "2": 2}
"""Values of -O."""


@click.command("build")
@click.argument("positionals", nargs=-1, metavar="[MODEL] OUTPUT")
@click.option(
    "--model-id", metavar="MODEL", help="The model, instead of the first of two arguments."
)
@click.option("--name", default="", help="The artifact's name; by default the model's.")
@click.option(
    "-tp",
    "--tensor-parallel-size",
    type=int,
    metavar="N",
    help="PEs of a card that share every operator: 1, 2, 4 or 8. Frozen in the artifact. By "
    "default 1, with --model-id 4.",
)
@pipeline_options("Pipeline stages, which `run` may change.")
@click.option(
    "-dp",
    "--data-parallel-size",
    type=int,
    metavar="N",
    help="Copies of the model, which `run` may change; by default as many as fit on --devices.",
)
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
    "--max-seq-len-to-capture",
    type=int,
    metavar="L",
    help="Longest sequence: no bucket may be longer; the length of both buckets if none is given.",
)
@click.option(
    "--quantization-artifact-path",
    metavar="DIR",
    help="What Furiosa's quantiser wrote about MODEL: qformat.yaml and qparam.npy.",
)
@click.option(
    "--allow-lossy",
    multiple=True,
    metavar="PATTERN",
    help="Tensors that need not be carried over exactly, by a pattern of names. Repeatable.",
)
@click.option(
    "--paged-attention-num-blocks",
    type=int,
    metavar="N",
    help="Most tokens that the KV cache holds at load time, one of them for padding. By default "
    "what the largest bucket needs.",
)
@click.option(
    "--kv-cache-sharing-across-beams-config",
    metavar="B,L",
    help="Refused: no model that can be built shares its KV cache across beams.",
)
@click.option(
    "--num-compile-workers",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Most processes that compile buckets; what is built is the same.",
)
@click.option(
    "--num-pipeline-builder-workers",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Most processes that trace the model. One is used: all buckets share one trace.",
)
@click.option(
    "--weights",
    type=click.Choice(["copy", "link", "skip"]),
    default="copy",
    show_default=True,
    help="Copy the weights into the artifact, hard-link the checkpoint's files, or leave them out.",
)
@click.option(
    OPTION,
    "model_options",
    multiple=True,
    callback=model_options,
    metavar="KEY=VALUE",
    help="A keyword of ArtifactBuilder, e.g. calculate_logit_only_for_last_token=True. Repeatable.",
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
    positionals: tuple[str, ...],
    model_id: str | None,
    tensor_parallel_size: int | None,
    quantization_artifact_path: str | None,
    num_compile_workers: int,
    num_pipeline_builder_workers: int,
    weights: Any,
    model_options: dict[str, Any],
    optimization_level: str,
    explain_tiling: bool,
    dump_ir: Path | None,
    as_json: bool,
    **keywords: Any,
) -> None:
    """Build MODEL for the given buckets into the artifact directory OUTPUT.

    MODEL is a Hugging Face directory, a .gguf file, or a hub id; with --model-id, OUTPUT is the
    only argument. Without any bucket, one prefill and one decode bucket of batch 1 are built, 2048
    tokens long or as long as the model's context.
    """
    from ..artifact.builder import SEED_TENSOR_PARALLEL, ArtifactBuilder
    from ..artifact.summary import summarize_artifact
    from ..artifact.tilings import ExplainedTiling, to_pin_file

    model, output = _model_and_output(model_id, positionals)
    if tensor_parallel_size is None and model_id is not None:
        tensor_parallel_size = SEED_TENSOR_PARALLEL
    if STAGES in model_options and keywords[STAGES] is not None:
        raise click.UsageError(f"{STAGES} is given twice: in {OPTION}, and as an option of its own")
    # What remains are keywords of the builder, by the names that it has for them.
    builder = ArtifactBuilder(
        model,
        tensor_parallel_size=tensor_parallel_size,
        quantize_artifact_path=quantization_artifact_path,
        optimization_level=LEVELS[optimization_level],
        **{**keywords, **model_options},
    )
    tilings: list[ExplainedTiling] = []
    with progress() as report:
        builder.build(
            output,
            num_pipeline_builder_workers=num_pipeline_builder_workers,
            num_compile_workers=num_compile_workers,
            weights=weights,
            dump_ir=dump_ir,
            progress=report,
            warn=warn,
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

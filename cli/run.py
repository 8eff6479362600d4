"""`furiosa-llm run`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import errors
from .parallel import devices_option, pipeline_options
from .progress import progress, warn

if TYPE_CHECKING:
    from ..llm.outputs import Metrics, RequestOutput


def _token_ids(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> Any:
    """`1,2,3` -> [1, 2, 3], each. Raises: RUN009."""
    return [_token_list(value) for value in values]


def _token_list(value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise errors.malformed_token_ids(value) from None


@click.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Repeatable.")
@click.option(
    "--prompt-token-ids",
    multiple=True,
    callback=_token_ids,
    metavar="IDS",
    help="A prompt as token ids, e.g. 1,2,3. Repeatable; instead of --prompt.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Tokens to generate for each prompt at most.",
)
@click.option(
    "--weights-from",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Take the weights from this checkpoint, for an artifact without weights.",
)
@pipeline_options("Pipeline stages; by default those of the build.")
@click.option(
    "-dp",
    "--data-parallel-size",
    type=int,
    metavar="N",
    help="Copies of the model, which divide the prompts; by default as many as --devices holds.",
)
@devices_option("By default those of the build.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    artifact: Path,
    prompts: tuple[str, ...],
    prompt_token_ids: list[list[int]],
    max_tokens: int,
    weights_from: Path | None,
    pipeline_parallel_size: int | None,
    num_blocks_per_pp_stage: tuple[int, ...] | None,
    data_parallel_size: int | None,
    devices: str | None,
    as_json: bool,
) -> None:
    """Generate text from ARTIFACT on the simulated device, always with the likeliest token.

    The times printed are the device's, as simulated. All prompts of a replica run as one batch.
    Stages, replicas and devices may differ from the build's; nothing is compiled again.
    """
    if bool(prompts) == bool(prompt_token_ids):
        raise errors.bad_prompts("run takes either --prompt or --prompt-token-ids")
    with progress() as report:
        report("loading the artifact")
        from ..llm.llm import LLM
        from ..llm.sampling_params import SamplingParams

        llm = LLM.load_artifact(
            artifact,
            devices=devices,
            data_parallel_size=data_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            num_blocks_per_pp_stage=num_blocks_per_pp_stage,
            weights_from=weights_from,
            on_step=lambda step: report(f"ran {step.bucket.name}: {step.cycles} cycles"),
            warn=warn,
        )
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        outputs = llm.generate(
            list(prompts) or None, params, prompt_token_ids=prompt_token_ids or None
        )
    assert isinstance(outputs, list)  # one for each prompt of a list
    assert llm.metrics is not None
    if as_json:
        click.echo(json.dumps(_to_json(outputs, llm.metrics), indent=2))
    else:
        _print(outputs, llm.metrics)


def _to_json(outputs: list[RequestOutput], metrics: Metrics) -> dict[str, Any]:
    return {
        "outputs": [
            {
                "prompt": output.prompt,
                "prompt_token_ids": output.prompt_token_ids,
                "token_ids": answer.token_ids,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
            }
            for output in outputs
            for answer in output.outputs
        ],
        "metrics": {
            **asdict(metrics),
            "steps": [{**asdict(s), "bucket": s.bucket.name} for s in metrics.steps],
        },
    }


def _print(outputs: list[RequestOutput], metrics: Metrics) -> None:
    for output in outputs:
        answer = output.outputs[0]
        if output.prompt is None:
            click.echo(",".join(map(str, answer.token_ids)))
        if answer.text:
            click.echo((output.prompt or "") + answer.text)
    from .tables import print_table

    rows = [
        ("time to first token (TTFT)", f"{metrics.ttft_us:.1f} us"),
        ("time per output token (TPOT)", _us(metrics.tpot_us)),
        ("throughput", f"{metrics.tokens_per_s:,.1f} tokens/s"),
        *_full_pipeline(metrics),
        ("device cycles", f"{metrics.cycles:,}"),
        ("device steps", f"{len(metrics.steps):,}"),
    ]
    print_table("simulated", ("what", "value"), rows)


def _full_pipeline(metrics: Metrics) -> list[tuple[str, str]]:
    """Nothing for one stage, which is always as busy as can be."""
    if all(step.interval_cycles == step.cycles for step in metrics.steps):
        return []
    return [("with every stage busy", f"{metrics.full_pipeline_tokens_per_s:,.1f} tokens/s")]


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} us"

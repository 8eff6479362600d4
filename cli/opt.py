"""`furiosa-llm opt`."""

from __future__ import annotations

from typing import TextIO

import click


@click.command("opt")
@click.argument("file", type=click.File(encoding="utf-8"))
@click.option(
    "--passes",
    default="",
    metavar="A,B{OPT=1}",
    help="Passes to run, in order, with their options in braces.",
)
@click.option(
    "--split-input-file",
    is_flag=True,
    help="Treat the parts between `// -----` lines as modules of their own.",
)
def command(file: TextIO, passes: str, split_input_file: bool) -> None:
    """Run passes on the IR in FILE (`-`: stdin) and print the result."""
    from ..backend_rngd.pipeline import DIALECTS, PASSES
    from ..passes.opt_tool import run_opt

    text = run_opt(
        file.read(),
        passes,
        split_input_file,
        registry=PASSES,
        extra_dialects=DIALECTS,
        filename=file.name,
    )
    click.echo(text, nl=False)

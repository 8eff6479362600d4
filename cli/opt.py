"""`furiosa-llm opt`."""

from __future__ import annotations

import json
from typing import TextIO

import click

from .. import errors


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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the modules' texts.")
def command(file: TextIO, passes: str, split_input_file: bool, as_json: bool) -> None:
    """Run passes on the IR in FILE (`-`: stdin) and print the result."""
    from ..backend_rngd.pipeline import DIALECTS, PASSES
    from ..passes.opt_tool import SEPARATOR, opt_modules

    modules = opt_modules(
        _read(file),
        passes,
        split_input_file,
        registry=PASSES,
        extra_dialects=DIALECTS,
        filename=file.name,
    )
    if as_json:
        click.echo(json.dumps({"modules": modules}, indent=2))
    else:
        click.echo(f"{SEPARATOR}\n".join(modules), nl=False)


def _read(file: TextIO) -> str:
    """Raises: IRV008 if it is not UTF-8."""
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise errors.ir_text_not_parsed(at=file.name, cause=errors.in_words(error)) from error

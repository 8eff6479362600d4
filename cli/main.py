"""`furiosa-llm`: finds the command, and turns every failure into text and an exit code.

Commands live in one file each and are imported only when asked for; they import the library
inside their function, so that `--help` answers at once.
"""

from __future__ import annotations

import traceback
from importlib import import_module
from typing import Any, NoReturn

import click

from .. import errors

COMMANDS = ("build", "run", "profile", "inspect", "opt")
"""Each is the object `command` in the module of its name."""

DEBUG = "furiosa_llm.debug"
"""Key of the --debug flag in click's context."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


class CommandGroup(click.Group):
    """Commands by name, and the one place where errors end."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return with_debug(import_module(f".{cmd_name}", __package__).command)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Options of the group itself, which are parsed before `invoke`."""
        try:
            return super().parse_args(ctx, args)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as usage:
            _end_wrong_usage(ctx, usage)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a failure ends the process with its exit code."""
        try:
            return super().invoke(ctx)
        except click.UsageError as usage:
            _end_wrong_usage(ctx, usage)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise  # click's own: --help, a reader that has gone
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            if not isinstance(error, errors.FuriosaLLMError):
                error = errors.internal_error(error)
            click.echo(str(error), err=True)
            ctx.exit(error.exit_code)


def _end_wrong_usage(ctx: click.Context, usage: click.UsageError) -> NoReturn:
    """Say in our form what click found wrong with the command line."""
    path = (usage.ctx or ctx).command_path
    if usage.ctx is None and ctx.invoked_subcommand:  # the parser of options has no context
        path = f"{path} {ctx.invoked_subcommand}"
    error = errors.wrong_usage(path, usage.format_message())
    click.echo(str(error), err=True)
    ctx.exit(error.exit_code)


def with_debug(command: click.Command) -> click.Command:
    """`command` with the option --debug, which all of them have."""
    if not any(param.name == "debug" for param in command.params):
        option = click.Option(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            is_eager=True,  # before options whose values may be wrong
            callback=_remember_debug,
            help="Show a traceback when something fails.",
        )
        command.params.append(option)
    return command


def _remember_debug(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    ctx.meta[DEBUG] = value  # shared by a command's context and its group's


@click.group(cls=CommandGroup)
@click.version_option(package_name="furiosa-llm-open", message="%(package)s %(version)s")
def main() -> None:
    """Build language models for the RNGD accelerator and run them on its simulator."""

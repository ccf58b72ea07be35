"""The application: every command, in the order of `varve --help`."""

from pathlib import Path
from typing import Annotated

import typer

from varve.pipeline.cli import run_commands, store_commands

EVERYWHERE = "--plugin FILE and --debug may be given to every command, anywhere in the line."

app = typer.Typer(
    name="varve",
    help="A layered feature store for video: decode once, run frozen networks once, keep layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def common(
    plugin: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Load a Python file of variants, before any command."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Print where an error came from.")] = False,
) -> None:
    """Declare the options of all commands, which `main` reads before: they go anywhere."""


for command in (
    store_commands.build,
    store_commands.plan,
    store_commands.datasets,
    store_commands.info,
    store_commands.failures,
    store_commands.verify,
    store_commands.diff,
    store_commands.gc,
    store_commands.demo,
    run_commands.run,
    run_commands.ablate,
    run_commands.cost,
    run_commands.route,
):
    app.command(epilog=EVERYWHERE)(command)

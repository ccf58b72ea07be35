"""Options that commands share, and the options of a build made from their declarations."""

import functools
import inspect
import json
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from varve.pipeline import registry
from varve.pipeline.config import Option, options_of
from varve.pipeline.progress import Progress, default_progress
from varve.pipeline.units import printable

StoreArgument = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder of the feature store.")
]
BY_NAME = inspect.Parameter.KEYWORD_ONLY
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]

Command = Callable[..., None]


def progress_for(as_json: bool) -> Progress:
    """Return the progress that a command shows: none beside JSON."""
    return Progress() if as_json else default_progress()


def show(as_json: bool, facts: Callable[..., Any], text: Callable[..., str], *result: Any) -> None:
    """Print a result as JSON for a program, by `facts`, or for a person, by `text`."""
    if as_json:
        print(json.dumps(facts(*result), indent=1, ensure_ascii=False))
    else:
        print(printable(text(*result), keep="\n\t\u200d"))  # joiners are part of words


def takes(
    *, partial: bool = False, only: Collection[str] = (), unless: str = "", **configs: type
) -> Callable[[Command], Command]:
    """Give a command the options of configurations: `@takes(spec=BuildSpec, runtime=Runtime)`.

    The command gets each configuration in the parameter of that name.

    Args:
        partial: Pass the dict of the given options instead; only options of a key are taken.
        only: The fields to take; empty for all.
        unless: An option without which the command gets None in place of its configuration.
        configs: The parameters of the command, with the class of each.
    """

    def decorate(command: Command) -> Command:
        declared_by_hand = inspect.signature(command, eval_str=True).parameters
        added: dict[str, dict[str, inspect.Parameter]] = {}
        for parameter, config in configs.items():
            hints = get_type_hints(config)
            defaults = {f.name: f.default for f in fields(config)}
            added[parameter] = {
                name: _parameter(name, declared, hints[name], defaults[name], partial)
                for name, declared in options_of(config).items()
                if (not only or name in only) and (declared.in_key or not partial)
            }

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            for parameter, options in added.items():
                values = {name: arguments.pop(name) for name in options}
                if not partial:
                    values = {n: () if value is None else value for n, value in values.items()}
                values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
                if unless in values and not values[unless]:
                    arguments[parameter] = None
                    continue
                arguments[parameter] = values if partial else configs[parameter](**values)
            command(**arguments)

        parameters: list[inspect.Parameter] = []
        for name, by_hand in declared_by_hand.items():
            parameters += added[name].values() if name in added else [by_hand.replace(kind=BY_NAME)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameter(
    name: str, declared: Option, hint: Any, default: Any, partial: bool
) -> inspect.Parameter:
    flag = f"--{declared.flag or name.replace('_', '-')}"
    if hint is bool:
        flag = f"{flag}/--no-{flag[2:]}" if default or partial else flag
    several = hint not in (bool, int, float, str)
    if several or partial:
        hint, default = (list[str] if several else hint) | None, None
    choices = declared.choices
    names = registry.listed(choices) if isinstance(choices, str) and choices else choices
    help = f"{declared.help} [{', '.join(names)}]" if names else declared.help
    annotation = Annotated[hint, typer.Option(flag, help=help)]
    return inspect.Parameter(name, BY_NAME, default=default, annotation=annotation)

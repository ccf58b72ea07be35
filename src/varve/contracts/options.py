"""Options of the contract suites, a pytest plugin: which variants of which kinds are tested."""

from pathlib import Path

import pytest

from varve.pipeline import registry

KINDS = {
    "head": "heads",
    "graft": "grafts",
    "layout": "layouts",
    "decoder": "decoders",
    "sampling": "samplings",
    "backbone": "backbones",
    "reduction": "reductions",
    "scenario": "scenarios",
    "metric": "metrics",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for option, kind in KINDS.items():
        parser.addoption(
            f"--{option}",
            action="append",
            default=[],
            metavar="NAME_OR_FILE",
            help=f"test this variant of {kind}, or those that a file registers",
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore the modules of the kinds that no option names, where any option is used."""
    named = {kind for option, kind in KINDS.items() if config.getoption(f"--{option}")}
    kind = collection_path.stem.removeprefix("test_every_") + "s"
    is_suite = collection_path.parent == Path(__file__).parent and kind in KINDS.values()
    return True if is_suite and named and kind not in named else None


def names(config: pytest.Config, kind: str) -> list[str]:
    """Return the variants of a kind to test: all, or those of the options.

    Raises:
        pytest.UsageError: A file registers no variant of the kind, or there is none of the name.
    """
    option = next(option for option, k in KINDS.items() if k == kind)
    chosen: list[str] = []
    for name in config.getoption(f"--{option}"):
        if not name.endswith(".py") or kind == "heads":
            # A file is itself the variant, where the kind is heads: see `find_head`.
            if not name.endswith(".py") and name not in registry.available(kind):
                raise pytest.UsageError(
                    f"--{option} {name}: there are {', '.join(registry.available(kind))}"
                )
            chosen.append(name)
            continue
        registry.load_plugin(name)
        added = registry.names_in(name, kind)
        if not added:
            raise pytest.UsageError(f"--{option} {name}: the file registers nothing in {kind}")
        chosen += added
    return chosen or registry.available(kind)

"""The specification of a sweep: heads, a grid of their options, and seeds; from Python or TOML."""

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from varve.pipeline.experiments.head_source import HeadSource, find_head
from varve.pipeline.experiments.run_spec import option_defaults
from varve.pipeline.experiments.scenarios import SEEDS, ClassList
from varve.pipeline.registry import load_plugin

# Options of `FeatureStore.sampled` that a grid may vary, where no head has one of that name.
FRAMES = ("frames", "sampling", "fps", "stride", "view")


@dataclass(frozen=True)
class Sweep:
    """The runs of an ablation.

    Attributes:
        heads: File names in `heads/`, or paths of a user's files, which are called by their stems
            in `grid` and `options`.
        scenario: A registered scenario or `BASE+KxN`.
        grid: Values of options, by "head.option", or "option" for every head that has it. Every
            combination is run.
        seeds: Seeds of class order and head: a list, or how many of 1000, 1993, 2021.
        options: Options that are the same in all runs: by head, a table of options.
        backbone: The backbone whose features are read, where the store has several.
        splits: The splits to train on and to test on.
        plugins: Files of user-defined variants that `read` loads.
        sampled: Frames to read of a store of whole videos; see `varve.run`. The grid may vary them
            by these names: `frames`, `sampling`, `fps`, `stride`, `view`.
        order, only: Classes, or a file of them; see `varve.run`.
        validation: Share of the training clips to test on; see `varve.run`.
    """

    heads: Sequence[str | Path | HeadSource]
    scenario: str
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: int | Sequence[int] = len(SEEDS)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    backbone: str = ""
    splits: Sequence[str] = ("train", "test")
    plugins: Sequence[str] = ()
    sampled: Mapping[str, Any] = field(default_factory=dict)
    order: ClassList | None = None
    only: ClassList | None = None
    validation: float = 0.0

    @classmethod
    def read(cls, file: str | Path) -> "Sweep":
        """Read a sweep from TOML, with the attributes as keys. "null" stands for None.

        Paths of heads, plugins and lists of classes are relative to the folder of the file.

        Raises:
            ValueError: It is no such file.
        """
        try:
            content = _nulls(tomllib.loads(Path(file).read_text()))
            if unknown := sorted(set(content) - {attribute.name for attribute in fields(cls)}):
                raise ValueError(f"it has {', '.join(unknown)}")
            sweep, folder = cls(**content), Path(file).parent
            for plugin in sweep.plugins:
                load_plugin(folder / plugin)
            heads = [folder / h if h.endswith(".py") else h for h in map(str, sweep.heads)]
            order, only = (
                folder / classes if isinstance(classes, str) else classes
                for classes in (sweep.order, sweep.only)
            )
            return replace(sweep, heads=heads, order=order, only=only)
        except (ValueError, TypeError) as error:  # of TOML and of UTF-8, too
            raise ValueError(
                f"{file} is no sweep: {error}. One has `heads`, `scenario`, and maybe `seeds`, "
                "`backbone`, `splits`, `plugins`, `order`, `only`, `validation`, [grid] and "
                "[options.HEAD]"
            ) from error

    def with_options(self, options: Mapping[str, Any]) -> "Sweep":
        """Return the sweep with other options, by "head.option", or "option" of all that have it.

        Raises:
            ValueError: No head has one, or it is in the grid.
        """
        known = {source.name: option_defaults(source.build) for source in self.sources()}
        merged = {head: dict(self.options.get(head, {})) for head in known}
        for name, value in options.items():
            heads, option = _heads_with(name, known)
            swept = {option, *(f"{head}.{option}" for head in heads)} & set(self.grid)
            if not heads or swept:
                raise ValueError(
                    f"--set {name}: "
                    + (f"none of {', '.join(known)} has it" if not heads else "the grid has it")
                )
            for head in heads:
                merged[head][option] = value
        return replace(self, options=merged)

    def sources(self) -> list[HeadSource]:
        """Return the sources of the heads.

        Raises:
            ValueError, FileNotFoundError: As `find_head`, or two heads have one name.
        """
        sources = [find_head(head) for head in self.heads]
        texts = {(source.name, source.digest) for source in sources}
        if len(texts) > len({source.name for source in sources}):
            raise ValueError(
                f"heads {', '.join(source.path for source in sources)}: results know a file by its "
                "name alone, so rename one of two that share it"
            )
        return sources

    def seed_list(self) -> list[int]:
        """Return the seeds.

        Raises:
            ValueError: There are fewer default seeds, or none is wanted.
        """
        if isinstance(self.seeds, int):
            if not 1 <= self.seeds <= len(SEEDS):
                raise ValueError(
                    f"seeds={self.seeds}: a number from 1 to {len(SEEDS)}, or a list of seeds"
                )
            return list(SEEDS[: self.seeds])
        return [int(seed) for seed in self.seeds]

    def runs(self) -> list[tuple[str, int, dict[str, Any], dict[str, Any]]]:
        """Return head, seed, options and frames of every run, the seeds of a combination together.

        Raises:
            ValueError: The grid names an unknown head or option, or two heads have one name.
        """
        known = {source.name: option_defaults(source.build) for source in self.sources()}
        for name in self.options:
            if name not in known:
                raise ValueError(f"options of {name}, which is none of {', '.join(known)}")
        runs = []
        for head, axes in self._axes(known).items():
            for values in itertools.product(*axes.values()):
                options = {**self.options.get(head, {}), **dict(zip(axes, values, strict=True))}
                of_clips = [name for name in FRAMES if name in axes and name not in known[head]]
                frames = {**self.sampled, **{name: options.pop(name) for name in of_clips}}
                runs += [(head, seed, options, frames) for seed in self.seed_list()]
        return runs

    def _axes(self, known: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Sequence[Any]]]:
        """Return the values of each option of the grid, by head and option."""
        axes: dict[str, dict[str, Sequence[Any]]] = {head: {} for head in known}
        for name, values in self.grid.items():
            heads, option = _heads_with(name, known)
            heads = list(known) if not heads and name in FRAMES else heads
            if not heads:
                raise ValueError(
                    f"the grid's {name}: none of {', '.join(known)} has it; options are\n"
                    + "\n".join(f"  {head}: {', '.join(known[head])}" for head in known)
                )
            if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
                raise ValueError(f"the grid's {name} = {values!r}: give a list of values")
            for head in heads:
                if option in axes[head]:
                    raise ValueError(
                        f"the grid has {option} of {head} twice, with and without a head"
                    )
                axes[head][option] = values
        return axes


def _heads_with(name: str, known: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], str]:
    """Return the heads that "head.option" or "option" means, and the option."""
    head, _, option = name.rpartition(".")
    return [name for name in known if option in known[name] and head in ("", name)], option


def _nulls(value: Any) -> Any:
    """Replace "null" by None, at any depth."""
    if isinstance(value, dict):
        return {key: _nulls(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_nulls(part) for part in value]
    return None if value == "null" else value

"""Scenarios: which classes arrive with which task, and which clips train and test on them.

A scenario is written BASE+KxN: a first task of BASE classes, then N tasks of K. "51+10x5" is the
published "ucf101-10x5"; with a BASE of 0 all tasks have one size ("0+40x10"). More parts may
follow, "+KxN" or "+K" for one task of K, where the classes do not divide evenly: "0+3x2+1". The
classes arrive in the order of their numbers, shuffled by a seed, or in the order of a list.

Classes whose names are all whole numbers are ordered by value, and a whole number in an order or
list means the class of that name. Elsewhere it is the number of a class, from 0.

"ucf101-..." and "hmdb51-..." number the classes by the alphabet and ignore case, as the files of
the data sets do, whatever their order in the store. All others number them as the store does.

A user's scenario is one function with the decorator `register`. It takes the classes of the store
and the seed, and returns the class names of each task:

    from varve import register

    @register("scenarios")
    def one_by_one(classes, seed):
        return [[label] for label in classes]

`one_by_one.classes = 10`, or a list of names, says for which classes alone it is made.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from varve.pipeline.experiments._pickles import read_pickle
from varve.pipeline.registry import available, register, source_digest, variant
from varve.stores.clips import row_keys

SEEDS = (1000, 1993, 2021)
PUBLISHED = {
    "ucf101-10x5": "51+10x5",
    "ucf101-5x10": "51+5x10",
    "ucf101-2x25": "51+2x25",
    "hmdb51-5x5": "26+5x5",
    "hmdb51-1x25": "26+1x25",
    "ssv2-10x9": "84+10x9",
    "ssv2-5x18": "84+5x18",
    "k400-10": "0+40x10",
    "k400-20": "0+20x20",
    "ave-4x7": "0+4x7",
    "kinetics-sounds-5x6": "0+5x6",
    "demo": "4+2x4",
}
# Number of classes of subsets of Kinetics-400; the user lists the classes and sizes the tasks.
FROM_A_LIST = {"avk-100": 100, "avk-200": 200, "avk-400": 400}
GIVEN = "given"
# A sort by code points swaps HammerThrow with Hammering and JumpRope with JumpingJack.
BY_ALPHABET = ("ucf101-", "hmdb51-")
HELD_OUT = "held out of training"
MOST_NAMES = 10  # in a message
PICKLES = (".pkl", ".pickle")

# A file's path, or class names or numbers, in one list or a list for each task.
ClassList = str | Path | Sequence[str | int] | Sequence[Sequence[str | int]]


@dataclass(frozen=True)
class Scenario:
    """Tasks of a class-incremental run.

    Attributes:
        name: As it was requested.
        tasks: Class names of each task, in order of arrival.
        seed: Seed of the shuffle; None where the order was listed.
        order: Numbers of the classes in order of arrival, from 0.
        source_digest: SHA-256 of the file of a user's scenario; "" for others.
    """

    name: str
    tasks: tuple[tuple[str, ...], ...]
    seed: int | None
    order: tuple[int, ...]
    source_digest: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes, in order of arrival."""
        return tuple(label for task in self.tasks for label in task)


@dataclass(frozen=True, eq=False)
class Division:
    """Row ids of the training and test clips of each task, ascending.

    Attributes:
        left_out: Number of clips that are in neither, by the first reason that applies.
        shared: Number of test clips whose bytes and interval a training clip has too.
    """

    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    left_out: Mapping[str, int]
    shared: int = 0


def make_scenario(
    name: str,
    classes: Sequence[str],
    seed: int | None = SEEDS[0],
    *,
    order: ClassList | None = None,
    only: ClassList | None = None,
) -> Scenario:
    """Decide which classes arrive with which task.

    Args:
        name: A registered scenario; BASE+KxN, with more parts "+KxN" or "+K"; "avk-100:BASE+KxN"
            (or 200, 400), which needs `only` or `order`; "given" or "avk-100", which need an
            `order` with a list for each task.
        classes: Classes of the store.
        seed: Seed of the shuffle of class numbers, as in TCD and PILOT. None: the classes arrive
            in the order of their numbers. Without effect beside `order`.
        order: The classes as they arrive, in place of a shuffle; those that it lacks are left out.
        only: The classes to shuffle, where a part of the store's is meant; numbered as listed.

    Raises:
        ValueError: There is no such scenario, it does not fit the classes, or a list names a class
            that the store has not, or names one twice.

    >>> make_scenario("1+2x1", ["jump", "run", "walk"], seed=1993).tasks
    (('jump',), ('walk', 'run'))
    >>> make_scenario("1+2x1", ["jump", "run", "walk"], order=["walk", "jump", "run"]).tasks
    (('walk',), ('jump', 'run'))
    """
    if name in available("scenarios") and name not in PUBLISHED:
        if order is not None or only is not None:
            raise ValueError(
                f"{name} decides itself which classes there are: leave out `order`, `only`"
            )
        return _registered(name, classes, seed)
    shape = _shape(name)
    numbered = _numbered(name, classes)
    if order is not None and only is not None:
        raise ValueError(f"{name}: give `order` or `only`; an order says which classes there are")
    if order is not None:
        tasks, seed = _resolve(order, numbered, "order"), None
    else:
        if only is not None:
            listed_classes = _flat(_resolve(only, numbered, "only"))
            alphabetic = name.startswith(BY_ALPHABET)
            numbered = _numbered(name, listed_classes) if alphabetic else listed_classes
        tasks = [shuffled(numbered, seed)]
    arrival = _flat(tasks)
    listed = order is not None or only is not None
    _check_count(name, shape, len(arrival), len(classes), listed)
    if shape is not None:
        ends = accumulate(shape, initial=0)
        cut = [arrival[start:end] for start, end in pairwise(ends)]
        if len(tasks) > 1 and [*map(len, tasks)] != [*map(len, cut)]:
            raise ValueError(
                f"{name} has tasks of {_sizes(cut)} classes, the order of {_sizes(tasks)}; name "
                f"the scenario {GIVEN!r} to take the tasks of the order"
            )
        tasks = cut
    elif len(tasks) == 1:
        raise ValueError(
            f"{name} needs an `order` with a list of classes for each task; for one list of "
            f"classes write BASE+KxN{f', here {name}:BASE+KxN' if name in FROM_A_LIST else ''}"
        )
    return _scenario(name, tasks, seed, numbered)


for _name in PUBLISHED:
    register("scenarios", _name)(
        lambda classes, seed, name=_name: make_scenario(name, classes, seed).tasks
    )


def _registered(name: str, classes: Sequence[str], seed: int | None) -> Scenario:
    """Make the scenario of a user's function."""
    try:
        tasks = [list(task) for task in variant("scenarios", name)(list(classes), seed)]
    except Exception as error:
        raise ValueError(
            f"the scenario {name!r} failed on {len(classes)} classes with seed {seed}: "
            f"{type(error).__name__}: {error}"
        ) from error
    tasks = _resolve(tasks, classes, f"tasks of {name}")
    digest = source_digest("scenarios", name)
    return replace(_scenario(name, tasks, seed, classes), source_digest=digest)


def _scenario(
    name: str, tasks: Sequence[Sequence[str]], seed: int | None, numbered: Sequence[str]
) -> Scenario:
    number_of = {label: number for number, label in enumerate(numbered)}
    order = tuple(number_of[label] for label in _flat(tasks))
    return Scenario(name, tuple(map(tuple, tasks)), seed, order)


def shuffled(classes: Sequence[str], seed: int | None) -> list[str]:
    """Return the classes in the order that published runs draw; unchanged for None."""
    order = np.arange(len(classes))
    if seed is not None:
        # The published orders are this generator's; a new-style one gives others.
        np.random.RandomState(seed).shuffle(order)
    return [classes[number] for number in order.tolist()]


def read_list(path: Path) -> list[Any]:
    """Read an order of classes: names, or numbers from 0, in one list or a list for each task.

    A .json, .pkl or .pickle file is such a list, or a file of vCLIMB, of which only the order is
    taken: the splits are those of the store. Any other file has a name or a number on each line.
    No code in a pickle is run.

    Raises:
        ValueError: It is none of these.
        OSError: It cannot be read.
    """
    if path.suffix.lower() in PICKLES:
        value = read_pickle(path)
    else:
        text = path.read_text("utf-8-sig")
        if path.suffix.lower() != ".json":
            return [line.strip() for line in text.split("\n") if line.strip()]
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {error.lineno} is not JSON: {error.msg}") from None
    if isinstance(value, dict) and isinstance(value.get("train"), list | tuple):
        value = value["train"]
    if isinstance(value, list | tuple):
        # A task of vCLIMB has the videos of each of its classes.
        value = [list(task) if isinstance(task, dict) else task for task in value]
    if not isinstance(value, list):
        kind = f"an object of {', '.join(map(repr, value))}" if isinstance(value, dict) else value
        raise ValueError(
            f"{path} contains {kind}; save a list of classes, or a list of lists, one for each task"
        )
    return value


def divide(
    table: pd.DataFrame,
    scenario: Scenario,
    train: str = "train",
    test: str = "test",
    validation: float = 0.0,
) -> Division:
    """Find the training and test clips of each task: those of two splits that are ready.

    With `validation`, numbers such as a temperature are chosen without the test clips: a share of
    each class's training clips is tested on instead of them, and is not trained on.

    Args:
        table: Table of clips of a store.
        train: Split to learn from.
        test: Split to test on: "validation" for Something-Something, whose test has no labels.
        validation: Share of the training clips of each class to test on; 0 for the test split.
            Which clips depends on their bytes alone, so they are the same for every head and seed.

    Raises:
        ValueError: `validation` is not in [0, 1). Or a class has no clip to learn from, or none to
            test on; the message names them.
    """
    if train == test:
        raise ValueError(f"split {train!r} cannot be for both training and test; name two splits")
    if not 0 <= validation < 1:
        raise ValueError(f"{validation=}: give a share of the training clips, from 0 to below 1")
    task = {label: i for i, labels in enumerate(scenario.tasks) for label in labels}
    task_N = table["label"].map(task).fillna(-1).to_numpy(np.int64)
    split_N, status_N = (table[name].to_numpy() for name in ("split", "status"))
    if validation:
        learned_N = (task_N >= 0) & (split_N == train) & (status_N == "ready")
        test, split_N = HELD_OUT, split_N.astype(object)
        split_N[_held_out(table, np.flatnonzero(learned_N), validation)] = HELD_OUT
    reasons = np.select(
        [task_N < 0, ~np.isin(split_N, (train, test)), status_N != "ready"],
        [
            np.full(len(table), "of no task", object),
            np.array([f"in split {name!r}" if name else "in no split" for name in split_N], object),
            status_N,
        ],
        "",
    )
    used_N = reasons == ""
    left_out = dict(sorted(Counter(reasons[~used_N].tolist()).items()))
    rows, labels = table.index.to_numpy(np.int64), table["label"]
    needs = []
    for split, what in ((train, "to learn from"), (test, "to test on")):
        have = set(labels[used_N & (split_N == split)])
        if lacking := [label for label in scenario.classes if label not in have]:
            needs.append(f"no clip {what} (split {split!r}): {_some(lacking)}")
    if needs:
        raise ValueError(
            f"{scenario.name}, {len(task)} classes: these have {'; these have '.join(needs)}."
            f" Left out: {', '.join(f'{n} {why}' for why, n in left_out.items()) or 'nothing'}. "
            "Add clips, leave the classes out, or say which splits to learn from and to test on."
        )
    train_rows, test_rows = (
        tuple(rows[used_N & (split_N == split) & (task_N == i)] for i in range(len(scenario.tasks)))
        for split in (train, test)
    )
    # A table of a user may lack the column.
    same_N = np.asarray(table.get("duplicate_of", np.full(len(table), -1)))
    first_N = np.where(same_N >= 0, same_N, table.index)
    train_N, test_N = (used_N & (split_N == split) for split in (train, test))
    shared = int(np.isin(first_N[test_N], first_N[train_N]).sum())
    return Division(train_rows, test_rows, left_out, shared)


def _held_out(table: pd.DataFrame, indices: np.ndarray, share: float) -> list[int]:
    """Return a share of some clips of each class, at least one of two and never all."""
    keys = [key.tobytes() for key in row_keys(table.iloc[indices])]
    drawn: list[int] = []
    for _, of_class in pd.Series(indices).groupby(table["label"].to_numpy()[indices]):
        # Clips with the same bytes stay together.
        clips: dict[bytes, list[int]] = {}
        for position, index in of_class.items():
            clips.setdefault(hashlib.sha256(keys[int(position)]).digest(), []).append(int(index))
        count = min(max(1, round(share * len(clips))), len(clips) - 1)
        drawn += [index for digest in sorted(clips)[:count] for index in clips[digest]]
    return drawn


def _shape(name: str) -> list[int] | None:
    """Return the number of classes of each task of a scenario's name; None for a list.

    Raises:
        ValueError: There is no such scenario.
    """
    family, colon, written = name.partition(":")
    if name == GIVEN or name in FROM_A_LIST:
        return None
    written = written if colon and family in FROM_A_LIST else PUBLISHED.get(name, name)
    part = r"[1-9][0-9]{0,5}(?:x[1-9][0-9]{0,5})?"
    if not re.fullmatch(rf"[0-9]{{1,6}}(?:\+{part})+", written):
        known = ", ".join([*available("scenarios"), *FROM_A_LIST])
        raise ValueError(
            f"no scenario {name!r}; choose from {known}, write BASE+KxN (51+10x5: 51 classes, then "
            f"5 tasks of 10; 0+3x2+1: one of 1 at the end), or {GIVEN!r} with an order that has a "
            "list of classes for each task"
        )
    base, *parts = written.split("+")
    sizes = [int(base)] * (int(base) > 0)
    for size, _, count in (part.partition("x") for part in parts):
        sizes += [int(size)] * int(count or 1)
    return sizes


def _numbered(name: str, classes: Sequence[str]) -> list[str]:
    by_value = _by_value(classes)
    if by_value and (name.startswith(BY_ALPHABET) or list(classes) == sorted(classes)):
        # A store of an earlier build has them sorted as text: 0, 1, 10, 11, 2.
        return [label for _, label in sorted(by_value.items())]
    return sorted(classes, key=str.casefold) if name.startswith(BY_ALPHABET) else list(classes)


def _resolve(listed: ClassList, numbered: Sequence[str], what: str) -> list[list[str]]:
    """Return the class names of a list, task by task; a flat list is one task.

    Raises:
        ValueError: An entry is no class, or a class is listed twice.
    """
    entries: Sequence[Any] = read_list(Path(listed)) if isinstance(listed, str | Path) else listed
    is_task = [isinstance(entry, list | tuple) for entry in entries]
    tasks = [list(task) for task in entries] if any(is_task) and all(is_task) else [list(entries)]
    flat, known = _flat(tasks), set(numbered)
    if not all(tasks) or not all(isinstance(entry, str | int | np.integer) for entry in flat):
        raise ValueError(
            f"{what}: neither a list of classes nor a list of such lists, one for each task"
        )
    if by_value := _by_value(numbered):
        # Classes are numbers themselves: 5 is the class "5", wherever it stands in the order.
        tasks = [[_named_by_value(entry, by_value) for entry in task] for task in tasks]
        flat = _flat(tasks)
    elif known.isdisjoint(flat):
        tasks = [[_by_number(entry, numbered) for entry in task] for task in tasks]
        flat = _flat(tasks)
    if unknown := [entry for entry in flat if entry not in known]:
        raise ValueError(
            f"{what}: {len(unknown)} of {len(flat)} entries are no class of the store: "
            f"{_some(unknown)}. Its {len(numbered)} are {_some(numbered)}: spell them so, or "
            + (
                "give the numbers that name them"
                if by_value
                else f"give only numbers from 0 to {len(numbered) - 1}"
            )
        )
    if repeated := [label for label, times in Counter(flat).items() if times > 1]:
        raise ValueError(f"{what}: listed twice: {_some(repeated)}; name each class once")
    return tasks


def _by_value(numbered: Sequence[str]) -> dict[int, str]:
    """Return the classes by value where all are whole numbers, each of another value; else {}."""
    values = {value: label for label in numbered if (value := _whole(label)) is not None}
    return values if len(values) == len(numbered) else {}


def _named_by_value(entry: Any, by_value: Mapping[int, str]) -> Any:
    value = _whole(entry)
    return entry if value is None else by_value.get(value, entry)


def _whole(entry: Any) -> int | None:
    if isinstance(entry, str):
        return int(entry) if re.fullmatch("-?[0-9]{1,18}", entry) else None
    return int(entry)


def _by_number(entry: Any, numbered: Sequence[str]) -> Any:
    number = int(entry) if not isinstance(entry, str) or entry.isdecimal() else -1
    return numbered[number] if 0 <= number < len(numbered) else entry


def _check_count(
    name: str, shape: Sequence[int] | None, count: int, in_store: int, listed: bool
) -> None:
    """Refuse a number of classes that is not the scenario's."""
    family = name.partition(":")[0]
    if family in FROM_A_LIST and (not listed or count != FROM_A_LIST[family]):
        has = f"the list has {count}" if listed else "there is no list"
        raise ValueError(
            f"{family} needs a list of its {FROM_A_LIST[family]} classes (`only`, `order`); {has}"
        )
    total = sum(shape) if shape else count
    if total != count:
        written = f" ({PUBLISHED[name]})" if name in PUBLISHED else ""
        raise ValueError(
            f"{name} is {total} classes{written}; {'the list' if listed else 'the store'} "
            f"has {count}. Write BASE+KxN that adds up to {count}"
            + (f" (such as {_that_fits(shape or [], count)})" if count > 1 else "")
            + (f", or list the {total} that are meant (`only`)" if total < in_store else "")
        )


def _that_fits(shape: Sequence[int], count: int) -> str:
    """Return a scenario of so many classes, with the last task's size where it fits.

    >>> _that_fits([3, 3], 7), _that_fits([51, 10, 10], 4)
    ('0+3x2+1', '2+2x1')
    """
    size = shape[-1]
    base = 0 if len(set(shape)) == 1 else shape[0]
    increments, rest = divmod(count - base, size)
    if base >= count or not increments:
        return f"{count - count // 2}+{count // 2}x1"
    return f"{base}+{size}x{increments}" + (f"+{rest}" if rest else "")


def _flat(tasks: Iterable[Iterable[Any]]) -> list[Any]:
    return [entry for task in tasks for entry in task]


def _sizes(tasks: Iterable[Sequence[Any]]) -> str:
    return ", ".join(str(len(task)) for task in tasks)


def _some(names: Sequence[Any]) -> str:
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(map(str, names[:MOST_NAMES])) + rest

"""Scenarios: which classes arrive with which task, and which clips teach and test them.

A scenario is written BASE+KxN: a first task of BASE classes, then N tasks of K. "51+10x5" is the
published "ucf101-10x5"; with a BASE of 0 all tasks are alike ("0+40x10"). The order in which the
classes arrive is a shuffle of their numbers by a seed, or a list's.

"ucf101-..." and "hmdb51-..." number the classes by the alphabet, case aside, as the data sets'
own files do, whatever order a store has them in. Everything else numbers them as the store does.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SEEDS = (1000, 1993, 2021)

NAMED = {
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
# Which of Kinetics-400's classes, and how many a task, is for the user to say.
FROM_A_LIST = {"avk-100": 100, "avk-200": 200, "avk-400": 400}
GIVEN = "given"
# A sort by code points swaps HammerThrow with Hammering and JumpRope with JumpingJack.
BY_ALPHABET = ("ucf101-", "hmdb51-")
SHOWN = 10

# A file's path, or class names or numbers, in one list or a list a task.
ClassList = str | Path | Sequence[str | int] | Sequence[Sequence[str | int]]


@dataclass(frozen=True)
class Scenario:
    """Tasks of a class-incremental run.

    Attributes:
        name: As asked for.
        tasks: Class names of each task, in order of arrival.
        seed: What shuffled the classes; None where their order was given.
        order: Numbers of the classes in order of arrival, from 0.
    """

    name: str
    tasks: tuple[tuple[str, ...], ...]
    seed: int | None
    order: tuple[int, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """All of them, in order of arrival."""
        return tuple(label for task in self.tasks for label in task)


@dataclass(frozen=True, eq=False)
class Division:
    """Row ids of the clips that teach and test each task, ascending.

    Attributes:
        left_out: How many clips are in neither, by the first reason that holds.
    """

    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    left_out: Mapping[str, int]


def scenario_of(
    name: str,
    classes: Sequence[str],
    seed: int | None = SEEDS[0],
    *,
    order: ClassList | None = None,
    only: ClassList | None = None,
) -> Scenario:
    """Say which classes arrive with which task.

    Args:
        name: One of NAMED; BASE+KxN; "avk-100:BASE+KxN" (or 200, 400), which wants `only` or
            `order`; "given" or "avk-100", which want an `order` with a list a task.
        classes: The store's.
        seed: Shuffles the class numbers, as TCD and PILOT do. None: the classes arrive as they
            are numbered. Of no effect beside `order`.
        order: The classes as they arrive, in place of a shuffle; those that it lacks are left out.
        only: The classes to shuffle, where not all of the store's are meant; numbered as listed.

    Raises:
        ValueError: There is no such scenario, it does not fit the classes, or a list has a class
            that the store has not, or has one twice.

    >>> scenario_of("1+2x1", ["jump", "run", "walk"], seed=1993).tasks
    (('jump',), ('walk', 'run'))
    >>> scenario_of("1+2x1", ["jump", "run", "walk"], order=["walk", "jump", "run"]).tasks
    (('walk',), ('jump', 'run'))
    """
    shape = _shape(name)
    numbered = _numbered(name, classes)
    if order is not None and only is not None:
        raise ValueError(f"{name}: give `order` or `only`; an order says which classes there are")
    if order is not None:
        tasks, seed = _resolve(order, numbered, "order"), None
    else:
        if only is not None:
            numbered = _numbered(name, _flat(_resolve(only, numbered, "only")))
        tasks = [shuffled(numbered, seed)]
    arrival = _flat(tasks)
    listed = order is not None or only is not None
    _check_count(name, shape, len(arrival), len(classes), listed)
    if shape is not None:
        cut = [[arrival[i] for i in task] for task in split_classes(len(arrival), *shape[:2])]
        if len(tasks) > 1 and [*map(len, tasks)] != [*map(len, cut)]:
            raise ValueError(
                f"{name} has tasks of {_sizes(cut)} classes, the order of {_sizes(tasks)}; name "
                f"the scenario {GIVEN!r} to take the order's"
            )
        tasks = cut
    elif len(tasks) == 1:
        raise ValueError(
            f"{name} needs an `order` with a list of classes a task; for one list of classes write "
            f"BASE+KxN{f', here {name}:BASE+KxN' if name in FROM_A_LIST else ''}"
        )
    place = {label: number for number, label in enumerate(numbered)}
    return Scenario(name, tuple(map(tuple, tasks)), seed, tuple(place[label] for label in arrival))


def shuffled(classes: Sequence[str], seed: int | None) -> list[str]:
    """Classes in the order that published runs draw; as they are for None."""
    order = np.arange(len(classes))
    if seed is not None:
        # The published orders are this generator's; a new-style one gives others.
        np.random.RandomState(seed).shuffle(order)
    return [classes[number] for number in order.tolist()]


def split_classes(count: int, base: int, increment: int) -> list[list[int]]:
    """Class numbers of each task: the first `base`, if any, then `increment` at a time.

    Raises:
        ValueError: The classes do not come out even.

    >>> split_classes(7, base=3, increment=2)
    [[0, 1, 2], [3, 4], [5, 6]]
    >>> split_classes(4, base=0, increment=2)
    [[0, 1], [2, 3]]
    """
    if count < 1 or not 0 <= base <= count or increment < 1 or (count - base) % increment:
        raise ValueError(f"{count} classes are no {base} and then tasks of {increment}")
    starts = range(base, count, increment)
    first = [list(range(base))] if base else []
    return first + [list(range(a, a + increment)) for a in starts]


def read_list(path: Path) -> list[Any]:
    """Read an order of classes: names, or numbers from 0, in one list or a list a task.

    A .json file is such a list, or one of vCLIMB's, of which only the order is taken: the clips'
    splits are the store's. Any other file has a name or a number a line.

    Raises:
        ValueError: It is neither.
        OSError: It cannot be read.
    """
    text = path.read_text("utf-8-sig")
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.split("\n") if line.strip()]
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno} is not JSON: {error.msg}") from None
    if isinstance(value, dict) and isinstance(tasks := value.get("train"), list):
        value = [list(task) if isinstance(task, dict) else task for task in tasks]
    if not isinstance(value, list):
        held = f"an object of {', '.join(map(repr, value))}" if isinstance(value, dict) else value
        raise ValueError(
            f"{path} holds {held}; save a list of classes, or a list of lists, a task each"
        )
    return value


def divide(
    table: pd.DataFrame, scenario: Scenario, train: str = "train", test: str = "test"
) -> Division:
    """Find the clips that teach and test each task: the ready ones of two splits.

    Args:
        table: A store's table of clips.
        train: Split to learn from.
        test: Split to test on: "validation" of Something-Something, whose test has no labels.

    Raises:
        ValueError: A class has no clip to learn from, or none to test on; the message names them.
    """
    if train == test:
        raise ValueError(f"split {train!r} cannot both teach and test; name two splits")
    task = {label: i for i, labels in enumerate(scenario.tasks) for label in labels}
    task_N = table["label"].map(task).fillna(-1).to_numpy(np.int64)
    split_N, status_N = (table[name].to_numpy() for name in ("split", "status"))
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
    return Division(train_rows, test_rows, left_out)


def _shape(name: str) -> tuple[int, int, int] | None:
    """(base, increment, tasks after the base) of a scenario's name; None where a list says it.

    Raises:
        ValueError: There is no such scenario.
    """
    family, colon, written = name.partition(":")
    if name == GIVEN or name in FROM_A_LIST:
        return None
    written = written if colon and family in FROM_A_LIST else NAMED.get(name, name)
    match = re.fullmatch(r"([0-9]+)\+([1-9][0-9]*)x([1-9][0-9]*)", written)
    if not match:
        known = ", ".join([*NAMED, *FROM_A_LIST])
        raise ValueError(
            f"no scenario {name!r}; choose from {known}, write BASE+KxN (51+10x5: 51 classes, then "
            f"5 tasks of 10), or {GIVEN!r} with an order that has a list of classes a task"
        )
    base, increment, count = map(int, match.groups())
    return base, increment, count


def _numbered(name: str, classes: Iterable[str]) -> list[str]:
    return sorted(classes, key=str.casefold) if name.startswith(BY_ALPHABET) else list(classes)


def _resolve(listed: ClassList, numbered: Sequence[str], what: str) -> list[list[str]]:
    """Class names of a list, task by task; a flat list is one task.

    Raises:
        ValueError: An entry is no class, or a class is there twice.
    """
    entries: Sequence[Any] = read_list(Path(listed)) if isinstance(listed, str | Path) else listed
    is_task = [isinstance(entry, list | tuple) for entry in entries]
    tasks = [list(task) for task in entries] if any(is_task) and all(is_task) else [list(entries)]
    flat, known = _flat(tasks), set(numbered)
    if not all(tasks) or not all(isinstance(entry, str | int | np.integer) for entry in flat):
        raise ValueError(f"{what}: neither a list of classes nor a list of such lists, a task each")
    if known.isdisjoint(flat):
        tasks = [[_by_number(entry, numbered) for entry in task] for task in tasks]
        flat = _flat(tasks)
    if strange := [entry for entry in flat if entry not in known]:
        raise ValueError(
            f"{what}: {len(strange)} of {len(flat)} entries are no class of the store: "
            f"{_some(strange)}. Its {len(numbered)} are {_some(numbered)}: spell them so, or "
            f"give numbers from 0 to {len(numbered) - 1} alone"
        )
    if twice := [label for label, times in Counter(flat).items() if times > 1]:
        raise ValueError(f"{what}: there twice: {_some(twice)}; name each class once")
    return tasks


def _by_number(entry: Any, numbered: Sequence[str]) -> Any:
    number = int(entry) if not isinstance(entry, str) or entry.isdecimal() else -1
    return numbered[number] if 0 <= number < len(numbered) else entry


def _check_count(
    name: str, shape: tuple[int, int, int] | None, found: int, held: int, listed: bool
) -> None:
    family = name.partition(":")[0]
    wanted = FROM_A_LIST.get(family, found)
    if family in FROM_A_LIST and (not listed or found != wanted):
        has = f"the list given has {found}" if listed else "none is given"
        raise ValueError(f"{family} needs a list of its {wanted} classes (`only`, `order`); {has}")
    total = shape[0] + shape[1] * shape[2] if shape else found
    if total != found:
        written = f" ({NAMED[name]})" if name in NAMED else ""
        half = found // 2
        raise ValueError(
            f"{name} is {total} classes{written}; {'the list given' if listed else 'the store'} "
            f"has {found}. Write BASE+KxN that adds up to {found}"
            + (f" (such as {found - half}+{half}x1)" if half else "")
            + (f", or list the {total} that are meant (`only`)" if total < held else "")
        )


def _flat(tasks: Iterable[Iterable[Any]]) -> list[Any]:
    return [entry for task in tasks for entry in task]


def _sizes(tasks: Iterable[Sequence[Any]]) -> str:
    return ", ".join(str(len(task)) for task in tasks)


def _some(names: Sequence[Any]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + rest

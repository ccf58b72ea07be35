"""Scenarios: the published orders, how classes are numbered, what does not fit, which clips."""

import json
import os
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from varve.pipeline.datasets.layouts import read as read_layout
from varve.pipeline.experiments.scenarios import (
    FROM_A_LIST,
    PUBLISHED,
    SEEDS,
    divide,
    make_scenario,
    read_list,
)

DATA = Path(__file__).parents[4] / "shared" / "data"
FIRST = {  # of published orders, as given with the papers' code
    (101, 1000): [37, 97, 56, 55, 33, 84],
    (101, 1993): [68, 56, 78, 8, 23, 84],
    (101, 2021): [90, 2, 46, 4, 78, 8],
    (51, 1000): [9, 34, 8, 43],
    (51, 1993): [43, 41, 23, 14],
    (51, 2021): [15, 19, 13, 34],
    (174, 1000): [33, 28, 129, 145],
}
SIZES = {
    "ucf101-10x5": [51] + [10] * 5,
    "ucf101-5x10": [51] + [5] * 10,
    "ucf101-2x25": [51] + [2] * 25,
    "hmdb51-5x5": [26] + [5] * 5,
    "hmdb51-1x25": [26] + [1] * 25,
    "ssv2-10x9": [84] + [10] * 9,
    "ssv2-5x18": [84] + [5] * 18,
    "k400-10": [40] * 10,
    "k400-20": [20] * 20,
    "ave-4x7": [4] * 7,
    "kinetics-sounds-5x6": [5] * 6,
    "demo": [4, 2, 2, 2, 2],
}


def shared(name):
    if not (DATA / name).exists():
        pytest.skip(f"no ../shared/data/{name} beside the repository")
    return DATA / name


def names(count):
    return [f"class {i:03}" for i in range(count)]


def sizes(scenario):
    return [len(task) for task in scenario.tasks]


@pytest.mark.parametrize(("count", "seed"), FIRST)
def test_orders_are_the_published_ones(count, seed):
    name = {101: "ucf101-10x5", 51: "hmdb51-5x5", 174: "ssv2-10x9"}[count]
    scenario = make_scenario(name, names(count), seed)
    first = FIRST[count, seed]
    assert list(scenario.order[: len(first)]) == first
    assert sorted(scenario.order) == list(range(count))
    assert list(scenario.classes) == [f"class {i:03}" for i in scenario.order]
    assert scenario.seed == seed


def test_orders_of_all_of_ucf101_are_those_that_tcd_published():
    published = json.loads(shared("splits/tcd/ucf101_class_orders.json").read_text())
    for seed in SEEDS:
        order = published[f"np.random.seed({seed}) shuffle(arange(101))"]
        assert list(make_scenario("ucf101-2x25", names(101), seed).order) == order
    assert list(make_scenario("ucf101-2x25", names(101)).order) == published["class_list.pkl"]


def test_every_named_scenario_has_its_tasks():
    assert set(SIZES) == set(PUBLISHED)
    for name, expected in SIZES.items():
        assert sizes(make_scenario(name, names(sum(expected)))) == expected


def test_a_name_is_its_written_form():
    for name, written in PUBLISHED.items():
        classes = names(sum(SIZES[name]))
        assert make_scenario(name, classes, 7).tasks == make_scenario(written, classes, 7).tasks


def test_without_a_seed_classes_arrive_as_they_are_numbered():
    scenario = make_scenario("demo", names(12), seed=None)
    assert scenario.order == tuple(range(12))
    assert scenario.seed is None


def test_the_seed_alone_decides_and_no_global_generator_is_touched():
    before = np.random.get_state()[1].tolist(), np.random.get_state()[2]  # noqa: NPY002
    scenario = make_scenario("3+3x3", names(12), 5)
    assert make_scenario("3+3x3", names(12), 5) == scenario
    assert make_scenario("3+3x3", names(12), 6) != scenario
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before  # noqa: NPY002


# ucf101's index is sorted without regard to case; a plain sort swaps two pairs of it.


def official(name):
    rows = [line.split() for line in shared(name).read_text().splitlines() if line.strip()]
    return [label for _, label in rows]


def test_the_alphabet_case_aside_is_the_class_index_of_ucf101():
    index = official("splits/ucf101/classInd.txt")
    assert index == sorted(index, key=str.casefold)
    moved = [a for a, b in zip(index, sorted(index), strict=True) if a != b]
    assert moved == ["Hammering", "HammerThrow", "JumpingJack", "JumpRope"]


def test_ucf101_has_its_tasks_whatever_order_the_store_has_its_classes_in():
    index = official("splits/ucf101/classInd.txt")
    expected = make_scenario("ucf101-10x5", index)
    assert expected.classes == tuple(index[i] for i in expected.order)
    for order in (sorted(index), index[::-1]):
        assert make_scenario("ucf101-10x5", order) == expected
    # The written form knows no data set: it numbers classes as the store does.
    assert make_scenario("51+10x5", sorted(index)).tasks != expected.tasks


def test_the_numbers_of_hmdb51_are_the_alphabets_and_not_the_index_files():
    numbers = {}
    for line in shared("splits/hmdb51/hmdb51_trainlist01.txt").read_text().splitlines():
        _, number, path = line.split("\t")
        numbers[path.split("/")[0]] = int(number)
    index = official("splits/hmdb51/ClassInd.txt")
    scenario = make_scenario("hmdb51-5x5", index, seed=None)
    assert [numbers[label] for label in scenario.classes] == list(range(51))
    assert list(scenario.classes) != index


def test_a_listing_of_ucf101_fits(tmp_path):
    for file in shared("splits/ucf101").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    listing = read_layout(tmp_path)
    table = pd.DataFrame(
        {
            "label": [clip.label for clip in listing.clips],
            "split": [clip.split for clip in listing.clips],
            "status": "ready",
        }
    )
    scenario = make_scenario("ucf101-10x5", listing.classes)
    clips = divide(table, scenario)
    assert sum(map(len, clips.train)) == 9537
    assert sum(map(len, clips.test)) == 3783
    assert not clips.left_out
    assert set(table["label"][clips.test[2]]) == set(scenario.tasks[2])


def test_tasks_may_come_from_vclimbs_file():
    file = shared("splits/vclimb/UCF101_data.json")
    index = official("splits/ucf101/classInd.txt")
    scenario = make_scenario("given", index, order=file)
    assert sizes(scenario) == [11] + [10] * 9
    assert scenario.tasks[0][:3] == ("Surfing", "SalsaSpin", "PlayingTabla")
    assert [index[i] for i in scenario.order[:3]] == ["Surfing", "SalsaSpin", "PlayingTabla"]
    assert scenario.seed is None
    assert make_scenario("11+10x9", index, order=file).tasks == scenario.tasks
    with pytest.raises(ValueError, match=r"51, 10, 10, 10, 10, 10 classes, the order of 11, 10"):
        make_scenario("ucf101-10x5", index, order=file)


ABC = ["ant", "bee", "cat", "dog"]


@pytest.mark.parametrize(
    "order",
    [
        ["cat", "ant", "dog", "bee"],
        [2, 0, 3, 1],
        np.array([2, 0, 3, 1]),
        [["cat", "ant"], ["dog"], ["bee"]],
        "cat\nant\n\n \n  dog \nbee",
        "2\n0\n3\n1\n",
        '["cat", "ant", "dog", "bee"]',
        "[[2, 0], [3], [1]]",
        '{"train": [{"cat": ["x"], "ant": []}, {"dog": []}, {"bee": []}], "val": []}',
    ],
    ids=str,
)
def test_an_order_may_be_a_list_or_a_file(order, tmp_path):
    if isinstance(order, str):
        file = tmp_path / ("order.json" if order[0] in "[{" else "order.txt")
        file.write_text(order)
        assert make_scenario("2+1x2", ABC, order=str(file)) == make_scenario(
            "2+1x2", ABC, order=file
        )
        order = file
    scenario = make_scenario("2+1x2", ABC, order=order)
    assert scenario.tasks == (("cat", "ant"), ("dog",), ("bee",))
    assert scenario.order == (2, 0, 3, 1)


def test_numbers_that_are_names_are_names():
    digits = ["3", "2", "1", "0"]
    assert make_scenario("2+2x1", digits, order=["1", "0", "3", "2"]).order == (2, 3, 0, 1)
    assert make_scenario("2+2x1", digits, order=[1, 0, 3, 2]).order == (2, 3, 0, 1)


def test_an_order_may_leave_classes_out_and_only_may_choose_them():
    ordered = make_scenario("1+1x1", ABC, order=["dog", "ant"])
    assert ordered.tasks == (("dog",), ("ant",))
    assert ordered.order == (3, 0)
    only = make_scenario("1+1x2", ABC, seed=1993, only=["dog", "cat", "ant"])
    whole = make_scenario("1+1x2", ["dog", "cat", "ant"], seed=1993)
    assert only == whole  # numbered as listed
    assert set(only.classes) == {"dog", "cat", "ant"}


@pytest.mark.parametrize("name", FROM_A_LIST)
def test_avk_takes_the_users_classes_and_task_sizes(name):
    count = FROM_A_LIST[name]
    classes, chosen = names(400), names(400)[::-1][:count]
    scenario = make_scenario(f"{name}:0+{count // 5}x5", classes, only=chosen)
    assert sizes(scenario) == [count // 5] * 5
    assert set(scenario.classes) == set(chosen)
    halves = [chosen[: count // 2], chosen[count // 2 :]]
    assert make_scenario(name, classes, order=halves).tasks == tuple(map(tuple, halves))
    for wrong in ({}, {"only": chosen[1:]}):
        with pytest.raises(ValueError, match=f"a list of its {count} classes"):
            make_scenario(f"{name}:0+{count // 5}x5", classes, **wrong)
    with pytest.raises(ValueError, match=f"here {name}:BASE"):
        make_scenario(name, classes, only=chosen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ucf101-10x5"}, r"101 classes \(51\+10x5\); the store has 4.*such as 2\+2x1\)$"),
        ({"name": "2+1x1"}, r"2\+1x1 is 3 classes; the store has 4.*or list the 3"),
        ({"name": "0+3x1"}, r"0\+3x1 is 3 classes; the store has 4.*such as 0\+3x1\+1\)"),
        ({"name": "1+2x2"}, r"5 classes; the store has 4.*such as 1\+2x1\+1\)$"),
        ({"name": "0+3x1+"}, "no scenario"),
        ({"name": "0+3x1+0"}, "no scenario"),
        ({"name": "2+2x2", "only": ["ant", "bee"]}, "6 classes; the list has 2"),
        (
            {"name": "ucf-10x5"},
            r"no scenario 'ucf-10x5'; choose from ave.*ucf101-10x5.*write BASE",
        ),
        ({"name": "demo:2+2x1"}, "no scenario"),
        ({"name": "2+0x3"}, "no scenario"),
        ({"name": "2x2"}, "no scenario"),
        ({"name": ""}, "no scenario"),
        ({"name": "given"}, "a list of classes for each task"),
        ({"name": "given", "order": ABC}, "a list of classes for each task"),
        ({"name": "2+2x1", "order": ["ant", "bee", "cow", "cat"]}, "1 of 4 .*: cow. Its 4 are ant"),
        ({"name": "2+2x1", "order": [0, 1, 2, 4]}, "1 of 4 .*: 4. "),
        ({"name": "2+2x1", "order": [0, 1, 2, -1]}, "1 of 4 .*: -1. "),
        ({"name": "2+2x1", "order": ["ant", "bee", "cat", "ant"]}, "listed twice: ant"),
        ({"name": "2+2x1", "order": [0, 1, 2, 0]}, "listed twice: ant"),
        ({"name": "2+2x1", "order": [["ant", "bee"], "cat", "dog"]}, "neither a list"),
        ({"name": "2+2x1", "order": [["ant", "bee"], []]}, "neither a list"),
        ({"name": "2+2x1", "order": [{"ant": 1}]}, "neither a list"),
        ({"name": "2+2x1", "order": ABC, "only": ABC}, "`order` or `only`"),
        ({"name": "1+1x3", "order": [["ant", "bee"], ["cat", "dog"]]}, "'given'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_what_does(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scenario(arguments.pop("name"), ABC, **arguments)


def test_a_long_list_of_strangers_is_cut(tmp_path):
    with pytest.raises(ValueError, match=r"101 of 101 .* and 91 more"):
        make_scenario("ucf101-10x5", ABC, order=[f"x{i}" for i in range(101)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("order.json", "[1,\n2", "line 2 is not JSON"),
        ("order.json", '{"class_list.pkl": [1], "other": [2]}', "'class_list.pkl', 'other'"),
        ("order.json", '{"train": 3}', "an object of 'train'"),
        ("order.json", "3", "contains 3"),
    ],
)
def test_a_file_that_is_no_list_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0+3x2+1", [3, 3, 1]),
        ("3+2x2", [3, 2, 2]),
        ("0+7x1", [7]),
        ("2+1+4", [2, 1, 4]),
        ("1+2x2+1x2", [1, 2, 2, 1, 1]),
    ],
)
def test_tasks_may_be_of_any_sizes(name, expected):
    scenario = make_scenario(name, names(7), seed=None)
    assert sizes(scenario) == expected
    assert list(scenario.classes) == names(7)


VCLIMB = {
    "train": [OrderedDict(bee=["a.mp4"], dog=["b.mp4"]), {"ant": ["c.mp4"]}],
    "val": [{"bee": ["d.mp4"]}, {"ant": ["e.mp4"]}],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        VCLIMB,
        defaultdict(list, VCLIMB),
        {"train": tuple(VCLIMB["train"]), "seen": {1, 2}, "rate": 0.5, "done": True},
        VCLIMB["train"],
        [["bee", "dog"], ["ant"]],
        [[1, 3], (0,)],
    ],
)
def test_tasks_may_come_from_a_pickle(value, protocol, tmp_path):
    (tmp_path / "tasks.pkl").write_bytes(pickle.dumps(value, protocol))
    scenario = make_scenario("given", ABC, order=tmp_path / "tasks.pkl")
    assert scenario.tasks == (("bee", "dog"), ("ant",))


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Runs(), r"builtins\.exec"),
        ([["ant"], Runs()], r"builtins\.exec"),
        ([[np.int64(3)]], "numpy.*scalar"),
        ([[Path("ant")]], r"pathlib\.|copyreg\._reconstructor"),
        (defaultdict(Path), r"pathlib"),
        (os.system, r"posix\.system"),
    ],
)
def test_a_pickle_of_more_than_data_is_refused_and_not_run(value, what, protocol, tmp_path):
    (tmp_path / "tasks.pickle").write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(ValueError, match=f"holds ({what}).* save it as JSON"):
        read_list(tmp_path / "tasks.pickle")


@pytest.mark.parametrize("data", [b"", b"not a pickle", pickle.dumps(VCLIMB)[:-9]])
def test_a_damaged_pickle_is_refused(data, tmp_path):
    (tmp_path / "tasks.pkl").write_bytes(data)
    with pytest.raises(ValueError, match="is no pickle, or is damaged"):
        read_list(tmp_path / "tasks.pkl")


def table(rows):
    frame = pd.DataFrame(rows, columns=["label", "split", "status"])
    return frame.rename_axis(index="row")


ROWS = [
    ("ant", "test", "ready"),
    ("cat", "train", "ready"),
    ("ant", "train", "ready"),
    ("bee", "train", "quarantined"),
    ("bee", "train", "ready"),
    ("bee", "test", "ready"),
    ("cat", "test", "ready"),
    ("cow", "train", "ready"),
    ("cat", "", "ready"),
    ("cat", "val", "quarantined"),
    ("ant", "train", "ready"),
    ("ant", "test", "pending"),
]


def test_each_task_has_its_clips_and_the_others_are_counted():
    scenario = make_scenario("1+2x1", ["ant", "bee", "cat"], order=["cat", "bee", "ant"])
    clips = divide(table(ROWS), scenario)
    assert [rows.tolist() for rows in clips.train] == [[1], [2, 4, 10]]
    assert [rows.tolist() for rows in clips.test] == [[6], [0, 5]]
    assert clips.left_out == {
        "of no task": 1,
        "in no split": 1,
        "in split 'val'": 1,
        "quarantined": 1,
        "pending": 1,
    }
    used = sum(map(len, [*clips.train, *clips.test]))
    assert used + sum(clips.left_out.values()) == len(ROWS)


def test_splits_may_have_other_names():
    rows = [(label, {"test": "val", "val": "x"}.get(s, s), status) for label, s, status in ROWS]
    scenario = make_scenario("1+2x1", ["ant", "bee", "cat"])
    clips = divide(table(rows), scenario, test="val")
    assert sorted(np.concatenate(clips.test)) == [0, 5, 6]
    with pytest.raises(ValueError, match=r"no clip to test on \(split 'test'\).*4 in split 'val'"):
        divide(table(rows), scenario)
    with pytest.raises(ValueError, match="cannot be for both"):
        divide(table(rows), scenario, test="train")


def test_classes_without_clips_are_named():
    rows = [*ROWS, ("dog", "train", "ready"), ("fly", "test", "quarantined")]
    scenario = make_scenario("3+1x2", ["ant", "bee", "cat", "dog", "fly"], seed=None)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        divide(table(rows), scenario)
    message = str(refused.value)
    assert "no clip to learn from (split 'train'): fly; " in message
    assert "no clip to test on (split 'test'): dog, fly. " in message
    assert "2 quarantined" in message


def test_a_store_without_splits_is_refused():
    rows = [(label, "", status) for label, _, status in ROWS]
    with pytest.raises(ValueError, match="11 in no split, 1 of no task"):
        divide(table(rows), make_scenario("1+2x1", ["ant", "bee", "cat"]))


# Classes whose names are numbers


def test_folders_named_by_numbers_are_drawn_as_published_code_draws_them(tmp_path):
    for label in range(12):
        (tmp_path / str(label)).mkdir()
        (tmp_path / str(label) / "a.mp4").write_bytes(b"")
    classes = read_layout(tmp_path).classes
    assert classes == tuple(map(str, range(12)))
    scenario = make_scenario("0+4x3", classes, 1993)
    assert scenario.tasks[0] == ("4", "2", "6", "7")
    assert scenario.order[:4] == (4, 2, 6, 7)
    # A store whose classes were sorted as text gives the same.
    assert make_scenario("0+4x3", sorted(classes), 1993) == scenario


def test_numbers_in_an_order_mean_the_classes_of_those_names(tmp_path):
    classes = ["1", "2", "10"]
    assert make_scenario("1+2x1", classes, order=[10, 1, 2]).tasks == (("10",), ("1", "2"))
    assert make_scenario("given", classes, order=[["2"], [10, 1]]).tasks == (("2",), ("10", "1"))
    assert make_scenario("1+1x1", classes, seed=None, only=[10, 2]).tasks == (("10",), ("2",))
    file = tmp_path / "order.json"
    file.write_text("[10, 1, 2]")
    assert make_scenario("1+2x1", classes, order=file).tasks == (("10",), ("1", "2"))
    with pytest.raises(ValueError, match=r"1 of 3 entries are no class.*: 0\. .*that name them"):
        make_scenario("1+2x1", classes, order=[0, 1, 2])


def test_numbers_in_an_order_are_positions_where_classes_have_words_as_names():
    assert make_scenario("1+1x1", ["a", "1"], order=[1, 0]).tasks == (("1",), ("a",))


def held_out_table(more=()):
    """Ten clips a class in training, one of them twice, and four to test on."""
    rows = [(label, split, "ready", f"{label}{split}{i}") for label in ("ant", "bee")
            for split, count in (("train", 10), ("test", 4)) for i in range(count)]  # fmt: skip
    rows += [("ant", "train", "ready", "anttrain0"), *more]
    frame = pd.DataFrame(rows, columns=["label", "split", "status", "digest"])
    return frame.assign(start_seconds=np.nan, end_seconds=np.nan).rename_axis(index="row")


def test_a_share_of_the_training_clips_is_tested_on_and_not_trained_on():
    scenario, clips = make_scenario("1+1x1", ["ant", "bee"], None), held_out_table()
    whole, part = divide(clips, scenario), divide(clips, scenario, validation=0.3)
    for task in range(2):
        assert not set(part.test[task]) & set(part.train[task])
        assert sorted([*part.test[task], *part.train[task]]) == whole.train[task].tolist()
        assert clips["digest"][part.test[task]].nunique() == 3
    twice = clips.index[clips["digest"] == "anttrain0"]
    assert set(twice) <= set(part.test[0]) or set(twice) <= set(part.train[0])
    assert part.left_out == {"in split 'test'": 8}
    assert part.shared == 0
    # Neither the order of the classes nor clips of another class change what is held out.
    more = held_out_table([("cow", "train", "ready", f"cow{i}") for i in range(5)])
    again = divide(more, make_scenario("2+1x1", ["ant", "bee", "cow"], 1993), validation=0.3)
    assert set(np.concatenate(part.test)) <= set(np.concatenate(again.test))
    no_test = clips[clips["split"] == "train"]
    assert divide(no_test, scenario, validation=0.3).test[0].tolist() == part.test[0].tolist()


def test_one_clip_of_a_class_cannot_be_held_out():
    rows = held_out_table([("cow", "train", "ready", "cow0"), ("cow", "test", "ready", "cow1")])
    scenario = make_scenario("1+1x2", ["ant", "bee", "cow"], None)
    with pytest.raises(ValueError, match=r"no clip to test on \(split 'held out of training'\): "
                                         "cow"):  # fmt: skip
        divide(rows, scenario, validation=0.5)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="a share of the training clips"):
            divide(rows, scenario, validation=share)

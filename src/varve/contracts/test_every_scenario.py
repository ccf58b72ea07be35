"""Contract of scenarios: tasks that divide classes of the store, by classes and seed alone.

A scenario that is made for certain classes has them as its attribute `classes`: a number, or a
list of names. Others are tried on several numbers of classes.
"""

import pytest

from varve.contracts.options import names
from varve.pipeline import registry
from varve.pipeline.experiments.scenarios import SEEDS, make_scenario

COUNTS = (12, 10, 8, 6, 4, 20, 24, 28, 30, 51, 101, 174, 200, 400)


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", names(metafunc.config, "scenarios"), scope="module")


@pytest.fixture(scope="module")
def classes(name) -> list[str]:
    """Class names that the scenario takes."""
    wanted = getattr(registry.variant("scenarios", name), "classes", None)
    if isinstance(wanted, list | tuple):
        return list(wanted)
    errors = []
    for count in COUNTS if wanted is None else (wanted,):
        labels = [f"class {number:03}" for number in range(count)]
        try:
            make_scenario(name, labels)
            return labels
        except ValueError as error:
            errors.append(str(error))
    pytest.fail(f"{name} takes none of {COUNTS} classes: set its attribute `classes`; {errors[0]}")


@pytest.mark.parametrize("seed", SEEDS)
def test_every_task_has_classes_of_the_store_and_none_comes_twice(name, classes, seed):
    scenario = make_scenario(name, classes, seed)
    assert scenario.name == name
    assert all(scenario.tasks)
    assert len(set(scenario.classes)) == len(scenario.classes)
    assert set(scenario.classes) <= set(classes)


def test_equal_seeds_give_equal_tasks_and_the_classes_are_not_changed(name, classes):
    labels = list(classes)
    assert make_scenario(name, labels, 7) == make_scenario(name, classes, 7)
    assert labels == classes


def test_its_order_names_the_classes(name, classes):
    scenario = make_scenario(name, classes, 1993)
    assert len(scenario.order) == len(scenario.classes)
    assert len(set(scenario.order)) == len(scenario.order)
    assert set(scenario.order) <= set(range(len(classes)))


def test_a_users_scenario_is_named_by_its_code(name, classes):
    digest = registry.source_digest("scenarios", name)
    assert make_scenario(name, classes).source_digest == digest

"""Kills: at every write, at any moment, of any process; what a next build makes of it."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline import execute as execution
from pipeline.blocks import Block, ClipWork, DecodedBlock, FileWork, Job, Report
from pipeline.building import build
from pipeline.execute import Events, Lost
from pipeline.spec import BuildSpec, Runtime
from pipeline.synthetic import make_dataset
from stores import FeatureStore, atomic

SERIAL = Runtime(serial=True)
SPEC = BuildSpec(("resnet18:random-0",), ("stem:pool", "layer1.0:pool"), frames=16)
OPTIONS = [
    "--backbone=resnet18:random-0",
    "--keep=stem:pool",
    "--keep=layer1.0:pool",
    "--frames=16",
]


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kill") / "set"
    make_dataset(root, clips_per_class=8, classes=("grow", "fade in"))
    return root


@pytest.fixture(scope="session")
def undisturbed(videos, tmp_path_factory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("kill") / "s.zarr"
    build(videos, store, SPEC, runtime=SERIAL)
    return bytes_of(store)


def bytes_of(store: Path) -> dict[str, bytes]:
    """Everything but the build logs, which tell times and machines."""
    files = (p for p in store.rglob("*") if p.is_file() and "logs" not in p.parts)
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


def start(videos: Path, store: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline.cli", "build", str(videos), "--store", str(store)]
    return subprocess.Popen(
        [*command, *OPTIONS, *options], start_new_session=True, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2],
    )  # fmt: skip


class Killed(BaseException):
    """Stands for a kill: nothing catches it on the way."""


def test_a_kill_at_any_write_costs_nothing_but_that_write(
    videos, undisturbed, tmp_path, monkeypatch
):
    """The process ends before, and in another try after, each file it puts in place."""
    real = atomic.write
    count = 0

    def counting(*arguments):
        nonlocal count
        count += 1
        real(*arguments)

    monkeypatch.setattr(atomic, "write", counting)
    build(videos, tmp_path / "count.zarr", SPEC, runtime=SERIAL)
    assert count > 15
    rng = random.Random(0)
    moments = [(n, after) for n in range(count) for after in (False, True)]
    for n, after in rng.sample(moments, 6):
        store = tmp_path / f"{n}-{after}.zarr"
        left = n

        def dying(*arguments, after=after):
            nonlocal left
            if left == 0 and not after:
                raise Killed
            real(*arguments)
            if left == 0:
                raise Killed
            left -= 1

        monkeypatch.setattr(atomic, "write", dying)
        with pytest.raises(Killed):
            build(videos, store, SPEC, runtime=SERIAL)
        monkeypatch.setattr(atomic, "write", real)
        build(videos, store, SPEC, runtime=SERIAL)
        assert bytes_of(store) == undisturbed, (n, after)


def test_a_sigkill_of_the_whole_group_at_random_moments(videos, undisturbed, tmp_path):
    store = tmp_path / "s.zarr"
    rng = random.Random(int(time.time()))
    seed_said = rng.random()
    for attempt in range(3):
        process = start(videos, store, *(["--serial"] if attempt else []))
        time.sleep(4 + 5 * rng.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start(videos, store)
    assert process.wait(timeout=120) == 1  # done, with the broken clips quarantined
    assert bytes_of(store) == undisturbed, seed_said


def test_what_was_staged_before_a_kill_is_not_computed_again(
    videos, undisturbed, tmp_path, monkeypatch
):
    store = tmp_path / "s.zarr"
    process = start(videos, store, "--serial")
    staged = store / ".staging"
    deadline = time.monotonic() + 60
    while not list(staged.rglob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(staged.rglob("*.npz"))
    report = build(videos, store, SPEC, runtime=SERIAL)
    assert report.adopted
    assert report.computed < 23
    assert bytes_of(store) == undisturbed


def test_workers_and_children_end_with_a_killed_builder(videos, tmp_path):
    process = start(videos, tmp_path / "s.zarr")
    family: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(family) < 3:
        family = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.2)
    assert len(family) >= 3
    os.kill(process.pid, signal.SIGKILL)  # the builder alone
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [p.cmdline() for p in alive]


def test_four_workers_and_one_give_equal_bytes(videos, undisturbed, tmp_path):
    build(videos, tmp_path / "s.zarr", SPEC, runtime=Runtime(workers=4))
    assert bytes_of(tmp_path / "s.zarr") == undisturbed


def test_a_file_that_kills_its_worker_is_given_up_alone(tmp_path, monkeypatch):
    """Real workers, really killed; the file beside the culprit is computed."""

    def decode(job, block):
        return DecodedBlock(block, (), (), 0.0)

    def forward(job, decoded):
        if any("poison" in file.path for file in decoded.block.files):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return Report(decoded.block, [], {}, {})

    monkeypatch.setattr(execution, "decode", decode)
    monkeypatch.setattr(execution, "forward", forward)
    names = ["a", "b", "poison", "c", "d"]
    files = [FileWork(name, 0, 0, (ClipWork((i,), b"k" * 16, None, None, ()),))
             for i, name in enumerate(names)]  # fmt: skip
    blocks = [Block(0, tuple(files[:3])), Block(1, tuple(files[3:]))]
    job = Job(tmp_path, (), 1, 10.0)
    answers = list(execution.execute(job, blocks, Runtime(workers=1), Events()))
    lost = [answer for answer in answers if isinstance(answer, Lost)]
    assert [file.path for answer in lost for file in answer.block.files] == ["poison"]
    assert lost[0].failure.reason == "crashed"
    done = [file.path for answer in answers if isinstance(answer, Report)
            for file in answer.block.files]  # fmt: skip
    assert sorted(done) == ["a", "b", "c", "d"]


def test_an_interrupt_ends_with_130_and_the_next_build_goes_on(videos, undisturbed, tmp_path):
    store = tmp_path / "s.zarr"
    process = start(videos, store)
    deadline = time.monotonic() + 60
    while not list((store / ".staging").rglob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    FeatureStore.open(store)
    build(videos, store, SPEC, runtime=SERIAL)
    assert bytes_of(store) == undisturbed

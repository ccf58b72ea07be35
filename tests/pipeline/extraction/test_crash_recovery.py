"""Kills: at every write, at any moment, of any process; what a next build makes of it."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from varve.pipeline.config import BuildSpec, Runtime
from varve.pipeline.extraction import schedule
from varve.pipeline.extraction.blocks import Block
from varve.pipeline.extraction.build import build
from varve.pipeline.extraction.extract import ClipWork, FileWork
from varve.pipeline.extraction.schedule import Events, Lost
from varve.pipeline.extraction.worker import DecodedBlock, Job, Report
from varve.stores import FeatureStore, atomic, lock

SERIAL = Runtime(serial=True)
SPEC = BuildSpec(("resnet18:random-0",), ("stem:pool", "layer1.0:pool"), frames=8)
OPTIONS = [
    "--backbone=resnet18:random-0",
    "--keep=stem:pool",
    "--keep=layer1.0:pool",
    "--frames=8",
]

pytestmark = pytest.mark.usefixtures("loaded_once", "children_kept")


@pytest.fixture(scope="module")
def videos(dataset) -> Path:
    return dataset(("grow", "fade in"), 8, broken=True)


@pytest.fixture(scope="module")
def undisturbed(videos, built_once) -> dict[str, bytes]:
    return bytes_of(built_once(videos, SPEC))


def bytes_of(store: Path) -> dict[str, bytes]:
    """Everything but the build logs, which tell times and machines."""
    files = (p for p in store.rglob("*") if p.is_file() and "logs" not in p.parts)
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


def start(videos: Path, store: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "varve", "build", str(videos), "--store", str(store)]
    return subprocess.Popen(
        [*command, *OPTIONS, *options], start_new_session=True, stderr=subprocess.DEVNULL,
        # What a shell starts in the background ignores it, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[3],
    )  # fmt: skip


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def wait_for_lock(process: subprocess.Popen, store: Path) -> None:
    """Wait until the process has the store's lock, whose file contains its number."""
    file = store / lock.FILE
    wait_for(lambda: file.exists() and f'"pid": {process.pid},' in file.read_text())


def staged(store: Path) -> list[Path]:
    return list((store / ".staging").rglob("*.npz"))


def named(*names: str) -> tuple[FileWork, ...]:
    """Files of one clip each."""
    return tuple(
        FileWork(name, 0, 0, (ClipWork((i,), b"k" * 16, None, None, {}),))
        for i, name in enumerate(names)
    )


class Killed(BaseException):
    """Stands for a kill: nothing catches it on the way."""


def test_a_kill_at_any_write_costs_nothing_but_that_write(dataset, tmp_path, monkeypatch):
    """The process ends before, and in another try after, a file of each kind that it writes."""
    monkeypatch.setattr("varve.pipeline.extraction.blocks.CPU_BLOCK_PICTURES", 8)
    videos, spec = dataset(("grow", "fade in"), 2, broken=True), replace(SPEC, frames=2)
    real, kinds = atomic.write, []

    def noting(store, target, *pieces):
        parts = target.relative_to(store).parts
        kinds.append((parts[0], len(parts)))
        real(store, target, *pieces)

    monkeypatch.setattr(atomic, "write", noting)
    build(videos, tmp_path / "whole.zarr", spec, runtime=SERIAL)
    undisturbed = bytes_of(tmp_path / "whole.zarr")
    assert len(kinds) > 20
    assert len(set(kinds)) > 10
    rng = random.Random(0)
    writes = [[n for n, k in enumerate(kinds) if k == kind] for kind in sorted(set(kinds))]
    for n, after in itertools.product(map(rng.choice, writes), (False, True)):
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
            build(videos, store, spec, runtime=SERIAL)
        monkeypatch.setattr(atomic, "write", real)
        build(videos, store, spec, runtime=SERIAL)
        assert bytes_of(store) == undisturbed, (n, after)


def test_kills_at_random_moments_leave_no_process_and_cost_no_byte(videos, undisturbed, tmp_path):
    store, seed = tmp_path / "s.zarr", int(time.time())
    rng = random.Random(seed)
    process = start(videos, store)
    builder = psutil.Process(process.pid)
    wait_for(lambda: len(builder.children(recursive=True)) >= 3)
    time.sleep(6 * rng.random())
    family = builder.children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)  # the builder alone
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [p.cmdline() for p in alive]

    process = start(videos, store, "--serial")
    wait_for_lock(process, store)
    time.sleep(2 * rng.random())
    os.killpg(process.pid, signal.SIGKILL)  # the whole group
    process.wait()
    build(videos, store, SPEC)
    assert bytes_of(store) == undisturbed, seed


def test_what_was_staged_before_a_kill_is_not_computed_again(
    videos, undisturbed, tmp_path, monkeypatch
):
    store = tmp_path / "s.zarr"
    process = start(videos, store, "--serial")
    wait_for(lambda: staged(store))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert staged(store)
    report = build(videos, store, SPEC, runtime=SERIAL)
    assert report.adopted
    assert report.computed < 23
    assert bytes_of(store) == undisturbed


def test_many_small_blocks_over_workers_give_the_bytes_of_one_process(
    videos, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr("varve.pipeline.extraction.blocks.CPU_BLOCK_PICTURES", 32)
    build(videos, tmp_path / "s.zarr", SPEC, runtime=Runtime(workers=2))
    assert bytes_of(tmp_path / "s.zarr") == undisturbed


def test_a_file_that_kills_its_worker_is_given_up_alone(tmp_path, monkeypatch):
    """Real workers, really killed; the file beside the culprit is computed."""

    def decode(job, block):
        return DecodedBlock(block)

    def forward(job, decoded):
        if any("poison" in file.path for file in decoded.block.files):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return Report(decoded.block, [], {}, {})

    monkeypatch.setattr(schedule, "decode", decode)
    monkeypatch.setattr(schedule, "forward", forward)
    blocks = [Block(0, named("a", "poison")), Block(1, named("b"))]
    job = Job(tmp_path, (), 1, 10.0)
    answers = list(schedule.run_blocks(job, blocks, Runtime(workers=1), Events()))
    lost = [answer for answer in answers if isinstance(answer, Lost)]
    assert [file.path for answer in lost for file in answer.block.files] == ["poison"]
    assert lost[0].failure.reason == "crashed"
    done = [file.path for answer in answers if isinstance(answer, Report)
            for file in answer.block.files]  # fmt: skip
    assert sorted(done) == ["a", "b"]


@pytest.mark.parametrize("position", range(5))
def test_of_many_files_the_one_that_kills_workers_is_found_and_no_other_is_lost(
    tmp_path, monkeypatch, position
):
    """Without workers: what is tried next after a block was lost."""
    tried = []

    def run(client, job, blocks, device, events, in_flight, suspects):
        for block in blocks:
            tried.append([file.path for file in block.files])
            if "poison" in tried[-1]:
                suspects.append(block)
            else:
                yield Report(block, [], {}, {})

    monkeypatch.setattr(schedule, "_client", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(schedule, "_slots", lambda *_: 1)
    monkeypatch.setattr(schedule, "_run", run)
    names = [*"abcd"[:position], "poison", *"abcd"[position:]]
    blocks = [Block(0, named(*names)), Block(1, named("e", "f"))]
    job = Job(tmp_path, (), 1, 10.0)
    answers = list(schedule.run_blocks(job, blocks, Runtime(), Events()))
    lost = [answer for answer in answers if isinstance(answer, Lost)]
    assert [[file.path for file in answer.block.files] for answer in lost] == [["poison"]]
    done = [file.path for answer in answers if isinstance(answer, Report)
            for file in answer.block.files]  # fmt: skip
    assert sorted(done) == list("abcdef")
    assert tried[:3] == [names, ["e", "f"], names], "tried alone before it is halved"


def test_an_interrupt_ends_with_130_and_the_next_build_resumes(videos, undisturbed, tmp_path):
    store = tmp_path / "s.zarr"
    process = start(videos, store)
    wait_for(lambda: staged(store))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    FeatureStore.open(store)
    build(videos, store, SPEC, runtime=SERIAL)
    assert bytes_of(store) == undisturbed

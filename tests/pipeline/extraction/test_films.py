"""Films: builds of long videos use the memory of short ones, and resume in the middle."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest

from varve import BuildSpec, FeatureStore, Runtime, build, load_plugin
from varve.pipeline.config import PAGE_FRAMES
from varve.pipeline.decoders._index import KEPT_PACKET_BYTES
from varve.pipeline.extraction import blocks
from varve.pipeline.progress import Progress
from varve.pipeline.registry import VARIABLE, unregister
from varve.stores import pages, staging

pytestmark = pytest.mark.usefixtures("tiny", "children_kept")
SERIAL = Runtime(serial=True)
SPEC = BuildSpec("tiny64:random-0", "layer1.0:pool", sampling="all", dtype="float32")
# 30 minutes. All its pictures at once would be 135 MB.
FRAMES, FPS = 900, Fraction(1, 2)
PAGES = -(-FRAMES // PAGE_FRAMES)
BOUND_BYTES = 96 << 20


class Recorded(Progress):
    """Records the totals and the advances of progress bars, and the peak memory meanwhile."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.totals: dict[str, tuple[int, str]] = {}
        self.advances: dict[str, list[int]] = defaultdict(list)

    @contextmanager
    def bars(self, began: float | None = None, **totals: tuple[int, str]) -> Iterator[None]:
        self.totals |= totals
        with peak_of_memory() as peak:
            yield
        self.peak_bytes = peak[0]

    def advance(self, name: str, count: int, frames: int = 0) -> None:
        self.advances[name] += [count] if count else []


@contextmanager
def peak_of_memory() -> Iterator[list[int]]:
    """Sample the resident bytes of this process and its children; the result is the largest sum."""
    peak, ended, ours = [0], threading.Event(), psutil.Process()

    def sample() -> None:
        while not ended.wait(0.02):
            family = [ours, *ours.children(recursive=True)]
            total = 0
            for process in family:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def bytes_of(store: Path) -> dict[str, bytes]:
    files = (p for p in store.rglob("*") if p.is_file() and "logs" not in p.parts)
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, film) -> Path:
    root = tmp_path_factory.mktemp("film") / "set"
    (root / "a").mkdir(parents=True)
    film(root / "a" / "film.mp4", FRAMES, FPS)
    return root


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory, film):
    """A store of the film, its progress, and the largest memory of this build and of a short one's.

    The short one has as many frames as a block of the film.
    """
    short, out = tmp_path_factory.mktemp("short"), tmp_path_factory.mktemp("built")
    (short / "a").mkdir()
    film(short / "a" / "clip.mp4", blocks.CPU_BLOCK_PICTURES, FPS)
    build(short, out / "warm.zarr", SPEC, runtime=SERIAL)
    gc.collect()
    progress, of_film = Recorded(), Recorded()
    build(short, out / "short.zarr", SPEC, runtime=SERIAL, progress=progress)
    build(folder, out / "film.zarr", SPEC, runtime=SERIAL, progress=of_film)
    return out / "film.zarr", of_film, of_film.peak_bytes - progress.peak_bytes


def test_every_frame_of_half_an_hour_is_kept_with_its_time(built, folder, tmp_path):
    (feature,) = FeatureStore.open(built[0]).features()
    assert feature.shape[:2] == (PAGES, PAGE_FRAMES)
    assert feature.valid.all()
    assert feature.frames(0).tolist() == list(range(FRAMES))
    np.testing.assert_allclose(feature.times(0), np.arange(FRAMES) / float(FPS), atol=1e-6)
    direct = BuildSpec("tiny64:random-0", "layer1.0:pool", frames=32, dtype="float32")
    build(folder, tmp_path / "direct.zarr", direct, runtime=SERIAL)
    (alone,) = FeatureStore.open(tmp_path / "direct.zarr").features()
    np.testing.assert_allclose(feature.sampled(frames=32).read(), alone.read(), atol=1e-6)


def test_a_film_takes_the_memory_of_a_short_clip(built):
    assert built[2] < BOUND_BYTES


def test_the_progress_of_a_film_is_that_of_its_pages(built):
    progress = built[1]
    for name in ("decode", "forward"):
        assert progress.totals[name] == (PAGES, "pages")
        advances = progress.advances[name]
        assert sum(advances) == PAGES
        assert max(advances) * PAGE_FRAMES <= blocks.CPU_BLOCK_PICTURES


def done_pages(store: Path) -> set[int]:
    """Pages of the film that are staged."""
    rows: set[int] = set()
    for file in (store / staging.FOLDER).rglob("*.npz"):
        rows |= {row for row, _ in staging.rows_and_keys(file)}
    return rows


def test_a_film_that_is_killed_resumes_at_the_page_and_ends_with_the_same_bytes(
    built, folder, tiny, tmp_path, monkeypatch
):
    store = tmp_path / "s.zarr"
    command = [sys.executable, "-m", "varve", "build", str(folder), "--store", str(store),
               "--serial", "--plugin", str(tiny), "--backbone", "tiny64:random-0",
               "--keep", "layer1.0:pool", "--sampling", "all", "--dtype", "float32"]  # fmt: skip
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list((store / staging.FOLDER).rglob("*.npz"))) < 3:
        assert process.poll() is None, "there was nothing to interrupt"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = done_pages(store)
    assert 0 < len(before) < PAGES
    assert before == set(range(len(before)))
    decoded = []
    real = blocks.video_blocks

    def noting(*arguments):
        planned = real(*arguments)
        decoded.extend(row for block in planned for clip in block.clips for row in clip.rows)
        return planned

    monkeypatch.setattr("varve.pipeline.extraction.plan.video_blocks", noting)
    report = build(folder, store, SPEC, runtime=SERIAL)
    assert sorted(set(decoded)) == list(range(len(before), PAGES))
    assert report.adopted == len(before)
    assert report.frames == FRAMES - len(before) * PAGE_FRAMES
    assert bytes_of(store) == bytes_of(built[0])
    assert len(pages.read(store, "stride-1")) == PAGES


@pytest.mark.slow
def test_two_hours_at_30_frames_a_second_take_the_memory_of_half_an_hour(built, film, tmp_path):
    frames = 2 * 3600 * 30
    (tmp_path / "set" / "a").mkdir(parents=True)
    film(tmp_path / "set" / "a" / "film.mp4", frames, 30)
    progress = Recorded()
    build(tmp_path / "set", tmp_path / "s.zarr", SPEC, runtime=SERIAL, progress=progress)
    (feature,) = FeatureStore.open(tmp_path / "s.zarr").features()
    assert feature.valid.all()
    np.testing.assert_array_equal(feature.frames(0), np.arange(frames))
    np.testing.assert_allclose(feature.times(0), np.arange(frames) / 30, atol=1e-6)
    assert sum(progress.advances["decode"]) == -(-frames // PAGE_FRAMES)
    # The packets of the film, up to 64 MiB, stay in the memory of the decoding process.
    assert progress.peak_bytes - built[1].peak_bytes < BOUND_BYTES + KEPT_PACKET_BYTES


SLOW = """
import time
from varve import register
from varve.pipeline.decoders import Undecodable
from varve.pipeline.decoders.pyav import pictures


@register("decoders", "slow")
def slow(path, index, wanted_N):
    for number, image in pictures(path, index, wanted_N):
        if number == 330 and "hangs" in path:
            time.sleep(3600)
        if number == 330 and "fails" in path:
            raise Undecodable("corrupt", "a part cannot be read")
        time.sleep(0.015)
        yield number, image
"""


def test_the_deadline_is_of_pages_and_a_film_that_fails_in_the_middle_stops_no_other(
    tmp_path, film, monkeypatch
):
    """A film takes 6 seconds, and a page of it 1."""
    monkeypatch.setattr(blocks, "CPU_BLOCK_PICTURES", PAGE_FRAMES)
    monkeypatch.setenv(VARIABLE, "")  # decoding processes need no network
    (tmp_path / "set" / "a").mkdir(parents=True)
    for name in ("fails", "hangs", "whole"):
        film(tmp_path / "set" / "a" / f"{name}.mp4", 384, 25)
        # Other bytes, at the end, where no player looks.
        with open(tmp_path / "set" / "a" / f"{name}.mp4", "ab") as file:
            file.write(b"\0\0\0\x0efree" + f"{name:6}".encode())
    (tmp_path / "slow.py").write_text(SLOW)
    load_plugin(tmp_path / "slow.py")
    try:
        spec = BuildSpec("tiny64:random-0", "layer1.0:pool", sampling="all", decoder="slow")
        runtime = Runtime(serial=True, deadline_seconds=4.0)
        report = build(tmp_path / "set", tmp_path / "s.zarr", spec, runtime=runtime)
    finally:
        unregister("decoders", "slow")
    assert report.clips == {"ready": 1, "quarantined": 2}
    assert report.seconds["decode"] > 5 + 5 + 5 + 4
    table = FeatureStore.open(tmp_path / "s.zarr").clips.set_index("path")
    assert table.loc["a/whole.mp4", "status"] == "ready"
    expected = {
        "hangs": ("timeout", "not decoded within 4 seconds"),
        "fails": ("corrupt", "a part cannot be read"),
    }
    for name, (reason, detail) in expected.items():
        clip = table.loc[f"a/{name}.mp4"]
        assert clip["reason"] == reason
        assert clip["detail"] == f"frames 320 to 383, from 12.80 s on: {detail}"
    (feature,) = FeatureStore.open(tmp_path / "s.zarr").features()
    assert feature.valid_cells.sum() == 3 * 6 - 2

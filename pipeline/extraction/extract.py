"""Extraction: the one way to decode videos and to run networks over them.

`extract(files, passes)` decodes each file once, for all of its clips and passes, and runs the
passes over the frames. Its halves, `decode_files` and `run_passes`, are the two tasks of a build's
workers. `route`, `verify` and the figures call `extract` itself.
"""

import os
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from varve.pipeline.config import FrameSet
from varve.pipeline.datasets.media import size_and_mtime
from varve.pipeline.decoders import Decoded, DecodePool, Facts, Failure, Request, Stretch, decode
from varve.pipeline.extraction.forward import Cells, adopted, filled, run_pages, run_pass
from varve.pipeline.extraction.passes import GROUP_FRAMES, Pass
from varve.pipeline.registry import plugins
from varve.stores.clips import row_key
from varve.stores.pages import PAGE_FRAMES

if TYPE_CHECKING:
    from varve.pipeline.backbones import Backbone

# Files whose frames are in memory at once.
FILES_AT_ONCE = 32
# Pages of a film that are one request to a decoding child, at most.
PART_PAGES = 8


@dataclass(frozen=True)
class ClipWork:
    """One clip to decode or to compute.

    Attributes:
        rows: Rows of the table: all clips with these bytes and this interval.
        key: Their row key, 16 bytes.
        start_seconds, end_seconds: The interval; None for the beginning or end of the file.
        needs: Output numbers to compute, by pass number. A pass without outputs only has its
            frames decoded, which describes the clip.
        source_row: Row of the feature that the clip starts from; -1 for the video.
        part: Of a whole video, whose rows are pages or windows: the first of the file's kept
            frames, and the number of frames; None for the frames that the frame sets choose.
        source_frames: Frames of the pages of a column of whole videos that the clip starts from, as
            rows of the flattened pages; empty where the clip starts from a cell or the video.
    """

    rows: tuple[int, ...]
    key: bytes
    start_seconds: float | None
    end_seconds: float | None
    needs: Mapping[int, tuple[int, ...]]
    source_row: int = -1
    part: tuple[int, int] | None = None
    source_frames: tuple[int, ...] = ()

    def frames_in(self, frame_set: FrameSet) -> int:
        """Return the number of its frames that go through a network."""
        return self.part[1] if self.part and frame_set.in_pages else frame_set.frames

    def runs_in(self, frame_set: FrameSet) -> int:
        """Return how many clips it is to a network: of a page, every group of frames is one."""
        return -(-self.frames_in(frame_set) // GROUP_FRAMES) if frame_set.in_pages else 1


@dataclass(frozen=True)
class FileWork:
    """One file to open and its clips; size and time of change are those of its hashed bytes."""

    path: str
    size_bytes: int
    mtime_ns: int
    clips: tuple[ClipWork, ...]


@dataclass(frozen=True)
class ClipResult:
    """The result of one clip.

    Attributes:
        work: The requested clip.
        frames: By frame set, uint8 [T, S, S, 3] pictures or float32 [T, samples] of audio.
        facts: Facts of the video; None for a clip that starts from a feature, or that failed.
        failure: The reason why there are no frames and no cells; None for success.
        cells: Stored bits [*cell] by column (`ColumnSpec.relative_path`).
        overflowed: Short fingerprints of the columns whose number format cannot represent the
            clip's value. They have no cell.
    """

    work: ClipWork
    frames: Mapping[FrameSet, np.ndarray] = field(default_factory=dict, repr=False)
    facts: Facts | None = None
    failure: Failure | None = None
    cells: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    overflowed: tuple[str, ...] = ()


def extract(
    files: Iterable[FileWork],
    passes: Sequence[Pass],
    networks: "Mapping[str, Backbone] | None" = None,
    *,
    children: int = 1,
    deadline_seconds: float = 120.0,
) -> Iterator[ClipResult]:
    """Decode files and run passes over their frames, in this process.

    A cell has the bits that a build gives it: neither depends on the other clips of a batch.

    Args:
        files: Files and their clips; see `file_work`.
        passes: Passes from the videos. A pass without outputs gives its frames alone.
        networks: Backbones by name; passes of other names load theirs.
        children: Decoding processes; 0 decodes in this process, without a deadline.
        deadline_seconds: Deadline for one file.

    Yields:
        A result per clip, in the order of the files and their clips.

    Raises:
        NetworkDiffers: A network is not the one whose fingerprints a pass has.
    """
    try:
        with adopted(networks or {}):
            for group in batched(files, FILES_AT_ONCE):
                decoded = decode_files(group, passes, children, deadline_seconds)
                yield from run_passes(decoded, passes)
    finally:
        if children:
            close_pools()


def file_work(
    path: Path,
    digest: str,
    passes: Sequence[Pass],
    row: int = 0,
    start_seconds: float = np.nan,
    end_seconds: float = np.nan,
) -> FileWork:
    """Ask for every output of some passes of one clip.

    Args:
        path: The video's file, or its folder of frames.
        digest: Digest of its bytes (`media.content_digest`). It seeds what is drawn of the frames.
        row: Row of the table, to recognise the result by.
        start_seconds: Start of the interval; NaN for the beginning of the file.
        end_seconds: End of the interval; NaN for the end of the file.

    Raises:
        OSError: The file cannot be read.
    """
    size_bytes, mtime_ns = size_and_mtime(path)
    needs = {number: tuple(range(len(pass_.outputs))) for number, pass_ in enumerate(passes)}
    key = row_key(digest, start_seconds, end_seconds)
    interval = optional(start_seconds), optional(end_seconds)
    return FileWork(str(path), size_bytes, mtime_ns, (ClipWork((row,), key, *interval, needs),))


def optional(seconds: float) -> float | None:
    """Return None for the NaN that stands for an open end of an interval."""
    return None if np.isnan(seconds) else float(seconds)


def decode_files(
    files: Sequence[FileWork], passes: Sequence[Pass], children: int, deadline_seconds: float
) -> list[ClipResult]:
    """Decode files, each once, and return a result per clip: frames and facts, or a failure."""
    requests = [_request(file, passes) for file in files]
    waiting = [
        _pool_of(file, children, deadline_seconds).submit(request)
        for file, request in zip(files if children else (), requests, strict=bool(children))
    ]
    results: list[ClipResult] = []
    for number, (file, request) in enumerate(zip(files, requests, strict=True)):
        answers = waiting[number].result() if children else decode(request)
        if _changed(file):
            failure = Failure("changed", "the file changed while it was read; build again")
            answers = [failure] * len(file.clips)
        for work, answer in zip(file.clips, answers, strict=True):
            if isinstance(answer, Decoded):
                frames = dict(zip(request.frame_sets, answer.frames, strict=True))
                results.append(ClipResult(work, frames, answer.facts))
            else:
                assert isinstance(answer, Failure)  # a timeline is asked for without clips
                results.append(ClipResult(work, failure=answer))
    return results


def run_passes(
    clips: Sequence[ClipResult],
    passes: Sequence[Pass],
    store: Path | None = None,
    calls: "Counter[str] | None" = None,
) -> list[ClipResult]:
    """Run every pass over decoded clips, or over features of the store, and add the cells.

    Args:
        store: The store's folder, for passes that start from a feature.
        calls: Counts the calls of each stage, "network stage".

    Raises:
        NetworkDiffers: This process builds another network than the plan was made with.
    """
    cells: list[dict[str, np.ndarray]] = [{} for _ in clips]
    overflowed: list[dict[str, None]] = [{} for _ in clips]
    for number, pass_ in enumerate(passes):
        needs = {
            i: needed
            for i, clip in enumerate(clips)
            if clip.failure is None and (needed := clip.work.needs.get(number))
        }
        if not needs:
            continue
        inputs: Sequence[np.ndarray] | Cells
        if pass_.source:
            assert store is not None
            works = [clips[i].work for i in needs]
            inputs = Cells(store, pass_.source, [work.source_row for work in works],
                           [work.source_frames for work in works])  # fmt: skip
        else:
            inputs = [clips[i].frames[pass_.frame_set] for i in needs]
        outputs = tuple(sorted(set().union(*needs.values())))
        in_pages = pass_.frame_set.in_pages
        if in_pages:
            counts = [clips[i].work.frames_in(pass_.frame_set) for i in needs]
            columns = run_pages(pass_, outputs, inputs, counts, calls)
        else:
            batches = list(run_pass(pass_, outputs, inputs, calls))
            columns = {c: list(np.concatenate([b[c] for b in batches])) for c in outputs}
        for c in outputs:
            spec = pass_.outputs[c].spec
            for cell, (i, needed) in zip(columns[c], needs.items(), strict=True):
                if c in needed and _finite(cell, spec.dtype):
                    cells[i][spec.relative_path] = filled(cell, spec) if in_pages else cell
                elif c in needed:
                    overflowed[i][spec.short] = None
    return [
        replace(clip, cells=cells[i], overflowed=tuple(overflowed[i]))
        for i, clip in enumerate(clips)
    ]


_POOLS: dict[tuple[int, float, int, frozenset[tuple[str, str]]], DecodePool] = {}
_POOLS_LOCK = threading.Lock()


def _pool_of(file: FileWork, children: int, deadline_seconds: float) -> DecodePool:
    """Return the decoding children of this process that read a file.

    Whole videos have children of one process each, so that what follows in a stretch of a film is
    read by the child that has it open.
    """
    part = file.clips[0].part
    if part is None:
        return _decode_pool(children, deadline_seconds)
    stretch = part[0] // (PART_PAGES * PAGE_FRAMES)
    return _decode_pool(1, deadline_seconds, (zlib.crc32(file.path.encode()) + stretch) % children)


def _decode_pool(children: int, deadline_seconds: float, number: int = 0) -> DecodePool:
    """Return some of this process's decoding children: kept between calls, shared by its threads.

    Children load plugin files when they start, so other plugins need other children.
    """
    with _POOLS_LOCK:
        key = (children, deadline_seconds, number, frozenset(plugins().items()))
        return _POOLS.get(key) or _POOLS.setdefault(key, DecodePool(children, deadline_seconds))


def close_pools() -> None:
    """End this process's decoding children. The next call starts others."""
    with _POOLS_LOCK:
        while _POOLS:
            _POOLS.popitem()[1].close()


def _request(file: FileWork, passes: Sequence[Pass]) -> Request:
    """Return everything that is requested of a file: its clips, and each frame set once."""
    numbers = sorted(set().union(*(clip.needs for clip in file.clips)))
    frame_sets = dict.fromkeys(passes[number].frame_set for number in numbers)
    stretches = (Stretch(c.start_seconds, c.end_seconds, c.key.hex(), c.part) for c in file.clips)
    return Request(file.path, tuple(stretches), tuple(frame_sets))


def _changed(file: FileWork) -> bool:
    try:
        return size_and_mtime(Path(file.path)) != (file.size_bytes, file.mtime_ns)
    except OSError:
        return os.path.exists(file.path)


def _finite(cell: np.ndarray, dtype: str) -> bool:
    if dtype == "bfloat16":
        return bool(((cell & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(cell).all())

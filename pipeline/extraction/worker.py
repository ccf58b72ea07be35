"""Blocks: the work of a build in pieces, and the two functions that do one piece.

`decode` opens each file of a block once, in child processes, for everything asked of it.
`forward` runs the networks over the pictures, or over features of the store, and stages the
cells. Both are plain functions of their arguments, run by a worker process or, with `--serial`, by
the builder itself.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from varve.pipeline.datasets.media import size_and_mtime
from varve.pipeline.decoders import Decoded, DecodePool, Failure, Request, Stretch
from varve.pipeline.extraction import overflow
from varve.pipeline.extraction.forward import Cells, run_pass
from varve.pipeline.extraction.passes import Pass
from varve.stores import staging
from varve.stores.staging import StagedBlock

FACTS_ONLY = -1


@dataclass(frozen=True)
class ClipWork:
    """One clip to compute.

    Attributes:
        rows: Of the table: all clips with these bytes and this stretch.
        key: Their row key, 16 bytes.
        needs: (pass, output) numbers of the cells to make; FACTS_ONLY for an output where a clip
            is decoded to be described, all its cells being there.
        held: Row of the feature that the clip begins from; -1 where it begins from its video.
    """

    rows: tuple[int, ...]
    key: bytes
    start_seconds: float | None
    end_seconds: float | None
    needs: tuple[tuple[int, int], ...]
    held: int = -1


@dataclass(frozen=True)
class FileWork:
    """One file to open, and the clips of it to compute. Size and time are as it was hashed."""

    path: str
    size_bytes: int
    mtime_ns: int
    clips: tuple[ClipWork, ...]


@dataclass(frozen=True)
class Block:
    """What one task handles, and what a kill may cost: some files, or clips that begin from one
    feature of the store (`cached`), never both."""

    number: int
    files: tuple[FileWork, ...]
    cached: tuple[ClipWork, ...] = ()

    @property
    def clips(self) -> list[ClipWork]:
        return [clip for file in self.files for clip in file.clips] + list(self.cached)

    def clips_of(self, pass_number: int) -> int:
        return sum(
            any(p == pass_number and c != FACTS_ONLY for p, c in clip.needs) for clip in self.clips
        )

    def outputs_of(self, pass_number: int) -> set[int]:
        return {
            c for clip in self.clips for p, c in clip.needs if p == pass_number and c != FACTS_ONLY
        }

    def halves(self) -> "list[Block]":
        """Two blocks of half the work; what cannot be divided stays whole."""
        parts: tuple[FileWork, ...] | tuple[ClipWork, ...] = self.files or self.cached
        if len(parts) == 1:
            return [self]
        middle = len(parts) // 2
        return [
            replace(self, files=self.files[a:b], cached=self.cached[a:b])
            for a, b in ((0, middle), (middle, len(parts)))
        ]


@dataclass(frozen=True)
class Job:
    """What every block of a build has in common.

    Attributes:
        store: The store's folder, as the workers see it.
        children: Decoding processes a worker.
        deadline_seconds: For the decoding of one file.
        describe: Leave what is learnt of the videos in the store.
    """

    store: Path
    passes: tuple[Pass, ...]
    children: int
    deadline_seconds: float
    describe: bool = True


@dataclass(frozen=True)
class DecodedBlock:
    """A block's pictures, uint8 [T, S, S, 3] by clip and pass; or why a clip has none."""

    block: Block
    clips: tuple["Decoded | Failure", ...] = field(default=(), repr=False)
    places: tuple[dict[int, int], ...] = field(default=(), repr=False)  # frame set, by pass
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """What became of a block.

    Attributes:
        facts: For every clip, JSON: rows, key, and either the facts of its video (none for a
            clip that began from a feature) or its failure.
        staged: By column (`ColumnSpec.relative_path`), the staged file's name and its rows.
        seconds: Spent, by part: decode, forward, write.
        calls: Of each stage, "network stage".
    """

    block: Block
    facts: list[dict[str, Any]]
    staged: dict[str, tuple[str, list[int]]]
    seconds: dict[str, float]
    calls: "Counter[str]" = field(default_factory=Counter)


def decode(job: Job, block: Block) -> DecodedBlock:
    """Decode a block's files, each once, in this process's decoding children."""
    began = time.perf_counter()
    pool = _decode_pool(job.children, job.deadline_seconds)
    waiting = []
    for file in block.files:
        wanted = sorted({p for clip in file.clips for p, _ in clip.needs})
        frame_sets = list(dict.fromkeys(job.passes[p].frame_set for p in wanted))
        request = Request(
            file.path,
            tuple(Stretch(c.start_seconds, c.end_seconds, c.key.hex()) for c in file.clips),
            tuple(frame_sets),
        )
        places = {p: frame_sets.index(job.passes[p].frame_set) for p in wanted}
        waiting.append((file, places, pool.submit(request)))
    clips: list[Decoded | Failure] = []
    all_places = []
    for file, places, future in waiting:
        answers = future.result()
        if _changed(file):
            answers = [Failure("changed", "the file changed while it was read; build again")
                       for _ in file.clips]  # fmt: skip
        clips += answers
        all_places += [places] * len(file.clips)
    return DecodedBlock(block, tuple(clips), tuple(all_places), time.perf_counter() - began)


def forward(job: Job, decoded: DecodedBlock) -> Report:
    """Run every pass over a block's pictures and stage the cells.

    Raises:
        OSError: The store cannot be written (disk full, read-only).
        NetworkDiffers: This process builds another network than the plan was made with.
    """
    seconds = {"decode": decoded.seconds, "forward": 0.0, "write": 0.0}
    calls: Counter[str] = Counter()
    works = decoded.block.clips
    answers: tuple[Decoded | Failure | None, ...] = decoded.clips or (None,) * len(works)
    overflows: dict[int, list[str]] = {}
    ready: list[tuple[tuple[int, int, int], str, StagedBlock]] = []
    for number, one in enumerate(job.passes):
        wanted = {
            i: needed
            for i, work in enumerate(works)
            if not isinstance(answers[i], Failure)
            and (needed := {c for p, c in work.needs if p == number and c != FACTS_ONLY})
        }
        if not wanted:
            continue
        began = time.perf_counter()
        inputs: Sequence[np.ndarray] | Cells
        if one.source:
            inputs = Cells(job.store, one.source, [works[i].held for i in wanted])
        else:
            inputs = [_pictures(decoded, i, number) for i in wanted]
        outputs = tuple(sorted(set().union(*wanted.values())))
        with _ONE_FORWARD:
            batches = list(run_pass(one, outputs, inputs, calls))
        seconds["forward"] += time.perf_counter() - began
        for c in outputs:
            cells = np.concatenate([batch[c] for batch in batches])
            chosen: list[tuple[int, int]] = []  # row, and its place among the cells
            for place, (i, needed) in enumerate(wanted.items()):
                if c in needed and _finite(cells[place], one.outputs[c].spec.dtype):
                    chosen += [(row, place) for row in works[i].rows]
                elif c in needed:
                    overflows.setdefault(i, []).append(overflow.sentence(one.outputs[c].spec))
            if chosen:
                staged_block = _staged(chosen, cells, works)
                ready.append(
                    (_order(number, one, c), one.outputs[c].spec.relative_path, staged_block)
                )
    facts = [_fact(work, answers[i], overflows.get(i, [])) for i, work in enumerate(works)]
    began = time.perf_counter()
    # Facts go first: a cell found staged by the next build must not lack what goes with it.
    if job.describe and (told := [fact for fact in facts if "detail" in fact]):
        staging.put_facts(job.store, told)
    # What can be computed from another goes before it: were the first lost by a kill and the other
    # not, the next build would take it from there, rounded, and not from the video.
    staged = {
        place: (staging.put(job.store, place, block).name, block.rows.tolist())
        for _, place, block in sorted(ready, key=lambda one: one[0])
    }
    seconds["write"] += time.perf_counter() - began
    return Report(decoded.block, facts, staged, seconds, calls)


# Two forwards at once on one worker would share its cores, and each would be slower.
_ONE_FORWARD = threading.Lock()


_POOLS: dict[tuple[int, float], DecodePool] = {}
_ONE_POOL = threading.Lock()


def _decode_pool(children: int, deadline_seconds: float) -> DecodePool:
    """This process's decoding children: kept from block to block, shared by its threads."""
    with _ONE_POOL:
        wanted = (children, deadline_seconds)
        return _POOLS.get(wanted) or _POOLS.setdefault(wanted, DecodePool(*wanted))


def close_pools() -> None:
    """End this process's decoding children; the next block starts others."""
    with _ONE_POOL:
        while _POOLS:
            _POOLS.popitem()[1].close()


def _pictures(decoded: DecodedBlock, clip: int, pass_number: int) -> np.ndarray:
    answer = decoded.clips[clip]
    assert isinstance(answer, Decoded)
    return answer.frames[decoded.places[clip][pass_number]]


def _order(number: int, one: Pass, output: int) -> tuple[int, int, int]:
    """Deepest first; at one stage, what others are parts of comes last."""
    chosen = one.outputs[output]
    depth = list(one.stage_keys).index(chosen.stage)
    return (number, -depth, 2 * chosen.spec.cell_bytes + (not chosen.reduction))


def _staged(chosen: list[tuple[int, int]], cells: np.ndarray, works: list[ClipWork]) -> StagedBlock:
    key_of = {row: work.key for work in works for row in work.rows}
    chosen = sorted(chosen)
    keys = b"".join(key_of[row] for row, _ in chosen)
    return StagedBlock(
        np.array([row for row, _ in chosen], np.int64),
        np.frombuffer(keys, np.uint8).reshape(len(chosen), -1),
        cells[[place for _, place in chosen]],
    )


def _finite(cell: np.ndarray, dtype: str) -> bool:
    if dtype == "bfloat16":
        return bool(((cell & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(cell).all())


def _changed(file: FileWork) -> bool:
    try:
        return size_and_mtime(Path(file.path)) != (file.size_bytes, file.mtime_ns)
    except OSError:
        return os.path.exists(file.path)


def _fact(work: ClipWork, answer: Decoded | Failure | None, overflows: list[str]) -> dict[str, Any]:
    fact: dict[str, Any] = {"rows": list(work.rows), "key": work.key.hex()}
    if isinstance(answer, Failure):
        return fact | {"reason": answer.reason, "detail": answer.detail}
    lost = {"reason": "not_finite", "detail": "\n".join(overflows)} if overflows else {}
    if answer is None:
        return fact | lost
    known = answer.facts
    fact |= {
        "num_frames": known.num_frames,
        "num_frames_claimed": known.num_frames_claimed,
        "fps": known.fps,
        "width": known.width,
        "height": known.height,
        "decoder": known.decoder,
        "detail": known.warning,
    }
    if known.sound is not None:
        fact["sound"] = known.sound
    return fact | lost

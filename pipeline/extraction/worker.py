"""Workers: the two tasks that compute one block of a build.

`decode` opens each file of a block once, in child processes. `forward` runs the networks and
stages the cells. Both are plain functions of their arguments, run by a worker process or, with
`--serial`, by the builder itself.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from varve.pipeline.extraction.blocks import Block
from varve.pipeline.extraction.clip_status import Outcome
from varve.pipeline.extraction.extract import ClipResult, decode_files, run_passes
from varve.pipeline.extraction.passes import Pass
from varve.pipeline.registry import load_plugin, plugins
from varve.stores import staging
from varve.stores.staging import StagedBlock


@dataclass(frozen=True)
class Job:
    """Settings that all blocks of a build share.

    Attributes:
        store: The store's folder, as the workers see it.
        passes: Passes of the plan.
        children: Decoding processes per worker.
        deadline_seconds: Deadline for the decoding of one file.
        describe: Whether the facts of the videos are kept in the store.
        plugins: Files of user-defined variants, and the SHA-256 of each.
    """

    store: Path
    passes: tuple[Pass, ...]
    children: int
    deadline_seconds: float
    describe: bool = True
    plugins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodedBlock:
    """A block with its decoded clips, and the seconds that decoding took."""

    block: Block
    clips: tuple[ClipResult, ...] = field(default=(), repr=False)
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """The result of a block.

    Attributes:
        outcomes: What was learnt of every clip, in the order of the block's clips.
        staged: Name and rows of the staged file, by column (`ColumnSpec.relative_path`).
        seconds: Seconds by part: decode, forward, write.
        calls: Calls of each stage, "network stage".
    """

    block: Block
    outcomes: list[Outcome]
    staged: dict[str, tuple[str, list[int]]]
    seconds: dict[str, float]
    calls: "Counter[str]" = field(default_factory=Counter)


class PluginMissing(RuntimeError):
    """A worker does not have the plugin file that the build uses."""


def decode(job: Job, block: Block) -> DecodedBlock:
    """Decode a block's files, each once, in this process's decoding children.

    Raises:
        PluginMissing: This process cannot load a plugin file of the build.
    """
    began = time.perf_counter()
    load_plugins(job.plugins)
    clips = decode_files(block.files, job.passes, job.children, job.deadline_seconds)
    return DecodedBlock(block, tuple(clips), time.perf_counter() - began)


def forward(job: Job, decoded: DecodedBlock) -> Report:
    """Run every pass over a block's frames or features, and stage the cells.

    Raises:
        OSError: The store cannot be written (disk full, read-only).
        NetworkDiffers: This process builds another network than the plan was made with.
        PluginMissing: This process cannot load a plugin file of the build.
    """
    load_plugins(job.plugins)
    calls: Counter[str] = Counter()
    clips = [*decoded.clips, *map(ClipResult, decoded.block.cached)]
    with _ONE_FORWARD:
        began = time.perf_counter()
        results = run_passes(clips, job.passes, job.store, calls)
    computed = time.perf_counter()
    outcomes = [Outcome.of(result) for result in results]
    # Outcomes are written first: a staged cell that the next build finds must not lack them.
    if job.describe and (described := [o.to_json() for o in outcomes if o.describes]):
        staging.put_facts(job.store, described)
    staged = {}
    for folder in _staging_order(job.passes):
        if block := _staged_block(folder, results):
            staged[folder] = (staging.put(job.store, folder, block).name, block.rows.tolist())
    seconds = {
        "decode": decoded.seconds,
        "forward": computed - began,
        "write": time.perf_counter() - computed,
    }
    return Report(decoded.block, outcomes, staged, seconds, calls)


# Two forwards at once in one worker would share its cores, and each would be slower.
_ONE_FORWARD = threading.Lock()


def load_plugins(files: Mapping[str, str]) -> None:
    """Load a build's plugin files in this process.

    Args:
        files: SHA-256 of each file's text, by its path.

    Raises:
        PluginMissing: This machine has no such file, or another version of it.
    """
    for file, sha256 in files.items():
        try:
            load_plugin(file)
        except ValueError as error:
            raise PluginMissing(
                f"a worker cannot load the plugin {file} ({error}). Copy the file to the same path "
                "on every worker's machine, and build again"
            ) from error
        if plugins().get(file) != sha256:
            raise PluginMissing(
                f"a worker has another version of the plugin {file}. Copy the builder's file to "
                "every worker's machine, restart the workers, and build again"
            )


def _staging_order(passes: Sequence[Pass]) -> list[str]:
    """Columns in the order in which their cells are staged: pass by pass, deepest first.

    A feature that can be computed from another is staged before it. Were it lost by a kill and the
    other one not, the next build would compute it from there, rounded, and not from the video. At
    one stage, the features that others are parts of come last.
    """
    ranked: list[tuple[int, int, int, str]] = []
    for number, pass_ in enumerate(passes):
        depth = {stage: -index for index, stage in enumerate(pass_.stage_keys)}
        for output in pass_.outputs:
            size = 2 * output.spec.cell_bytes + (not output.reduction)
            ranked.append((number, depth[output.stage], size, output.spec.relative_path))
    return list(dict.fromkeys(folder for *_, folder in sorted(ranked)))


def _staged_block(folder: str, results: Sequence[ClipResult]) -> StagedBlock | None:
    """Return the cells of one column in the order of their rows; None where there are none."""
    chosen = sorted(
        (row, i) for i, r in enumerate(results) if folder in r.cells for row in r.work.rows
    )
    if not chosen:
        return None
    rows = np.array([row for row, _ in chosen], np.int64)
    keys = b"".join(results[i].work.key for _, i in chosen)
    return StagedBlock(
        rows,
        np.frombuffer(keys, np.uint8).reshape(len(rows), -1),
        np.stack([results[i].cells[folder] for _, i in chosen]),
    )

"""Verify: what a store holds, against its checksums and against its videos."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.blocks import Block, ClipWork, FileWork, Job, NetworkDiffers, decode, run_pass
from pipeline.columns import Execution, Output, Pass, frames_key
from pipeline.decoders import Decoded, Failure
from pipeline.progress import Watch
from pipeline.spec import FrameSet, Picture
from stores import Feature, FeatureStore
from stores.clips import content_digest, row_keys, size_and_mtime
from stores.columns import ColumnSpec, runs
from stores.identity import digest

# Equal to the bit on the machine that built it. Elsewhere other kernels round otherwise; what
# follows is the share of a cell's largest value that its worst entry may be off by.
ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: the column, its shard's file, the clip, and what."""

    column: str
    shard: str
    clip: str
    problem: str


@dataclass
class Verified:
    """What was looked at, and what was found.

    Attributes:
        chunks: Cells read whole, their checksums verified.
        equal: Cells computed again from their videos and equal to the bit.
        close: Cells computed again and equal within the rounding of another machine.
        findings: Everything else.
    """

    chunks: int = 0
    equal: int = 0
    close: int = 0
    findings: list[Finding] = field(default_factory=list)


def verify(
    store: str | Path,
    *,
    dataset: str | Path | None = None,
    backbones: Mapping[str, str] | None = None,
    sample: int = 8,
    seed: int = 0,
    deadline_seconds: float = 120.0,
    watch: Watch | None = None,
) -> Verified:
    """Read every chunk of a store, and compute a sample of cells again from the videos.

    Args:
        dataset: Where the videos lie; by default where the last build found them.
        backbones: NAME:TAG or NAME:/path to load, by the backbone's name in the store; by
            default what the last build was given.
        sample: Clips to compute again, drawn with `seed`; 0 for none.

    Raises:
        NotAStore: There is no store.
        FileNotFoundError: The data set is not where the store says.
    """
    watch = watch or Watch()
    opened = FeatureStore.open(store)
    features = opened.features()
    result = Verified()
    with watch.bars(checksums=(sum(int(f.valid.sum()) for f in features), "cells")):
        for feature in features:
            result.findings += _checksums(feature, opened, watch)
            result.chunks += int(feature.valid.sum())
    if not sample or not features:
        return result
    root = Path(dataset or opened.attributes["dataset"])
    root = root.parent if root.is_file() else root
    if not root.is_dir():
        raise FileNotFoundError(
            f"the data set of {store} is not at {root}; say where it is with --dataset, or verify "
            "the checksums alone with --sample 0"
        )
    broken = {(finding.column, finding.clip) for finding in result.findings}
    for one, members in _passes(opened, features, backbones or {}):
        rows = _draw(members, sample, seed)
        answers = _decode(opened, one, rows, root, deadline_seconds)
        for row, answer in answers.items():
            clip = str(opened.clips.at[row, "path"])
            if isinstance(answer, Failure):
                where = ("every column", "", clip)
                result.findings.append(Finding(*where, f"{answer.reason}: {answer.detail}"))
        pictures = {r: a.frames[0] for r, a in answers.items() if isinstance(a, Decoded)}
        try:
            batches = list(run_pass(one, tuple(range(len(members))), list(pictures.values())))
        except (NetworkDiffers, ValueError, OSError) as error:
            problem = f"cannot be computed again: {error}"
            result.findings += [Finding(_label(f), "", "", problem) for f in members]
            continue
        for number, feature in enumerate(members):
            cells = [cell for batch in batches for cell in batch[number]]
            for row, cell in zip(pictures, cells, strict=True):
                clip = str(opened.clips.at[row, "path"])
                if feature.valid[row] and (_label(feature), clip) not in broken:
                    _compare(feature, row, clip, cell, result)
    return result


def _checksums(feature: Feature, opened: FeatureStore, watch: Watch) -> Iterator[Finding]:
    rows = np.flatnonzero(feature.valid)
    for a, b in runs(rows):
        for part in range(a, b, 64):
            wanted = rows[part : min(part + 64, b)]
            try:
                whole = not _missing(feature, feature.bits(wanted)).any()
            except Exception:  # any complaint of the codecs: the rows one by one say whose it is
                whole = False
            for row in [] if whole else wanted.tolist():
                problem = _problem(feature, row)
                if problem:
                    clip = str(opened.clips.at[row, "path"])
                    yield Finding(_label(feature), feature.shard_of(row), clip, problem)
            watch.advance("checksums", len(wanted))


def _problem(feature: Feature, row: int) -> str:
    try:
        if _missing(feature, feature.bits(np.array([row])))[0]:
            return "marked done, and the shard has no chunk for it"
    except Exception as error:
        return f"cannot be read: {error}"
    return ""


def _missing(feature: Feature, bits: np.ndarray) -> np.ndarray:
    """Which cells are the fill value throughout: no chunk was there."""
    flat = bits.reshape(len(bits), -1)
    absent: np.ndarray = ((flat == 0x7FC0) if feature.dtype == "bfloat16" else np.isnan(flat)).all(
        axis=1
    )
    return absent


def _passes(
    opened: FeatureStore, features: list[Feature], given: Mapping[str, str]
) -> Iterator[tuple[Pass, list[Feature]]]:
    """Features that one run of one network over one frame set gives, together."""
    groups: dict[str, list[Feature]] = {}
    for feature in features:
        spec = feature.spec
        parts = [
            spec["backbone"],
            spec["frames"],
            spec["execution"],
            spec["stages"][0]["precision"],
        ]
        groups.setdefault(digest(parts), []).append(feature)
    asked = opened.attributes.get("backbones", {})
    for members in groups.values():
        spec, name = members[0].spec, members[0].backbone
        frames = spec["frames"]
        frame_set = FrameSet(**(frames | {"picture": Picture(**frames["picture"])}))
        keys = {}
        key = frames_key(frame_set)
        deepest = max(members, key=lambda feature: len(feature.spec["stages"]))
        for stage in deepest.spec["stages"]:
            key = keys[stage["stage"]] = digest({"input": key, **stage})
        outputs = tuple(
            Output(
                ColumnSpec(name, f.name, f.fingerprint, f.shape[1:], f.dtype, {}),
                f.spec["stages"][-1]["stage"],
                f.spec["reduction"],
            )
            for f in members
        )
        precision = spec["stages"][0]["precision"]
        execution = Execution(**spec["execution"])
        backbone = given.get(name) or asked.get(name, name)
        yield Pass(backbone, precision, frame_set, execution, outputs, keys), members


def _draw(features: list[Feature], sample: int, seed: int) -> np.ndarray:
    rows = np.flatnonzero(np.any([feature.valid for feature in features], axis=0))
    count = min(sample, len(rows))
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def _decode(
    opened: FeatureStore, one: Pass, rows: np.ndarray, root: Path, deadline_seconds: float
) -> dict[int, Decoded | Failure]:
    answers: dict[int, Decoded | Failure] = {}
    files: list[FileWork] = []
    keys = row_keys(opened.clips)
    for row in rows.tolist():
        clip = opened.clips.loc[row]
        path = root / clip["path"]
        try:
            size, mtime = size_and_mtime(path)
            same = content_digest(path) == clip["digest"]
        except OSError as error:
            answers[row] = Failure("missing", f"{error.strerror or error}")
            continue
        if not same:
            detail = "the video's bytes are not those of the build; build again"
            answers[row] = Failure("changed", detail)
            continue
        interval = [None if np.isnan(t) else float(t)
                    for t in (clip["start_seconds"], clip["end_seconds"])]  # fmt: skip
        work = ClipWork((row,), keys[row].tobytes(), interval[0], interval[1], ((0, 0),))
        files.append(FileWork(str(path), size, mtime, (work,)))
    job = Job(opened.path, (one,), 1, deadline_seconds)
    decoded = decode(job, Block(0, tuple(files)))
    for file, answer in zip(files, decoded.clips, strict=True):
        answers[file.clips[0].rows[0]] = answer
    return answers


def _compare(feature: Feature, row: int, clip: str, cell: np.ndarray, result: Verified) -> None:
    held = feature.bits(np.array([row]))[0]
    if np.array_equal(held, cell):
        result.equal += 1
        return
    ours, theirs = (feature.values(bits).astype(np.float64) for bits in (held, cell))
    error = float(np.abs(ours - theirs).max() / max(float(np.abs(theirs).max()), 1e-12))
    precision = feature.spec["stages"][0]["precision"]
    if error <= max(ROUNDING[feature.dtype], ROUNDING[precision]):
        result.close += 1
        return
    problem = f"differs from the video's feature by {error:.2%} of its largest value"
    result.findings.append(Finding(_label(feature), feature.shard_of(row), clip, problem))


def _label(feature: Feature) -> str:
    return f"{feature.backbone} {feature.name} {feature.path.name}"

"""Verify: what a store holds, against its checksums and against its videos."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from varve.pipeline.config import FrameSet
from varve.pipeline.datasets.media import content_digest, size_and_mtime
from varve.pipeline.decoders import Decoded, Failure
from varve.pipeline.extraction.forward import NetworkDiffers, run_pass
from varve.pipeline.extraction.passes import Execution, Output, Pass, frames_key
from varve.pipeline.extraction.worker import Block, ClipWork, FileWork, Job, close_pools, decode
from varve.pipeline.progress import Progress
from varve.stores import Damaged, Feature, FeatureStore
from varve.stores.clips import row_keys
from varve.stores.columns import ColumnSpec, runs
from varve.stores.digests import digest

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
        close: Cells computed again and equal within the rounding of another machine, or of the
            feature that they were computed from.
        changed: Columns of networks that a method has changed: only their checksums were read.
        findings: Everything else.
    """

    chunks: int = 0
    equal: int = 0
    close: int = 0
    changed: int = 0
    findings: list[Finding] = field(default_factory=list)


def verify(
    store: str | Path,
    *,
    dataset: str | Path | None = None,
    backbones: Mapping[str, str] | None = None,
    sample: int = 8,
    seed: int = 0,
    deadline_seconds: float = 120.0,
    progress: Progress | None = None,
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
    progress = progress or Progress()
    opened = FeatureStore.open(store)
    result = Verified()
    features = _readable(opened, result)
    strange = set(backbones or {}) - {feature.backbone for feature in features}
    if strange:
        held = ", ".join(sorted({feature.backbone for feature in features}))
        raise ValueError(f"{store} has nothing of {', '.join(strange)}; it has {held or 'nothing'}")
    with progress.bars(checksums=(sum(int(f.valid.sum()) for f in features), "cells")):
        for feature in features:
            result.findings += _checksums(feature, opened, progress)
            result.chunks += int(feature.valid.sum())
    own = [feature for feature in features if not feature.spec.get("grafts")]
    result.changed = len(features) - len(own)
    if not sample or not own:
        return result
    root = Path(dataset or opened.attributes["dataset"])
    root = root.parent if root.is_file() else root
    if not root.is_dir():
        raise FileNotFoundError(
            f"the data set of {store} is not at {root}; say where it is with --dataset, or verify "
            "the checksums alone with --sample 0"
        )
    broken = {(finding.column, finding.clip) for finding in result.findings}
    for one, members in _passes(own):
        rows = _draw(opened, members, sample, seed)
        answers = _decode(opened, one, rows, root, deadline_seconds)
        for row, answer in answers.items():
            clip = str(opened.clips.at[row, "path"])
            if isinstance(answer, Failure):
                where = ("every column", "", clip)
                result.findings.append(Finding(*where, f"{answer.reason}: {answer.detail}"))
        pictures = {r: a.frames[0] for r, a in answers.items() if isinstance(a, Decoded)}
        given = (backbones or {}).get(one.backbone)
        asked = opened.attributes.get("backbones", {}).get(one.backbone, [one.backbone])
        try:
            batches = _compute(one, [given] if given else asked, list(pictures.values()))
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


def _checksums(feature: Feature, opened: FeatureStore, progress: Progress) -> Iterator[Finding]:
    rows = np.flatnonzero(feature.valid)
    for a, b in runs(rows):
        for part in range(a, b, 64):
            wanted = rows[part : min(part + 64, b)]
            # Together, since that is faster; if anything is wrong, one by one to say whose it is.
            for row in wanted.tolist() if _problem(feature, wanted) else []:
                problem = _problem(feature, np.array([row]))
                if problem:
                    clip = str(opened.clips.at[row, "path"])
                    yield Finding(_label(feature), feature.shard_of(row), clip, problem)
            progress.advance("checksums", len(wanted))


def _problem(feature: Feature, rows: np.ndarray) -> str:
    try:
        absent = feature.is_fill(feature.bits(rows)).any()
    except Damaged as error:
        return f"cannot be read: {error.__cause__}"
    return "marked done, and the shard has no chunk for it" if absent else ""


def _readable(opened: FeatureStore, result: Verified) -> list[Feature]:
    """The store's columns, but for those whose metadata or marks are damaged: they are findings."""
    features = []
    for backbone, name, path in sorted(opened.columns()):
        try:
            feature = Feature(path, backbone, name, opened.clips)
            feature.valid.sum()
        except Damaged as error:
            result.findings.append(Finding(f"{backbone} {name} {path.name}", "", "", str(error)))
        else:
            features.append(feature)
    for marks in sorted(opened.path.glob("features/*/*/*.done")):
        if not marks.with_suffix("").joinpath("zarr.json").exists():
            label = " ".join([*marks.parts[-3:-1], marks.stem])
            problem = "it has marks and no array; build again"
            result.findings.append(Finding(label, "", "", problem))
    return features


def _compute(
    one: Pass, backbones: list[str], pictures: list[np.ndarray]
) -> list[dict[int, np.ndarray]]:
    """All outputs of a pass, by whichever of the named networks is the one it was made with."""
    for i, backbone in enumerate(backbones):
        try:
            outputs = tuple(range(len(one.outputs)))
            return list(run_pass(replace(one, backbone=backbone), outputs, pictures))
        except NetworkDiffers:
            if i + 1 == len(backbones):
                raise
    return []


def _passes(features: list[Feature]) -> Iterator[tuple[Pass, list[Feature]]]:
    """Features that one run of one network over one frame set gives, together."""
    groups: list[list[Feature]] = []
    for feature in sorted(features, key=lambda feature: -len(feature.spec["stages"])):
        for members in groups:
            if _comes_with(feature.spec, members[0].spec):
                members.append(feature)
                break
        else:
            groups.append([feature])
    for members in groups:
        spec, name = members[0].spec, members[0].backbone
        frame_set = FrameSet.of(spec["frames"])
        keys = {}
        key = frames_key(frame_set)
        for stage in spec["stages"]:
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
        yield Pass(name, precision, frame_set, execution, outputs, keys), members


def _comes_with(spec: dict[str, Any], deeper: dict[str, Any]) -> bool:
    """Whether a run that gives the deeper feature gives this one on the way."""
    stages = spec["stages"]
    return bool(
        stages == deeper["stages"][: len(stages)]
        and all(spec[part] == deeper[part] for part in ("backbone", "frames", "execution"))
    )


def _draw(opened: FeatureStore, features: list[Feature], sample: int, seed: int) -> np.ndarray:
    there = (opened.clips["reason"] != "missing").to_numpy()
    rows = np.flatnonzero(there & np.any([feature.valid for feature in features], axis=0))
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
    close_pools()
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
    rounded = (feature.dtype, precision, *feature.spec.get("resumed", []))
    if error <= max(ROUNDING[kind] for kind in rounded):
        result.close += 1
        return
    problem = f"differs from the video's feature by {error:.2%} of its largest value"
    result.findings.append(Finding(_label(feature), feature.shard_of(row), clip, problem))


def _label(feature: Feature) -> str:
    return f"{feature.backbone} {feature.name} {feature.path.name}"

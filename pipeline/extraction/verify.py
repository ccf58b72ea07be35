"""Verify: check a store's cells against their checksums and against the videos."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from varve.pipeline.config import FrameSet
from varve.pipeline.datasets.media import content_digest
from varve.pipeline.decoders import Failure
from varve.pipeline.extraction.extract import FileWork, extract, file_work
from varve.pipeline.extraction.forward import NetworkDiffers, network_of
from varve.pipeline.extraction.passes import Execution, Output, Pass, frames_key
from varve.pipeline.progress import Progress
from varve.stores import Damaged, Feature, FeatureStore, VideoFeature
from varve.stores.columns import ColumnSpec, runs
from varve.stores.digests import digest

# On the machine that built them, cells are equal to the bit. On another one, kernels round
# differently: these are the largest differences allowed, relative to a cell's largest value.
ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Finding:
    """A problem: the column, its shard's file, the clip, and a description."""

    column: str
    shard: str
    clip: str
    problem: str


@dataclass
class Verified:
    """The result of a verification.

    Attributes:
        chunks: Cells read whole, with their checksums verified.
        equal: Cells computed again from their videos and equal to the bit.
        close: Cells computed again and equal within the rounding of another machine, or of the
            feature that they were computed from.
        changed: Columns of networks that a method has changed: only their checksums were read.
        whole: Columns of whole videos: only the checksums of their pages were read.
        findings: The problems.
    """

    chunks: int = 0
    equal: int = 0
    close: int = 0
    changed: int = 0
    whole: int = 0
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
        store: The store's folder.
        dataset: Where the videos are; by default where the last build found them.
        backbones: NAME:TAG or NAME:/path to load, by the backbone's name in the store; by
            default those of the last build.
        sample: Number of clips to compute again, drawn with `seed`; 0 for none.
        deadline_seconds: Deadline for the decoding of one file.
        progress: Receives the progress; silent by default.

    Raises:
        NotAStore: There is no store.
        ValueError: The store has no feature of a backbone in `backbones`.
        FileNotFoundError: The data set is not where the store says.
    """
    progress = progress or Progress()
    opened = FeatureStore.open(store)
    result = Verified()
    features = _readable(opened, result)
    unknown = set(backbones or {}) - {feature.backbone for feature in features}
    if unknown:
        names = ", ".join(sorted({feature.backbone for feature in features})) or "nothing"
        raise ValueError(f"{store} has nothing of {', '.join(unknown)}; it has {names}")
    with progress.bars(checksums=(sum(int(f.valid_cells.sum()) for f in features), "cells")):
        for feature in features:
            result.findings += _checksums(feature, progress)
            result.chunks += int(feature.valid_cells.sum())
    unchanged = [feature for feature in features if not feature.spec.get("grafts")]
    result.changed = len(features) - len(unchanged)
    fixed = [feature for feature in unchanged if not isinstance(feature, VideoFeature)]
    result.whole = len(unchanged) - len(fixed)
    unchanged = fixed
    if not sample or not unchanged:
        return result
    root = _dataset_root(opened, dataset)
    for pass_, members in _passes(unchanged, result):
        rows = _draw(opened, members, sample, seed)
        files = list(_unchanged_files(opened, pass_, rows, root, result))
        recorded = opened.attributes.get("backbones", {}).get(pass_.backbone, [pass_.backbone])
        name = (backbones or {}).get(pass_.backbone)
        try:
            pass_ = _with_network(pass_, [name] if name else recorded)
        except (NetworkDiffers, ValueError, OSError) as error:
            result.findings += _not_recomputed(members, error)
            pass_ = replace(pass_, outputs=())  # the videos are decoded all the same
        _recompute(opened, pass_, members, files, deadline_seconds, result)
    return result


def _dataset_root(opened: FeatureStore, dataset: str | Path | None) -> Path:
    """Return the folder that the clips' paths are relative to.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    root = Path(dataset or opened.attributes["dataset"])
    root = root.parent if root.is_file() else root
    if not root.is_dir():
        raise FileNotFoundError(
            f"the data set of {opened.path} is not at {root}; say where it is with --dataset, or "
            "verify the checksums alone with --sample 0"
        )
    return root


def _checksums(feature: Feature, progress: Progress) -> Iterator[Finding]:
    """Read every valid cell of a column, and yield those that cannot be read."""
    valid = np.flatnonzero(feature.valid_cells)
    for a, b in runs(valid):
        for part in range(a, b, 64):
            rows = valid[part : min(part + 64, b)]
            # Together, which is faster; after a problem one by one, to find the clip.
            for row in rows.tolist() if _problem(feature, rows) else []:
                if problem := _problem(feature, np.array([row])):
                    yield _at(feature, row, feature.path_of(row), problem)
            progress.advance("checksums", len(rows))


def _problem(feature: Feature, rows: np.ndarray) -> str:
    try:
        absent = feature.is_fill(feature.bits(rows)).any()
    except Damaged as error:
        return f"cannot be read: {error.__cause__}"
    return "marked done, and the shard has no chunk for it" if absent else ""


def _readable(opened: FeatureStore, result: Verified) -> list[Feature]:
    """Return the columns that can be read; damaged metadata or marks are findings."""
    features = []
    for backbone, name, path in sorted(opened.columns()):
        try:
            feature = opened.feature_at(path, backbone, name)
            feature.valid_cells.sum()
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


def _with_network(pass_: Pass, names: list[str]) -> Pass:
    """Return the pass with the first of some networks that has the pass's fingerprints.

    Raises:
        NetworkDiffers: None has.
        ValueError, OSError: A network cannot be loaded.
    """
    for name in names[:-1]:
        with contextlib.suppress(NetworkDiffers):
            network_of(replace(pass_, backbone=name))
            return replace(pass_, backbone=name)
    pass_ = replace(pass_, backbone=names[-1])
    network_of(pass_)
    return pass_


def _recompute(
    opened: FeatureStore,
    pass_: Pass,
    features: list[Feature],
    files: list[FileWork],
    deadline_seconds: float,
    result: Verified,
) -> None:
    """Compute a pass's cells of some clips again, and compare them with the stored ones."""
    unreadable = {(finding.column, finding.clip) for finding in result.findings}
    for clip in extract(files, (pass_,), deadline_seconds=deadline_seconds):
        (row,) = clip.work.rows
        path = str(opened.clips.at[row, "path"])
        if clip.failure:
            result.findings.append(_no_clip(path, clip.failure))
        for output, feature in zip(pass_.outputs, features, strict=False):
            if not feature.valid[row] or (_label(feature), path) in unreadable:
                continue
            if output.spec.relative_path in clip.cells:
                _compare(feature, row, path, clip.cells[output.spec.relative_path], result)
            elif output.spec.short in clip.overflowed:
                problem = f"the video's feature leaves the range of {feature.dtype}"
                result.findings.append(_at(feature, row, path, problem))


def _not_recomputed(features: list[Feature], error: Exception) -> list[Finding]:
    return [Finding(_label(f), "", "", f"cannot be computed again: {error}") for f in features]


def _no_clip(path: str, failure: Failure) -> Finding:
    return Finding("every column", "", path, f"{failure.reason}: {failure.detail}")


def _passes(features: list[Feature], result: Verified) -> Iterator[tuple[Pass, list[Feature]]]:
    """Group the features that one run of one network over one frame set gives.

    Features of frames that cannot be chosen again are findings.
    """
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
        try:
            frame_set = FrameSet.of(spec["frames"])
        except (ValueError, RuntimeError) as error:
            result.findings += _not_recomputed(members, error)
            continue
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
    """Whether a run that gives the deeper feature also gives this one."""
    stages = spec["stages"]
    return bool(
        stages == deeper["stages"][: len(stages)]
        and all(spec[part] == deeper[part] for part in ("backbone", "frames", "execution"))
    )


def _draw(opened: FeatureStore, features: list[Feature], sample: int, seed: int) -> np.ndarray:
    """Draw rows that have a valid cell in one of the columns, and whose file is not missing."""
    present = (opened.clips["reason"] != "missing").to_numpy()
    rows = np.flatnonzero(present & np.any([feature.valid for feature in features], axis=0))
    count = min(sample, len(rows))
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def _unchanged_files(
    opened: FeatureStore, pass_: Pass, rows: np.ndarray, root: Path, result: Verified
) -> Iterator[FileWork]:
    """Yield the files of some rows. A file that is missing or has changed is a finding."""
    for row in rows.tolist():
        clip = opened.clips.loc[row]
        path, interval = root / clip["path"], (clip["start_seconds"], clip["end_seconds"])
        try:
            if content_digest(path) == clip["digest"]:
                yield file_work(path, clip["digest"], (pass_,), row, *interval)
                continue
            detail = "the video's bytes are not those of the build; build again"
            failure = Failure("changed", detail)
        except OSError as error:
            failure = Failure("missing", f"{error.strerror or error}")
        result.findings.append(_no_clip(str(clip["path"]), failure))


def _compare(feature: Feature, row: int, clip: str, cell: np.ndarray, result: Verified) -> None:
    stored_bits = feature.bits(np.array([row]))[0]
    if np.array_equal(stored_bits, cell):
        result.equal += 1
        return
    stored, again = (feature.values(bits).astype(np.float64) for bits in (stored_bits, cell))
    error = float(np.abs(stored - again).max() / max(float(np.abs(again).max()), 1e-12))
    precision = feature.spec["stages"][0]["precision"]
    rounded = (feature.dtype, precision, *feature.spec.get("resumed", []))
    if error <= max(ROUNDING[kind] for kind in rounded):
        result.close += 1
        return
    problem = f"differs from the video's feature by {error:.2%} of its largest value"
    result.findings.append(_at(feature, row, clip, problem))


def _at(feature: Feature, row: int, clip: str, problem: str) -> Finding:
    return Finding(_label(feature), feature.shard_of(row), clip, problem)


def _label(feature: Feature) -> str:
    return f"{feature.backbone} {feature.name} {feature.path.name}"

"""Forward: runs a pass over batches of clips, and keeps the networks of this process.

A pass starts from frames or from a feature of the store, and gives the cells of its outputs.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from varve.pipeline.extraction.passes import (
    GROUP_FRAMES,
    Output,
    Pass,
    Source,
    column_key,
    frames_key,
)
from varve.stores import Feature, VideoFeature, clips
from varve.stores.columns import FEATURES, MISSING, STORED, ColumnSpec, Damaged, node_name

if TYPE_CHECKING:
    from torch import Tensor

    from varve.pipeline.backbones import Backbone


class Cells:
    """Cells of a feature as a sequence of stored bits, read one slice at a time.

    Args:
        rows: Row of each cell.
        frames: Frames of whole videos that each cell is made of, as rows of the flattened pages;
            empty where the cell of `rows` is taken.
    """

    def __init__(
        self,
        store: Path,
        source: Source,
        rows: Sequence[int],
        frames: Sequence[tuple[int, ...]] = (),
    ) -> None:
        names = (node_name(source.backbone), node_name(source.feature), source.fingerprint[:16])
        path = store.joinpath(FEATURES, *names)
        self._rows = np.asarray(rows, np.int64)
        self._frames = frames if any(frames) else ()
        column = (path, source.backbone, source.feature, clips.read(store))
        self._feature = VideoFeature(*column, store) if self._frames else Feature(*column)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        if self._frames:
            return self._gathered(self._frames[part])
        bits = self._feature.bits(self._rows[part])
        # Valid when the plan was made and gone since: a fill value must not be computed on.
        if self._feature.is_fill(bits).any():
            raise Damaged(f"{self._feature.path} has lost cells since the plan was made")
        return bits

    def _gathered(self, cells: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Read cells frame by frame from pages; shorter cells end in zeros."""
        assert isinstance(self._feature, VideoFeature)
        flat = np.concatenate([np.asarray(frames, np.int64) for frames in cells])
        read = self._feature.item_bits(flat)
        if self._feature.is_fill(read).any():
            raise Damaged(f"{self._feature.path} has lost pages since the plan was made")
        bits = np.zeros((len(cells), max(map(len, cells)), *read.shape[1:]), read.dtype)
        lengths = np.array([len(frames) for frames in cells])
        bits[np.arange(bits.shape[1]) < lengths[:, None]] = read
        return bits


def run_pass(
    pass_: Pass,
    outputs: tuple[int, ...],
    inputs: "Sequence[np.ndarray] | Cells",
    calls: "Counter[str] | None" = None,
) -> Iterator[dict[int, np.ndarray]]:
    """Compute cells of some outputs of a pass, one batch of clips at a time.

    Every batch has `batch_clips` clips. The last one is padded with zeros, so that a cell's bits
    do not depend on the number of clips.

    Args:
        outputs: Numbers of the pass's outputs to compute.
        inputs: Each clip's frames, uint8 [T, S, S, 3] or float32 [T, samples], or the stored bits
            of the pass's source.
        calls: Counts the calls of each stage, "network stage".

    Yields:
        Stored bits [clips of the batch, *cell] by output number.

    Raises:
        NetworkDiffers: The network of that name has other fingerprints than the pass.
    """
    import torch

    execution, source = pass_.execution, pass_.source
    backbone = network_of(pass_)
    chosen = {c: pass_.outputs[c] for c in outputs}
    counted: Counter[str] = Counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(execution.threads or threads)
    try:
        for count, padded in _batches(inputs, pass_.batch_clips):
            # The caller's context, such as autocast in a training loop, must decide no value.
            with torch.inference_mode(), torch.autocast(execution.device, enabled=False):
                x = torch.from_numpy(padded.reshape(-1, *padded.shape[2:]))
                x = x.view(torch.bfloat16) if source and source.dtype == "bfloat16" else x
                results = _results(backbone, source, chosen, x.to(execution.device), counted)
                yield {
                    c: _bits(result, chosen[c], pass_.batch_clips)[:count]
                    for c, result in results.items()
                }
    finally:
        torch.set_num_threads(threads)
    if calls is not None:
        calls.update({f"{backbone.name} {name}": n for name, n in counted.items()})


def run_pages(
    pass_: Pass,
    outputs: tuple[int, ...],
    inputs: "Sequence[np.ndarray] | Cells",
    counts: Sequence[int],
    calls: "Counter[str] | None" = None,
) -> dict[int, list[np.ndarray]]:
    """Compute the frames of pages as `run_pass` computes clips, `GROUP_FRAMES` frames as one clip.

    So a frame has the bits that a build of `GROUP_FRAMES` frames per clip gives it.

    Args:
        inputs: Frames of each page, uint8 [frames, S, S, 3], or the stored bits of its cell in the
            pass's source, [64, ...].
        counts: Number of frames of each page.

    Returns:
        Stored bits [frames, ...] of each page, by output number.
    """
    specs = [output.spec for output in pass_.outputs]
    narrow = [replace(spec, cell=(GROUP_FRAMES, *spec.cell[1:])) for spec in specs]
    grouped = [replace(o, spec=spec) for o, spec in zip(pass_.outputs, narrow, strict=True)]
    groups: list[np.ndarray] = []
    for i, count in enumerate(counts):
        (page,) = inputs[i : i + 1]
        padded = np.zeros((-count % GROUP_FRAMES, *page.shape[1:]), page.dtype)
        groups += [
            *np.concatenate([page[:count], padded]).reshape(-1, GROUP_FRAMES, *page.shape[1:])
        ]
    batches = list(run_pass(replace(pass_, outputs=tuple(grouped)), outputs, groups, calls))
    ends = np.cumsum([-(-count // GROUP_FRAMES) for count in counts])[:-1]
    results = {}
    for c in outputs:
        parts = np.split(np.concatenate([batch[c] for batch in batches]), ends)
        frames = [part.reshape(-1, *part.shape[2:]) for part in parts]
        results[c] = [part[:count] for part, count in zip(frames, counts, strict=True)]
    return results


def filled(frames: np.ndarray, spec: ColumnSpec) -> np.ndarray:
    """Return a page's cell from its frames: with not-a-number after the last one."""
    cell = np.full(spec.cell, MISSING[spec.dtype], STORED[spec.dtype])
    cell[: len(frames)] = frames
    return cell


def _results(
    backbone: "Backbone",
    source: Source | None,
    outputs: dict[int, Output],
    x: "Tensor",
    calls: "Counter[str]",
) -> "dict[int, Tensor]":
    """Return a batch's outputs, reduced, from its frames or from the source's cells."""
    from varve.pipeline.backbones import expand, reduce

    results: dict[int, Tensor] = {}
    features: dict[str, Tensor] = {}
    start = source.stage if source else None
    if source:
        feature = (source.stage, source.reduction)
        results = {c: x for c, o in outputs.items() if (o.stage, o.reduction) == feature}
        if len(results) == len(outputs):
            return results
        x = features[source.stage] = expand(x, backbone.stage(source.stage), source.reduction)
    keep = {o.stage for o in outputs.values()} - {start}
    features |= backbone.run(x, keep, start, calls) if keep else {}
    return results | {
        c: reduce(features[o.stage], backbone.stage(o.stage), o.reduction)
        for c, o in outputs.items()
        if c not in results
    }


def _batches(inputs: "Sequence[np.ndarray] | Cells", size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield batches of `size` clips, and how many are not padding. The next is read meanwhile."""

    def batch(start: int) -> tuple[int, np.ndarray]:
        part = inputs[start : start + size]
        padded = np.zeros((size, *part[0].shape), part[0].dtype)
        padded[: len(part)] = part
        return len(part), padded

    starts = range(0, len(inputs), size)
    if not isinstance(inputs, Cells):
        yield from map(batch, starts)
        return
    with ThreadPoolExecutor(1) as reader:
        waiting = [reader.submit(batch, start) for start in starts[:1]]
        for start in starts:
            ready = waiting.pop().result()
            if start + size < len(inputs):
                waiting.append(reader.submit(batch, start + size))
            yield ready


def _bits(x: "Tensor", output: Output, clips: int) -> np.ndarray:
    """Return a batch's feature [clips * T, ...] as stored bits [clips, T, ...], T of the column."""
    import torch

    x = x.to(getattr(torch, output.spec.dtype)).contiguous().cpu()
    if output.spec.dtype == "bfloat16":
        x = x.view(torch.uint16)
    bits: np.ndarray = x.numpy().reshape(clips, *output.spec.cell)
    return bits


class NetworkDiffers(RuntimeError):
    """A worker's network is not the one the plan was made with."""


_NETWORKS: dict[tuple[str, str, str], "Backbone"] = {}
_KEYS: dict[tuple[str, str, str, str], dict[str, str]] = {}


def adopt(name: str, backbone: "Backbone") -> None:
    """Use this network where passes name it, and load none."""
    dismiss(name)  # one that was loaded before would be used instead
    precision = str(backbone.precision).removeprefix("torch.")
    _NETWORKS[name, precision, ""] = backbone


def dismiss(name: str) -> None:
    """Drop a network."""
    for key in [key for key in _NETWORKS if key[0] == name]:
        del _NETWORKS[key]
    for request in [request for request in _KEYS if request[0] == name]:
        del _KEYS[request]


@contextlib.contextmanager
def adopted(networks: "Mapping[str, Backbone]") -> Iterator[None]:
    """Use these networks, by name, inside the block."""
    try:
        for name, backbone in networks.items():
            adopt(name, backbone)
        yield
    finally:
        for name in networks:
            dismiss(name)


def network_of(pass_: Pass) -> "Backbone":
    """Return the network of a pass on its device: loaded or adopted, kept between calls.

    Raises:
        NetworkDiffers: Its fingerprints, or those of a reduction, are not those of the pass.
        ValueError, OSError: It cannot be loaded.
    """
    device = pass_.execution.device
    backbone = _NETWORKS.get((pass_.backbone, pass_.precision, device))
    if backbone is None:
        backbone = _on_device(_NETWORKS.get((pass_.backbone, pass_.precision, "")), pass_)
        _NETWORKS[pass_.backbone, pass_.precision, device] = backbone
    request = (pass_.backbone, pass_.precision, device, frames_key(pass_.frame_set))
    if request not in _KEYS:
        _KEYS[request] = backbone.keys(request[3])
    for stage, key in pass_.stage_keys.items():
        if _KEYS[request][stage] != key:
            raise NetworkDiffers(
                f"{pass_.backbone}: a worker's network differs from the builder's from stage "
                f"{stage} on. Give every machine the same weights and versions, and build again."
            )
    for output in pass_.outputs:
        key = column_key(pass_.stage_keys[output.stage], output.reduction, output.spec.dtype)
        if key != output.spec.fingerprint:
            raise NetworkDiffers(
                f"{output.spec.feature}: a worker's reduction differs from the builder's. Its file "
                "was edited after it was loaded: start again, and build again."
            )
    return backbone


def _on_device(adopted: "Backbone | None", pass_: Pass) -> "Backbone":
    """Load a pass's network, or take the adopted one, onto the pass's device."""
    import torch

    from varve.pipeline import backbones

    device = pass_.execution.device
    if adopted is None:
        backbone = backbones.load(pass_.backbone, getattr(torch, pass_.precision))
    else:
        # A copy where it moves: the caller's modules must stay on their device.
        tensors = [t for s in adopted.stages for t in backbones.tensors_of(s.module).values()]
        there = all(tensor.device.type == device for tensor in tensors)
        backbone = adopted if there else copy.deepcopy(adopted)
    for stage in backbone.stages:
        stage.module.to(device)
    return backbone

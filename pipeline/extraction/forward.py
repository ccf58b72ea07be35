"""Running: one pass over a batch of clips after another, and the networks of this process.

A pass begins from pictures or from a feature of the store, and gives the cells of its outputs.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from varve.pipeline.extraction.passes import Output, Pass, Source, column_key, frames_key
from varve.stores import Feature, clips
from varve.stores.columns import FEATURES, Damaged, node_name

if TYPE_CHECKING:
    from torch import Tensor

    from varve.pipeline.backbones import Backbone


class Cells:
    """Cells of a feature as a sequence of stored bits, read a slice at a time."""

    def __init__(self, store: Path, source: Source, rows: Sequence[int]) -> None:
        names = (node_name(source.backbone), node_name(source.feature), source.fingerprint[:16])
        path = store.joinpath(FEATURES, *names)
        self._feature = Feature(path, source.backbone, source.feature, clips.read(store))
        self._rows = np.asarray(rows, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        rows = self._rows[part]
        order = np.argsort(rows)
        bits = self._feature.bits(rows[order])
        # Planned as valid, and gone since: a number that was never computed must not be used.
        if self._feature.is_fill(bits).any():
            raise Damaged(f"{self._feature.path} has lost cells since the plan was made")
        if (np.diff(order) == 1).all():
            return np.asarray(bits)
        out = np.empty_like(bits)
        out[order] = bits
        return out


def run_pass(
    one: Pass,
    outputs: tuple[int, ...],
    inputs: "Sequence[np.ndarray] | Cells",
    calls: "Counter[str] | None" = None,
) -> Iterator[dict[int, np.ndarray]]:
    """Cells of some outputs of a pass, a batch of clips at a time.

    Every batch has `batch_clips` clips, the last one padded with black (or zeros), so that a
    cell's bits do not depend on how many clips came with it.

    Args:
        outputs: Numbers of the pass's outputs to give.
        inputs: Pictures uint8 [T, S, S, 3] each, or the stored bits of the pass's source.
        calls: Counts the calls of each stage, "network stage".

    Yields:
        By output number, stored bits [clips of the batch, *cell].
    """
    import torch

    execution, source = one.execution, one.source
    backbone = network_of(one.backbone, one.precision, execution.device)
    _check(one, backbone)
    chosen = {c: one.outputs[c] for c in outputs}
    counted: Counter[str] = Counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(execution.threads or threads)
    try:
        for count, padded in _batches(inputs, one.batch_clips):
            # What is around a call, such as autocast in a training loop, decides no value.
            with torch.inference_mode(), torch.autocast(execution.device, enabled=False):
                x = torch.from_numpy(padded.reshape(-1, *padded.shape[2:]))
                x = x.view(torch.bfloat16) if source and source.dtype == "bfloat16" else x
                results = _results(backbone, source, chosen, x.to(execution.device), counted)
                yield {
                    c: _bits(result, chosen[c], one.batch_clips)[:count]
                    for c, result in results.items()
                }
    finally:
        torch.set_num_threads(threads)
    if calls is not None:
        calls.update({f"{backbone.name} {name}": n for name, n in counted.items()})


def _results(
    backbone: "Backbone",
    source: Source | None,
    outputs: dict[int, Output],
    x: "Tensor",
    calls: "Counter[str]",
) -> "dict[int, Tensor]":
    """Outputs of a batch, reduced, from its pictures or from what the source holds of it."""
    from varve.pipeline.backbones import expand, reduce

    results: dict[int, Tensor] = {}
    features: dict[str, Tensor] = {}
    start = source.stage if source else None
    if source:
        same = (source.stage, source.reduction)
        results = {c: x for c, o in outputs.items() if (o.stage, o.reduction) == same}
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
    """Batches of `size` clips and how many of them are real. The next is read meanwhile."""

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
    """A batch's feature [clips * T, ...] as stored bits [clips, T, ...]."""
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
    """Run this network where passes ask for `name`, and load none."""
    precision = str(backbone.precision).removeprefix("torch.")
    _NETWORKS[name, precision, ""] = backbone


def dismiss(name: str) -> None:
    """Forget a network."""
    for held in [key for key in _NETWORKS if key[0] == name]:
        del _NETWORKS[held]
    for asked in [key for key in _KEYS if key[0] == name]:
        del _KEYS[asked]


def network_of(name: str, precision: str, device: str) -> "Backbone":
    """The network of that name on a device: loaded, or adopted; kept from block to block."""
    import torch

    from varve.pipeline import backbones

    held = _NETWORKS.get((name, precision, device))
    if held is not None:
        return held
    given = _NETWORKS.get((name, precision, ""))
    if given is None:
        backbone = backbones.load(name, getattr(torch, precision))
    else:
        # A copy where it moves: the modules of whoever gave it must stay where they are.
        tensors = [t for s in given.stages for t in backbones.tensors_of(s.module).values()]
        there = all(tensor.device.type == device for tensor in tensors)
        backbone = given if there else copy.deepcopy(given)
    for stage in backbone.stages:
        stage.module.to(device)
    _NETWORKS[name, precision, device] = backbone
    return backbone


def _check(one: Pass, backbone: "Backbone") -> None:
    asked = (one.backbone, one.precision, one.execution.device, frames_key(one.frame_set))
    if asked not in _KEYS:
        _KEYS[asked] = backbone.keys(asked[3])
    own = _KEYS[asked]
    for stage, key in one.stage_keys.items():
        if own[stage] != key:
            raise NetworkDiffers(
                f"{one.backbone}: a worker's network differs from the builder's from stage {stage} "
                "on. Give every machine the same weights and the same versions, and build again."
            )
    for output in one.outputs:
        key = column_key(one.stage_keys[output.stage], output.reduction, output.spec.dtype)
        if key != output.spec.fingerprint:
            raise NetworkDiffers(
                f"{output.spec.feature}: a worker's reduction differs from the builder's. Its file "
                "was edited after it was loaded: start again, and build again."
            )

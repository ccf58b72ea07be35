"""Cost tables: parameters, multiply-adds and latency of a head, module by module.

    part                  parameters                      multiply-adds of a clip
    backbone, cached      frozen stages, from the store   what a run on raw video has besides
    backbone              frozen stages that run          for the T frames of a clip
    blocks                stages that train               the same
    adapter, hf_gate ...  each kind of graft, alone       without the stage around which it stands
    encoder, experts ...  the head's own modules          all of them together
    classifier            ... and what is in no module    products with text, means, closed forms

These are the numbers of StPR's Table 7 (backbone, adapters, experts), of HF-Net's Fig. 4 (the same
network with more gates) and, with `latency`, of Class Regularization's latency column. A part that
is off has no row: adapters=0, gates=0, strength 0. What serves training alone, such as the HAS of
HCE, has parameters and no multiply-adds. Text towers are not counted: a class has its text once.

A multiply-add is one multiplication with its addition, in matrix products and convolutions;
elementwise operations and searches in an index do not count. Where papers print FLOPs, some count
a multiply-add as two and some as one: StPR's Table 7 does both.

Shapes: N clips, B clips a batch, T frames.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from varve.heads import FineTunesBackbone, ReplaysExemplars, Task, UsesTeacher
from varve.heads.parts.clips import Clips
from varve.pipeline.backbones import Backbone
from varve.pipeline.experiments import head_inputs
from varve.pipeline.experiments.cost import (
    BACKBONE,
    COLUMNS,
    MOST_CLIPS,
    NETWORK,
    cost_row,
    counted,
    graft_name,
    grafts_of,
    module_costs,
    modules_of,
    named_modules,
    stages_of,
)
from varve.pipeline.experiments.head_network import HeadNetwork
from varve.pipeline.experiments.head_source import HeadSource, find_head
from varve.pipeline.experiments.run_spec import PreparedRun, option_defaults, prepare_run
from varve.pipeline.experiments.scenarios import ClassList, Scenario
from varve.stores import FeatureStore

FROM_CACHE, FROM_VIDEO = "from the cache", "from raw video"
LATENCY_COLUMNS = ["stage", "graft", "milliseconds", "milliseconds_without", "ratio"]
CLIPS_PER_CLASS = 2  # some heads in closed form cannot learn a task of one clip


@dataclass(frozen=True)
class Cost:
    """The cost of a head, in one or several variants.

    Attributes:
        parts: A row for each part of each variant: the options of `grid`, `part`, `parameters`,
            `multiply_adds` of one clip, and `cached`, true for the frozen stages whose output comes
            from the store.
        latency: A row for each stage with a graft, and for the whole network from the cache and
            from raw video: the options of `grid`, `stage`, `graft`, `milliseconds` a clip with the
            grafts, `milliseconds_without`, and their `ratio`. Empty where it was not measured.
    """

    parts: pd.DataFrame
    latency: pd.DataFrame

    def totals(self) -> pd.DataFrame:
        """Sum the parts of each variant.

        Returns:
            A row for each variant: the options of `grid`, and `parameters` and `multiply_adds`
            `from the cache`, which a run computes, and `from raw video`, all there are.
        """
        varied = list(self.parts)[: -len(COLUMNS)]
        keys = [repr(values) for values in self.parts[varied].to_numpy(object).tolist()]
        rows = []
        for _, group in self.parts.groupby(keys, sort=False):
            row = {name: group[name].iloc[0] for name in varied}
            for total, some in ((FROM_CACHE, group[~group["cached"]]), (FROM_VIDEO, group)):
                for name in ("parameters", "multiply_adds"):
                    row[f"{name} {total}"] = int(some[name].sum())
            rows.append(row)
        return pd.DataFrame(rows)


def cost(
    store: str | Path | FeatureStore,
    head: str | Path | HeadSource,
    scenario: str | Scenario,
    *,
    seed: int = 1000,
    options: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    backbone: str = "",
    sampled: Mapping[str, Any] | None = None,
    order: ClassList | None = None,
    only: ClassList | None = None,
    device: str = "cpu",
    latency: int = 0,
) -> Cost:
    """Count what a head costs after the last task of a scenario, module by module.

    Nothing is trained and no run folder is written: the head learns the classes from a few clips
    for 0 epochs. See the module for the parts, and for what counts as a multiply-add.

    Args:
        store: A store with the features that the head reads.
        head: A file name in `heads/`, or the path of a user's file.
        scenario: It decides the number of classes, and of tasks (experts).
        seed: As for `varve.run`.
        options: Options of the head.
        grid: Values of further options; every combination is a variant, such as
            {"gates": [0, 1, 2]}.
        backbone: The backbone whose features are read, where the store has several.
        sampled: Frames to read of a store of whole videos, as for `varve.run`.
        order: As for `varve.run`, as is `only`.
        device: Where the head works: "cpu" or "cuda".
        latency: Number of forwards of which the median is taken, each with and without the grafts,
            in alternation; 0 measures none.

    Raises:
        ValueError: As for `varve.run`; or `latency` is negative.
        SpecMismatch: As for `varve.run`.
    """
    if latency < 0:
        raise ValueError(f"{latency=}: give a number of forwards, or 0 to measure none")
    source, varied = find_head(head), dict(grid or {})
    defaults = option_defaults(source.build)
    epochs = [name for name in defaults if name.endswith("epochs")]
    parts, latencies = [], []
    for values in itertools.product(*varied.values()):
        variant = dict(zip(varied, values, strict=True))
        chosen = {**(options or {}), **variant}
        chosen |= {n: 0 for n in epochs if chosen.get(n, defaults[n]) is not None}
        plan = prepare_run(store, source, scenario, seed, chosen, backbone, device=device,
                           sampled=sampled, order=order, only=only)  # fmt: skip
        clips = _learn(plan)
        parts += [variant | row for row in _parts(plan, clips)]
        if latency:
            latencies += [variant | row for row in _latencies(plan, clips, latency)]
    return Cost(
        pd.DataFrame(parts, columns=[*varied, *COLUMNS]),
        pd.DataFrame(latencies, columns=[*varied, *LATENCY_COLUMNS]),
    )


def cached_costs(
    backbone: Backbone, stage: str, frames: int, device: str = "cpu"
) -> list[tuple[str, nn.Module, int]]:
    """Count the multiply-adds of the stages of a network up to one, for the frames of a clip.

    Shapes alone pass through the network, which is moved to the device; no number is computed.

    Returns:
        The name, module and multiply-adds of each stage.
    """
    stages = backbone.stages[: backbone.stage_names.index(stage) + 1]
    named = [(each.name, each.module) for each in stages]
    pictures = _pictures(backbone, frames, device)
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    with shapes, torch.no_grad(), counted(named, "") as flops:
        backbone.run(shapes.from_tensor(pictures), [stage])
    return [(name, module, flops[name] // 2) for name, module in named]


def alternated(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[float, float]:
    """Return the median seconds of two calls, which run in turn, so that both meet the same load.

    Each is called once before, and the order changes from turn to turn.
    """
    calls = (first, second)
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(-1, repeats):
        for number in (0, 1) if turn % 2 else (1, 0):
            _synchronise()
            started = time.perf_counter()
            calls[number]()
            _synchronise()
            if turn >= 0:
                seconds[number].append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _learn(plan: PreparedRun) -> Clips:
    """Let the head learn all tasks from a few clips of each class; return some clips to score."""
    head, network = plan.head, plan.network
    first_clip = _FirstClip(network)
    if network is not None and isinstance(head, FineTunesBackbone):
        head.attach(first_clip)
    for number, all_rows in enumerate(plan.division.train):
        rows = np.concatenate(
            [all_rows[plan.labels[all_rows] == label][:CLIPS_PER_CLASS]
             for label in np.unique(plan.labels[all_rows])]
        )  # fmt: skip
        clips, memory = _with_teacher(plan, rows), None
        if isinstance(head, ReplaysExemplars) and len(head.exemplars):
            memory = _with_teacher(plan, head.exemplars.numpy())
        text = None
        if plan.class_text is not None:
            text = plan.class_text[sorted(set(clips.labels.tolist()))].to(plan.device)
        head.learn(Task(clips, number, text, memory))
    first_clip.restore()
    return plan.test_clips(plan.division.test[0][:MOST_CLIPS])


def _with_teacher(plan: PreparedRun, rows: np.ndarray) -> Clips:
    """Return clips, with the teacher's outputs of the first of them for all, where it is used."""
    head, clips = plan.head, plan.training_clips(rows, [])
    if not isinstance(head, UsesTeacher) or not head.classes or plan.network is None:
        return clips
    with torch.no_grad():
        outputs = head.suffix(clips[torch.arange(1)][head.reads[0]])
    teacher = {}
    for name in head.teacher_stages:
        output = outputs[plan.network.find(name)]
        teacher[f"teacher {name}"] = output.expand(len(clips), *output.shape[1:])
    return Clips({**clips.features, **teacher}, clips.labels, clips.rows)


class _FirstClip:
    """A network whose suffixes compute the first clip of a batch and return it for every clip.

    What is learned has no effect on the cost, and this takes no longer for a hundred classes.
    """

    def __init__(self, network: HeadNetwork | None) -> None:
        self._network, self._suffixes = network, list[nn.Module]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def suffix(self, *arguments: Any, **options: Any) -> nn.Module:
        assert self._network is not None
        suffix = self._network.suffix(*arguments, **options)
        forward = suffix.forward

        def of_first(x: Tensor) -> Any:
            outputs = forward(x[:1])
            if isinstance(outputs, dict):
                return {n: y.expand(len(x), *y.shape[1:]) for n, y in outputs.items()}
            return outputs.expand(len(x), *outputs.shape[1:])

        suffix.forward = of_first  # type: ignore[method-assign]
        self._suffixes.append(suffix)
        return suffix

    def restore(self) -> None:
        """Let the suffixes compute every clip."""
        for suffix in self._suffixes:
            del suffix.forward


def _parts(plan: PreparedRun, clips: Clips) -> list[dict[str, Any]]:
    """Return the rows of a head, after those of the frozen stages that come from the store."""
    computed = {id(p) for _, module in named_modules(plan.head) for p in module.parameters()}
    owners = list(dict.fromkeys(feature.backbone for feature in plan.features.values()))
    rows = []
    for owner in owners:
        features = [feature for feature in plan.features.values() if feature.backbone == owner]
        if plan.network is not None and owner == plan.spec["backbone"]:
            network = plan.network.frozen
        else:
            network = head_inputs.load_network(FeatureStore.open(plan.store), owner)
        stages = [feature.name.partition(":")[0] for feature in features]
        costs = cached_costs(network, max(stages, key=network.stage_names.index),
                             features[0].spec["frames"]["frames"], plan.device)  # fmt: skip
        sizes = {id(p): p.numel() for _, module, _ in costs for p in module.parameters()}
        parameters = sum(count for key, count in sizes.items() if key not in computed)
        part = BACKBONE if len(owners) == 1 else f"{BACKBONE} {owner}"
        rows.append(cost_row(part, parameters, sum(count for *_, count in costs), True))
    return rows + module_costs(plan.head, clips)


def _latencies(plan: PreparedRun, clips: Clips, repeats: int) -> list[dict[str, Any]]:
    """Measure the forwards of one clip with and without grafts: each stage, and the network."""
    head, network = plan.head, plan.network
    suffix = next((m for name, m in modules_of(head) if name == NETWORK), None)
    if network is None or suffix is None:
        return []
    chain = network.backbone_of(suffix)
    ours = {id(stage) for stage in stages_of(suffix)}
    grafted: dict[str, tuple[nn.Module, nn.Module, str]] = {}  # graft, what it replaces, names
    for stage in (stage for stage in chain.stages if id(stage.module) in ours):
        layers, inner = grafts_of(stage.module)
        added = len(layers) - len(grafts_of(network.module(stage.name))[0])
        if added:
            plain = [*layers, inner][added]
            names = "+".join(map(graft_name, layers[:added]))
            grafted[stage.name] = (stage.module, plain, names)
    batch = clips[torch.arange(1)]
    x = batch[head.reads[0]]
    pictures = _pictures(chain, network.frames, plan.device)
    last = next(s.name for s in chain.stages if s.module is stages_of(suffix)[-1])
    inputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[name] = arguments[0].clone()

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, (graft, _, _) in grafted.items():
            hooks.callback(graft.register_forward_pre_hook(partial(keep, name)).remove)
        suffix(x)
    rows = []

    def measure(
        stage: str, names: str, call: Callable[[], object], other: Callable[[], object]
    ) -> None:
        seconds, without = alternated(call, other, repeats)
        if not names:
            without = math.nan
        values = (stage, names, 1000 * seconds, 1000 * without, seconds / without)
        rows.append(dict(zip(LATENCY_COLUMNS, values, strict=True)))

    def without_grafts(call: Callable[[], object]) -> None:
        with contextlib.ExitStack() as replaced:
            for graft, plain, _ in grafted.values():
                graft.forward = plain.__call__  # type: ignore[method-assign]
                replaced.callback(delattr, graft, "forward")
            call()

    with torch.no_grad():
        for name, (graft, plain, names) in grafted.items():
            measure(name, names, partial(graft, inputs[name]), partial(plain, inputs[name]))
        kinds = "+".join(dict.fromkeys(names for *_, names in grafted.values()))
        calls = {FROM_CACHE: partial(suffix, x), FROM_VIDEO: partial(chain.run, pictures, [last])}
        for name, call in calls.items():
            measure(name, kinds, call, partial(without_grafts, call))
    return rows


def _pictures(backbone: Backbone, frames: int, device: str) -> Tensor:
    """Return an input of a network for T frames, on a device, to which the network is moved."""
    for stage in backbone.stages:
        stage.module.to(device)
    dtype = getattr(torch, backbone.picture.dtype)
    return torch.zeros(frames, *backbone.picture.shape, dtype=dtype, device=device)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

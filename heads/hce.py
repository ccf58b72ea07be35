"""HCE: importance-weighted feature distillation, channel by channel.

From the second task on, e and e' are the maps of the trained blocks by the network and its teacher:

    H     = HAS(e, e'), an importance of each channel    (parts/hierarchical_aggregation.py)
    L_hc  = sum_l mean H |e - e'|^2, on unit maps
    L_kd  = mean |unit f(x) - unit f'(x)|^2, of the frames' last vectors
    R     = CRM's offset of the logits of old and new classes, by the spread of H
            (parts/correlation_refinement.py)
    loss  = CE(p + R, y) + kd * L_kd + weight * L_hc

The teacher's maps come with the clips: they are computed once per task and read in every epoch. HAS
trains on from task to task; the first task has none. CNN is the classifier, NME the nearest mean of
exemplars.

Ours, where HCE is silent: see the parts, and the form of L_kd; the optimiser of all heads instead
of SGD at 1e-3 for 50 epochs with x 0.1 after 20 and 30. Only the last `blocks` train, from a cached
feature on: frozen blocks have a zero L_hc. The paper's network is `tsm_resnet34` (UCF101) or
`tsm_resnet50`; in a plain ResNet the blocks that train get a temporal shift. The patches of a
transformer are a map too, without temporal shift.

Shapes: B clips, T frames, N = B * T, C channels of a block.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from varve.heads import Network
from varve.heads.grafts.temporal_shift import TemporalShift
from varve.heads.parts import correlation_refinement, models
from varve.heads.parts.classifiers import Classifier
from varve.heads.parts.clips import Batch
from varve.heads.parts.exemplars import ExemplarConfig
from varve.heads.parts.fine_tuned_head import FineTunedHead, Graft, grid
from varve.heads.parts.hierarchical_aggregation import HAS, check, drift, effective
from varve.heads.parts.models import TaskLoss, TaskTraining
from varve.heads.parts.trainable_suffix import TrainableSuffix

IMPORTANCES = ("has", "multi", "single")
PARTS = ("kd", "hc", "crm", "number")
CRMS = ("epoch", "batch")
# Fewer epochs at a greater rate, for the contract suite: an epoch of HAS takes long.
QUICK = {"epochs": 12, "lr": 0.03}


class HCE(FineTunedHead):
    """Fine-tune blocks with importance-weighted distillation; see the module.

    Args:
        blocks: Number of the network's last blocks that train.
        parts: Terms beside cross entropy, joined by "+": `kd` (L_kd), `hc` (L_hc), and `crm` or
            `number`, which takes the logarithms of class counts as R. None for "kd+hc+crm", without
            crm where there is no HAS or no exemplar.
        importance: Source of H: `has`; `multi`, equal for every channel of every block; `single`,
            for those of the last block alone.
        weight: Weight of L_hc; 1000 in the paper, whose scale may differ.
        kd: Weight of L_kd.
        levels: Number of map sizes that are distilled, from the coarsest: 3 are layers 2 to 4 of a
            ResNet. Hypercorrelations of layer 1 would take 0.5 GB per clip.
        crm: Source of the offset: the `epoch` before, or the `batch` itself, with gradients.
        mix: Option of HAS, as are `h`, `last_stride` and `frames`; see
            `varve.heads.parts.hierarchical_aggregation`.
        has_lr: Learning rate of HAS.
        shift: 1/shift of the channels are shifted in time before each block that trains (TSM); 0
            for none. Blocks of a TSM network are already shifted, and stay as they are.
        exemplars: Options of the exemplars.
        options: Options of `varve.heads.parts.fine_tuned_head.FineTunedHead`.
    """

    def __init__(
        self,
        blocks: int = 2,
        parts: str | None = None,
        importance: str = "has",
        weight: float = 1000.0,
        kd: float = 1.0,
        levels: int = 3,
        crm: str = "epoch",
        mix: str = "cascade",
        h: str = "bounded",
        last_stride: int = 2,
        frames: int | None = 8,
        has_lr: float = 1e-4,
        shift: int = 8,
        exemplars: ExemplarConfig = ExemplarConfig(),
        **options: Any,
    ) -> None:
        super().__init__(blocks, exemplars=exemplars, **options)
        if parts is None:
            has_crm = importance == "has" and exemplars.budget != 0
            parts = "kd+hc+crm" if has_crm else "kd+hc"
        self.parts = set(parts.split("+")) if parts else set()
        if importance not in IMPORTANCES or not self.parts <= set(PARTS):
            raise ValueError(
                f"{parts=}, {importance=}: join {', '.join(PARTS)} by +, and choose from "
                f"{', '.join(IMPORTANCES)}"
            )
        alone = "hc" not in self.parts or "number" in self.parts
        if "crm" in self.parts and (importance != "has" or alone):
            raise ValueError(
                f"{parts=}, {importance=}: crm is computed from HAS, in the place of number"
            )
        if "crm" in self.parts and exemplars.budget == 0:
            raise ValueError(
                f"budget=0, {parts=}: crm compares exemplars with new clips; give parts without it"
            )
        if crm not in CRMS or levels < 1 or not has_lr >= 0:
            raise ValueError(
                f"{crm=}, {levels=}, {has_lr=}: choose crm from {', '.join(CRMS)}, distill maps "
                "of one size at least, and give a rate of 0 or more"
            )
        check(mix, h, last_stride, frames)
        self.importance, self.weight, self.kd, self.crm = importance, weight, kd, crm
        self.diagnostics: Mapping[str, float] = {}
        self._levels = levels
        self._new_has = partial(HAS, mix=mix, h=h, last_stride=last_stride, frames=frames)
        self._has_lr, self._shift = has_lr, shift
        self._has: HAS | None = None

    @property
    def teacher_stages(self) -> Sequence[str]:
        return [*self.distilled_stages, *(["vector"] if "kd" in self.parts else [])]

    @property
    def distilled_stages(self) -> Sequence[str]:
        """The trained stages whose maps are distilled."""
        if "hc" not in self.parts:
            return []
        network = self.network
        stages = network.stages
        after = stages.index(network.find(self.reads[0])) + 1
        shapes = {name: network.shape(name) for name in stages[after:]}
        maps = {name: _map_shape(shape)[1:] for name, shape in shapes.items() if len(shape) > 1}
        sizes = list(dict.fromkeys(maps.values()))[-self._levels :]
        return [name for name, size in maps.items() if size in sizes]

    def grafts(self, network: Network, classifier: Classifier) -> Mapping[str, Graft]:
        if not self._shift:
            return {}
        blocks = [network.find(f"blocks.-{n}") for n in range(1, self._blocks + 1)]
        maps = [
            stage
            for stage in blocks
            if len(network.shape(stage)) == 3
            and not isinstance(network.module(stage), TemporalShift)
        ]
        return {
            stage: partial(TemporalShift, frames=network.time_steps(stage), fold=self._shift)
            for stage in maps
        }

    def task_loss(self, training: TaskTraining) -> TaskLoss:
        if not self.classes:
            return TaskLoss()
        features = [f"teacher {name}" for name in self.teacher_stages]
        if lacking := [name for name in features if name not in training.clips.features]:
            raise ValueError(
                f"clips without {', '.join(map(repr, lacking))}: the outputs of the network before "
                "this task come with them (heads.UsesTeacher)"
            )
        has = self._trainable_has(training.rng, training.suffix)
        return FeatureDistillation(self, training, has)

    def _trainable_has(self, rng: np.random.Generator, suffix: TrainableSuffix) -> HAS | None:
        """Return a copy of HAS to train, or a new one; None where there is no HAS."""
        if self.importance != "has" or "hc" not in self.parts:
            return None
        shapes = {name: _map_shape(self.network.shape(name)) for name in self.distilled_stages}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**31)))
            has = self._new_has(shapes)
        if self._has is not None:
            has.load_state_dict(self._has.state_dict())
        return has.to(next(iter(suffix.own().values())).device)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().modules()
        if self._has is not None:
            yield "has", self._has

    @property
    def trainable(self) -> int:
        return super().trainable + models.trainable(self._has)

    def state_dict(self) -> dict[str, Tensor]:
        tensors = {} if self._has is None else self._has.state_dict()
        return super().state_dict() | models.copies(tensors, "has.")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._has = None
        if tensors := models.part(state, "has."):
            assert self._suffix is not None
            self._has = self._trainable_has(np.random.default_rng(0), self._suffix)
            assert self._has is not None
            self._has.load_state_dict(tensors)


class FeatureDistillation(TaskLoss):
    """L_kd, L_hc and the offsets R of one task."""

    def __init__(self, head: HCE, training: TaskTraining, has: HAS | None) -> None:
        task, clips = training.task, training.clips
        self._head, self._has, self._trained = head, has, training.suffix.trained
        self._maps = head.distilled_stages
        if head.importance == "single":
            self._maps = self._maps[-1:]
        self._is_exemplar_N = torch.arange(len(clips)) >= len(task.clips)
        self._counts = [int((clips.labels == label).sum()) for label in training.classes]
        self._known = len(head.classes)
        self._offset: float | Tensor = 0.0  # of old classes; new ones have 0
        self._spreads = correlation_refinement.Spread(), correlation_refinement.Spread()
        self._effective: dict[str, list[Tensor]] = {name: [] for name in self._maps if has}
        self._diagnostics: dict[str, float] = {}
        if has is not None:
            has.train()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return (
            [{"params": [*self._has.parameters()], "lr": self._head._has_lr}] if self._has else []
        )

    def logit_offsets(self, classes: int) -> Tensor:
        if "number" in self._head.parts:
            return torch.tensor([max(1, n) for n in self._counts]).log()
        old_C = (torch.arange(classes) < self._known).float()
        return old_C.to(getattr(self._offset, "device", "cpu")) * self._offset

    def loss(
        self, indices: Tensor, batch: Batch, vectors: Batch, outputs: Sequence[Tensor]
    ) -> Tensor:
        head = self._head
        loss = torch.zeros((), device=outputs[0].device)
        if "kd" in head.parts:
            new, teacher = (
                normalize(x, dim=2) for x in (vectors["vector"], batch["teacher vector"])
            )
            loss = loss + head.kd * (new - teacher).square().sum(dim=2).mean()
        if not self._maps:
            return loss
        maps = dict(zip(self._trained, outputs, strict=True))
        new_maps = {name: _map(maps[name]) for name in self._maps}
        teacher_maps = {name: _map(batch[f"teacher {name}"]) for name in self._maps}
        if self._has is None:
            h = {n: torch.ones(x.shape[:2], device=x.device) for n, x in new_maps.items()}
        else:
            h = self._has(new_maps, teacher_maps)
            clips_BW = torch.cat(
                [x.unflatten(0, (len(indices), -1)).flatten(1) for x in h.values()], 1
            )
            exemplar_B = self._is_exemplar_N[indices].to(clips_BW.device)
            for name, h_NC in h.items():
                self._effective[name].append(effective(h_NC.detach()))
            if "crm" in head.parts and head.crm == "batch":
                self._offset = correlation_refinement.difference(
                    clips_BW[exemplar_B], clips_BW[~exemplar_B]
                )
            for spread, mask_B in zip(self._spreads, (exemplar_B, ~exemplar_B), strict=True):
                spread.add(clips_BW[mask_B])
        return loss + head.weight * drift(h, new_maps, teacher_maps)

    def on_epoch_end(self) -> None:
        if "crm" in self._head.parts and self._head.crm == "epoch":
            self._offset = correlation_refinement.ratios(*self._spreads)[0]
        self._spreads = correlation_refinement.Spread(), correlation_refinement.Spread()
        self._diagnostics = {
            f"effective channels, {name}": float(torch.stack(shares).mean())
            for name, shares in self._effective.items()
        }
        self._effective = {name: [] for name in self._effective}

    def on_task_end(self) -> None:
        self._head.diagnostics = self._diagnostics
        if self._has is not None:
            self._head._has = self._has.eval()


def _map_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, prefix = grid(shape)
    if len(shape) == 3:
        return channels, shape[1], shape[2]
    side = math.isqrt(shape[0] - prefix)
    return channels, side, side


def _map(x: Tensor) -> Tensor:
    """Return the maps of frames [B, T, ...], float32 [N, C, H, W]."""
    x = x.flatten(0, 1).float()
    if x.ndim == 4:
        return x
    C, H, W = _map_shape(x.shape[1:])
    return x[:, -H * W :].mT.reshape(-1, C, H, W)


build = HCE

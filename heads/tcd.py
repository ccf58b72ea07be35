"""TCD: distillation weighted by the importance of each channel at each time.

Park, Kang and Han, "Class-Incremental Learning for Action Recognition in Videos", ICCV 2021, with
the numbers of the published code. F_l are the maps of trained stage l and f the last vectors of the
frames, F' and f' those of the network as the previous task left it (the teacher):

    L      = CE' + kd sqrt(old / new classes) L_kd + maps L_maps + diversity L_div
    L_maps = mean_l 1 / sqrt(T) mean_(t c) I_l(t c) | unit(F_l(t c)^2) - unit(F'_l(t c)^2) |_2
    L_kd   = 1 / T sum_(t c) I(t c) (unit f_t - unit f'_t)_c^2
    L_div  = mean_l sum_c | R_l(c) - identity |_F / (T (T - 1))
    I_l(t c) = mean over the clips learned of sum_space (d CE' / d F_l(t c))^2, divided by its mean

R_l(c) has the cosines between a channel's maps of the T frames. The importance I is computed after
the last epoch of a task, from its clips and the exemplars, and weighs the distillation of the next
task. The classifier has one proxy per class, and the NCA loss CE' of the code (`parts/losses.py`);
old proxies are frozen. Then the proxies of the task alone are tuned on equally many exemplars per
class. Statistics and affine parameters of batch norms are frozen.

Ours: only the last `blocks` train, from a cached feature on, so that frozen stages have no term;
stage l is the last trained block of each size of map, every trained block of a transformer. A clip
has the cosines of its mean vector, where the code averages those of its frames. The margin of the
code's loss is subtracted from all classes alike and has no effect; it is left out. eta starts from
20 (`varve.heads.parts.classifiers` says why). The optimiser of all heads, where TCD has SGD at
0.001 for 50 epochs with x 0.1 after 20 and 30, batches of 32, norms clipped at 20, dropout of 0.8
and five times the rate for the classifier (`benchmarks/sweeps/tcd.toml` has them).

Shapes: B clips, T frames, C channels, S positions of a map, W width of a clip's vector.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from varve.heads import Network
from varve.heads.grafts.temporal_shift import TemporalShift
from varve.heads.parts import models
from varve.heads.parts.classifiers import Classifier, Cosine
from varve.heads.parts.clips import Batch
from varve.heads.parts.fine_tuned_head import FineTunedHead, Graft
from varve.heads.parts.losses import nca_as_coded, positions
from varve.heads.parts.models import TaskLoss, TaskTraining


class TCD(FineTunedHead):
    """Distill maps by the importance of channels in time; see the module.

    Args:
        blocks: Number of the network's last blocks that train.
        kd: Weight of L_kd.
        maps: Weight of L_maps.
        diversity: Weight of L_div.
        importance: Whether I weighs the distillation; False for I = 1.
        shift: 1/shift of the channels are shifted in time before each block that trains (TSM); 0
            for none. Blocks of a TSM network are already shifted, and stay as they are.
        proxies: Option of the classifier, as are `tune_lr` and `batch_norm`; see the module.
        options: Options of `varve.heads.parts.fine_tuned_head.FineTunedHead`.

    Raises:
        ValueError: A weight is negative, or the classifier is linear.
    """

    tunes_old = False

    def __init__(
        self,
        blocks: int = 2,
        kd: float = 0.01,
        maps: float = 0.3,
        diversity: float = 0.01,
        importance: bool = True,
        shift: int = 8,
        proxies: int = 1,
        tune_lr: float = 1e-4,
        batch_norm: str = "fixed",
        **options: Any,
    ) -> None:
        super().__init__(blocks, proxies=proxies, tune_lr=tune_lr, batch_norm=batch_norm, **options)
        if not self._proxies:
            raise ValueError("classifier='linear': TCD's loss is one of cosines; leave it out")
        if min(kd, maps, diversity) < 0 or shift < 0:
            raise ValueError(f"{kd=}, {maps=}, {diversity=}, {shift=}: give 0 or more of each")
        self.kd, self.maps, self.diversity = kd, maps, diversity
        self._weighs, self._shift = importance, shift
        self.importance: dict[str, Tensor] = {}  # I by stage, [T, C]

    @property
    def teacher_stages(self) -> Sequence[str]:
        return [*(self.stages if self.maps else []), *(["vector"] if self.kd else [])]

    @property
    def stages(self) -> list[str]:
        """The trained stages whose maps are compared."""
        network = self.network
        names = network.stages[network.stages.index(network.find(self.reads[0])) + 1 :]
        shapes = {name: network.shape(name) for name in names if len(network.shape(name)) > 1}
        last = {shape: name for name, shape in shapes.items()}
        return [n for n, shape in shapes.items() if len(shape) == 2 or last[shape] == n]

    def grafts(self, network: Network, classifier: Classifier) -> Mapping[str, Graft]:
        if not self._shift:
            return {}
        blocks = [network.find(f"blocks.-{n}") for n in range(1, self._blocks + 1)]
        plain = [stage for stage in blocks if len(network.shape(stage)) == 3
                 and not isinstance(network.module(stage), TemporalShift)]  # fmt: skip
        return {
            stage: partial(TemporalShift, frames=network.time_steps(stage), fold=self._shift)
            for stage in plain
        }

    def classification_loss(
        self, classifier: Classifier, vectors_BW: Tensor, columns_B: Tensor, offsets_C: Tensor
    ) -> Tensor:
        assert isinstance(classifier, Cosine)
        return nca_as_coded(classifier.logits(vectors_BW), columns_B)

    def task_loss(self, training: TaskTraining) -> TaskLoss:
        return TimeChannelDistillation(self, training)

    def measure(self, training: TaskTraining) -> dict[str, Tensor]:
        """Return I of every compared stage and of the frames' vectors, [T, C], by the trained."""
        sums: dict[str, Tensor] = {}
        suffix, model, classifier = training.suffix, training.model, training.classifier
        no_offsets_C = torch.zeros(len(training.classes), device=training.device)
        for indices in torch.split(torch.arange(len(training.clips)), models.BATCH):
            batch, columns_B = training.clips[indices], training.columns_N[indices]
            with torch.enable_grad():
                vectors, passed = suffix.traced(batch)
                mean = self.classification_loss(
                    classifier, model.vectors(vectors), columns_B.to(training.device), no_offsets_C
                )
                # Of the sum over clips, so that the gradient of a clip is that of its own loss.
                outputs = {name: passed[name].outputs for name in self.stages}
                outputs["vector"] = vectors["vector"]
                gradients = torch.autograd.grad(mean * len(indices), [*outputs.values()])
            for name, gradient in zip(outputs, gradients, strict=True):
                x_NSC = positions(gradient.flatten(0, 1) if name == "vector" else gradient)
                squares_NC = x_NSC.float().square().sum(dim=1)
                steps = self.network.time_steps(name)
                total_TC = squares_NC.reshape(-1, steps, squares_NC.shape[1]).sum(dim=0)
                sums[name] = sums[name] + total_TC if name in sums else total_TC
        # Without any gradient every channel counts alike.
        return {name: total_TC / total_TC.mean() if total_TC.any() else torch.ones_like(total_TC)
                for name, total_TC in sums.items()}  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | models.copies(self.importance, "importance.")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.importance = {n: x.clone() for n, x in models.part(state, "importance.").items()}


class TimeChannelDistillation(TaskLoss):
    """L_kd and L_maps from the second task on, and L_div."""

    def __init__(self, head: TCD, training: TaskTraining) -> None:
        self._head, self._training, self._trained = head, training, training.suffix.trained
        self._known = len(head.classes)
        self._importance: dict[str, Tensor] = {}  # of this task, which weighs the next
        if not self._known:
            return
        assert isinstance(training.classifier, Cosine)
        training.classifier.frozen = ~training.in_task_C
        features = [f"teacher {name}" for name in head.teacher_stages]
        if lacking := [name for name in features if name not in training.clips.features]:
            raise ValueError(
                f"clips without {', '.join(map(repr, lacking))}: the outputs of the network before "
                "this task come with them (heads.UsesTeacher)"
            )
        self._kd = head.kd * (self._known / len(training.task.classes)) ** 0.5

    def loss(
        self, indices: Tensor, batch: Batch, vectors: Batch, outputs: Sequence[Tensor]
    ) -> Tensor:
        head, loss = self._head, torch.zeros((), device=outputs[0].device)
        maps = {
            name: _maps_of_clips(output)
            for name, output in zip(self._trained, outputs, strict=True)
            if name in head.stages
        }
        if head.diversity and vectors["vector"].shape[1] > 1:
            loss = loss + head.diversity * torch.stack([*map(diversity, maps.values())]).mean()
        if not self._known:
            return loss
        if head.maps:
            terms = []
            for name, new in maps.items():
                old = _maps_of_clips(batch[f"teacher {name}"])
                terms.append(map_distance(new, old, self._weights(name)))
            loss = loss + head.maps * torch.stack(terms).mean()
        if head.kd:
            new, old = (normalize(x, dim=2) for x in (vectors["vector"], batch["teacher vector"]))
            distances_BTC = self._weights("vector") * (new - old).square()
            loss = loss + self._kd * distances_BTC.sum(dim=2).mean()
        return loss

    def _weights(self, name: str) -> Tensor:
        head, device = self._head, self._training.device
        return head.importance[name].to(device) if head._weighs else torch.ones((), device=device)

    def on_trained(self) -> None:
        if self._head._weighs:
            self._importance = self._head.measure(self._training)

    def on_task_end(self) -> None:
        self._head.importance = self._importance


def map_distance(x: Tensor, teacher: Tensor, weights_TC: Tensor) -> Tensor:
    """Return the term of L_maps of one stage, a mean over clips, from maps [B, T, S, C]."""
    new, old = (normalize(each.square(), dim=2) for each in (x, teacher))
    distances_BTC = (new - old).norm(dim=2)
    distance: Tensor = (weights_TC * distances_BTC).mean() / x.shape[1] ** 0.5
    return distance


def diversity(x: Tensor) -> Tensor:
    """Return the term of L_div of one stage, a mean over clips, from maps [B, T, S, C]."""
    T = x.shape[1]
    unit_BCTS = normalize(x, dim=2).permute(0, 3, 1, 2)
    cosines_BCTT = unit_BCTS @ unit_BCTS.mT
    identity_TT = torch.eye(T, device=x.device)
    sums_B = (cosines_BCTT - identity_TT).norm(dim=(2, 3)).sum(dim=1)
    total: Tensor = sums_B.mean() / (T * (T - 1))
    return total


def _maps_of_clips(x: Tensor) -> Tensor:
    """Return maps or tokens of clips, [B, T, ...], as float32 [B, T, S, C]."""
    x_NSC = positions(x.flatten(0, 1).float())
    return x_NSC.reshape(*x.shape[:2], *x_NSC.shape[1:])


build = TCD

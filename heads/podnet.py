"""PODNet: the last blocks of the network train, held by their pooled outputs.

Douillard et al., ECCV 2020. The classifier has P proxies a class (local similarity classifier) and
the NCA loss with a margin; from the second task on, over its clips and the exemplars:

    L = NCA(x) + (POD-flat + 3 POD-spatial) sqrt(classes so far / classes of the task)
    POD-flat = 1 - cos(f*(x), f(x)),   POD-spatial: pooled outputs of each trained stage

f* is the old model; `varve.heads.parts.distillation` has the equations. Then the classifier alone
is
tuned on the exemplars, as many of each class. As in the published code new proxies start about the
mean of their clips (imprinting), and old ones are held until the tuning.

Ours, on video: the network trains from a cached feature on, so `blocks` says how many of its last
blocks; outputs are pooled frame by frame; f(x) is the encoder of the last vectors of T frames. The
shared recipe of `varve.heads.linear` without decay of proxies; eta starts from 20, and proxies are
imprinted in the first task too (see `varve.heads.lucir`); 5 exemplars a class (TCD's).

Shapes: B clips, T frames, L tokens, C classes, W width of a clip's vector.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varve.heads import Task
from varve.heads.parts import models
from varve.heads.parts.classifiers import Classifier, Cosine
from varve.heads.parts.clips import Batch, Clips
from varve.heads.parts.distillation import less_forget, nca, pooled
from varve.heads.parts.fine_tuned_head import FineTunedHead, TaskLoss
from varve.heads.parts.trainable_suffix import TrainableSuffix


class PODNet(FineTunedHead):
    """See the module, and `varve.heads.parts.fine_tuned_head` for the other options.

    Args:
        blocks: How many of the network's last blocks train.
        margin: Of the NCA loss.
        flat: Weight of POD-flat.
        spatial: Weight of POD-spatial.
    """

    def __init__(
        self,
        blocks: int = 2,
        margin: float = 0.6,
        flat: float = 1.0,
        spatial: float = 3.0,
        **tuned: Any,
    ) -> None:
        super().__init__(blocks, **tuned)
        if not self._proxies:
            raise ValueError("classifier='linear': PODNet's loss is one of cosines; leave it out")
        self.margin, self.flat, self.spatial = margin, flat, spatial

    def classified(
        self, classifier: Classifier, vectors_BW: Tensor, columns_B: Tensor, offsets_C: Tensor
    ) -> Tensor:
        assert isinstance(classifier, Cosine)
        return nca(classifier(vectors_BW), columns_B, classifier.scale, self.margin)

    def more(
        self,
        task: Task,
        clips: Clips,
        trunk: TrainableSuffix,
        model: models.Model[Classifier],
        rng: np.random.Generator,
    ) -> TaskLoss:
        return Pooled(self, task, model.classifier) if self.classes else TaskLoss()


class Pooled(TaskLoss):
    """What holds a task's network to the old one."""

    def __init__(self, head: PODNet, task: Task, classifier: Classifier) -> None:
        assert isinstance(classifier, Cosine)
        self._head, device = head, classifier.weight.device
        new = [label for label in task.classes if label not in head.classes]
        taught = [label in task.classes for label in [*head.classes, *new]]
        classifier.held = ~torch.tensor(taught, device=device)
        assert head._trunk is not None
        self._old_trunk, self._old = head._trunk.to(device), models.learned(head._model).to(device)
        self._weight = (len(taught) / len(task.classes)) ** 0.5

    def loss(
        self, places: Tensor, batch: Batch, vectors: Batch, outputs: Sequence[Tensor]
    ) -> Tensor:
        with torch.no_grad():
            old_vectors, old_outputs = self._old_trunk(batch)
            old_BW = self._old.vectors(old_vectors)
        flat, spatial = self._weight * self._head.flat, self._weight * self._head.spatial
        gap: Tensor = flat * less_forget(vectors[models.ENCODED], old_BW)
        gap += spatial * pooled(outputs, old_outputs)
        return gap


build = PODNet

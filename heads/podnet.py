"""PODNet: the last blocks of the network train, with distillation of their pooled outputs.

Douillard et al., ECCV 2020. The classifier has P proxies per class (local similarity classifier)
and the NCA loss with a margin. From the second task on, over its clips and the exemplars:

    L = NCA(x) + (POD-flat + 3 POD-spatial) sqrt(classes so far / classes of the task)
    POD-flat = 1 - cos(f*(x), f(x)),   POD-spatial: pooled outputs of each trained stage

f* is the previous model; `varve.heads.parts.losses` has the equations. Then the classifier
alone is tuned on equally many exemplars of each class. As in the published code new proxies start
around the mean of their clips (imprinting), and old ones are frozen until the tuning.

Ours, on video: only the last `blocks` of the network train, from a cached feature on; outputs are
pooled frame by frame; f(x) is the temporal encoder of the last vectors of T frames. The optimiser
is that of all heads, without decay of proxies; eta starts from 20, and proxies are imprinted in the
first task too (see `varve.heads.lucir`); 5 exemplars per class (TCD's).

Shapes: B clips, T frames, L tokens, C classes, W width of a clip's vector.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varve.heads.parts import models
from varve.heads.parts.classifiers import Classifier, Cosine
from varve.heads.parts.clips import Batch
from varve.heads.parts.fine_tuned_head import FineTunedHead
from varve.heads.parts.losses import less_forget, nca, pooled
from varve.heads.parts.models import TaskLoss, TaskTraining


class PODNet(FineTunedHead):
    """Fine-tune blocks with pooled outputs distillation; see the module.

    Args:
        blocks: Number of the network's last blocks that train.
        margin: Margin of the NCA loss.
        flat: Weight of POD-flat.
        spatial: Weight of POD-spatial.
        options: Options of `varve.heads.parts.fine_tuned_head.FineTunedHead`.
    """

    def __init__(
        self,
        blocks: int = 2,
        margin: float = 0.6,
        flat: float = 1.0,
        spatial: float = 3.0,
        **options: Any,
    ) -> None:
        super().__init__(blocks, **options)
        if not self._proxies:
            raise ValueError("classifier='linear': PODNet's loss is one of cosines; leave it out")
        self.margin, self.flat, self.spatial = margin, flat, spatial

    def classification_loss(
        self, classifier: Classifier, vectors_BW: Tensor, columns_B: Tensor, offsets_C: Tensor
    ) -> Tensor:
        assert isinstance(classifier, Cosine)
        return nca(classifier(vectors_BW), columns_B, classifier.scale, self.margin)

    def task_loss(self, training: TaskTraining) -> TaskLoss:
        return PooledDistillation(self, training) if self.classes else TaskLoss()


class PooledDistillation(TaskLoss):
    """POD-flat and POD-spatial, from a teacher: the suffix and model of the previous task."""

    def __init__(self, head: PODNet, training: TaskTraining) -> None:
        assert isinstance(training.classifier, Cosine)
        assert head._suffix is not None
        training.classifier.frozen = ~training.in_task_C
        self._teacher_suffix = head._suffix.to(training.device)
        self._teacher = models.learned(head._model).to(training.device)
        weight = (len(training.classes) / len(training.task.classes)) ** 0.5
        self._flat, self._spatial = weight * head.flat, weight * head.spatial

    def loss(
        self, indices: Tensor, batch: Batch, vectors: Batch, outputs: Sequence[Tensor]
    ) -> Tensor:
        with torch.no_grad():
            teacher_vectors, teacher_outputs = self._teacher_suffix(batch)
            teacher_BW = self._teacher.vectors(teacher_vectors)
        loss: Tensor = self._flat * less_forget(vectors[models.ENCODED], teacher_BW)
        loss += self._spatial * pooled(outputs, teacher_outputs)
        return loss


build = PODNet

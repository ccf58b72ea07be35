"""LwM: learning without memorizing, by distillation of attention maps.

Dhar, Singh, Peng, Wu and Chellappa, CVPR 2019. It keeps no clip, and adds to LwF-MC (see
`varve.heads.lwf`) that the model keeps looking where the previous one looked:

    L = L_C + beta L_D + gamma L_AD
    L_C = - sum_(c of the task) [y = c] log g_c + [y != c] log(1 - g_c),   g = sigmoid(o)
    L_D = - sum_(other c) q_c log g_c + (1 - q_c) log(1 - g_c),   q = sigmoid(o*)
    L_AD = mean_t | unit Q_t - unit Q*_t |_1

o* are the logits of the previous model (the teacher) and Q_t is the Grad-CAM map of frame t
(Selvaraju et al., ICCV 2017), for the old class b that the teacher scores highest, of both models:

    Q = ReLU(sum_c alpha_c A_c),   alpha_c = mean over positions of d o_b / d A_c

The gradient of L_AD runs through alpha too, as published.

Ours: the paper's weights depend on its data set; beta = gamma = 1 here. Only the last `blocks` of
the network train. A is the output of the last trained block of maps, and in a transformer the input
of the last attention, after which no token sees another. The maps cost a second pass through the
blocks.

Shapes: B clips, T frames, S positions of a map, c channels, C classes, K classes known before.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, one_hot

from varve.heads.parts import models
from varve.heads.parts.classifiers import Classifier
from varve.heads.parts.clips import Batch
from varve.heads.parts.exemplars import ExemplarConfig
from varve.heads.parts.fine_tuned_head import FineTunedHead
from varve.heads.parts.losses import positions
from varve.heads.parts.models import TaskLoss, TaskTraining
from varve.heads.parts.trainable_suffix import TrainableSuffix

# Independent sigmoids need more steps than a softmax on the few clips of the contract suite.
QUICK = {"lr": 0.03}


class LwM(FineTunedHead):
    """Distill logits and attention maps; see the module.

    Args:
        blocks: Number of the network's last blocks that train.
        beta: Weight of L_D.
        gamma: Weight of L_AD; 0 computes no map.
        classifier: Option of the classifier, as is `exemplars` of the memory: none by default.
        options: Options of `varve.heads.parts.fine_tuned_head.FineTunedHead`.

    Raises:
        ValueError: A weight is negative.
    """

    def __init__(
        self,
        blocks: int = 2,
        beta: float = 1.0,
        gamma: float = 1.0,
        classifier: str = "linear",
        exemplars: ExemplarConfig = ExemplarConfig(budget=0),
        **options: Any,
    ) -> None:
        super().__init__(blocks, classifier=classifier, exemplars=exemplars, **options)
        if min(beta, gamma) < 0:
            raise ValueError(f"{beta=}, {gamma=}: give weights of at least 0")
        self.beta, self.gamma = beta, gamma

    def classification_loss(
        self, classifier: Classifier, vectors_BW: Tensor, columns_B: Tensor, offsets_C: Tensor
    ) -> Tensor:
        logits_BC = classifier.logits(vectors_BW)
        targets_BC = one_hot(columns_B, logits_BC.shape[1]).to(logits_BC)
        learns_C = offsets_C == 0
        return _sigmoid_loss(logits_BC[:, learns_C], targets_BC[:, learns_C])

    def task_loss(self, training: TaskTraining) -> TaskLoss:
        return AttentionDistillation(self, training) if self.classes else TaskLoss()

    def attention(
        self, suffix: TrainableSuffix, model: models.Model[Any], batch: Batch, columns_B: Tensor
    ) -> Tensor:
        """Return Q of each frame for one class of each clip, [B, T, S], with its graph."""
        batch = {name: x.detach().requires_grad_() for name, x in batch.items()}
        # The fused kernels of attention have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            vectors, passed = suffix.traced(batch)
            logits_BC = model.classifier.logits(model.vectors(vectors))
            stage, at_input = self._stage(suffix)
            x = passed[stage].inputs if at_input else passed[stage].outputs
            chosen = logits_BC.gather(1, columns_B[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, x, create_graph=True)
        x_NSC, gradient_NSC = positions(x.float()), positions(gradient.float())
        map_NS = torch.relu((gradient_NSC.mean(dim=1, keepdim=True) * x_NSC).sum(dim=2))
        return map_NS.reshape(len(columns_B), -1, map_NS.shape[1])

    def _stage(self, suffix: TrainableSuffix) -> tuple[str, bool]:
        """Return the stage whose map is compared, and whether it is the stage's input."""
        maps = [name for name in suffix.trained if len(self.network.shape(name)) == 3]
        if maps:
            return maps[-1], False
        attention = [name for name in suffix.trained if name.endswith(".attn")]
        return (attention or suffix.trained)[-1], True


class AttentionDistillation(TaskLoss):
    """L_D and L_AD, from a teacher: the suffix and model of the previous task."""

    def __init__(self, head: LwM, training: TaskTraining) -> None:
        assert head._suffix is not None
        self._head, self._training = head, training
        self._teacher_suffix = head._suffix.to(training.device)
        self._teacher = models.learned(head._model).to(training.device)
        self._old_K = ~training.in_task_C[: len(head.classes)]

    def logit_offsets(self, classes: int) -> Tensor:
        # Columns of classes of before learn from the teacher, and not from labels.
        offsets_C = torch.zeros(classes)
        offsets_C[: len(self._old_K)][self._old_K.cpu()] = -torch.inf
        return offsets_C

    def loss(
        self, indices: Tensor, batch: Batch, vectors: Batch, outputs: Sequence[Tensor]
    ) -> Tensor:
        head, training = self._head, self._training
        with torch.no_grad():
            teacher_vectors, _ = self._teacher_suffix(batch)
            encoded_BW = self._teacher.vectors(teacher_vectors)
            teacher_BK = self._teacher.classifier.logits(encoded_BW)
        loss = torch.zeros((), device=training.device)
        if self._old_K.any():
            logits_BK = training.classifier.logits(vectors[models.ENCODED])[:, : len(self._old_K)]
            targets_BK = teacher_BK.sigmoid()[:, self._old_K]
            loss = loss + head.beta * _sigmoid_loss(logits_BK[:, self._old_K], targets_BK)
        if head.gamma:
            top_B = teacher_BK.argmax(dim=1)
            new_BTS = head.attention(training.suffix, training.model, batch, top_B)
            old_BTS = head.attention(self._teacher_suffix, self._teacher, batch, top_B).detach()
            gaps_BTS = normalize(new_BTS, dim=2) - normalize(old_BTS, dim=2)
            loss = loss + head.gamma * gaps_BTS.abs().sum(dim=2).mean()
        return loss


def _sigmoid_loss(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Return the cross entropy of independent sigmoids, summed over columns, mean over clips."""
    if not logits_BK.shape[1]:
        return logits_BK.sum()
    losses_BK = binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none")
    return losses_BK.sum(dim=1).mean()


build = LwM

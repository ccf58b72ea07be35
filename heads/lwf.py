"""LwF-MC: learning without forgetting, class-incremental and without exemplars.

Li and Hoiem, ECCV 2016, in the form in which iCaRL (Rebuffi et al., CVPR 2017, Sec. 4) compares
with it, and TCD and FrameMaker report it. Each column has a sigmoid. Columns of the task's classes
learn from its labels, the others from the outputs of the previous model on the task's clips:

    L = - sum_(c of the task) [y = c] log g_c + [y != c] log(1 - g_c)
        - sum_(other c) q_c log g_c + (1 - q_c) log(1 - g_c),   q = the previous model's g

summed over columns, mean over clips. With an encoder without parameters (`mean`, `order`) old
columns stay as they are, since the previous model's outputs are theirs. New columns are never
trained on clips of old classes, which is what is lost.

Ours: the optimiser of all heads; a class that is learned again learns from labels.

Shapes: B clips, C classes, K classes known before.
"""

from typing import Any

from torch import Tensor

from varve.heads.parts import models
from varve.heads.parts.classifiers import Linear
from varve.heads.parts.clips import Batch
from varve.heads.parts.losses import sigmoid_distillation

# Independent sigmoids need more steps than a softmax on the few clips of the contract suite.
QUICK = {"lr": 0.03}


class LwF(models.ModelHead[Linear]):
    """Distill the previous model's sigmoid outputs; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        weight: Weight of the distillation; 1 in the paper.
        options: Options of `varve.heads.parts.models.ModelHead`.
    """

    build_classifier = Linear

    def __init__(self, feature: str = "vector", weight: float = 1.0, **options: Any) -> None:
        super().__init__(feature, **options)
        self._weight = weight

    def loss(self, training: models.Training[Linear], batch: Batch, columns_B: Tensor) -> Tensor:
        logits_BC = training.model(batch)
        teacher_BK = models.scores(self._model, batch) if self._model else logits_BC[:, :0]
        return sigmoid_distillation(
            logits_BC, columns_B, teacher_BK, training.in_task_C, self._weight
        )


build = LwF

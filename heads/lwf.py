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

import torch
from torch import Tensor

from varve.heads import Task
from varve.heads.parts import models
from varve.heads.parts.classifiers import Linear, columns
from varve.heads.parts.clips import Batch
from varve.heads.parts.encoders import EncoderConfig
from varve.heads.parts.losses import sigmoid_distillation
from varve.heads.parts.training import OptimConfig

# Independent sigmoids need more steps than a softmax on the few clips of the contract suite.
QUICK = {"lr": 0.03}


class LwF(models.ModelHead[Linear]):
    """Distill the previous model's sigmoid outputs; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        weight: Weight of the distillation; 1 in the paper.
        encoder: Options of the temporal encoder.
        optim: Options of gradient descent.
        seed: Seed of the order of clips and of the encoder.
    """

    def __init__(
        self,
        feature: str = "vector",
        weight: float = 1.0,
        encoder: EncoderConfig = EncoderConfig(),
        optim: OptimConfig = OptimConfig(),
        seed: int = 0,
    ) -> None:
        super().__init__(feature, encoder, Linear, optim, seed)
        self._weight = weight

    def learn(self, task: Task) -> None:
        rng, classes = task.rng(self._seed), task.classes_after(self.classes)
        first = task.clips[torch.arange(1)]
        teacher = self._model and self._model.on(first)
        model = self._config.trainable_copy(teacher, first, rng)
        model.classifier.grow(len(classes))
        clips = model.prepare(task.clips)
        columns_N = columns(classes, clips.labels)
        labelled_C = torch.tensor([label in task.classes for label in classes])

        def step(indices: Tensor, batch: Batch) -> Tensor:
            logits_BC = model(batch)
            teacher_BK = models.scores(teacher, batch) if teacher else logits_BC[:, :0]
            columns_B, labelled = (x.to(logits_BC.device) for x in (columns_N[indices], labelled_C))
            return sigmoid_distillation(logits_BC, columns_B, teacher_BK, labelled, self._weight)

        self.train(task, step, model.parameters(), clips, rng)
        self.classes, self._model = classes, model


build = LwF

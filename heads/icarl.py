"""Exemplars by herding, and classification by the nearest mean of exemplars (iCaRL).

Rebuffi et al., CVPR 2017. The class of a clip is argmax_c cos(phi(x), mean of c's exemplars)
(Alg. 1; `varve.heads.parts.exemplars` has herding and the means). Where something trains, phi and a
sigmoid classifier are trained on the task's clips and the exemplars together (Alg. 3): columns of
the task's classes learn from labels, the others from the outputs of the previous model. The loss is
that of `varve.heads.lwf`.

With an encoder without parameters (`mean`, `order`) and `predict="nme"` nothing trains, and the
method is herding and NME alone.

Ours: the optimiser of all heads; 5 exemplars per class (TCD's, on video), where the paper has 2000
for all classes (`budget=2000, shared=True`); a class that is learned again learns from labels, and
its exemplars are selected anew among the old and the new.

Shapes: B clips, C classes, K classes known before.
"""

import torch
from torch import Tensor

from varve.heads import Task
from varve.heads.parts import models
from varve.heads.parts.classifiers import Linear, columns
from varve.heads.parts.clips import Batch
from varve.heads.parts.encoders import EncoderConfig
from varve.heads.parts.exemplars import ExemplarConfig
from varve.heads.parts.losses import sigmoid_distillation
from varve.heads.parts.training import OptimConfig

PREDICTIONS = ("nme", "classifier")


class ICaRL(models.ReplayModelHead[Linear]):
    """Classify by the nearest mean of herded exemplars; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        predict: Classifier of `scores`: `nme`, the method, or `classifier` (the paper's hybrid).
        encoder: Options of the temporal encoder.
        exemplars: Options of the exemplars.
        optim: Options of gradient descent.
        seed: Seed of the order of clips, of the encoder and of random exemplars.
    """

    def __init__(
        self,
        feature: str = "vector",
        predict: str = "nme",
        encoder: EncoderConfig = EncoderConfig(),
        exemplars: ExemplarConfig = ExemplarConfig(),
        optim: OptimConfig = OptimConfig(),
        seed: int = 0,
    ) -> None:
        if predict not in PREDICTIONS:
            raise ValueError(f"no {predict=}; choose from {', '.join(PREDICTIONS)}")
        super().__init__(exemplars, feature, encoder, Linear, optim, seed)
        self._predict = predict
        self._trains = encoder.trains or predict == "classifier"

    @property
    def trainable(self) -> int:
        return super().trainable if self._trains else 0

    def learn(self, task: Task) -> None:
        rng, classes = task.rng(self._seed), task.classes_after(self.classes)
        self._exemplars.quota(len(classes))
        first = task.clips[torch.arange(1)]
        teacher = self._model and self._model.on(first)
        model = self._config.trainable_copy(teacher, first, rng)
        if self._trains:
            model.classifier.grow(len(classes))
        clips = model.prepare(self._exemplars.rehearsal(task))
        columns_N = columns(classes, clips.labels)
        labelled_C = torch.tensor([label in task.classes for label in classes])

        def step(indices: Tensor, batch: Batch) -> Tensor:
            logits_BC = model(batch)
            teacher_BK = models.scores(teacher, batch) if teacher else logits_BC[:, :0]
            columns_B, labelled = (x.to(logits_BC.device) for x in (columns_N[indices], labelled_C))
            return sigmoid_distillation(logits_BC, columns_B, teacher_BK, labelled)

        if self._trains:
            self.train(task, step, model.parameters(), clips, rng)
        self.keep(task, classes, model, clips, rng)

    def scores(self, batch: Batch) -> Tensor:
        return self.nearest(batch) if self._predict == "nme" else super().scores(batch)


build = ICaRL

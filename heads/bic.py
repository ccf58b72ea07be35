"""BiC: large-scale incremental learning, by a correction of the bias towards new classes.

Wu et al., CVPR 2019; vCLIMB and others compare with it on video. After each task but the first,
two numbers correct the logits o of its m classes against those of the n classes before:

    q_c = alpha o_c + beta  for a class c of the task,   q_c = o_c  for the others      (Eq. 5)

Training has two stages. Of the clips of the task and the exemplars a validation set is held out,
with equally many of each class. On the others the model trains (Eqs. 1 to 3):

    L = lambda L_d + (1 - lambda) CE(o, y),   lambda = n / (n + m)
    L_d = - sum_(old c) softmax_c(q* / 2) log softmax_c(o / 2)

q* are the corrected logits of the model before the task. Then alpha and beta alone train on the
validation set, by CE(q, y). Corrections of earlier tasks stay.

Ours: the optimiser of all heads; 5 exemplars per class (TCD's, on video), where the paper has 2000
for all classes (`budget=2000, shared=True`). The share of an old class that is held out is 0.1 of
its exemplars in the paper, and one exemplar at least here. A class with a single clip has it in
both sets. A class that is learned again counts as one of the task: it learns from labels, and is
corrected with the task's classes.

vCLIMB's BiC (Villa et al., CVPR 2022) keeps a few frames of an exemplar (`exemplar_frames`), and
trains whole clips to agree with their sparse versions (`consistency`;
`varve.heads.parts.models.consistent` has the equation).

Shapes: N clips, B clips a batch, C classes, K classes known before.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from varve.heads.parts import models
from varve.heads.parts.classifiers import BiasCorrected
from varve.heads.parts.clips import Batch, part_of
from varve.heads.parts.exemplars import ExemplarConfig
from varve.heads.parts.losses import softened
from varve.heads.parts.training import fit

TEMPERATURE = 2.0


class BiC(models.ReplayModelHead[BiasCorrected]):
    """Distill, and correct the bias of new classes; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        held_out: Share of the clips of the smallest class that is held out, of every class.
        correct_epochs: Number of epochs in which alpha and beta train; 0 corrects nothing.
        correct_lr: Their learning rate.
        consistency: Weight of vCLIMB's consistency of whole and sparse clips; 0 for none.
        exemplars: Options of the exemplars; None keeps every clip.
        options: Options of `varve.heads.parts.models.ReplayModelHead`.

    Raises:
        ValueError: An option is out of range.
    """

    build_classifier = BiasCorrected

    def __init__(
        self,
        feature: str = "vector",
        held_out: float = 0.1,
        correct_epochs: int = 100,
        correct_lr: float = 0.01,
        consistency: float = 0.0,
        exemplars: ExemplarConfig | None = ExemplarConfig(),
        **options: Any,
    ) -> None:
        if not 0 < held_out < 1 or correct_epochs < 0 or not correct_lr > 0:
            raise ValueError(
                f"{held_out=}, {correct_epochs=}, {correct_lr=}: give a share between 0 and 1, at "
                "least 0 epochs, and a rate above 0"
            )
        models.check_consistency(consistency, exemplars)
        super().__init__(feature, exemplars=exemplars, **options)
        self._consistency, self._sees_frames = consistency, consistency > 0
        self._held_out = held_out
        self._correct_epochs, self._correct_lr = correct_epochs, correct_lr

    def loss(
        self, training: models.Training[BiasCorrected], batch: Batch, columns_B: Tensor
    ) -> Tensor:
        def loss(batch: Batch) -> tuple[Tensor, Tensor]:
            logits_BC = training.model(batch)
            return self._distilled(training, batch, logits_BC, columns_B), logits_BC

        if not self._consistency:
            return loss(batch)[0]
        return models.consistent(loss, batch, self._exemplars.frames, self._consistency)

    def _distilled(
        self,
        training: models.Training[BiasCorrected],
        batch: Batch,
        logits_BC: Tensor,
        columns_B: Tensor,
    ) -> Tensor:
        """Return L from the logits of a batch."""
        loss: Tensor = cross_entropy(logits_BC, columns_B)
        if self._model is None:
            return loss
        teacher_BK = models.scores(self._model, batch)
        old_K = ~training.in_task_C[: teacher_BK.shape[1]]
        share = float(old_K.sum()) / logits_BC.shape[1]
        if not share:
            return loss
        # The mean of the sum over old classes, less the entropy of the teacher, a constant.
        logits_BK = logits_BC[:, : len(old_K)][:, old_K]
        distillation = softened(logits_BK, teacher_BK[:, old_K], TEMPERATURE) / TEMPERATURE**2
        total: Tensor = share * distillation + (1 - share) * loss
        return total

    def train(self, training: models.Training[BiasCorrected]) -> None:
        if self._model is None or not self._correct_epochs:
            super().train(training)
            return
        whole, classifier = training.clips, training.classifier
        # Of a class that comes again.
        classifier.correct(training.in_task_C, *torch.tensor([1.0, 0.0], device=training.device))
        train_n, validation_m = self._divided(training)
        super().train(models.Training(training.task, training.classes, part_of(whole, train_n),
                                      training.model, training.rng))  # fmt: skip
        self._correct(models.Training(training.task, training.classes, part_of(whole, validation_m),
                                      training.model, training.rng))  # fmt: skip

    def _divided(self, training: models.Training[BiasCorrected]) -> tuple[Tensor, Tensor]:
        """Return indices of the clips to train on, and of those held out, equally many a class."""
        columns_N = training.columns_N.numpy()
        sizes_C = np.bincount(columns_N, minlength=len(training.classes))
        count = max(1, round(self._held_out * int(sizes_C[sizes_C > 0].min())))
        validation: list[int] = []
        trains_N = np.ones(len(columns_N), bool)
        for column in np.flatnonzero(sizes_C):
            indices = training.rng.permutation(np.flatnonzero(columns_N == column))
            validation += indices[:count].tolist()
            trains_N[indices[:count]] = len(indices) <= count
        return torch.from_numpy(np.flatnonzero(trains_N)), torch.tensor(validation)

    def _correct(self, training: models.Training[BiasCorrected]) -> None:
        """Train alpha and beta on held-out clips, and set them in the classifier."""
        classifier, device = training.classifier, training.device
        clips = training.model.encode(training.clips)
        columns_N, in_task_C = training.columns_N, training.in_task_C
        alpha, beta = (nn.Parameter(torch.tensor(x, device=device)) for x in (1.0, 0.0))

        def step(indices: Tensor, batch: Batch) -> Tensor:
            with torch.no_grad():
                logits_BC = classifier(batch[models.ENCODED])
            corrected_BC = torch.where(in_task_C, alpha * logits_BC + beta, logits_BC)
            return cross_entropy(corrected_BC, columns_N[indices].to(device))

        optim = replace(self._optim, lr=self._correct_lr, weight_decay=0.0)
        epochs = self._correct_epochs
        fit(step, [alpha, beta], clips, optim, epochs=epochs, rng=training.rng)
        classifier.correct(in_task_C, alpha.detach(), beta.detach())


build = BiC

"""LUCIR (UCIR): a cosine classifier, less-forget distillation and a margin between old and new.

Hou et al., CVPR 2019. p = softmax(eta cos(theta_c, f(x))). From the second task on, over its clips
and exemplars N, of which N_o are the exemplars:

    L = mean_N ( CE(p, y) + lambda (1 - cos(f*(x), f(x))) ) + mean_(N_o) L_mr
    L_mr = sum_(k in the 2 highest new) max(m - cos(theta_y, f(x)) + cos(theta_k, f(x)), 0)
    lambda = lambda_base sqrt(old classes / new classes)

f* is the previous model; lambda_base = 5, m = 0.5. As in the published code new classes start from
the mean of their clips (imprinting), and old theta are frozen while others train. With an encoder
without parameters (`mean`, `order`) f = f*, and the less-forget term is zero.

Ours: the optimiser of all heads, without decay of theta, whose length a cosine ignores; eta starts
from 20 (`varve.heads.parts.classifiers` says why). Classes of the first task are imprinted too:
from random theta a trained encoder first undoes the draw, and in 5 of 6 trials on two motions it
stayed where both classes look alike. 5 exemplars per class (TCD's, on video), where the paper has
20; the sum over k as the paper prints it, not the mean of the published code; theta of a class that
is learned again trains.

Shapes: B clips, C classes, W width of a clip's vector.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from varve.heads import Task
from varve.heads.parts import models
from varve.heads.parts.classifiers import Cosine, columns
from varve.heads.parts.clips import Batch
from varve.heads.parts.encoders import EncoderConfig
from varve.heads.parts.exemplars import ExemplarConfig
from varve.heads.parts.losses import less_forget, margin_ranking
from varve.heads.parts.training import OptimConfig


class LUCIR(models.ReplayModelHead[Cosine]):
    """Rebalance old and new classes by cosines; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        less_forget: lambda_base.
        margin: m; 0 removes L_mr.
        hold: Whether old theta are frozen.
        encoder: Options of the temporal encoder.
        exemplars: Options of the exemplars.
        optim: Options of gradient descent.
        seed: Seed of the order of clips, of the parameters and of random exemplars.
    """

    def __init__(
        self,
        feature: str = "vector",
        less_forget: float = 5.0,
        margin: float = 0.5,
        hold: bool = True,
        encoder: EncoderConfig = EncoderConfig(),
        exemplars: ExemplarConfig = ExemplarConfig(),
        optim: OptimConfig = OptimConfig(),
        seed: int = 0,
    ) -> None:
        super().__init__(exemplars, feature, encoder, Cosine, optim, seed)
        self._less_forget, self._margin, self._freezes = less_forget, margin, hold

    def learn(self, task: Task) -> None:
        rng, classes = task.rng(self._seed), task.classes_after(self.classes)
        known = len(self.classes)
        self._exemplars.quota(len(classes))
        first = task.clips[torch.arange(1)]
        teacher = self._model and self._model.on(first)
        model = self._config.trainable_copy(teacher, first, rng)
        classifier = model.classifier
        device = classifier.weight.device
        classifier.grow(len(classes), rng)
        clips = model.prepare(self._exemplars.rehearsal(task))
        columns_N = columns(classes, clips.labels)
        task_C = torch.tensor([label in task.classes for label in classes], device=device)
        classifier.imprint_new(known, model.encode(clips).whole(models.ENCODED), columns_N, rng)
        classifier.frozen = ~task_C if known and self._freezes else None
        weight = self._less_forget * (known / len(task.classes)) ** 0.5

        def step(indices: Tensor, batch: Batch) -> Tensor:
            vectors_BW, columns_B = model.vectors(batch), columns_N[indices].to(device)
            cosines_BC = classifier(vectors_BW)
            loss = cross_entropy(classifier.scale * cosines_BC, columns_B)
            if teacher:
                loss = loss + weight * less_forget(vectors_BW, models.vectors(teacher, batch))
                if self._margin:
                    loss = loss + margin_ranking(cosines_BC, columns_B, task_C, 2, self._margin)
            return loss

        groups: list[dict[str, Any]] = [
            {"params": [*model.encoder.parameters()]},
            {"params": [*classifier.parameters()], "weight_decay": 0.0},
        ]
        self.train(task, step, groups, clips, rng)
        self.keep(task, classes, model, clips, rng)


build = LUCIR

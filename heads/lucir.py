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

from torch import Tensor
from torch.nn.functional import cross_entropy

from varve.heads.parts import models
from varve.heads.parts.classifiers import Cosine
from varve.heads.parts.clips import Batch
from varve.heads.parts.losses import less_forget, margin_ranking


class LUCIR(models.ReplayModelHead[Cosine]):
    """Rebalance old and new classes by cosines; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        less_forget: lambda_base.
        margin: m; 0 removes L_mr.
        hold: Whether old theta are frozen.
        options: Options of `varve.heads.parts.models.ReplayModelHead`.
    """

    build_classifier = Cosine

    def __init__(
        self,
        feature: str = "vector",
        less_forget: float = 5.0,
        margin: float = 0.5,
        hold: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(feature, **options)
        self._less_forget, self._margin, self._freezes = less_forget, margin, hold

    def parameters(self, model: models.Model[Cosine]) -> list[dict[str, Any]]:
        return [
            {"params": model.body()},
            {"params": [*model.classifier.parameters()], "weight_decay": 0.0},
        ]

    def train(self, training: models.Training[Cosine]) -> None:
        known, classifier = len(self.classes), training.classifier
        vectors_NW = training.model.encode(training.clips).whole(models.ENCODED)
        classifier.imprint_new(known, vectors_NW, training.columns_N, training.rng)
        classifier.frozen = ~training.in_task_C if known and self._freezes else None
        super().train(training)

    def loss(self, training: models.Training[Cosine], batch: Batch, columns_B: Tensor) -> Tensor:
        vectors_BW, classifier = training.model.vectors(batch), training.classifier
        cosines_BC = classifier(vectors_BW)
        loss = cross_entropy(classifier.scale * cosines_BC, columns_B)
        if self._model:
            weight = self._less_forget * (len(self.classes) / len(training.task.classes)) ** 0.5
            loss = loss + weight * less_forget(vectors_BW, models.vectors(self._model, batch))
            if self._margin:
                in_task_C = training.in_task_C
                loss = loss + margin_ranking(cosines_BC, columns_B, in_task_C, 2, self._margin)
        return loss


build = LUCIR

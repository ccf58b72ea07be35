"""Exemplars by herding, and classification by the nearest mean of exemplars (iCaRL).

Rebuffi et al., CVPR 2017. The class of a clip is argmax_c cos(phi(x), mean of c's exemplars)
(Alg. 1; `varve.heads.parts.exemplars` has herding and the means). Where something trains, phi and a
sigmoid classifier are trained on the task's clips and the exemplars together (Alg. 3): columns of
the task's classes learn from labels, the others from the outputs of the previous model. The loss is
that of `varve.heads.lwf`.

With an encoder without parameters (`mean`, `order`) and `predict="nme"` nothing trains, and the
method is herding and NME alone.

vCLIMB's iCaRL (Villa et al., CVPR 2022) keeps a few frames of an exemplar (`exemplar_frames`), and
trains whole clips to agree with their sparse versions (`consistency`, 1 in its code;
`varve.heads.parts.models.consistent` has the equation).

Ours: the optimiser of all heads; 5 exemplars per class (TCD's, on video), where the paper has 2000
for all classes (`budget=2000, shared=True`); a class that is learned again learns from labels, and
its exemplars are selected anew among the old and the new.

Shapes: B clips, C classes, K classes known before.
"""

from typing import Any

from torch import Tensor

from varve.heads.parts import models
from varve.heads.parts.classifiers import Linear
from varve.heads.parts.clips import Batch
from varve.heads.parts.exemplars import ExemplarConfig
from varve.heads.parts.losses import sigmoid_distillation

PREDICTIONS = ("nme", "classifier")


class ICaRL(models.ReplayModelHead[Linear]):
    """Classify by the nearest mean of herded exemplars; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        predict: Classifier of `scores`: `nme`, the method, or `classifier` (the paper's hybrid).
        consistency: Weight of vCLIMB's consistency of whole and sparse clips; 0 for none.
        exemplars: Options of the exemplars; None keeps every clip.
        options: Options of `varve.heads.parts.models.ReplayModelHead`.

    Raises:
        ValueError: There is no such `predict`, or nothing trains that could be consistent.
    """

    build_classifier = Linear

    def __init__(
        self,
        feature: str = "vector",
        predict: str = "nme",
        consistency: float = 0.0,
        exemplars: ExemplarConfig | None = ExemplarConfig(),
        **options: Any,
    ) -> None:
        if predict not in PREDICTIONS:
            raise ValueError(f"no {predict=}; choose from {', '.join(PREDICTIONS)}")
        models.check_consistency(consistency, exemplars)
        super().__init__(feature, exemplars=exemplars, **options)
        self._predict, self._consistency = predict, consistency
        self._trains = self._config.encoder.trains or predict == "classifier" or self.fine_tunes
        if consistency and not self._trains:
            raise ValueError(
                f"{consistency=} where nothing trains: give predict='classifier', encoder='expert' "
                "or blocks"
            )
        self._sees_frames = consistency > 0

    def loss(self, training: models.Training[Linear], batch: Batch, columns_B: Tensor) -> Tensor:
        def loss(batch: Batch) -> tuple[Tensor, Tensor]:
            logits_BC = training.model(batch)
            teacher_BK = models.scores(self._model, batch) if self._model else logits_BC[:, :0]
            loss = sigmoid_distillation(logits_BC, columns_B, teacher_BK, training.in_task_C)
            return loss, logits_BC

        if not self._consistency:
            return loss(batch)[0]
        return models.consistent(loss, batch, self._exemplars.frames, self._consistency)

    def scores(self, batch: Batch) -> Tensor:
        return self.nearest(batch) if self._predict == "nme" else super().scores(batch)


build = ICaRL

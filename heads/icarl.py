"""iCaRL: exemplars by herding, and the class whose mean of exemplars is nearest.

Rebuffi et al., CVPR 2017. A clip's class is argmax_c cos(phi(x), mean of c's exemplars) (Alg. 1;
`varve.heads.parts.exemplars` has herding and the means). Where something trains, phi and a sigmoid
classifier learn on the task's clips and the exemplars together (Alg. 3): columns of the task by
labels, the others by what the old model answers, see `varve.heads.lwf`, whose loss it is.

With a fixed encoder (`mean`, `order`) and `predict="nme"` nothing trains, and this is herding and
NME alone. Ours: the shared recipe of `varve.heads.linear`; 5 exemplars a class (TCD's, on video),
where
the paper has 2000 for all classes (`budget=2000, shared=True`); a class that comes again is taught
by labels, and its exemplars are chosen anew among the old and the new.

Shapes: B clips, C classes, K known before.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varve.heads import Task
from varve.heads.parts import models
from varve.heads.parts.classifiers import Linear, columns
from varve.heads.parts.clips import Batch
from varve.heads.parts.distillation import sigmoid_distillation
from varve.heads.parts.encoders import TRAINED
from varve.heads.parts.exemplars import Exemplars
from varve.heads.parts.training import fit

PREDICTIONS = ("nme", "classifier")


class ICaRL:
    """See the module.

    Args:
        feature: One vector a frame.
        encoder: How T frames become one vector: `mean`, `order`, `trn`, `expert`; see
            `varve.heads.parts.encoders`.
        expert: Options of the expert: `layers`, `heads`, `ffn`, `position`.
        predict: What `scores` are: `nme`, the method, or `classifier` (the paper's hybrid).
        budget: Exemplars of each class.
        shared: The budget is that of all classes together.
        choice: `herding` or `random`.
        first_epochs: Of the first task.
        epochs: Of every other.
    """

    def __init__(
        self,
        feature: str = "vector",
        encoder: str = "mean",
        expert: Mapping[str, Any] | None = None,
        predict: str = "nme",
        budget: int = 5,
        shared: bool = False,
        choice: str = "herding",
        first_epochs: int = 60,
        epochs: int = 30,
        batch_size: int = 40,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ) -> None:
        if predict not in PREDICTIONS:
            raise ValueError(f"no {predict=}; choose from {', '.join(PREDICTIONS)}")
        self.reads = (feature,)
        self.classes: list[int] = []
        self._form = models.Form(feature, encoder, expert, Linear)
        self._predict, self._seed = predict, seed
        self._trains = encoder in TRAINED or predict == "classifier"
        self._epochs = (first_epochs, epochs)
        self._sgd: dict[str, Any] = {
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        self._model: models.Model[Linear] | None = None
        self._exemplars = Exemplars(budget, shared, choice)

    @property
    def trainable(self) -> int:
        return models.trainable(self._model) if self._trains else 0

    @property
    def exemplars(self) -> Tensor:
        return self._exemplars.rows

    def learn(self, task: Task) -> None:
        rng = np.random.default_rng([self._seed, task.number])
        classes = self.classes + [c for c in task.classes if c not in self.classes]
        self._exemplars.quota(len(classes))
        first = task.clips[torch.arange(1)]
        old = self._model and self._model.on(first)
        model = self._form.begun(old, first, rng)
        if self._trains:
            model.classifier.grow(len(classes))
        clips = model.ready(self._exemplars.rehearsal(task))
        columns_N = columns(classes, clips.labels)
        taught_C = torch.tensor([label in task.classes for label in classes])

        def step(places: Tensor, batch: Batch) -> Tensor:
            logits_BC = model(batch)
            old_BK = models.scores(old, batch) if old else logits_BC[:, :0]
            device = logits_BC.device
            return sigmoid_distillation(
                logits_BC, columns_N[places].to(device), old_BK, taught_C.to(device)
            )

        if self._trains:
            fit(
                step,
                model.parameters(),
                clips,
                epochs=self._epochs[bool(self.classes)],
                rng=rng,
                on_epoch_end=task.on_epoch_end,
                **self._sgd,
            )
        vectors_NW = model.encoded(clips).whole(models.ENCODED)
        self._exemplars, _ = self._exemplars.chosen(vectors_NW, clips, task.classes, classes, rng)
        self.classes, self._model = classes, model

    def scores(self, batch: Batch) -> Tensor:
        return self.nearest(batch) if self._predict == "nme" else models.scores(self._model, batch)

    def nearest(self, batch: Batch) -> Tensor:
        return self._exemplars.nearest(models.vectors(self._model, batch))

    def state_dict(self) -> dict[str, Tensor]:
        return models.state_of(self._model, self.classes) | self._exemplars.state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._model = self._form.loaded(state)
        self._exemplars.load(state)
        self.classes = state["classes"].tolist()


build = ICaRL

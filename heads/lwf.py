"""LwF-MC: learning without forgetting, for classes that add up, without exemplars.

Li and Hoiem, ECCV 2016, in the form in which iCaRL (Rebuffi et al., CVPR 2017, Sec. 4) compares
with it and TCD and FrameMaker report it. A sigmoid each column; columns of the task are taught by
its labels, the others by what the old model answers on the task's own clips:

    L = - sum_(c of the task) [y = c] log g_c + [y != c] log(1 - g_c)
        - sum_(other c) q_c log g_c + (1 - q_c) log(1 - g_c),   q = the old model's g

summed over columns, mean over clips. With a fixed encoder (`mean`, `order`) old columns then stay
as they are, since the old model's answers are theirs: what is lost is lost to new columns, which
are never taught on old classes. Ours: the shared recipe of `varve.heads.linear`; a class that
comes again is taught by labels.

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
from varve.heads.parts.training import fit


class LwF:
    """See the module.

    Args:
        feature: One vector a frame.
        encoder: How T frames become one vector: `mean`, `order`, `trn`, `expert`; see
            `varve.heads.parts.encoders`.
        expert: Options of the expert: `layers`, `heads`, `ffn`, `position`.
        weight: Of the old model's answers; 1 in the paper.
        first_epochs: Of the first task.
        epochs: Of every other.
    """

    def __init__(
        self,
        feature: str = "vector",
        encoder: str = "mean",
        expert: Mapping[str, Any] | None = None,
        weight: float = 1.0,
        first_epochs: int = 60,
        epochs: int = 30,
        batch_size: int = 40,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ) -> None:
        self.reads = (feature,)
        self.classes: list[int] = []
        self._form = models.Form(feature, encoder, expert, Linear)
        self._weight, self._seed = weight, seed
        self._epochs = (first_epochs, epochs)
        self._sgd: dict[str, Any] = {
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        self._model: models.Model[Linear] | None = None

    @property
    def trainable(self) -> int:
        return models.trainable(self._model)

    def learn(self, task: Task) -> None:
        rng = np.random.default_rng([self._seed, task.number])
        classes = self.classes + [c for c in task.classes if c not in self.classes]
        first = task.clips[torch.arange(1)]
        old = self._model and self._model.on(first)
        model = self._form.begun(old, first, rng)
        model.classifier.grow(len(classes))
        clips = model.ready(task.clips)
        columns_N = columns(classes, clips.labels)
        taught_C = torch.tensor([label in task.classes for label in classes])

        def step(places: Tensor, batch: Batch) -> Tensor:
            logits_BC = model(batch)
            old_BK = models.scores(old, batch) if old else logits_BC[:, :0]
            device = logits_BC.device
            return sigmoid_distillation(
                logits_BC, columns_N[places].to(device), old_BK, taught_C.to(device), self._weight
            )

        epochs = self._epochs[bool(self.classes)]
        fit(
            step,
            model.parameters(),
            clips,
            epochs=epochs,
            rng=rng,
            on_epoch_end=task.on_epoch_end,
            **self._sgd,
        )
        self.classes, self._model = classes, model

    def scores(self, batch: Batch) -> Tensor:
        return models.scores(self._model, batch)

    def state_dict(self) -> dict[str, Tensor]:
        return models.state_of(self._model, self.classes)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._model = self._form.loaded(state)
        self.classes = state["classes"].tolist()


build = LwF

"""Joint training, the upper bound: a new classifier on all clips of all classes, at every task.

    L = CE(W x + b, y) over all clips so far, from the start each time

It is no incremental method: it rehearses everything that it has seen. `exemplars` has every row,
and the memory that the next task brings is the whole past ("oracle" in the tables of TCD and
FrameMaker). NME is that of all clips. With encoder="expert" the representation is trained anew too.

Ours: the shared recipe of `varve.heads.linear`, with the epochs of a first task every time.

Shapes: B clips, C classes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from varve.heads import Task
from varve.heads.parts import models
from varve.heads.parts.classifiers import Linear, columns
from varve.heads.parts.clips import Batch
from varve.heads.parts.exemplars import Exemplars
from varve.heads.parts.training import fit


class Joint:
    """See the module.

    Args:
        feature: One vector a frame.
        encoder: How T frames become one vector: `mean`, `order`, `trn`, `expert`; see
            `varve.heads.parts.encoders`.
        expert: Options of the expert: `layers`, `heads`, `ffn`, `position`.
        epochs: Of every task, over all clips so far.
    """

    def __init__(
        self,
        feature: str = "vector",
        encoder: str = "mean",
        expert: Mapping[str, Any] | None = None,
        epochs: int = 60,
        batch_size: int = 40,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ) -> None:
        self.reads = (feature,)
        self.classes: list[int] = []
        self._form = models.Form(feature, encoder, expert, Linear)
        self._epochs, self._seed = epochs, seed
        self._sgd: dict[str, Any] = {
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        self._model: models.Model[Linear] | None = None
        self._exemplars = Exemplars(budget=None)

    @property
    def trainable(self) -> int:
        return models.trainable(self._model)

    @property
    def exemplars(self) -> Tensor:
        """Every row that was ever learned from."""
        return self._exemplars.rows

    def learn(self, task: Task) -> None:
        rng = np.random.default_rng([self._seed, task.number])
        classes = self.classes + [c for c in task.classes if c not in self.classes]
        first = task.clips[torch.arange(1)]
        if self._model is not None:
            models.vectors(self._model, first)  # of the form that was learned before?
        model = self._form.begun(None, first, rng)
        model.classifier.grow(len(classes))
        clips = model.ready(self._exemplars.rehearsal(task))
        columns_N = columns(classes, clips.labels)

        def step(places: Tensor, batch: Batch) -> Tensor:
            logits_BC = model(batch)
            return cross_entropy(logits_BC, columns_N[places].to(logits_BC.device))

        fit(
            step,
            model.parameters(),
            clips,
            epochs=self._epochs,
            rng=rng,
            on_epoch_end=task.on_epoch_end,
            **self._sgd,
        )
        vectors_NW = model.encoded(clips).whole(models.ENCODED)
        self._exemplars, _ = self._exemplars.chosen(vectors_NW, clips, task.classes, classes, rng)
        self.classes, self._model = classes, model

    def scores(self, batch: Batch) -> Tensor:
        return models.scores(self._model, batch)

    def nearest(self, batch: Batch) -> Tensor:
        return self._exemplars.nearest(models.vectors(self._model, batch))

    def state_dict(self) -> dict[str, Tensor]:
        return models.state_of(self._model, self.classes) | self._exemplars.state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._model = self._form.loaded(state)
        self._exemplars.load(state)
        self.classes = state["classes"].tolist()


build = Joint

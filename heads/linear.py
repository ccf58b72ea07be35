"""Fine-tuning: a linear classifier over all classes seen, trained on each task's clips alone.

    L = CE(W x + b, y) over the columns of all classes so far

Old columns learn only that they are wrong: this is the forgetting that others are measured against
("fine-tuning" in the tables of TCD and FrameMaker). With encoder="expert" the representation is
trained too, and forgets as well.

Ours: the recipe that all heads of gradient descent share, so that a comparison is one of methods:
SGD at 0.01, momentum 0.9, cosine, 60 epochs for the first task and 30 for the others, batches of 40
(StPR's), weight decay 5e-4 (LUCIR's, PODNet's and TCD's); x made 16 long, new columns from zero.

Shapes: B clips, C classes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from varve.heads import Task
from varve.heads.parts import classifiers, models
from varve.heads.parts.clips import Batch
from varve.heads.parts.training import fit


class Linear:
    """See the module.

    Args:
        feature: One vector a frame.
        encoder: How T frames become one vector: `mean`, `order`, `trn`, `expert`; see
            `varve.heads.parts.encoders`.
        expert: Options of the expert: `layers`, `heads`, `ffn`, `position`.
        first_epochs: Of the first task.
        epochs: Of every other.
    """

    def __init__(
        self,
        feature: str = "vector",
        encoder: str = "mean",
        expert: Mapping[str, Any] | None = None,
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
        self._form = models.Form(feature, encoder, expert, classifiers.Linear)
        self._epochs = (first_epochs, epochs)
        self._sgd: dict[str, Any] = {
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        self._seed = seed
        self._model: models.Model[classifiers.Linear] | None = None

    @property
    def trainable(self) -> int:
        return models.trainable(self._model)

    def learn(self, task: Task) -> None:
        rng = np.random.default_rng([self._seed, task.number])
        classes = self.classes + [c for c in task.classes if c not in self.classes]
        model = self._form.begun(self._model, task.clips[torch.arange(1)], rng)
        model.classifier.grow(len(classes))
        clips = model.ready(task.clips)
        columns_N = classifiers.columns(classes, clips.labels)

        def step(places: Tensor, batch: Batch) -> Tensor:
            logits_BC = model(batch)
            return cross_entropy(logits_BC, columns_N[places].to(logits_BC.device))

        epochs = self._epochs[bool(self.classes)]
        fit(step, model.parameters(), clips, epochs=epochs, rng=rng, on_epoch_end=task.on_epoch_end,
            **self._sgd)  # fmt: skip
        self.classes, self._model = classes, model

    def scores(self, batch: Batch) -> Tensor:
        return models.scores(self._model, batch)

    def state_dict(self) -> dict[str, Tensor]:
        return models.state_of(self._model, self.classes)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._model = self._form.loaded(state)
        self.classes = state["classes"].tolist()


build = Linear

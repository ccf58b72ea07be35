"""LUCIR (UCIR): a classifier rebalanced by cosines, less-forget and a margin between old and new.

Hou et al., CVPR 2019. p = softmax(eta cos(theta_c, f(x))), and from the second task on, over its
clips N and the exemplars N_o among them:

    L = mean_N ( CE(p, y) + lambda (1 - cos(f*(x), f(x))) ) + mean_(N_o) L_mr
    L_mr = sum_(k in the 2 highest new) max(m - cos(theta_y, f(x)) + cos(theta_k, f(x)), 0)
    lambda = lambda_base sqrt(old classes / new classes)

f* is the old model; lambda_base = 5, m = 0.5. As in the published code new classes start from the
mean of their clips (imprinting), and old theta are held while others train. With a fixed encoder
(`mean`, `order`) f = f*, and less-forget has nothing to hold.

Ours: the shared recipe of `varve.heads.linear`, without decay of theta, whose length a cosine
ignores; eta starts from 20 (`varve.heads.parts.classifiers` says why); the first task's classes are
imprinted too:
from drawn theta a trained encoder first undoes the draw, and in 5 of 6 trials on two motions it
stayed where both classes look alike; 5 exemplars a class (TCD's, on video) where the paper has 20;
the sum over k as the paper prints it, not the code's mean; theta of a class that comes again
trains.

Shapes: B clips, C classes, W width of a clip's vector.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from varve.heads import Task
from varve.heads.parts import models
from varve.heads.parts.classifiers import Cosine, columns
from varve.heads.parts.clips import Batch
from varve.heads.parts.distillation import less_forget, margin_ranking
from varve.heads.parts.exemplars import Exemplars
from varve.heads.parts.training import fit


class LUCIR:
    """See the module.

    Args:
        feature: One vector a frame.
        encoder: How T frames become one vector: `mean`, `order`, `trn`, `expert`; see
            `varve.heads.parts.encoders`.
        expert: Options of the expert: `layers`, `heads`, `ffn`, `position`.
        less_forget: lambda_base.
        margin: m; 0 leaves L_mr out.
        hold: Old theta stay as they are.
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
        less_forget: float = 5.0,
        margin: float = 0.5,
        hold: bool = True,
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
        self.reads = (feature,)
        self.classes: list[int] = []
        self._form = models.Form(feature, encoder, expert, Cosine)
        self._less_forget, self._margin, self._hold = less_forget, margin, hold
        self._epochs, self._seed = (first_epochs, epochs), seed
        self._sgd: dict[str, Any] = {
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        self._model: models.Model[Cosine] | None = None
        self._exemplars = Exemplars(budget, shared, choice)

    @property
    def trainable(self) -> int:
        return models.trainable(self._model)

    @property
    def exemplars(self) -> Tensor:
        return self._exemplars.rows

    def learn(self, task: Task) -> None:
        rng = np.random.default_rng([self._seed, task.number])
        known = len(self.classes)
        classes = self.classes + [c for c in task.classes if c not in self.classes]
        self._exemplars.quota(len(classes))
        first = task.clips[torch.arange(1)]
        old = self._model and self._model.on(first)
        model = self._form.begun(old, first, rng)
        model.classifier.grow(len(classes), rng)
        clips = model.ready(self._exemplars.rehearsal(task))
        columns_N = columns(classes, clips.labels)
        device = model.classifier.weight.device
        fresh_C = torch.tensor([label in task.classes for label in classes], device=device)
        vectors_NW = model.encoded(clips).whole(models.ENCODED)
        for column in range(known, len(classes)):
            of = vectors_NW[(columns_N == column).to(device)]
            model.classifier.imprint(column, of, torch.arange(known), rng)
        model.classifier.held = ~fresh_C if known and self._hold else None
        weight = self._less_forget * (known / len(task.classes)) ** 0.5

        def step(places: Tensor, batch: Batch) -> Tensor:
            vectors_BW, columns_B = model.vectors(batch), columns_N[places].to(device)
            cosines_BC = model.classifier(vectors_BW)
            loss = cross_entropy(model.classifier.scale * cosines_BC, columns_B)
            if old:
                loss = loss + weight * less_forget(vectors_BW, models.vectors(old, batch))
                if self._margin:
                    loss = loss + margin_ranking(cosines_BC, columns_B, fresh_C, 2, self._margin)
            return loss

        groups: list[dict[str, Any]] = [
            {"params": [*model.encoder.parameters()]},
            {"params": [*model.classifier.parameters()], "weight_decay": 0.0},
        ]
        epochs = self._epochs[bool(known)]
        fit(
            step, groups, clips, epochs=epochs, rng=rng, on_epoch_end=task.on_epoch_end, **self._sgd
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


build = LUCIR

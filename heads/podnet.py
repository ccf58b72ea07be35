"""PODNet: the last blocks of the network train, held by their pooled outputs.

Douillard et al., ECCV 2020. The classifier has P proxies a class (local similarity classifier) and
the NCA loss with a margin; from the second task on, over its clips and the exemplars:

    L = NCA(x) + (POD-flat + 3 POD-spatial) sqrt(classes so far / classes of the task)
    POD-flat = 1 - cos(f*(x), f(x)),   POD-spatial: pooled outputs of each trained stage

f* is the old model; `heads.parts.distillation` has the equations. Then the classifier alone is
tuned on the exemplars, as many of each class. As in the published code new proxies start about the
mean of their clips (imprinting), and old ones are held until the tuning.

Ours, on video: the network trains from a cached feature on, so `blocks` says how many of its last
blocks; outputs are pooled frame by frame; f(x) is the encoder of the last vectors of T frames. The
shared recipe of `heads.linear` without decay of proxies; eta starts from 20, and proxies are
imprinted in the first task too (see `heads.lucir`); the tuning, 20 epochs at 0.05 in the paper
beside a rate of 0.1, keeps half the rate; 5 exemplars a class (TCD's).

Shapes: B clips, T frames, L tokens, C classes, W width of a clip's vector.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heads import Network, Task
from heads.parts import models
from heads.parts.classifiers import Cosine, columns
from heads.parts.clips import Batch, Clips
from heads.parts.distillation import less_forget, nca, pooled
from heads.parts.exemplars import Exemplars
from heads.parts.training import fit
from heads.parts.trunk import VECTOR, Trunk


class PODNet:
    """See the module.

    Args:
        blocks: How many of the network's last blocks train. What goes into them is read: all
            tokens, or the map.
        encoder: How T frames become one vector: `mean`, `order` or `expert`; see
            `heads.parts.encoders`.
        expert: Options of the expert: `layers`, `heads`, `ffn`, `position`.
        proxies: P; 1 is a cosine classifier.
        margin: Of the NCA loss.
        flat: Weight of POD-flat.
        spatial: Weight of POD-spatial.
        tune_epochs: Of the classifier on the exemplars, after each task but the first.
        budget: Exemplars of each class.
        shared: The budget is that of all classes together.
        choice: `herding` or `random`.
        first_epochs: Of the first task.
        epochs: Of every other.
    """

    def __init__(
        self,
        blocks: int = 1,
        encoder: str = "mean",
        expert: Mapping[str, Any] | None = None,
        proxies: int = 10,
        margin: float = 0.6,
        flat: float = 1.0,
        spatial: float = 3.0,
        tune_epochs: int = 20,
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
        if blocks < 1 or proxies < 1:
            raise ValueError(f"{blocks=}, {proxies=}: give at least 1 of each")
        self.reads = (f"blocks.-{blocks + 1}",)
        self.classes: list[int] = []
        self._form = models.Form(VECTOR, encoder, expert, lambda width: Cosine(width, proxies))
        self._margin, self._flat, self._spatial = margin, flat, spatial
        self._epochs, self._tune_epochs, self._seed = (first_epochs, epochs), tune_epochs, seed
        self._sgd: dict[str, Any] = {
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        self._network: Network | None = None
        self._trunk: Trunk | None = None
        self._model: models.Model[Cosine] | None = None
        self._exemplars = Exemplars(budget, shared, choice)

    @property
    def changes(self) -> bool:
        return True

    def attach(self, network: Network) -> None:
        self._network = network

    @property
    def trainable(self) -> int:
        trunk = {} if self._trunk is None else self._trunk.own()
        return models.trainable(self._model) + sum(p.numel() for p in trunk.values())

    @property
    def exemplars(self) -> Tensor:
        return self._exemplars.rows

    def learn(self, task: Task) -> None:
        rng = np.random.default_rng([self._seed, task.number])
        known = len(self.classes)
        classes = self.classes + [c for c in task.classes if c not in self.classes]
        self._exemplars.quota(len(classes))
        first = task.clips[torch.arange(1)]
        device = first[self.reads[0]].device
        trunk, old_trunk, old = self._fresh().to(device), self._trunk, self._model
        if old_trunk and old:
            trunk.take(old_trunk.to(device).own())
            old.to(device)
        with torch.no_grad():
            vectors, _ = trunk(first)
        model = self._form.begun(old, vectors, rng)
        classifier = model.classifier
        classifier.grow(len(classes), rng)
        clips = self._exemplars.rehearsal(task)
        columns_N = columns(classes, clips.labels)
        taught_C = torch.tensor([label in task.classes for label in classes], device=device)
        vectors_NW = _encoded(trunk, model, clips).whole(models.ENCODED)
        for column in range(known, len(classes)):
            of = vectors_NW[(columns_N == column).to(device)]
            classifier.imprint(column, of, torch.arange(known), rng)
        classifier.held = ~taught_C if known else None
        weight = (len(classes) / len(task.classes)) ** 0.5

        def step(places: Tensor, batch: Batch) -> Tensor:
            vectors, outputs = trunk(batch)
            vectors_BW = model.vectors(vectors)
            loss = self._nca(classifier, vectors_BW, columns_N[places])
            if old_trunk and old:
                with torch.no_grad():
                    old_vectors, old_outputs = old_trunk(batch)
                    old_BW = old.vectors(old_vectors)
                loss = loss + weight * self._flat * less_forget(vectors_BW, old_BW)
                loss = loss + weight * self._spatial * pooled(outputs, old_outputs)
            return loss

        epochs = self._epochs[bool(known)]
        tune_epochs = self._tune_epochs if known else 0
        total = epochs + tune_epochs
        groups: list[dict[str, Any]] = [
            {"params": [*trunk.own().values(), *model.encoder.parameters()]},
            {"params": [*classifier.parameters()], "weight_decay": 0.0},
        ]
        fit(
            step,
            groups,
            clips,
            epochs=epochs,
            rng=rng,
            progress=lambda done, _, loss: task.progress(done, total, loss),
            **self._sgd,
        )
        classifier.held = None
        clips = _encoded(trunk, model, clips)
        vectors_NW = clips.whole(models.ENCODED)
        exemplars, kept = self._exemplars.chosen(vectors_NW, clips, task.classes, classes, rng)
        balanced = Clips({models.ENCODED: vectors_NW[kept.to(device)]}, clips.labels[kept])

        def tune(places: Tensor, batch: Batch) -> Tensor:
            return self._nca(classifier, batch[models.ENCODED], columns_N[kept][places])

        fit(
            tune,
            [classifier.weight],
            balanced,
            epochs=tune_epochs,
            rng=rng,
            progress=lambda done, _, loss: task.progress(done + epochs, total, loss),
            **self._sgd | {"lr": self._sgd["lr"] / 2, "weight_decay": 0.0},
        )
        self.classes, self._exemplars = classes, exemplars
        self._model, self._trunk = model, trunk

    def scores(self, batch: Batch) -> Tensor:
        model, vectors = self._vectors(batch)
        return models.scores(model, vectors)

    def nearest(self, batch: Batch) -> Tensor:
        model, vectors = self._vectors(batch)
        return self._exemplars.nearest(models.vectors(model, vectors))

    def state_dict(self) -> dict[str, Tensor]:
        own = {} if self._trunk is None else self._trunk.own()
        network = {f"network.{n}": p.detach().to("cpu", copy=True) for n, p in own.items()}
        return models.state_of(self._model, self.classes) | self._exemplars.state() | network

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._model = self._form.loaded(state)
        self._exemplars.load(state)
        self.classes = state["classes"].tolist()
        own = {n.removeprefix("network."): p for n, p in state.items() if n.startswith("network.")}
        self._trunk = self._fresh() if own else None
        if self._trunk:
            self._trunk.take(own)

    def _nca(self, classifier: Cosine, vectors_BW: Tensor, columns_B: Tensor) -> Tensor:
        cosines_BC = classifier(vectors_BW)
        columns_B = columns_B.to(cosines_BC.device)
        return nca(cosines_BC, columns_B, classifier.scale, self._margin)

    def _vectors(self, batch: Batch) -> tuple[models.Model[Cosine], Batch]:
        """The model, and the last vectors of a batch's clips."""
        model = models.learned(self._model)
        assert self._trunk is not None
        with torch.no_grad():
            vectors, _ = self._trunk.to(batch[self.reads[0]].device)(batch)
        return model, vectors

    def _fresh(self) -> Trunk:
        if self._network is None:
            raise ValueError("no network was attached, whose last blocks could train: attach one")
        return Trunk(self._network, self.reads[0])


def _encoded(trunk: Trunk, model: models.Model[Cosine], clips: Clips) -> Clips:
    """Clips whose vectors are made."""
    with torch.no_grad():
        parts = [model.vectors(trunk(batch)[0]) for _, batch in clips.batches(40)]
    return Clips({models.ENCODED: torch.cat(parts)}, clips.labels, clips.rows)


build = PODNet

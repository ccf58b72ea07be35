"""Models: what heads of gradient descent train, an encoder of clips and a classifier over it.

Shapes: N clips, B clips a batch, T frames, D feature width, W width of a clip's vector, C classes.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from varve.heads.parts.clips import Batch, Clips, frames
from varve.heads.parts.encoders import Encoder, check

ENCODED = "encoded"


class Model[K: nn.Module](nn.Module):
    """From a batch to the classifier's output, [B, C]."""

    def __init__(self, feature: str, encoder: Encoder, classifier: K) -> None:
        super().__init__()
        self.feature, self.encoder = feature, encoder
        self.classifier: K = classifier

    def forward(self, batch: Batch) -> Tensor:
        out: Tensor = self.classifier(self.vectors(batch))
        return out

    def vectors(self, batch: Batch) -> Tensor:
        """Of the clips, float32 [B, W].

        Raises:
            ValueError: The features have another form than was learned, or are not finite.
        """
        if ENCODED in batch:
            return batch[ENCODED]
        out: Tensor = self.encoder(self.encoder.fits(frames(batch, self.feature), self.feature))
        return out

    def encoded(self, clips: Clips) -> Clips:
        """Clips whose vectors are made: now and once, in place of at every use."""
        with torch.no_grad():
            parts = [self.vectors(batch) for _, batch in clips.batches(256)]
        return Clips({ENCODED: torch.cat(parts)}, clips.labels, clips.rows)

    def ready(self, clips: Clips) -> Clips:
        """Clips to train on: `encoded` where nothing in the encoder trains."""
        return clips if [*self.encoder.parameters()] else self.encoded(clips)

    def on(self, batch: Batch) -> Self:
        """The model, on the device of a batch."""
        return self.to(next(iter(batch.values())).device)


@dataclass(frozen=True)
class Form[K: nn.Module]:
    """What the options of a head say about its model.

    Attributes:
        feature: One vector a frame.
        encoder: One of `varve.heads.parts.encoders.ENCODERS`.
        expert: Options of the expert, or None.
        classifier: From W to a classifier without columns.

    Raises:
        ValueError: There is no such encoder, or it has no such options.
    """

    feature: str
    encoder: str
    expert: Mapping[str, Any] | None
    classifier: Callable[[int], K]

    def __post_init__(self) -> None:
        check(self.encoder, self.expert)

    def begun(self, model: Model[K] | None, first: Batch, rng: np.random.Generator) -> Model[K]:
        """A copy to train of a model, or one of the form of a first clip, on its device.

        Raises:
            ValueError: As `Model.vectors`.
        """
        x_BTD = frames(first, self.feature)
        if model is None:
            _, T, D = x_BTD.shape
            model = self._empty(T, D, rng)
        model.encoder.fits(x_BTD, self.feature)
        return copy.deepcopy(model).on(first)

    def loaded(self, state: Mapping[str, Tensor]) -> Model[K] | None:
        """The model of a state that `state_of` gave."""
        if "form" not in state:
            return None
        T, D = state["form"].tolist()
        model = self._empty(T, D, np.random.default_rng(0))
        for name, old in list(model.classifier.named_parameters()):
            new = state[f"classifier.{name}"]
            if new.shape != old.shape:
                setattr(model.classifier, name, nn.Parameter(torch.empty_like(new)))
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        return model

    def _empty(self, frames: int, width: int, rng: np.random.Generator) -> Model[K]:
        encoder = Encoder(self.encoder, frames, width, self.expert, rng)
        return Model(self.feature, encoder, self.classifier(encoder.vector))


def state_of[K: nn.Module](model: Model[K] | None, classes: list[int]) -> dict[str, Tensor]:
    """Classes and all of a model, as tensors of their own."""
    state = {"classes": torch.tensor(classes, dtype=torch.int64)}
    if model is None:
        return state
    state["form"] = torch.tensor([model.encoder.frames, model.encoder.width])
    own = model.state_dict().items()
    return state | {name: tensor.detach().to("cpu", copy=True) for name, tensor in own}


def learned[K: nn.Module](model: Model[K] | None) -> Model[K]:
    """The model, where there is one.

    Raises:
        ValueError: Nothing was learned yet.
    """
    if model is None:
        raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
    return model


def scores[K: nn.Module](model: Model[K] | None, batch: Batch) -> Tensor:
    """`Head.scores`."""
    with torch.no_grad():
        out: Tensor = learned(model).on(batch)(batch)
    return out


def trainable[K: nn.Module](model: Model[K] | None) -> int:
    """How many numbers a model trains."""
    return 0 if model is None else sum(p.numel() for p in model.parameters())


def vectors[K: nn.Module](model: Model[K] | None, batch: Batch) -> Tensor:
    """Of a batch's clips, [B, W], without gradient."""
    with torch.no_grad():
        return learned(model).on(batch).vectors(batch)

"""Text vectors of classes: the features of their prompts, or a random code for each class.

`Given` stores the text features of the tasks, such as those of CLIP's text tower. `Codes` is for
networks without a text tower: each class has a fixed random unit vector, drawn from its number and
a seed alone, and a matrix W, trained with the clips, maps it into their space. Ours: codes are
orthogonal, as long as there are no more classes than channels, and W starts as the identity.
Training W on the classes of a task then leaves those of others unchanged, so W can train with every
task (`always`). A W that is frozen after the first task (`first`) does not fit later classes: by
the mean frame alone, none of their clips was distinguished from the first task's classes.

Training changes neither: `grown` returns another object, to be dropped if the training fails.

Shapes: C classes, D feature width.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

TRAINED = ("always", "first")


class Text(Protocol):
    """Contract of text vectors: one unit vector for each class."""

    def grown(self, classes: Sequence[int], text_CD: Tensor | None, like: Tensor) -> Self:
        """Return a copy that has a task's classes too.

        Args:
            classes: Classes of the task.
            text_CD: Their text features, `Task.text`.
            like: Clips that the vectors are compared with, [..., D], for width and device.

        Raises:
            ValueError: No text where it is needed, another width, or numbers that are not finite.
        """

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters; those that require gradients train further."""

    def rows(self, classes: Sequence[int]) -> Tensor:
        """Return vectors [C, D], L2-normalised. Gradients reach the parameters that train."""

    def state_dict(self, classes: Sequence[int]) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], classes: Sequence[int]) -> None: ...


class Given:
    """Text features of the tasks; the newest ones of a class that came more than once."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}

    def grown(self, classes: Sequence[int], text_CD: Tensor | None, like: Tensor) -> Self:
        if text_CD is None:
            raise ValueError(
                "the task has no text features: the network has no text tower, or its features are "
                "whitened. Take a CLIP network without `whiten`, or text='codes' or 'means'"
            )
        expected = (len(classes), like.shape[-1])
        if text_CD.shape != expected or not text_CD.isfinite().all():
            raise ValueError(
                f"text features {list(text_CD.shape)} for {expected[0]} classes and clips of width "
                f"{expected[1]}: they must be finite and of one space with the clips; read the "
                "feature that CLIP compares with text, or use text='codes'"
            )
        grown = type(self)()
        rows = self._rows | dict(zip(classes, normalize(text_CD.float(), dim=1), strict=True))
        grown._rows = {label: row_D.to(like.device) for label, row_D in rows.items()}
        return grown

    def parameters(self) -> list[nn.Parameter]:
        return []

    def rows(self, classes: Sequence[int]) -> Tensor:
        return torch.stack([self._rows[label] for label in classes])

    def state_dict(self, classes: Sequence[int]) -> dict[str, Tensor]:
        return {"text": self.rows(classes).cpu()} if classes else {}

    def load_state_dict(self, state: Mapping[str, Tensor], classes: Sequence[int]) -> None:
        rows = state["text"].clone() if classes else ()
        self._rows = dict(zip(classes, rows, strict=True))


class Codes:
    """Vectors W times the code of a class, L2-normalised.

    Args:
        seed: Seed of the codes, with the number of the class, whatever the order of classes.
        trained: Tasks in which W trains, `always` or the `first` alone.
    """

    def __init__(self, seed: int = 0, trained: str = "always") -> None:
        if trained not in TRAINED:
            raise ValueError(f"no {trained=}; choose from {', '.join(TRAINED)}")
        self.seed = seed
        self.trained = trained
        self.weight: nn.Parameter | None = None

    def grown(self, classes: Sequence[int], text_CD: Tensor | None, like: Tensor) -> Self:
        grown = type(self)(self.seed, self.trained)
        if self.weight is None:
            grown.weight = nn.Parameter(torch.eye(like.shape[-1], device=like.device))
        else:
            trains = self.trained == "always"
            weight_DD = self.weight.detach().to(like.device, copy=True)
            grown.weight = nn.Parameter(weight_DD, requires_grad=trains)
        return grown

    def parameters(self) -> list[nn.Parameter]:
        return [] if self.weight is None else [self.weight]

    def rows(self, classes: Sequence[int]) -> Tensor:
        assert self.weight is not None
        codes_CD = torch.stack([code(label, len(self.weight), self.seed) for label in classes])
        return normalize(codes_CD.to(self.weight) @ self.weight.T, dim=1)

    def state_dict(self, classes: Sequence[int]) -> dict[str, Tensor]:
        if self.weight is None:
            return {}
        return {"text.weight": self.weight.detach().to("cpu", copy=True)}

    def load_state_dict(self, state: Mapping[str, Tensor], classes: Sequence[int]) -> None:
        weight_DD = state.get("text.weight")
        self.weight = None if weight_DD is None else nn.Parameter(weight_DD.clone())


def code(label: int, width: int, seed: int = 0) -> Tensor:
    """Return the unit vector [D] of a class. Those of classes aD to aD + D - 1 are orthogonal."""
    return _basis(label // width, width, seed)[label % width]


@lru_cache(16)
def _basis(number: int, width: int, seed: int) -> Tensor:
    drawn_DD = np.random.default_rng([seed, number]).normal(size=(width, width))
    basis_DD, upper_DD = np.linalg.qr(drawn_DD)
    # A sign of its own for each column, or it would be the LAPACK's choice.
    return torch.from_numpy(basis_DD * np.sign(np.diag(upper_DD))).float().T

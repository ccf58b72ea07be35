"""Heads: classifiers that grow class by class over cached features.

This file is the contract; every other module here is one head, found by its file name. A head
module has `build(**options) -> Head`, whose options have defaults and are JSON values. A head sees
tensors only: it imports torch and numpy, and nothing of `stores` or `pipeline`.

Shapes: N clips, T frames a clip, D feature width, C classes learned so far.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Head(Protocol):
    """A classifier whose set of classes may grow on every `learn`.

    Column j of `scores` is always `classes[j]`: columns are appended, in ascending order of label
    within one `learn`, and never moved. Equal calls give equal numbers, whatever the state of any
    global random generator: a head that draws takes `seed` as an option.
    """

    classes: list[int]

    def learn(self, feats_NTD: Tensor, labels_N: Tensor) -> None:
        """Absorb one task's clips; classes known already are updated.

        Args:
            feats_NTD: float32, finite, one feature a frame, N at least 1. Neither this nor
                `labels_N` is kept or modified.
            labels_N: int64.

        Raises:
            ValueError: The shapes do not fit each other or what was learned before, or a feature
                is not finite. Nothing has been learned then.
        """

    def scores(self, feats_NTD: Tensor) -> Tensor:
        """Return float32 [N, C], higher is likelier. Row n depends on clip n alone.

        Raises:
            ValueError: Nothing was learned yet, or the shape is another than was learned.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """All that was learned, as tensors of its own. Options are not part of it."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of a head built with the same options, whose `state_dict` this was."""

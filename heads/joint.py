"""Joint training, the upper bound: a new classifier on all clips of all classes, at every task.

    L = CE(W x + b, y) over all clips so far, from a new initialisation each time

It is no incremental method: it replays every clip. `exemplars` has every row, and the memory of the
next task is the whole past ("oracle" in the tables of TCD and FrameMaker). NME is that of all
clips. With encoder="expert" the representation is trained anew too.

Ours: the optimiser of all heads, with the epochs of a first task at every task.

Shapes: B clips, C classes.
"""

import numpy as np

from varve.heads.parts import models
from varve.heads.parts.classifiers import Linear
from varve.heads.parts.clips import Batch
from varve.heads.parts.encoders import EncoderConfig
from varve.heads.parts.models import BlocksConfig
from varve.heads.parts.training import OptimConfig


class Joint(models.ReplayModelHead[Linear]):
    """Train on all clips so far; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        encoder: Options of the temporal encoder.
        optim: Options of gradient descent.
        seed: Seed of the order of clips and of the encoder.
        blocks: The network's last blocks, where they train too, from the published network anew.
    """

    build_classifier = Linear

    def __init__(
        self,
        feature: str = "vector",
        encoder: EncoderConfig = EncoderConfig(),
        optim: OptimConfig = OptimConfig(first_epochs=None, epochs=60),
        seed: int = 0,
        blocks: BlocksConfig = BlocksConfig(),
    ) -> None:
        super().__init__(feature, encoder, None, optim, seed, blocks)

    def start(self, first: Batch, rng: np.random.Generator) -> models.Model[Linear]:
        if self._model is not None:
            models.vectors(self._model, first)  # refuses another shape than was learned before
        return self.copy_of(None, first, rng)


build = Joint

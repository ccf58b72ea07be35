"""Class Regularization: channel re-weighting by the class predicted at each stage.

The graft is `heads/grafts/class_regularization.py`, which has the equations. One block stands at
the end of each stage of the trained part, and all of them read the one classifier. A new class
enters the blocks as it enters the classifier. Tuning the classifier changes the blocks with it.

It is no incremental method. Ours: rehearsal and cross entropy with the optimiser of all heads; only
the last `blocks` train, from a cached feature on; A of a stage follows its depth in the network;
projections may start fitted. The paper trains all blocks, for 170 epochs from scratch or 100 of
fine-tuning; the learning rate is not given.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varve.heads import Network
from varve.heads.grafts.class_regularization import ClassRegularization
from varve.heads.parts import models
from varve.heads.parts.classifiers import Classifier
from varve.heads.parts.fine_tuned_head import FineTunedHead, Graft, stage_options
from varve.heads.parts.models import BATCH, TaskTraining
from varve.heads.parts.trainable_suffix import VECTOR, TrainableSuffix

STRENGTHS = (0.1, 0.2, 0.3, 0.4)
STARTS = ("drawn", "fitted")


class Regularized(FineTunedHead):
    """Fine-tune blocks with class regularization; see the module.

    Args:
        blocks: Number of the network's last blocks that train.
        strengths: A, from the first stage of the network to its last. A stage ends where the maps
            change their size (a ResNet has four), or with a quarter of a transformer's blocks. With
            fewer stages, the last values are used. 0 disables a block.
        start: Initialisation of the projections: `drawn` from a normal distribution, or `fitted`
            to the first task's clips, so that each stage predicts the classifier's class as well
            as the means of its channels allow (later classes less well). When drawn, c* stays at
            chance and the blocks change little; when fitted, less is forgotten and less is learned
            in a few epochs (REPRODUCIBILITY.md).
        options: Options of `varve.heads.parts.fine_tuned_head.FineTunedHead`.
    """

    def __init__(
        self,
        blocks: int = 2,
        strengths: Sequence[float] = STRENGTHS,
        start: str = "drawn",
        **options: Any,
    ) -> None:
        super().__init__(blocks, **options)
        if start not in STARTS:
            raise ValueError(f"no {start=}; choose from {', '.join(STARTS)}")
        self._strengths, self._start = [float(a) for a in strengths], start

    def grafts(self, network: Network, classifier: Classifier) -> Mapping[str, Graft]:
        grafts: dict[str, Graft] = {}
        for stage, strength in self._ends(network).items():
            number = network.stages.index(stage)
            seed = int(np.random.default_rng([self._seed, number]).integers(2**31))
            options = stage_options(network, stage) | {"strength": strength, "seed": seed}
            grafts[stage] = partial(ClassRegularization, classifier=classifier, **options)
        return grafts

    def before_first_task(self, training: TaskTraining) -> None:
        if self._start == "drawn" or not any(self._strengths):
            return
        clips, suffix = training.clips, training.suffix
        blocks = _blocks(suffix)
        means: dict[str, list[Tensor]] = {name: [] for name in blocks}
        encoded = []
        with torch.no_grad():
            for indices in torch.split(torch.arange(len(clips)), BATCH):
                vectors, outputs = suffix(clips[indices])
                encoded.append(training.model.vectors(vectors))
                for name, out in zip(suffix.trained, outputs, strict=True):
                    if name in blocks:
                        means[name].append(blocks[name].means(out.flatten(0, 1)))
        for name, block in blocks.items():
            width, vector = encoded[0].shape[1], self.network.shape(VECTOR)[-1]
            alike = block.channels == vector == width
            block.align(torch.cat(means[name]), torch.cat(encoded), alike)

    def excitations(self) -> dict[str, Tensor]:
        """Return m, the importance of each channel for each class, at each trained stage's end.

        Returns:
            Float32 [classes, channels] by stage, from 0 to 1; a row a class, in the order of
            `classes`.

        Raises:
            ValueError: Nothing was learned yet.
        """
        models.learned(self._model)
        assert self._suffix is not None
        return {name: block.excitations() for name, block in _blocks(self._suffix).items()}

    def _ends(self, network: Network) -> dict[str, float]:
        """Return the last block of each stage that trains, with its A."""
        maps = [name for name in network.stages if len(network.shape(name)) == 3]
        ends = [[*stage][-1] for _, stage in groupby(maps, network.shape)]
        if not maps:
            blocks = [name for name in network.stages if name.endswith(".mlp")]
            quarters = [-(-len(blocks) * quarter // 4) - 1 for quarter in range(1, 5)]
            ends = [blocks[index] for index in dict.fromkeys(quarters)]
        if len(ends) > len(self._strengths):
            raise ValueError(
                f"strengths={self._strengths} for the {len(ends)} stages of the network, which end "
                f"with {', '.join(ends)}: give one for each"
            )
        begin = network.stages.index(network.find(self.reads[0]))
        strengths = zip(ends, self._strengths[-len(ends) :], strict=True)
        return {name: a for name, a in strengths if network.stages.index(name) > begin}


def _blocks(suffix: TrainableSuffix) -> dict[str, ClassRegularization]:
    """Return the blocks by the stages that they stand behind."""
    return {name: s for name, s in suffix.stages() if isinstance(s, ClassRegularization)}


build = Regularized

"""Class Regularization: channels that speak for the class predicted so far are made louder.

The graft is `heads/grafts/class_regularization.py`, which has the equations; here one block stands
at the end of each stage of the trained part, all of them look at the one classifier, and classes
come task by task with exemplars: a new class enters the blocks as it enters the classifier.

Tuning the classifier, by the vectors that there were before it, moves the blocks with it.

It is no incremental method. Ours: rehearsal and CE with the recipe of `varve.heads.linear`; only
the last `blocks` train, from a cached feature on; A of a stage follows its depth in the network;
projections may start fitted. Published were all blocks, 170 epochs from scratch or 100 of
fine-tuning; the rate is not given.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varve.heads import Network
from varve.heads.grafts.class_regularization import ClassRegularization
from varve.heads.parts import models
from varve.heads.parts.classifiers import Classifier
from varve.heads.parts.clips import Clips
from varve.heads.parts.fine_tuned_head import READ, Change, FineTunedHead, grid
from varve.heads.parts.trainable_suffix import VECTOR, TrainableSuffix

STRENGTHS = (0.1, 0.2, 0.3, 0.4)
STARTS = ("drawn", "fitted")


class Regularized(FineTunedHead):
    """See the module, and `varve.heads.parts.fine_tuned_head` for the other options.

    Args:
        blocks: How many of the network's last blocks train.
        strengths: A, from the first stage of the network to its last; stages are where the maps
            change their size (a ResNet has four), or quarters of a transformer's blocks; of fewer
            stages the deeper ones. 0 is none.
        start: Of the projections: `drawn` from a normal distribution, or `fitted` to the first
            task's clips, so that each stage predicts what the classifier would, as nearly as its
            channels' means can tell (of classes to come less than of the first task's). As drawn,
            c* stays at chance and the blocks change little; fitted, less is forgotten and less
            learned in a few epochs (REPRODUCIBILITY.md).
    """

    def __init__(
        self,
        blocks: int = 2,
        strengths: Sequence[float] = STRENGTHS,
        start: str = "drawn",
        **tuned: Any,
    ) -> None:
        super().__init__(blocks, **tuned)
        if start not in STARTS:
            raise ValueError(f"no {start=}; choose from {', '.join(STARTS)}")
        self._strengths, self._start = [float(a) for a in strengths], start

    def changed(self, network: Network, classifier: Classifier) -> Mapping[str, Change]:
        return {
            stage: partial(self._block, network, classifier, stage, strength)
            for stage, strength in self._ends(network).items()
        }

    def begins(self, clips: Clips, trunk: TrainableSuffix, model: models.Model[Classifier]) -> None:
        if self._start == "drawn" or not any(self._strengths):
            return
        blocks = _blocks(trunk)
        means: dict[str, list[Tensor]] = {name: [] for name in blocks}
        encoded = []
        with torch.no_grad():
            for places in torch.split(torch.arange(len(clips)), READ):
                vectors, outputs = trunk(clips[places])
                encoded.append(model.vectors(vectors))
                for name, out in zip(trunk.trained, outputs, strict=True):
                    if name in blocks:
                        means[name].append(blocks[name].means(out.flatten(0, 1)))
        for name, block in blocks.items():
            width, vector = encoded[0].shape[1], self._attached().shape(VECTOR)[-1]
            alike = block.channels == vector == width
            block.align(torch.cat(means[name]), torch.cat(encoded), alike)

    def excitations(self) -> dict[str, Tensor]:
        """m, how much each channel speaks for each class, at the end of each stage that trains.

        Returns:
            Float32 [classes, channels] by stage, from 0 to 1; a row a class, in the order of
            `classes`.

        Raises:
            ValueError: Nothing was learned yet.
        """
        models.learned(self._model)
        assert self._trunk is not None
        return {name: block.excitations() for name, block in _blocks(self._trunk).items()}

    def _block(
        self,
        network: Network,
        classifier: Classifier,
        stage: str,
        strength: float,
        inner: nn.Module,
    ) -> ClassRegularization:
        number = network.stages.index(stage)
        seed = int(np.random.default_rng([self._seed, number]).integers(2**31))
        channels, prefix = grid(network.shape(stage))
        return ClassRegularization(
            inner, classifier, channels, network.frames, strength, prefix, seed
        )

    def _ends(self, network: Network) -> dict[str, float]:
        """The last block of each stage that trains, and its A."""
        maps = [name for name in network.stages if len(network.shape(name)) == 3]
        sizes = [network.shape(name) for name in maps]
        last = [here != after for here, after in zip(sizes, [*sizes, ()][1:], strict=True)]
        ends = [name for name, is_last in zip(maps, last, strict=True) if is_last]
        if not maps:
            blocks = [name for name in network.stages if name.endswith(".mlp")]
            quarters = [-(-len(blocks) * quarter // 4) - 1 for quarter in range(1, 5)]
            ends = [blocks[place] for place in dict.fromkeys(quarters)]
        if len(ends) > len(self._strengths):
            raise ValueError(
                f"strengths={self._strengths} for the {len(ends)} stages of the network, which end "
                f"with {', '.join(ends)}: give one for each"
            )
        begin = network.stages.index(network.find(self.reads[0]))
        found = zip(ends, self._strengths[-len(ends) :], strict=True)
        return {name: a for name, a in found if network.stages.index(name) > begin}


def _blocks(trunk: TrainableSuffix) -> dict[str, ClassRegularization]:
    """By the stages that they stand behind."""
    return {name: s for name, s in trunk.stages() if isinstance(s, ClassRegularization)}


build = Regularized

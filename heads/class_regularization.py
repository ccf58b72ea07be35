"""Class Regularization: channel re-weighting by the class predicted at each stage.

The graft is `heads/grafts/class_regularization.py`, which has the equations. One block stands at
the end of each stage of the trained part, or behind each of its residual blocks, and all of them
read the one classifier. A new class enters the blocks as it enters the classifier. Tuning the
classifier changes the blocks with it.

The paper's networks are 3D: there a map is [B, C, T', H, W], with the mean over time and space.
Table 1 of the paper adds four blocks to a ResNet, as at="stages" does; its text has one at every
bottleneck, as at="blocks".

It is no incremental method: a scenario of one task (`0+51x1`) is the paper's, all classes at once.
Ours: rehearsal and cross entropy with the optimiser of all heads; only
the last `blocks` train, from a cached feature on; A of a stage follows its depth in the network;
projections may start fitted. The paper trains all blocks, for 170 epochs from scratch or 100 of
fine-tuning; the learning rate is not given.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby, pairwise
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
AT = ("stages", "blocks")


class Regularized(FineTunedHead):
    """Fine-tune blocks with class regularization; see the module.

    Args:
        blocks: Number of the network's last blocks that train.
        strengths: A, from the first stage of the network to its last. A stage ends where the maps
            change their size (a ResNet has four), or with a quarter of a transformer's blocks. With
            fewer stages, the last values are used. A stage of strength 0 has no block.
        at: Where the blocks stand: `stages`, at the end of each, or `blocks`, behind each residual
            (inception, transformer) block with the A of its stage.
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
        at: str = "stages",
        start: str = "drawn",
        **options: Any,
    ) -> None:
        super().__init__(blocks, **options)
        if start not in STARTS:
            raise ValueError(f"no {start=}; choose from {', '.join(STARTS)}")
        if at not in AT:
            raise ValueError(f"no {at=}; choose from {', '.join(AT)}")
        self._at = at
        self._strengths, self._start = [float(a) for a in strengths], start

    def grafts(self, network: Network, classifier: Classifier) -> Mapping[str, Graft]:
        grafts: dict[str, Graft] = {}
        for stage, strength in self._strength_of(network).items():
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

    def _strength_of(self, network: Network) -> dict[str, float]:
        """Return A by the blocks of the trained part that have a block of ours behind them."""
        stages = _stages_of(network)
        if len(stages) > len(self._strengths):
            ends = ", ".join(blocks[-1] for blocks in stages)
            raise ValueError(
                f"strengths={self._strengths} for the {len(stages)} stages of the network, which "
                f"end with {ends}: give one for each"
            )
        begin = network.stages.index(network.find(self.reads[0]))
        return {
            name: strength
            for blocks, strength in zip(stages, self._strengths[-len(stages) :], strict=True)
            for name in (blocks if self._at == "blocks" else blocks[-1:])
            if strength and network.stages.index(name) > begin
        }


def _stages_of(network: Network) -> list[list[str]]:
    """Return the outputs of the network's blocks, stage by stage.

    A stage ends where the maps change their height and width, in 2D and 3D networks, or with a
    quarter of a transformer's blocks.
    """
    maps = [name for name in network.stages if len(network.shape(name)) == 3]
    if maps:
        # Blocks have names such as `layer3.1`; before them is the stem.
        maps = [name for name in maps if "." in name] or maps
        return [[*names] for _, names in groupby(maps, lambda name: network.shape(name)[1:])]
    blocks = [name for name in network.stages if name.endswith(".mlp")]
    quarters = [-(-len(blocks) * quarter // 4) for quarter in range(5)]
    return [blocks[a:b] for a, b in pairwise(quarters) if a < b]


def _blocks(suffix: TrainableSuffix) -> dict[str, ClassRegularization]:
    """Return the blocks by the stages that they stand behind."""
    return {name: s for name, s in suffix.stages() if isinstance(s, ClassRegularization)}


build = Regularized

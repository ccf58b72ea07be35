"""Fine-tuning: a linear classifier over all classes seen, trained on each task's clips alone.

    L = CE(W x + b, y) over the columns of all classes so far

For old columns every clip is a negative: this is the forgetting that other methods are compared
with ("fine-tuning" in the tables of TCD and FrameMaker). With encoder="expert" the representation
is trained too, and forgets as well.

Ours: x is normalised to length 16, new columns start from zero
(`varve.heads.parts.classifiers.Linear`), and the optimiser is that of all heads
(`varve.heads.parts.training.OptimConfig`).

Shapes: B clips, C classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from varve.heads import Task
from varve.heads.parts import classifiers
from varve.heads.parts.clips import Batch
from varve.heads.parts.encoders import EncoderConfig
from varve.heads.parts.models import ModelHead
from varve.heads.parts.training import OptimConfig


class Linear(ModelHead[classifiers.Linear]):
    """Fine-tune a linear classifier; see the module.

    Args:
        feature: Name of a feature of one vector per frame.
        encoder: Options of the temporal encoder.
        optim: Options of gradient descent.
        seed: Seed of the order of clips and of the encoder.
    """

    def __init__(
        self,
        feature: str = "vector",
        encoder: EncoderConfig = EncoderConfig(),
        optim: OptimConfig = OptimConfig(),
        seed: int = 0,
    ) -> None:
        super().__init__(feature, encoder, classifiers.Linear, optim, seed)

    def learn(self, task: Task) -> None:
        rng, classes = task.rng(self._seed), task.classes_after(self.classes)
        model = self._config.trainable_copy(self._model, task.clips[torch.arange(1)], rng)
        model.classifier.grow(len(classes))
        clips = model.prepare(task.clips)
        columns_N = classifiers.columns(classes, clips.labels)

        def step(indices: Tensor, batch: Batch) -> Tensor:
            logits_BC = model(batch)
            return cross_entropy(logits_BC, columns_N[indices].to(logits_BC.device))

        self.train(task, step, model.parameters(), clips, rng)
        self.classes, self._model = classes, model


build = Linear

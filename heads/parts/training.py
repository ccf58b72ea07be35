"""Gradient descent over the clips of a task, shared by all heads that train.

A head trains copies of its parameters and keeps them when `fit` returns. A training that fails
leaves what was learned before.

Shapes: N clips, B clips a batch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varve.heads.parts.clips import Batch, Clips

SCHEDULES = ("cosine", "step", "constant")
OPTIMIZERS = ("sgd", "adam")
GAMMA = 0.1  # factor of the learning rate at each milestone


@dataclass(frozen=True)
class OptimConfig:
    """Options of gradient descent.

    Ours: all heads share these defaults, so that a comparison is one of methods. They are StPR's
    SGD with momentum, cosine schedule, epochs and batches, and the weight decay of LUCIR, PODNet
    and TCD. A head whose paper states other values overrides them in its own file.

    Attributes:
        first_epochs: Number of epochs of the first task; None for as many as `epochs`.
        epochs: Number of epochs of every later task.
        batch_size: Number of clips per batch.
        lr: Learning rate at the start of a task.
        momentum: Momentum of SGD. Adam does not use it.
        weight_decay: L2 penalty on the parameters.
        schedule: Learning rate after each epoch: `cosine` decreases it from `lr` to 0, `step`
            multiplies it by 0.1 at each milestone, `constant` keeps it.
        milestones: Numbers of epochs after which schedule="step" lowers the learning rate.
        clip_norm: Largest 2-norm of the gradients of each parameter group; None does not clip.
        optimizer: `sgd` or `adam`.

    Raises:
        ValueError: A value is out of range, or is not one of the choices.
    """

    first_epochs: int | None = 60
    epochs: int = 30
    batch_size: int = 40
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: Sequence[int] = ()
    clip_norm: float | None = None
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        epochs = min(self.epochs, self.first_epochs or 0)
        if epochs < 0 or self.schedule not in SCHEDULES or self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"first_epochs={self.first_epochs}, epochs={self.epochs}, "
                f"schedule={self.schedule!r}, optimizer={self.optimizer!r}: give at least 0 "
                f"epochs, and choose from {', '.join(SCHEDULES)} and {', '.join(OPTIMIZERS)}"
            )
        if self.batch_size < 1 or not self.lr >= 0:
            raise ValueError(
                f"batch_size={self.batch_size}, lr={self.lr}: a batch has at least one clip, a "
                "learning rate is 0 or more"
            )

    def epochs_of(self, first_task: bool) -> int:
        """Return the number of epochs of the first task, or of a later one.

        >>> OptimConfig(first_epochs=9, epochs=4).epochs_of(first_task=True)
        9
        """
        return self.epochs if self.first_epochs is None or not first_task else self.first_epochs

    def factor(self, epoch: int, epochs: int) -> float:
        """Return the factor of the learning rate in an epoch, counted from 0."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        if self.schedule == "step":
            return GAMMA ** sum(epoch >= milestone for milestone in self.milestones)
        return 1.0


def fit(
    step: Callable[[Tensor, Batch], Tensor],
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    clips: Clips,
    optim: OptimConfig,
    *,
    epochs: int,
    rng: np.random.Generator,
    on_epoch_end: Callable[[int, int, float], object] = lambda done, epochs, loss: None,
) -> None:
    """Train parameters in place, on every clip once per epoch.

    Equal arguments, parameters and states of `rng` give equal bits, on one machine and number of
    threads. The global random generators are neither read nor moved; a `step` that draws (dropout)
    needs its own generator.

    Args:
        step: Returns the mean loss of a batch, from the indices of its clips, int64 [B], and their
            features. The labels are `clips.labels[indices]`, on the CPU. It sets modes (`train`,
            `eval`) and autocast itself.
        parameters: Parameters, or groups of them as torch's optimizers take them: a dict with
            "params" may have its own "lr" and "weight_decay". Without groups, `clip_norm` applies
            to all parameters together.
        epochs: Number of epochs, such as `optim.epochs_of(first_task)`.
        rng: Draws the order of the clips anew for every epoch.
        on_epoch_end: See `Task.on_epoch_end`. The loss is the mean over clips.

    Raises:
        ValueError: A loss or a parameter became infinite or not a number.
    """
    # Fused: one pass over the numbers in place of one each for momentum, decay and step.
    common: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay, "fused": True}
    optimizer: torch.optim.Optimizer
    if optim.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, **common)
    else:
        optimizer = torch.optim.SGD(parameters, momentum=optim.momentum, **common)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for epoch in range(epochs):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * optim.factor(epoch, epochs)
        # Summed on its device: asking for the number after each batch would make a GPU wait.
        total = torch.zeros((), dtype=torch.float64, device=trained[0].device)
        for indices, batch in clips.batches(optim.batch_size, rng):
            with torch.enable_grad():
                loss = step(indices, batch)
                loss.backward()  # type: ignore[no-untyped-call]
            if optim.clip_norm is not None:
                for group in optimizer.param_groups:
                    nn.utils.clip_grad_norm_(group["params"], optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() * len(indices)
        mean = float(total) / len(clips)
        # The norm reads the numbers once, where `isfinite` of each reads them four times.
        if not math.isfinite(mean) or not nn.utils.get_total_norm(trained).isfinite():
            raise ValueError(
                f"training diverged: the mean loss of epoch {epoch + 1} of {epochs} is {mean}, "
                f"at lr={optim.lr}; try a smaller rate, or give clip_norm"
            )
        on_epoch_end(epoch + 1, epochs, mean)


def tune(
    classifier: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    vectors_NW: Tensor,
    columns_N: Tensor,
    optim: OptimConfig,
    *,
    epochs: int,
    rng: np.random.Generator,
    on_epoch_end: Callable[[int, int, float], object],
) -> None:
    """Train a classifier alone on the vectors of some clips, without weight decay.

    With equally many exemplars per class it is class-balanced fine-tuning (Castro et al.,
    "End-to-End Incremental Learning", ECCV 2018; TCD). A learned `scale` keeps its value.

    Args:
        classifier: A module whose parameters train.
        loss: Returns the mean loss of vectors, [B, W], and their columns, int64 [B].
        vectors_NW: Vectors of the clips.
        columns_N: int64, the column of each.
    """
    clips = Clips({"vectors": vectors_NW}, columns_N)

    def step(indices: Tensor, batch: Batch) -> Tensor:
        return loss(batch["vectors"], columns_N[indices].to(vectors_NW.device))

    trained = [p for name, p in classifier.named_parameters() if name != "scale"]
    fit(step, trained, clips, replace(optim, weight_decay=0.0), epochs=epochs, rng=rng,
        on_epoch_end=on_epoch_end)  # fmt: skip

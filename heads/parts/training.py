"""The loop of gradient descent that trained heads share.

SGD with momentum, or Adam, over a task's clips. A head trains copies of its parameters and takes
them over when `fit` returns, so that a refusal in its midst leaves what was learned before.

Shapes: N clips, B clips a batch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varve.heads.parts.clips import Batch, Clips

SCHEDULES = ("cosine", "step", "constant")
OPTIMIZERS = ("sgd", "adam")


def check(
    epochs: int,
    batch_size: int,
    lr: float,
    schedule: str = "cosine",
    optimizer: str = "sgd",
    **others: object,
) -> None:
    """Refuse what `fit` cannot train with, before there is anything to train.

    Raises:
        ValueError: An option is none.
    """
    if epochs < 0 or schedule not in SCHEDULES or optimizer not in OPTIMIZERS:
        raise ValueError(
            f"{epochs=} by {schedule=}, {optimizer=}: give at least 0, one of "
            f"{', '.join(SCHEDULES)}, and one of {', '.join(OPTIMIZERS)}"
        )
    if batch_size < 1 or not lr >= 0:
        raise ValueError(
            f"{batch_size=}, {lr=}: a batch has at least one clip, a rate is 0 or more"
        )


def fit(
    step: Callable[[Tensor, Batch], Tensor],
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    clips: Clips,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    rng: np.random.Generator,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    clip_norm: float | None = None,
    optimizer: str = "sgd",
    on_epoch_end: Callable[[int, int, float], object] = lambda done, epochs, loss: None,
) -> None:
    """Train parameters where they are, on every clip once an epoch.

    Equal arguments, parameters and states of `rng` give equal bits, on one machine and number of
    threads. The global generators are neither read nor moved; a `step` that draws (dropout) has to
    do so from its own.

    Args:
        step: From places, int64 [B], and their features to the loss, the mean over these clips. The
            labels are `clips.labels[places]`, on the CPU. Modes (`train`, `eval`) and autocast are
            its own.
        parameters: Or groups of them, as torch's optimizers take them: a dict with "params" may
            have an "lr" or "weight_decay" of its own.
        rng: Draws the order of the clips anew for every epoch.
        schedule: What becomes of a rate after each epoch: `cosine` goes from `lr` towards 0 at the
            end, `step` multiplies by `gamma` when as many epochs as a milestone are done.
        clip_norm: Greatest 2-norm of the gradients of a group, all parameters where there are no
            groups; None leaves them.
        optimizer: `sgd` or `adam`, which has no momentum of one's own.
        on_epoch_end: `Task.on_epoch_end`. The mean loss is over clips.

    Raises:
        ValueError: A loss or a parameter became infinite or not a number, or an option is none.
    """
    check(epochs, batch_size, lr, schedule, optimizer)
    # Fused: one pass over the numbers in place of one each for momentum, decay and step.
    common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "fused": True}
    steps: torch.optim.Optimizer
    if optimizer == "adam":
        steps = torch.optim.Adam(parameters, **common)
    else:
        steps = torch.optim.SGD(parameters, momentum=momentum, **common)
    rates = [group["lr"] for group in steps.param_groups]
    trained = [p for group in steps.param_groups for p in group["params"]]
    for epoch in range(epochs):
        factor = 1.0
        if schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        elif schedule == "step":
            factor = gamma ** sum(epoch >= done for done in milestones)
        for group, rate in zip(steps.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        # Summed where it is: asking for the number after each batch would make a GPU wait.
        total = torch.zeros((), dtype=torch.float64, device=trained[0].device)
        for places, batch in clips.batches(batch_size, rng):
            with torch.enable_grad():
                loss = step(places, batch)
                loss.backward()  # type: ignore[no-untyped-call]
            if clip_norm is not None:
                for group in steps.param_groups:
                    nn.utils.clip_grad_norm_(group["params"], clip_norm)
            steps.step()
            steps.zero_grad()
            total += loss.detach() * len(places)
        mean = float(total) / len(clips)
        # The norm is one look at the numbers, where `isfinite` of each takes four.
        if not math.isfinite(mean) or not nn.utils.get_total_norm(trained).isfinite():
            raise ValueError(
                f"training diverged: the mean loss of epoch {epoch + 1} of {epochs} is {mean}, "
                f"at {lr=}; try a smaller rate, or give clip_norm"
            )
        on_epoch_end(epoch + 1, epochs, mean)

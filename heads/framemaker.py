"""FrameMaker: one condensed frame and a prompt in the place of an exemplar.

Pei et al., "Learning a Condensed Frame for Memory-Efficient Video Class-Incremental Learning",
NeurIPS 2022. An exemplar of T frames x_t becomes one frame, which is replayed T times:

    x = sum_t w_t x_t + P

The weights w and the prompt P, as large as a frame, are learned for each exemplar after the task,
with the model as it is (Sec. 3.2 and 3.3; the text at hand names the two losses and no weights):

    L = CE(o(x), y) + condense | f(x) - f(x_1 ... x_T) |^2

f is the vector of a clip. Only x is kept. The model itself trains with CE and, from the second task
on, with distillation of f (`varve.heads.lucir`'s less-forget term, weighted as there).

Ours: a frame is a frame of the cached feature that the trained blocks start from, not of pixels, so
that condensing costs no decoding and reads what is stored; w starts from 1 / T and P from 0; both
are learned with Adam, all exemplars of a class at once. 40 exemplars per class by default, which
have as many frames as TCD's memory of 5 clips of 8.

Shapes: B clips, T frames, M exemplars, W width of a clip's vector.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from varve.heads.parts import models
from varve.heads.parts.clips import Batch, Cells, Clips, part_of
from varve.heads.parts.exemplars import ExemplarConfig, Exemplars
from varve.heads.parts.fine_tuned_head import FineTunedHead
from varve.heads.parts.losses import less_forget
from varve.heads.parts.models import TaskLoss, TaskTraining


class CondensedExemplars(Exemplars):
    """Exemplars of which one frame each is kept, that of no clip.

    Attributes:
        condensed: x of each exemplar, in the order of `rows`, [M, ...].
    """

    condensed = torch.zeros(0)

    def replayed(self, clips: Clips) -> Clips:
        """Return clips of which those that are condensed are T times their frame."""
        number = dict(zip(self.rows.tolist(), range(len(self.condensed)), strict=False))
        numbers_N = torch.tensor([number.get(row, -1) for row in clips.rows.tolist()])
        if not (numbers_N >= 0).any():
            return clips
        return clips.mapped(lambda name, cells: _Condensed(cells, numbers_N, self.condensed))

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"exemplars.condensed": self.condensed.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self.condensed = state["exemplars.condensed"].to("cpu", copy=True)


class _Condensed:
    """Cells of which some are a condensed frame, T times."""

    def __init__(self, cells: Cells, numbers_N: Tensor, condensed: Tensor) -> None:
        self.cells, self.numbers_N, self.condensed = cells, numbers_N, condensed
        self.in_memory = getattr(cells, "in_memory", True)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, indices: Tensor) -> Tensor:
        x, numbers_B = self.cells[indices], self.numbers_N[indices.cpu()]
        condensed_B = numbers_B >= 0
        if not condensed_B.any():
            return x
        x = x.float().clone()
        frames = self.condensed[numbers_B[condensed_B]].to(x.device)
        x[condensed_B.to(x.device)] = frames[:, None].expand(-1, x.shape[1], *frames.shape[1:])
        return x


def condense(x: Tensor, weights_BT: Tensor, prompts: Tensor) -> Tensor:
    """Return the sum over t of w_t x_t and P, one frame of each clip, [B, ...]."""
    return torch.einsum("bt,bt...->b...", weights_BT, x) + prompts


class FrameMaker(FineTunedHead):
    """Replay condensed frames with prompts; see the module.

    Args:
        blocks: Number of the network's last blocks that train.
        kd: lambda_base of the distillation of vectors; 5 in LUCIR.
        condense: Weight of the distance of a condensed clip's vector from the whole clip's.
        condense_epochs: Number of steps in which w and P are learned; 0 keeps the mean frame.
        condense_lr: Their learning rate.
        exemplars: Options of the exemplars.
        options: Options of `varve.heads.parts.fine_tuned_head.FineTunedHead`.

    Raises:
        ValueError: A number is negative, or `exemplar_frames` is not 1.
    """

    def __init__(
        self,
        blocks: int = 2,
        kd: float = 5.0,
        condense: float = 1.0,
        condense_epochs: int = 40,
        condense_lr: float = 0.01,
        exemplars: ExemplarConfig = ExemplarConfig(budget=40, exemplar_frames=1),
        **options: Any,
    ) -> None:
        if min(kd, condense, condense_epochs) < 0 or not condense_lr > 0:
            raise ValueError(
                f"{kd=}, {condense=}, {condense_epochs=}, {condense_lr=}: give 0 or more, and a "
                "rate above 0"
            )
        if exemplars.exemplar_frames != 1:
            raise ValueError(
                f"exemplar_frames={exemplars.exemplar_frames}: framemaker keeps one condensed "
                "frame of an exemplar, so leave it at 1"
            )
        super().__init__(blocks, exemplars=exemplars, **options)
        self.kd, self._condense = kd, condense
        self._condense_epochs, self._condense_lr = condense_epochs, condense_lr

    def build_exemplars(self, config: ExemplarConfig) -> Exemplars:
        return CondensedExemplars(config, least=0)

    def task_loss(self, training: TaskTraining) -> TaskLoss:
        return VectorDistillation(self, training) if self.classes and self.kd else TaskLoss()

    def after_selection(self, training: TaskTraining, exemplars: Exemplars, kept: Tensor) -> None:
        before = self._exemplars
        assert isinstance(exemplars, CondensedExemplars)
        assert isinstance(before, CondensedExemplars)
        if not len(kept):
            return
        number = dict(zip(before.rows.tolist(), range(len(before.rows)), strict=True))
        rows, of_task = exemplars.rows.tolist(), set(training.task.clips.rows.tolist())
        condensed: list[Tensor] = [torch.zeros(0)] * len(rows)
        for column, label in enumerate(training.classes):
            of_class = torch.nonzero(exemplars.labels == label)[:, 0].tolist()
            new = [m for m in of_class if rows[m] in of_task]
            for m in sorted(set(of_class) - set(new)):
                condensed[m] = before.condensed[number[rows[m]]]
            if new:
                clips = part_of(training.clips, kept[torch.tensor(new)])
                for m, frame in zip(new, self._condensed(training, clips, column), strict=True):
                    condensed[m] = frame
        exemplars.condensed = torch.stack(condensed)
        replayed = exemplars.replayed(part_of(training.clips, kept))
        exemplars.update_means(training.vectors(replayed))

    def _condensed(self, training: TaskTraining, clips: Clips, column: int) -> Tensor:
        """Return the frames of some clips of one class, [m, ...], on the CPU."""
        suffix, model, name = training.suffix, training.model, self.reads[0]
        x = clips[torch.arange(len(clips))][name].float()
        target_mW = training.vectors(clips)
        columns_m = torch.full((len(clips),), column, device=x.device)
        no_offsets_C = torch.zeros(len(training.classes), device=x.device)
        weights_mT = nn.Parameter(torch.full(x.shape[:2], 1 / x.shape[1], device=x.device))
        prompts = nn.Parameter(torch.zeros_like(x[:, 0]))
        # Without a temporal module equal frames have equal vectors.
        steps = x.shape[1]
        shown = steps if any(getattr(m, "frames", 0) for m in suffix.suffix.modules()) else 1
        optimizer = torch.optim.Adam([weights_mT, prompts], lr=self._condense_lr)
        for _ in range(self._condense_epochs):
            gradients = [torch.zeros_like(weights_mT), torch.zeros_like(prompts)]
            for some in torch.split(torch.arange(len(clips), device=x.device), models.BATCH):
                with torch.enable_grad():
                    frames = condense(x[some], weights_mT[some], prompts[some])
                    clip = frames[:, None].expand(-1, shown, *frames.shape[1:])
                    vectors = suffix({name: clip})[0]
                    if shown < steps:
                        vectors = {n: v.expand(-1, steps, -1) for n, v in vectors.items()}
                    vectors_mW = model.vectors(vectors)
                    distance = (vectors_mW - target_mW[some]).square().sum(dim=1).mean()
                    wrong = self.classification_loss(
                        training.classifier, vectors_mW, columns_m[some], no_offsets_C
                    )
                    loss = (wrong + self._condense * distance) * len(some) / len(clips)
                    parts = torch.autograd.grad(loss, [weights_mT, prompts])
                gradients = [total + part for total, part in zip(gradients, parts, strict=True)]
            weights_mT.grad, prompts.grad = gradients
            optimizer.step()
        return condense(x, weights_mT, prompts).detach().cpu()


class VectorDistillation(TaskLoss):
    """The distillation of clips' vectors from the suffix and model of the previous task."""

    def __init__(self, head: FrameMaker, training: TaskTraining) -> None:
        assert head._suffix is not None
        self._teacher_suffix = head._suffix.to(training.device)
        self._teacher = models.learned(head._model).to(training.device)
        self._weight = head.kd * (len(head.classes) / len(training.task.classes)) ** 0.5

    def loss(
        self, indices: Tensor, batch: Batch, vectors: Batch, outputs: Sequence[Tensor]
    ) -> Tensor:
        with torch.no_grad():
            teacher_BW = self._teacher.vectors(self._teacher_suffix(batch)[0])
        distance: Tensor = self._weight * less_forget(vectors[models.ENCODED], teacher_BW)
        return distance


build = FrameMaker

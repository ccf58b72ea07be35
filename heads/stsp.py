"""STSP: a subspace per class, and gradients in the null space of earlier tasks' features.

Cheng et al., "STSP: Spatial-Temporal Subspace Projection for Video Class-Incremental Learning",
ECCV 2024. It keeps no clip. Its text fixes two parts, and no public code was found: the equations
are our reconstruction.

A subspace classifier (the paper's TSC). A class c is the span of R basis vectors B_c [R, D], to be
orthonormal, and orthogonal to those of other classes. With F the unit vectors of the T frames,

    o_c = eta / T sum_t | B_c f_t |^2,   L = CE(o, y) + orthogonal (L_intra + L_inter)
    L_intra = mean_c | B_c B_c' - I |_F^2 / R,   L_inter = mean_(c != c') | B_c B_c'' |_F^2 / R

Classes of earlier tasks keep their bases; new ones become orthogonal to them.

Projected gradients (the paper's SGP). After each task the second moment E[x x'] of the channels x,
over every position of every frame, is added up for the input of each convolution and linear layer
that trains. From the second task on, the gradient g of such a layer becomes g N N', where N has the
eigenvectors of the smallest eigenvalues, which hold a share 1 - energy of the sum. A change in this
null space leaves the outputs of earlier clips as they were: for a convolution at each of its taps,
since every tap reads a position of the same input. Parameters that have no such space (biases,
norms, grouped convolutions, fused attention weights) are frozen after the first task.

Ours besides: only the last `blocks` train; eta = 16; the basis of a new class starts from the
singular vectors of its frames; energy = 0.95; the optimiser of all heads, SGD alone and without
weight decay, since Adam's scaling and weight decay leave the null space.

Shapes: B clips, T frames, D width of a frame's vector, C classes, R rank, c channels.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from varve.heads.parts import models
from varve.heads.parts.classifiers import Classifier
from varve.heads.parts.encoders import EncoderConfig
from varve.heads.parts.exemplars import ExemplarConfig
from varve.heads.parts.fine_tuned_head import FineTunedHead
from varve.heads.parts.losses import positions
from varve.heads.parts.models import TaskLoss, TaskTraining
from varve.heads.parts.trainable_suffix import VECTOR, TrainableSuffix
from varve.heads.parts.training import OptimConfig

ETA = 16.0
Layer = nn.Conv2d | nn.Linear


class Subspaces(nn.Module):
    """Compute the energy of a clip's frames in the subspace of each class.

    Args:
        width: W = T D, the frames' vectors in order.
        frames: T.
        rank: R.
    """

    decays = False

    def __init__(self, width: int, frames: int, rank: int) -> None:
        super().__init__()
        self.frames, self.rank = frames, rank
        self.weight = nn.Parameter(torch.zeros(0, rank, width // frames))  # B, [C, R, D]
        self.frozen: Tensor | None = None  # bool [C], the bases that get no gradient

    def grow(self, classes: int, rng: np.random.Generator) -> None:
        """Append bases up to this number of classes, drawn with unit rows."""
        _, R, D = self.weight.shape
        drawn = torch.from_numpy(rng.normal(size=(classes - len(self.weight), R, D)))
        added = normalize(drawn.to(self.weight), dim=2)
        self.weight = nn.Parameter(torch.cat([self.weight.detach(), added]))

    def imprint(self, column: int, x_NW: Tensor) -> None:
        """Start a basis from the first singular vectors of the frames of its clips."""
        unit_ND = self._unit_frames(x_NW).flatten(0, 1).double()
        _, _, basis_KD = torch.linalg.svd(unit_ND, full_matrices=False)
        with torch.no_grad():
            count = min(self.rank, len(basis_KD))
            self.weight[column, :count] = basis_KD[:count].to(self.weight)

    def bases(self) -> Tensor:
        """Return B, [C, R, D], in which frozen classes have no gradient."""
        weight_CRD: Tensor = self.weight
        if self.frozen is None:
            return weight_CRD
        return torch.where(self.frozen[:, None, None], weight_CRD.detach(), weight_CRD)

    def forward(self, x_BW: Tensor) -> Tensor:
        parts_BTCR = torch.einsum("btd,crd->btcr", self._unit_frames(x_BW), self.bases())
        energy_BC: Tensor = parts_BTCR.square().sum(dim=3).mean(dim=1)
        return energy_BC

    def logits(self, x_BW: Tensor) -> Tensor:
        """Return the inputs of cross entropy, [B, C]."""
        return ETA * self.forward(x_BW)

    def orthogonality(self) -> Tensor:
        """Return L_intra + L_inter, a scalar."""
        basis_CRD = self.bases()
        C, R, _ = basis_CRD.shape
        flat = basis_CRD.flatten(0, 1)
        squares = (flat @ flat.T - torch.eye(C * R, device=flat.device)).square()
        sums_CC = squares.reshape(C, R, C, R).sum(dim=(1, 3)) / R
        intra, pairs = sums_CC.diagonal().mean(), C * (C - 1)
        inter = (sums_CC.sum() - sums_CC.diagonal().sum()) / pairs if pairs else 0 * intra
        total: Tensor = intra + inter
        return total

    def _unit_frames(self, x_BW: Tensor) -> Tensor:
        return normalize(x_BW.reshape(len(x_BW), self.frames, -1), dim=2)


class STSP(FineTunedHead):
    """Learn orthogonal subspaces with projected gradients; see the module.

    Args:
        blocks: Number of the network's last blocks that train.
        rank: R, the dimension of a class's subspace.
        orthogonal: Weight of L_intra + L_inter.
        energy: Share of the second moment that gradients may not touch, from 0 to 1; 0 projects
            nothing.
        encoder: Not an option of this head: it reads all frames in order.
        exemplars: Options of the memory: none by default.
        batch_norm: See `FineTunedHead`.
        optim: Options of gradient descent.
        options: Options of `varve.heads.parts.fine_tuned_head.FineTunedHead`.

    Raises:
        ValueError: A number is out of range, another encoder or classifier is given, or Adam or
            weight decay with projected gradients.
    """

    tunes_old = False

    def __init__(
        self,
        blocks: int = 2,
        rank: int = 4,
        orthogonal: float = 1.0,
        energy: float = 0.95,
        encoder: EncoderConfig = EncoderConfig("order"),
        exemplars: ExemplarConfig = ExemplarConfig(budget=0),
        batch_norm: str = "fixed",
        optim: OptimConfig = OptimConfig(weight_decay=0.0),
        **options: Any,
    ) -> None:
        if encoder.encoder != "order" or options.get("classifier", "lsc") != "lsc":
            raise ValueError("stsp has a classifier of its own, on the frames in order: leave out "
                             "`encoder` and `classifier`")  # fmt: skip
        if rank < 1 or orthogonal < 0 or not 0 <= energy < 1:
            raise ValueError(
                f"{rank=}, {orthogonal=}, {energy=}: give a dimension at least, a weight of 0 or "
                "more, and a share below 1"
            )
        if energy and (optim.optimizer != "sgd" or optim.weight_decay):
            raise ValueError(
                f"optimizer={optim.optimizer!r}, weight_decay={optim.weight_decay}: Adam's scaling "
                "and weight decay move weights out of the null space of earlier tasks; leave them "
                "out, or project nothing with energy=0"
            )
        self._rank, self.orthogonal, self.energy = rank, orthogonal, energy
        self.moments: dict[str, Tensor] = {}  # sums of x x' by layer, [c, c]
        super().__init__(blocks, encoder=encoder, exemplars=exemplars, batch_norm=batch_norm,
                         optim=optim, **options)  # fmt: skip

    def build_classifier(self, width: int) -> Classifier:
        frames = self.network.time_steps(VECTOR)
        return Subspaces(width, frames, self._rank)  # type: ignore[return-value]

    def classification_loss(
        self, classifier: Classifier, vectors_BW: Tensor, columns_B: Tensor, offsets_C: Tensor
    ) -> Tensor:
        assert isinstance(classifier, Subspaces)
        loss = cross_entropy(classifier.logits(vectors_BW) + offsets_C, columns_B)
        return loss + self.orthogonal * classifier.orthogonality()

    def task_loss(self, training: TaskTraining) -> TaskLoss:
        return ProjectedGradients(self, training)

    def second_moments(self, training: TaskTraining) -> dict[str, Tensor]:
        """Return E[x x'] over the inputs of each layer that trains, [c, c] float64, by name.

        The mean is over all positions of the task's clips: those of a smaller last batch count as
        much as others.
        """
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def add(name: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
            x = inputs[0].flatten(0, 1) if inputs[0].ndim == 5 else inputs[0]
            x_nc = positions(x.float()).flatten(0, 1)
            sum_cc = (x_nc.T @ x_nc).double()
            sums[name] = sums[name] + sum_cc if name in sums else sum_cc
            counts[name] = counts.get(name, 0) + len(x_nc)

        with ExitStack() as stack:
            for name, layer in _layers(training.suffix).items():
                stack.callback(layer.register_forward_hook(partial(add, name)).remove)
            training.vectors(training.task.clips)
        return {name: sum_cc.cpu() / counts[name] for name, sum_cc in sums.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | models.copies(self.moments, "moments.")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.moments = {name: x.clone() for name, x in models.part(state, "moments.").items()}


class ProjectedGradients(TaskLoss):
    """Project the gradients of the suffix during a task, and add its second moments afterwards."""

    def __init__(self, head: STSP, training: TaskTraining) -> None:
        self._head, self._training = head, training
        self._hooks: list[Any] = []
        classifier = training.classifier
        assert isinstance(classifier, Subspaces)
        columns_N, known = training.columns_N, len(head.classes)
        vectors_NW = training.vectors()
        for column in range(known, len(training.classes)):
            classifier.imprint(column, vectors_NW[(columns_N == column).to(vectors_NW.device)])
        if not known:
            return
        classifier.frozen = ~training.in_task_C
        if not head.energy:
            return
        layers = _layers(training.suffix)
        projected = {f"{name}.weight": layer for name, layer in layers.items()}
        for name, parameter in training.suffix.own().items():
            if name in projected and name.removesuffix(".weight") in head.moments:
                moment_cc = head.moments[name.removesuffix(".weight")]
                null_cc = null_space(moment_cc, head.energy).to(parameter)
                self._hook(parameter, partial(_projected, null_cc))
            else:
                self._hook(parameter, torch.zeros_like)

    def _hook(self, parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        self._hooks.append(parameter.register_hook(change))  # type: ignore[no-untyped-call]

    def on_trained(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._moments = dict(self._head.moments)
        if self._head.energy:
            for name, moment_cc in self._head.second_moments(self._training).items():
                before = self._moments.get(name, torch.zeros_like(moment_cc))
                self._moments[name] = before + moment_cc

    def on_task_end(self) -> None:
        self._head.moments = self._moments


def null_space(moment_cc: Tensor, energy: float) -> Tensor:
    """Return the projection N N' on the eigenvectors that hold at most 1 - energy of the sum."""
    values_c, vectors_cc = torch.linalg.eigh(moment_cc)
    values_c = values_c.clamp(min=0)
    small_c = values_c.cumsum(dim=0) <= (1 - energy) * values_c.sum() + 1e-12 * values_c.sum()
    null = vectors_cc[:, small_c]
    projection_cc: Tensor = null @ null.T
    return projection_cc


def _projected(null_cc: Tensor, gradient: Tensor) -> Tensor:
    """Return g N N' along the input channels of a layer's weight, [out, c, ...]."""
    return torch.einsum("oc...,cd->od...", gradient, null_cc)


def _layers(suffix: TrainableSuffix) -> dict[str, Layer]:
    """Return the layers that train and whose inputs have a second moment, by name."""
    trained = suffix.own()
    return {
        name: module
        for name, module in suffix.suffix.named_modules()
        if isinstance(module, Layer)
        and f"{name}.weight" in trained
        and getattr(module, "groups", 1) == 1
    }


build = STSP

"""Trainable suffix: the last blocks of a network, trained on a cached feature.

Shapes: B clips, T frames, D feature width.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from varve.heads import Network
from varve.heads.parts.clips import Batch

VECTOR = "vector"
BATCH_NORM = ("frozen", "trained", "fixed")


class Passed(NamedTuple):
    """Activations of N = B * T frames, clip by clip, at a stage that trains.

    Attributes:
        module: Module of the stage, with its graft, if any.
        inputs: Input of the stage, [N, ...].
        outputs: Output of the stage, [N, ...].
    """

    module: nn.Module
    inputs: Tensor
    outputs: Tensor


class TrainableSuffix(nn.Module):
    """Network after a cached feature, with trainable copies of the stages of maps and tokens.

    Args:
        network: The frozen network.
        after: Cached feature that the suffix starts from.
        changes: Functions by stage, from the stage's copy to its graft; see `varve.heads.grafts`.
        batch_norm: `frozen`, where statistics remain those of the network; `fixed`, where affine
            parameters do too; or `trained`.

    Attributes:
        trained: Names of the stages that are copies.
    """

    def __init__(
        self,
        network: Network,
        after: str,
        changes: Mapping[str, Callable[[nn.Module], nn.Module]] | None = None,
        batch_norm: str = "frozen",
    ) -> None:
        super().__init__()
        if batch_norm not in BATCH_NORM:
            raise ValueError(f"no {batch_norm=}; choose from {', '.join(BATCH_NORM)}")
        self.after, self.shape, self.last = after, network.shape(after), network.find(VECTOR)
        begin = network.stages.index(network.find(after)) + 1
        self._names = network.stages[begin:]
        self.trained = [name for name in self._names if len(network.shape(name)) > 1]
        keep = [*self.trained, self.last]
        self.suffix = network.suffix(changes or {}, after, keep, unfreeze=self.trained)
        self.learns = batch_norm == "trained"
        if batch_norm == "fixed":
            for module in self.suffix.modules():
                if isinstance(module, _BatchNorm):
                    module.requires_grad_(False)

    def forward(self, batch: Batch) -> tuple[Batch, list[Tensor]]:
        """Return the last vectors, [B, T, D], by name, and the outputs of the trained stages.

        Raises:
            ValueError: The feature is of another network, or not finite.
        """
        x = batch[self.after]
        if tuple(x.shape[2:]) != tuple(self.shape) or not x.isfinite().all():
            raise ValueError(
                f"features {self.after!r} are {list(x.shape)}; the suffix of the network takes "
                f"finite ones of {list(self.shape)} a frame: use the store of the network attached"
            )
        outputs = self.suffix(x)
        return {VECTOR: outputs[self.last].float()}, [outputs[name] for name in self.trained]

    def traced(self, batch: Batch) -> tuple[Batch, dict[str, Passed]]:
        """Return the last vectors by name, and the activations of the trained stages.

        These are the tensors that the vectors were computed from. `forward` returns reshaped
        outputs, which the gradients of the vectors do not reach.
        """
        passed: dict[str, Passed] = {}

        def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
            passed[name] = Passed(module, inputs[0], output)

        with ExitStack() as stack:
            for name, stage in self.stages():
                stack.callback(stage.register_forward_hook(partial(keep, name)).remove)
            vectors, _ = self(batch)
        return vectors, passed

    def stages(self) -> list[tuple[str, nn.Module]]:
        """Return names and modules of the stages that train, with their grafts."""
        modules: Any = self.suffix.stages
        named = zip(self._names, modules, strict=False)
        return [(name, module) for name, module in named if name in self.trained]

    def own(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, without those of a classifier that a graft reads."""
        named = self.suffix.named_parameters()
        return {n: p for n, p in named if p.requires_grad and not _of_classifier(n)}

    @property
    def looks(self) -> bool:
        """True if a graft reads the classifier, so that the vectors depend on it."""
        return any(_of_classifier(name) for name, _ in self.suffix.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """Return all that training changes: `own`, and batch-norm statistics if they train."""
        statistics = self.suffix.named_buffers() if self.learns else ()
        return {**self.own(), **dict(statistics)}

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters and statistics to those of another suffix's `state`."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(values[name])


def _of_classifier(name: str) -> bool:
    return ".classifier." in name

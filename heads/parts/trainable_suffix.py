"""Trunks: the last blocks of a network, to be trained from a cached feature on.

Shapes: B clips, T frames, D feature width.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from varve.heads import Network
from varve.heads.parts.clips import Batch

VECTOR = "vector"
BATCH_NORM = ("frozen", "trained")


class Passed(NamedTuple):
    """A stage that trains, and N = B * T frames at it, clip by clip.

    Attributes:
        module: With the graft, if any.
        taken, given: What went in and what came out, [N, ...].
    """

    module: nn.Module
    taken: Tensor
    given: Tensor


class TrainableSuffix(nn.Module):
    """The network after a cached feature, with copies of its own of the stages that give places.

    Args:
        changes: By stage, what makes a module of the stage's own copy; see `varve.heads.grafts`.
        batch_norm: `frozen`, its statistics stay those of the network, or `trained`.

    Attributes:
        trained: The stages that it has copies of.
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

    def forward(self, batch: Batch) -> tuple[Batch, list[Tensor]]:
        """The last vectors, [B, T, D], by name, and the outputs of the trained stages.

        Raises:
            ValueError: The feature is not the network's, or not finite.
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
        """As `forward`, but of the trained stages the tensors that the vectors were made of.

        `forward` gives reshaped ones, to which no gradient of the vectors leads.
        """
        passed: dict[str, Passed] = {}

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(module: nn.Module, taken: Any, given: Tensor) -> None:
                passed[name] = Passed(module, taken[0], given)

            return hook

        with ExitStack() as stack:
            for name, stage in self.stages():
                stack.callback(stage.register_forward_hook(keep(name)).remove)
            vectors, _ = self(batch)
        return vectors, passed

    def stages(self) -> list[tuple[str, nn.Module]]:
        """Those that train, with their grafts, by name."""
        modules: Any = self.suffix.stages
        named = zip(self._names, modules, strict=False)
        return [(name, module) for name, module in named if name in self.trained]

    def own(self) -> dict[str, nn.Parameter]:
        """What trains. A classifier that a graft looks at is trained by who has it."""
        named = self.suffix.named_parameters()
        return {n: p for n, p in named if p.requires_grad and not _of_classifier(n)}

    @property
    def looks(self) -> bool:
        """Whether a graft looks at the classifier, so that the vectors are others with another."""
        return any(_of_classifier(name) for name, _ in self.suffix.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """What training has changed: `own`, and statistics where they are trained."""
        statistics = self.suffix.named_buffers() if self.learns else ()
        return {**self.own(), **dict(statistics)}

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Take over the values of another's state."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(values[name])


def _of_classifier(name: str) -> bool:
    return ".classifier." in name

"""Trunks: the last blocks of a network, to be trained from a cached feature on.

Shapes: B clips, T frames, D feature width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heads import Network
from heads.parts.clips import Batch

VECTOR = "vector"


class Trunk(nn.Module):
    """The network after a cached feature, with copies of its own of the stages that give places."""

    def __init__(self, network: Network, after: str) -> None:
        super().__init__()
        self.after, self.shape, self.last = after, network.shape(after), network.find(VECTOR)
        begin = network.stages.index(network.find(after)) + 1
        self.trained = [name for name in network.stages[begin:] if len(network.shape(name)) > 1]
        keep = [*self.trained, self.last]
        self.suffix = network.suffix({}, after, keep, unfreeze=self.trained)

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

    def own(self) -> dict[str, nn.Parameter]:
        """What trains."""
        return {n: p for n, p in self.suffix.named_parameters() if p.requires_grad}

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Take over the values of another's own."""
        with torch.no_grad():
            for name, parameter in self.own().items():
                parameter.copy_(values[name])

"""Spatial features V^s of StPR: the vectors of frames, cached or from an adapted network.

K adapters are beside the MLPs of the last K blocks, with a method's own grafts around them. The
input of the first of these MLPs never changes, so it is read from the store and only the stages
after it run: with K = 1 on the class token alone, since after the last attention tokens are
independent.

Shapes: N clips, B clips a batch, T frames, D width of V^s.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from varve.heads import Network
from varve.heads.grafts.adapter import Adapter
from varve.heads.parts.clips import Batch, Clips, frames

READ = 64  # clips per batch, without training


class Spatial:
    """Encoder from a batch to V^s, L2-normalised, [B, T, D].

    Args:
        adapters: Number of blocks from the end that have an adapter; 0 for the cached vectors, or
            "all".
        feature: Cached feature that is read without adapters; with them it is "vector".
        form: Option of `Adapter`, as are `bottleneck` and `scale`.
        seed: Seed of the adapters.
        around: Function from the network, a stage and its adapter to the graft of that stage.

    Attributes:
        suffix: The network from the first adapter on; None without adapters.
    """

    def __init__(
        self,
        adapters: int | str = 0,
        feature: str = "vector",
        form: str = "parallel",
        bottleneck: int = 64,
        scale: float = 0.1,
        seed: int = 0,
        around: Callable[[Network, str, nn.Module], nn.Module] = lambda network, stage, adapter: (
            adapter
        ),
    ) -> None:
        if isinstance(adapters, str) and adapters != "all":
            raise ValueError(f"no {adapters=}; give a number of blocks from the end, or 'all'")
        if not isinstance(adapters, str) and adapters < 0:
            raise ValueError(f"{adapters=}: give a number of blocks from the end, or 'all'")
        if adapters and feature != "vector":
            raise ValueError(
                f"{feature=} with {adapters=}: an adapted network gives its own last vector; leave "
                "feature at 'vector'"
            )
        self.adapters = adapters
        self.form, self.bottleneck, self.scale = form, bottleneck, scale
        self.seed, self._around = seed, around
        if not adapters:
            self.read = feature
        elif adapters == 1:
            self.read = "blocks.-1.attn:cls"
        else:
            self.read = "blocks.0.attn" if adapters == "all" else f"blocks.-{adapters}.attn"
        self.suffix: nn.Module | None = None
        self._shape: tuple[int, ...] = ()
        self._grafts: dict[int, nn.Module] = {}

    def attach(self, network: Network) -> None:
        """Put the adapters into the network.

        Raises:
            ValueError: The network has fewer blocks with an MLP.
        """
        if not self.adapters:
            return
        blocks = sum(bool(re.fullmatch(r"blocks\.\d+\.mlp", stage)) for stage in network.stages)
        count = blocks if self.adapters == "all" else int(self.adapters)
        if not 1 <= count <= blocks:
            raise ValueError(
                f"adapters={self.adapters!r} on a network of {blocks} blocks with an MLP: adapters "
                "stand in vision transformers; give as many as there are blocks at most, or 0"
            )
        self._shape = tuple(network.shape(self.read))
        self._grafts = {}
        for number in range(1, count + 1):
            stage = network.find(f"blocks.-{number}.mlp")
            inner = network.module(stage)
            draw = int(np.random.default_rng([self.seed, number]).integers(2**31))
            adapter = Adapter(
                inner, self._shape[-1], self.bottleneck, self.scale, self.form, seed=draw
            )
            self._grafts[number] = self._around(network, stage, adapter)
            device = next(inner.parameters()).device
            for parameter in _trained(self._grafts[number]).values():
                parameter.data = parameter.to(device)
        changes = {f"blocks.-{number}.mlp": graft for number, graft in self._grafts.items()}
        self.suffix = network.suffix(changes, after=self.read)

    def __call__(self, batch: Batch, width: int | None = None) -> Tensor:
        """Return V^s of a batch; gradients reach the adapters and the grafts around them.

        Args:
            batch: Features of the clips.
            width: Expected width D; None for any.

        Raises:
            ValueError: The feature has another shape, or is not finite.
        """
        if not self.adapters:
            return normalize(frames(batch, self.read, width), dim=2)
        if self.suffix is None:
            raise ValueError(f"adapters={self.adapters!r} without a network: attach one first")
        x = batch[self.read]
        if tuple(x.shape[2:]) != self._shape or not x.isfinite().all():
            raise ValueError(
                f"features {self.read!r} are {list(x.shape)} where the suffix of the network takes "
                f"[clips, frames, {', '.join(map(str, self._shape))}], or are not finite: leave "
                "out the clips that the store has not marked as done"
            )
        return normalize(frames({"vector": self.suffix(x).float()}, "vector", width), dim=2)

    @torch.no_grad()
    def whole(self, clips: Clips, width: int | None = None) -> Tensor:
        """Return V^s of all clips by the present adapters, without gradients, [N, T, D]."""
        return torch.cat([self(batch, width) for _, batch in clips.batches(READ)])

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that train."""
        return [weight for graft in self._grafts.values() for weight in _trained(graft).values()]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained parameters; `adapter.N.down` is of the N-th block from the end."""
        return {
            f"adapter.{number}.{name}": weight.detach().to("cpu", copy=True)
            for number, graft in self._grafts.items()
            for name, weight in _trained(graft).items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained parameters to those of a `state_dict`."""
        if self.adapters and self.suffix is None:
            raise ValueError(f"adapters={self.adapters!r} without a network: attach one first")
        for number, graft in self._grafts.items():
            for name, weight in _trained(graft).items():
                weight.copy_(state[f"adapter.{number}.{name}"])


def _trained(graft: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: p for name, p in graft.named_parameters() if p.requires_grad}

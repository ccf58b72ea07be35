"""A backbone as a head that trains a part of it sees it; see `varve.heads.Network`."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from varve.pipeline.backbones import Backbone, canonical_reduction
from varve.pipeline.experiments.head_inputs import resolve_name
from varve.pipeline.registry import source_digest, variant
from varve.stores.digests import digest


class HeadNetwork:
    """A frozen backbone, of which heads take trainable suffixes.

    Args:
        backbone: The network as it computed the features of the store.
        frames: T, number of frames for each clip.
        load: Loads the same network in another precision.

    Attributes:
        frames: T.
        calls: Number of calls of each stage by all suffixes.
    """

    def __init__(
        self, backbone: Backbone, frames: int, load: Callable[[torch.dtype], Backbone]
    ) -> None:
        self.frames = frames
        self.calls: Counter[str] = Counter()
        self._graft_sources: dict[str, str] = {}  # SHA-256 of the user's file; "" for Varve's own
        self._frozen, self._load = backbone, load
        self._backbone_of: WeakKeyDictionary[nn.Module, Backbone] = WeakKeyDictionary()

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in order."""
        return self._frozen.stage_names

    @property
    def frozen(self) -> Backbone:
        """The network as it computed the features of the store."""
        return self._frozen

    def identity(self) -> str:
        """Return the key of the frozen network, and of the user's grafts that its head uses."""
        key = self._frozen.keys("")[self.stages[-1]]
        sources = {name: source for name, source in self._graft_sources.items() if source}
        return digest({"network": key, "grafts": sources}) if sources else key

    def find(self, name: str) -> str:
        """Return the stage or feature that a name of `Head.reads` means."""
        return resolve_name(name, self._frozen)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a feature, of one frame."""
        full_name, _, reduction = self.find(name).partition(":")
        stage = self._frozen.stage(full_name)
        return self._frozen.feature_shape(stage, canonical_reduction(stage, reduction))

    def time_steps(self, name: str) -> int:
        """Return the number of time steps of a feature of a clip."""
        return self._frozen.time_steps(self.find(name).partition(":")[0], self.frames)

    def module(self, stage: str) -> nn.Module:
        """Return the frozen module of a stage."""
        return self._frozen.stage(self.find(stage)).module

    def graft(self, name: str) -> Callable[..., nn.Module]:
        """Return the builder of a registered graft; its source then decides the identity."""
        graft = variant("grafts", name)
        self._graft_sources[name] = source_digest("grafts", name)
        build: Callable[..., nn.Module] = getattr(graft, "build", graft)
        return build

    def suffix(
        self,
        changes: Mapping[str, nn.Module | Callable[[nn.Module], nn.Module]],
        after: str,
        keep: Sequence[str] = (),
        unfreeze: Sequence[str] = (),
    ) -> nn.Module:
        """Return the network after a feature, with grafts; see `varve.heads.Network.suffix`."""
        backbone = self._frozen
        if unfreeze:
            # What trains is float32: most steps are too small for the eight bits of bfloat16.
            if backbone.precision != torch.float32:
                backbone = self._load(torch.float32)
            backbone = backbone.unfreeze(*map(self.find, unfreeze))
        for name, change in changes.items():
            stage = self.find(name)
            frozen = backbone.stage(stage).module
            module = change if isinstance(change, nn.Module) else change(frozen)
            backbone = backbone.graft(stage, module)
        suffix = backbone.suffix(self.find(after), [self.find(stage) for stage in keep])
        suffix.calls = self.calls
        self._backbone_of[suffix] = backbone
        return suffix

    def backbone_of(self, suffix: nn.Module) -> Backbone:
        """Return the whole network that a suffix belongs to, with its modules as they are now."""
        return self._backbone_of[suffix]

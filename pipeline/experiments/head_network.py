"""Attaching: a backbone as a head that changes it sees it; see `varve.heads.Network`."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from varve.pipeline.backbones import Backbone, canonical_reduction
from varve.pipeline.experiments.head_inputs import meaning
from varve.pipeline.registry import source_digest, variant
from varve.stores.digests import digest


class HeadNetwork:
    """A backbone as its features were computed, and what a head puts into it.

    Args:
        load: The same network in a precision.

    Attributes:
        calls: Of each stage by the suffixes that were given out.
    """

    def __init__(
        self, backbone: Backbone, frames: int, load: Callable[[torch.dtype], Backbone]
    ) -> None:
        self.frames = frames
        self.calls: Counter[str] = Counter()
        self._graft_sources: dict[str, str] = {}  # SHA-256 of the user's file; "" for Varve's own
        self._plain, self._load = backbone, load
        self._behind: WeakKeyDictionary[nn.Module, Backbone] = WeakKeyDictionary()

    @property
    def stages(self) -> list[str]:
        return self._plain.stage_names

    def identity(self) -> str:
        """Return the key of the plain network, and of the user's grafts that its head uses."""
        key = self._plain.keys("")[self.stages[-1]]
        sources = {name: source for name, source in self._graft_sources.items() if source}
        return digest({"network": key, "grafts": sources}) if sources else key

    def find(self, name: str) -> str:
        return meaning(name, self._plain)

    def shape(self, name: str) -> tuple[int, ...]:
        own, _, reduction = self.find(name).partition(":")
        stage = self._plain.stage(own)
        return self._plain.feature_shape(stage, canonical_reduction(stage, reduction))

    def module(self, stage: str) -> nn.Module:
        return self._plain.stage(self.find(stage)).module

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
        new = self._plain
        if unfreeze:
            # What trains is float32: most steps are too small for the eight bits of bfloat16.
            if new.precision != torch.float32:
                new = self._load(torch.float32)
            new = new.unfreeze(*map(self.find, unfreeze))
        for stage, change in changes.items():
            own = new.stage(self.find(stage)).module
            module = change if isinstance(change, nn.Module) else change(own)
            new = new.graft(self.find(stage), module)
        suffix = new.suffix(self.find(after), [self.find(stage) for stage in keep])
        suffix.calls = self.calls
        self._behind[suffix] = new
        return suffix

    def behind(self, suffix: nn.Module) -> Backbone:
        """The whole network that a suffix is of, with what has become of its modules since."""
        return self._behind[suffix]

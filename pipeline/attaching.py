"""Attaching: a backbone as a head that changes it sees it; see `heads.Network`."""

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from pipeline.backbones import Backbone
from pipeline.columns import cell_shape
from pipeline.offering import meaning
from pipeline.reductions import canonical_reduction


class HeadNetwork:
    """A backbone, and what a head puts into it.

    Attributes:
        changed: The backbone with the head's modules in it; the plain one before.
        calls: Of each stage by the suffixes that were given out.
    """

    def __init__(self, backbone: Backbone, frames: int) -> None:
        self.changed, self.frames = backbone, frames
        self.calls: Counter[str] = Counter()
        self._plain = backbone

    @property
    def stages(self) -> list[str]:
        return self._plain.stage_names

    def identity(self) -> str:
        """Names the plain network: every stage's code and parameters."""
        return self._plain.keys("")[self.stages[-1]]

    def find(self, name: str) -> str:
        return meaning(name, self._plain)

    def shape(self, name: str) -> tuple[int, ...]:
        own, _, reduction = self.find(name).partition(":")
        stage = self._plain.stage(own)
        return cell_shape(self._plain, stage, canonical_reduction(stage, reduction))

    def module(self, stage: str) -> nn.Module:
        return self._plain.stage(self.find(stage)).module

    def suffix(
        self,
        changes: Mapping[str, nn.Module],
        after: str,
        keep: Sequence[str] = (),
        unfreeze: Sequence[str] = (),
    ) -> nn.Module:
        new = self._plain.unfreeze(*map(self.find, unfreeze)) if unfreeze else self._plain
        for stage, module in changes.items():
            new = new.graft(self.find(stage), module)
        self.changed = new
        suffix = new.suffix(self.find(after), [self.find(stage) for stage in keep])
        suffix.calls = self.calls
        return suffix

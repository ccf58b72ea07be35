"""HF-Net: behind some blocks, gates let frames hand part of what they hold to the frame before.

The graft is `heads/grafts/hf_gate.py`, which has the equations; here the network after the first
gated block trains with the gates, the mean of the frames' vectors (TSN's consensus, where the paper
has the mean of their logits: the classifier makes it unit) or a relation network (TRN) is the
clip's, and classes come task by task with exemplars.

HF-Net is no incremental method. Ours: rehearsal, CE and the classifier of
`varve.heads.parts.fine_tuned_head`, the
recipe of `varve.heads.linear` in the place of SGD at 1e-3 for 60 epochs with x 0.1 after 25 and 40
(schedule="step", milestones=[25, 40]), and only the last `blocks` train, from a cached feature on.
As published: blocks=8 of a ResNet-18 (all), gates=None, drop=0.5, batch_norm="trained",
classifier="linear", tune_epochs=0, and encoder="trn" for the rows with a relation network.

A conservative gate behind the last block moves nothing where frames are averaged, since it keeps
their sum: so two blocks train by default, with a gate between them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from varve.heads import Network
from varve.heads.grafts.hf_gate import HFGate
from varve.heads.parts.classifiers import Classifier
from varve.heads.parts.fine_tuned_head import Change, FineTunedHead, grid


class HFNet(FineTunedHead):
    """See the module, and `varve.heads.parts.fine_tuned_head` for the other options.

    Args:
        blocks: How many of the network's last blocks train.
        gates: After how many of these a gate stands, from the end; None for all.
        conservative: False for two independent gates.
    """

    def __init__(
        self,
        blocks: int = 2,
        gates: int | None = None,
        conservative: bool = True,
        **tuned: Any,
    ) -> None:
        super().__init__(blocks, **tuned)
        if gates is not None and not 0 <= gates <= blocks:
            raise ValueError(f"{gates=} after {blocks} blocks that train: give 0 to {blocks}")
        self._gates = blocks if gates is None else gates
        self._conservative = conservative

    def changed(self, network: Network, classifier: Classifier) -> Mapping[str, Change]:
        gated = [network.find(f"blocks.-{number}") for number in range(1, self._gates + 1)]
        return {stage: partial(self._gate, network, stage) for stage in gated}

    def _gate(self, network: Network, stage: str, inner: nn.Module) -> HFGate:
        channels, prefix = grid(network.shape(stage))
        return HFGate(inner, channels, network.frames, self._conservative, prefix)


build = HFNet

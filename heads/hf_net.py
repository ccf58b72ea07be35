"""HF-Net: gates behind some blocks pass a part of each frame's features to the frame before.

The graft is `heads/grafts/hf_gate.py`, which has the equations. The network after the first gated
block trains with the gates. The vector of a clip is the mean of its frames' vectors (TSN's
consensus; the paper has the mean of their logits, but the classifier normalises the vector), or a
relation network (TRN) of them.

HF-Net is no incremental method. Ours: rehearsal, cross entropy and the classifier of
`varve.heads.parts.fine_tuned_head`; the optimiser of all heads in the place of SGD at 1e-3 for 60
epochs with x 0.1 after 25 and 40 (schedule="step", milestones=[25, 40]); only the last `blocks`
train, from a cached feature on. As published: blocks=8 of a ResNet-18 (all), gates=None, drop=0.5,
batch_norm="trained", classifier="linear", tune_epochs=0, and encoder="trn" for the rows with a
relation network.

A conservative gate behind the last block has no effect where frames are averaged, since it keeps
their sum. So two blocks train by default, with a gate between them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from varve.heads import Network
from varve.heads.grafts.hf_gate import HFGate
from varve.heads.parts.classifiers import Classifier
from varve.heads.parts.fine_tuned_head import FineTunedHead, Graft, stage_options


class HFNet(FineTunedHead):
    """Fine-tune blocks with HF gates; see the module.

    Args:
        blocks: Number of the network's last blocks that train.
        gates: Number of these with a gate behind them, from the end; None for all.
        conservative: Whether a gate keeps the sum over frames; otherwise there are two independent
            gates.
        options: Options of `varve.heads.parts.fine_tuned_head.FineTunedHead`.
    """

    def __init__(
        self,
        blocks: int = 2,
        gates: int | None = None,
        conservative: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(blocks, **options)
        if gates is not None and not 0 <= gates <= blocks:
            raise ValueError(f"{gates=} after {blocks} blocks that train: give 0 to {blocks}")
        self._gates = blocks if gates is None else gates
        self._conservative = conservative

    def grafts(self, network: Network, classifier: Classifier) -> Mapping[str, Graft]:
        gated = [network.find(f"blocks.-{number}") for number in range(1, self._gates + 1)]
        gate = partial(HFGate, conservative=self._conservative)
        return {stage: partial(gate, **stage_options(network, stage)) for stage in gated}


build = HFNet

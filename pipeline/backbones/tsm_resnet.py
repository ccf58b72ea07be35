"""TSM-ResNets: torchvision's ResNets whose residual blocks mix neighbouring frames.

Temporal Shift Module (Lin, Gan and Han, ICCV 2019), the network of TCD and HCE: 1/8 of the channels
before conv1 of every block come from the next frame and 1/8 from the previous one, over clips of
`FRAMES` frames (`heads/grafts/temporal_shift.py`). A stage's output for one frame depends on the
other frames of the clip, so a store of it has 8 frames a clip.

Weights are torchvision's tags, files or seeds, as for `resnet18`; also files of the authors' code,
whose names (`base_model.layer1.0.conv1.net.weight`, `new_fc.weight`) are translated.
"""

from dataclasses import replace

import torch
from torch import Tensor

from varve.heads.grafts.temporal_shift import TemporalShift
from varve.pipeline.backbones import resnet
from varve.pipeline.backbones._stage import Backbone

PREFIX = "tsm_"
FRAMES, FOLD = 8, 8
OWN = "base_model."
# The authors' code shifts every second block of these.
SPARSE = ("resnet101", "resnet152")


def networks() -> list[str]:
    """Return the names of the networks."""
    return [f"{PREFIX}{name}" for name in resnet.networks() if name not in SPARSE]


def build(network: str, weights: str, precision: torch.dtype) -> Backbone:
    """Build the network as a chain of its residual blocks.

    Raises:
        ValueError: No such tag, or weights that do not fit.
        OSError: The weights cannot be had.
    """
    plain = resnet.build(network.removeprefix(PREFIX), weights, precision, renamed)
    stages = tuple(
        replace(
            stage,
            module=TemporalShift(stage.module, FRAMES, FOLD).eval(),
            code="tsm_block/1",
            options={**stage.options, "frames": FRAMES, "fold": FOLD},
            frames=FRAMES,
            structure=None,
        )
        if stage.name.startswith("layer")
        else stage
        for stage in plain.stages
    )
    return replace(plain, name=f"{PREFIX}{plain.name}", network=network, stages=stages)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters under torchvision's names."""
    return {
        name.removeprefix(OWN).replace(".conv1.net.", ".conv1.").replace("new_fc.", "fc."): tensor
        for name, tensor in state.items()
    }

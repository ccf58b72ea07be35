"""The module of the stage, which a graft keeps as `inner`."""

from torch import nn


def train_unless_frozen[G: nn.Module](self: G, mode: bool = True) -> G:
    """Set the mode; an inner without trainable parameters stays in eval.

    It is the method `train` of a graft.
    """
    inner = self.get_submodule("inner")
    self.training = mode
    inner.train(mode and any(p.requires_grad for p in inner.parameters()))
    return self

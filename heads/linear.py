"""Fine-tuning: a linear classifier over all classes seen, trained on each task's clips alone.

    L = CE(W x + b, y) over the columns of all classes so far

For old columns every clip is a negative: this is the forgetting that other methods are compared
with ("fine-tuning" in the tables of TCD and FrameMaker). With encoder="expert" the representation
is trained too, and forgets as well.

Ours: x is normalised to length 16, new columns start from zero
(`varve.heads.parts.classifiers.Linear`), and the optimiser is that of all heads
(`varve.heads.parts.training.OptimConfig`).

Shapes: B clips, C classes.
"""

from varve.heads.parts import classifiers
from varve.heads.parts.models import ModelHead


class Linear(ModelHead[classifiers.Linear]):
    """Fine-tune a linear classifier; see the module. The options are those of `ModelHead`."""

    build_classifier = classifiers.Linear


build = Linear

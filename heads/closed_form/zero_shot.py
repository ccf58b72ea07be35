"""CLIP's zero-shot classifier: the cosine of a clip's mean frame to the text of each class.

Radford et al., ICML 2021, applied to frames as in StPR's frozen row, with V_i and text normalised:

    score_c = cos(mean_i V_i / |V_i|, t_c)

It learns nothing from the clips: a class is known when its text is. The order of frames does not
matter.

Shapes: B clips, T frames, D width of the joint space, C classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from varve.heads import Task
from varve.heads.parts.clips import Batch, frames


class ZeroShot:
    """Score a clip by its cosine to the text of each class.

    Args:
        feature: Name of a feature of one vector per frame, in the space of the text.
    """

    trainable = 0

    def __init__(self, feature: str = "vector") -> None:
        self.reads = (feature,)
        self.classes: list[int] = []
        self._text_CD = torch.zeros(0, 0)

    def learn(self, task: Task) -> None:
        """Store the text of a task's classes. One clip is read, to compare widths.

        Raises:
            ValueError: There is no text, or its width is not that of the frames.
        """
        (name,) = self.reads
        if task.text is None:
            raise ValueError(
                "no zero-shot without text features, and this network has no text tower: use one "
                "that has (clip_vit), or a head that learns from clips (nearest_mean)"
            )
        width = self._text_CD.shape[1] if self.classes else None
        x_BTD = frames(task.clips[torch.arange(1)], name, width)
        if x_BTD.shape[2] != task.text.shape[1] or not task.text.isfinite().all():
            raise ValueError(
                f"features {name!r} are {list(x_BTD.shape)}, the text of {len(task.classes)} "
                f"classes {list(task.text.shape)}: take finite ones of one width, both from the "
                "joint space"
            )
        classes = task.classes_after(self.classes)
        rows = dict(zip(self.classes, self._text_CD, strict=True))
        rows |= zip(task.classes, normalize(task.text.detach().cpu().float()), strict=True)
        text_CD = torch.stack([rows[label] for label in classes])
        self.classes, self._text_CD = classes, text_CD

    def scores(self, batch: Batch) -> Tensor:
        if not self.classes:
            raise ValueError("nothing was learned yet, so there is nothing to score: learn first")
        x_BTD = frames(batch, self.reads[0], self._text_CD.shape[1])
        mean_BD = normalize(normalize(x_BTD, dim=2).mean(dim=1), dim=1)
        return mean_BD @ self._text_CD.to(x_BTD.device).T

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "classes": torch.tensor(self.classes, dtype=torch.int64),
            "text": self._text_CD.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.classes = state["classes"].tolist()
        self._text_CD = state["text"].to("cpu", torch.float32, copy=True)


build = ZeroShot

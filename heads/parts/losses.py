"""Losses of StPR: contrast with text by class, and distillation by frame-shared semantics (FSSD).

Contrast (Eq. 6), with S_ij = cos(v_i, t_j), t_j the text of clip j's class, M_ij = [y_i = y_j]:

    L_v2t  = - mean_i  sum_j M_ij log softmax_j(S_ij / tau) / (sum_j M_ij + eps)
    L_cont = (L_v2t(S) + L_v2t(S')) / 2

FSSD (Eq. 5), with mu_cj and var_cj over all frames of class c in channel j, text channel T_cj:

    I_cj   = T_cj mu_cj / (var_cj + eps)
    w_j    = mean over the old classes of max(I_cj, 0)
    L_FSSD = mean over clips and channels of w_j (old_bj - new_bj)^2

Ours: the clamp, since two channels in five come out negative and would reward drift, the mean over
classes, and variances over n rather than n - 1.

Shapes: N clips, B clips a batch, T frames, D feature width, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

DISTILLATIONS = ("fssd", "uniform", "none")


def contrastive(
    clips_BD: Tensor, text_BD: Tensor, labels_B: Tensor, tau: float = 0.01, eps: float = 1e-8
) -> Tensor:
    """L_cont, a scalar. Neither side has to be unit already.

    Args:
        text_BD: The text feature of each clip's class.
        labels_B: int64; on any device.
        tau: Temperature; CLIP's trained scale of 100 is 0.01.
    """
    cosines_BB = normalize(clips_BD, dim=1) @ normalize(text_BD, dim=1).T / tau
    labels_B = labels_B.to(cosines_BB.device)
    mask_BB = (labels_B[:, None] == labels_B).to(cosines_BB.dtype)
    share_BB = mask_BB / (mask_BB.sum(dim=1, keepdim=True) + eps)
    both = log_softmax(cosines_BB, dim=1) + log_softmax(cosines_BB.T, dim=1)
    return -(share_BB * both).sum(dim=1).mean() / 2


def importance(
    frames_NTD: Tensor,
    labels_N: Tensor,
    classes: Sequence[int],
    text_CD: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """I of each class, [C, D], as it comes out: negative where text and frames disagree in sign.

    Args:
        frames_NTD: V^s, L2-normalised.
        classes: Each has a clip at least.
        text_CD: L2-normalised.
    """
    rows = []
    for label, text_D in zip(classes, text_CD, strict=True):
        # float64: the variance is the small difference of greater numbers.
        own_MD = frames_NTD[(labels_N == label).to(frames_NTD.device)].flatten(0, 1).double()
        rows.append(text_D * own_MD.mean(dim=0) / (own_MD.var(dim=0, correction=0) + eps))
    return torch.stack(rows).to(frames_NTD.dtype)


def weights(importance_CD: Tensor, distillation: str = "fssd") -> Tensor:
    """w [D] of the old classes, at least 0. `uniform` gives each channel the mean of w."""
    if distillation not in DISTILLATIONS:
        raise ValueError(f"no {distillation=}; choose from {', '.join(DISTILLATIONS)}")
    w_D = importance_CD.clamp(min=0).mean(dim=0)
    if distillation == "none":
        return torch.zeros_like(w_D)
    return w_D if distillation == "fssd" else w_D.mean().expand_as(w_D)


def fssd(old_BD: Tensor, new_BD: Tensor, w_D: Tensor) -> Tensor:
    """L_FSSD, a scalar, of spatial means of unit frames by the old and by the new model."""
    return (w_D * (old_BD - new_BD).square()).mean()

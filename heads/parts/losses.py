"""Losses of classification and distillation, as functions of tensors.

StPR's contrast with the text of classes (Eq. 6), with S_ij = cos(v_i, t_j), t_j the text of clip
j's class, M_ij = [y_i = y_j]:

    L_v2t  = - mean_i  sum_j M_ij log softmax_j(S_ij / tau) / (sum_j M_ij + eps)
    L_cont = (L_v2t(S) + L_v2t(S')) / 2

StPR's frame-shared semantics distillation (FSSD, Eq. 5), with mu_cj and var_cj over all frames of
class c in channel j, text channel T_cj:

    I_cj   = T_cj mu_cj / (var_cj + eps)
    w_j    = mean over the old classes of max(I_cj, 0)
    L_FSSD = mean over clips and channels of w_j (teacher_bj - new_bj)^2

Ours: the clamp, since two channels in five have a negative importance and would reward drift; the
mean over classes; and variances over n rather than n - 1.

Shapes: N clips, B clips a batch, T frames, D feature width, W width of a clip's vector, C classes
or columns, K columns of the teacher, L tokens, c channels, H x V a grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    kl_div,
    log_softmax,
    normalize,
)

DISTILLATIONS = ("fssd", "uniform", "none")
MOST_PREFIX = 16  # class and register tokens before the patches


@dataclass(frozen=True)
class DistillationConfig:
    """Options of FSSD.

    Attributes:
        distillation: Weights of the channels: `fssd`, `uniform`, or `none` for no distillation.
        weight: lambda, the weight of the loss.
        eps: Added to the variances in the importance of a channel.

    Raises:
        ValueError: There is no such distillation, or `eps` is not above 0.
    """

    distillation: str = "fssd"
    weight: float = 1e4
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.distillation not in DISTILLATIONS or not self.eps > 0:
            raise ValueError(
                f"no distillation={self.distillation!r}, eps={self.eps}; choose from "
                f"{', '.join(DISTILLATIONS)}, and give a number above 0"
            )


def contrastive(
    clips_BD: Tensor, text_BD: Tensor, labels_B: Tensor, tau: float = 0.01, eps: float = 1e-8
) -> Tensor:
    """Return L_cont, a scalar. Vectors are normalised here.

    Args:
        clips_BD: Vectors of the clips.
        text_BD: Text feature of each clip's class.
        labels_B: int64, on any device.
        tau: Temperature; CLIP's trained scale of 100 is 0.01.
        eps: Added to the number of clips of a class.
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
    """Return I of each class, [C, D]; it is negative where text and frames differ in sign.

    Args:
        frames_NTD: V^s, L2-normalised.
        labels_N: int64, the classes of the clips.
        classes: Classes, each with at least one clip.
        text_CD: Text features of the classes, L2-normalised.
        eps: Added to the variances.
    """
    rows = []
    for label, text_D in zip(classes, text_CD, strict=True):
        # float64: the variance is the small difference of greater numbers.
        frames_MD = frames_NTD[(labels_N == label).to(frames_NTD.device)].flatten(0, 1).double()
        rows.append(text_D * frames_MD.mean(dim=0) / (frames_MD.var(dim=0, correction=0) + eps))
    return torch.stack(rows).to(frames_NTD.dtype)


def weights(importance_CD: Tensor, distillation: str = "fssd") -> Tensor:
    """Return w [D] of the old classes, at least 0; `uniform` gives each channel the mean of w."""
    if distillation not in DISTILLATIONS:
        raise ValueError(f"no {distillation=}; choose from {', '.join(DISTILLATIONS)}")
    w_D = importance_CD.clamp(min=0).mean(dim=0)
    if distillation == "none":
        return torch.zeros_like(w_D)
    return w_D if distillation == "fssd" else w_D.mean().expand_as(w_D)


def fssd(teacher_BD: Tensor, new_BD: Tensor, w_D: Tensor) -> Tensor:
    """Return L_FSSD, a scalar, of the mean unit frames by the teacher and by the trained model."""
    return (w_D * (teacher_BD - new_BD).square()).mean()


def sigmoid_distillation(
    logits_BC: Tensor,
    columns_B: Tensor,
    teacher_BK: Tensor,
    labelled_C: Tensor,
    weight: float = 1.0,
) -> Tensor:
    """Return iCaRL's loss, the mean over clips (Rebuffi et al., CVPR 2017, Alg. 3).

        - sum_(c labelled) [y = c] log g_c + [y != c] log(1 - g_c)
        - sum_(other c) q_c log g_c + (1 - q_c) log(1 - g_c),   g = sigmoid(logits)

    Args:
        logits_BC: Logits of the model.
        columns_B: int64, y.
        teacher_BK: Logits of the teacher, for the first K columns; q is their sigmoid.
        labelled_C: Bool, the columns of the task's classes. The others are among the first K.
        weight: Weight of the second sum; 1 in the paper.
    """
    targets_BC = torch.zeros_like(logits_BC).scatter(1, columns_B[:, None], 1.0)
    teacher_BC = torch.zeros_like(logits_BC)
    teacher_BC[:, : teacher_BK.shape[1]] = teacher_BK.sigmoid()
    targets_BC = torch.where(labelled_C, targets_BC, teacher_BC)
    losses_BC = binary_cross_entropy_with_logits(logits_BC, targets_BC, reduction="none")
    labelled_B = (losses_BC * labelled_C).sum(dim=1)
    return (labelled_B + weight * (losses_BC * ~labelled_C).sum(dim=1)).mean()


def less_forget(x_BW: Tensor, teacher_BW: Tensor) -> Tensor:
    """Return the mean of 1 - cos(x, teacher's x): LUCIR's L_dis^G, PODNet's POD-flat."""
    return 1 - (normalize(x_BW, dim=1) * normalize(teacher_BW, dim=1)).sum(dim=1).mean()


def positions(x: Tensor) -> Tensor:
    """Return maps [N, c, H, V], tokens [N, L, c] or vectors [N, c] as [N, S, c]."""
    if x.ndim == 4:
        return x.flatten(2).mT
    return x[:, None] if x.ndim == 2 else x


def softened(logits_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """Return the mean of T^2 KL(softmax(teacher / T) || softmax(x / T)) (Hinton et al., 2015)."""
    teacher_BK, logits_BK = (x.div(temperature).log_softmax(dim=1) for x in (teacher_BK, logits_BK))
    return temperature**2 * kl_div(logits_BK, teacher_BK, reduction="batchmean", log_target=True)


def relations(x_nW: Tensor, teacher_nW: Tensor) -> Tensor:
    """Return |C(x) - C(teacher)|^2 / n^2, with C(x) the matrix of cosines of n vectors.

    It is a mean over leading dimensions.
    """
    new, teacher = (y @ y.mT for y in (normalize(x, dim=-1) for x in (x_nW, teacher_nW)))
    return (new - teacher).square().mean()


def margin_ranking(
    cosines_BC: Tensor, columns_B: Tensor, task_C: Tensor, top: int = 2, margin: float = 0.5
) -> Tensor:
    """Return LUCIR's L_mr (Hou et al., CVPR 2019): old classes win over new ones by a margin.

        mean over clips of old classes of  sum_(k in top new) max(margin - cos_y + cos_k, 0)

    It is 0 where the batch has no such clip. The published code has the mean over k in the place of
    the sum.

    Args:
        cosines_BC: Cosines of the clips to all classes.
        columns_B: int64, y.
        task_C: Bool, the columns of the task's classes.
        top: Number of new classes k, those of the greatest cosines.
        margin: m.
    """
    old_B = ~task_C[columns_B]
    label_B1 = cosines_BC[old_B].gather(1, columns_B[old_B, None])
    new_BF = cosines_BC[old_B][:, task_C]
    hardest_BK = new_BF.topk(min(top, new_BF.shape[1]), dim=1).values
    losses_BK = (margin - label_B1 + hardest_BK).clamp(min=0)
    return losses_BK.sum() / max(len(losses_BK), 1)


def nca(cosines_BC: Tensor, columns_B: Tensor, scale: Tensor, margin: float = 0.6) -> Tensor:
    """Return PODNet's classification loss, the mean over clips (Douillard et al., ECCV 2020).

    [ -log exp(eta (y_label - margin)) / sum_(others) exp(eta y_other) ]_+
    """
    others_BC = (scale * cosines_BC).scatter(1, columns_B[:, None], -math.inf)
    label_B = scale * (cosines_BC.gather(1, columns_B[:, None])[:, 0] - margin)
    return (others_BC.logsumexp(dim=1) - label_B).clamp(min=0).mean()


def nca_as_coded(scores_BC: Tensor, columns_B: Tensor) -> Tensor:
    """Return the NCA loss of TCD's and PODNet's public code without a hinge, the mean over clips.

        log( exp(max_c s_c) + sum_(others) exp(s_c) ) - s_label

    The code means to leave the label out of the sum, and puts the greatest score there instead.
    Where the label has the greatest score this is cross entropy.

    Args:
        scores_BC: s, cosines times eta.
        columns_B: int64, the column of each clip's label.
    """
    greatest_B1 = scores_BC.amax(dim=1, keepdim=True)
    label_B1 = columns_B[:, None]
    summed_BC = scores_BC.scatter(1, label_B1, greatest_B1)
    return (summed_BC.logsumexp(dim=1) - scores_BC.gather(1, label_B1)[:, 0]).mean()


def pooled(outputs: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return PODNet's POD-spatial, the mean over frames and stages.

        || p(h) - p(teacher's h) ||_2,   p(h) = unit [ sum_v h^2 ; sum_u h^2 ]   of h_(c u v)

    The squares, the unit length and the root are the published code's; the paper has none of them.
    Ours, on tokens [B, T, L, c]: the largest square of the last tokens is the grid; class and
    register tokens before it are not pooled, and stand squared in the same vector.

    Args:
        outputs: Outputs of some stages: maps [B, T, c, H, V] or tokens [B, T, L, c].
        teacher: Outputs of the teacher, for the same stages.
    """
    pairs = zip(outputs, teacher, strict=True)
    return torch.stack([(pool(h) - pool(g)).norm(dim=1).mean() for h, g in pairs]).mean()


def square_grid(tokens: int) -> tuple[int, int]:
    """Return the side of the square grid of patch tokens, and the number of tokens before it.

    >>> square_grid(197)
    (14, 1)

    Raises:
        ValueError: The patches form no square grid, as those of a clip.
    """
    side = math.isqrt(tokens)
    prefix = tokens - side**2
    if prefix > MOST_PREFIX:
        raise ValueError(
            f"{tokens} tokens, whose patches form no square grid of a frame: choose a head that "
            "trains no blocks, such as linear or icarl, or a network of frames or maps"
        )
    return side, prefix


def pool(h: Tensor) -> Tensor:
    """Return p of POD-spatial for each frame, [B * T, ...]."""
    squares = h.flatten(0, 1) ** 2
    first = squares[:, :0, :0]
    if squares.ndim == 3:
        side, prefix = square_grid(squares.shape[1])
        first, grid = squares[:, :prefix], squares[:, prefix:]
        squares = grid.reshape(len(grid), side, side, -1).permute(0, 3, 1, 2)
    sums = [squares.sum(dim=3), squares.sum(dim=2), first]
    return normalize(torch.cat([part.flatten(1) for part in sums], dim=1), dim=1)

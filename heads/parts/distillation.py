"""Distillation: losses that hold a new model to an old one, and the classes to each other.

Shapes: B clips, C columns, K old ones, W width of a clip's vector, T frames, L tokens, c channels,
H x V a grid.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, normalize


def sigmoid_distillation(
    logits_BC: Tensor, columns_B: Tensor, old_BK: Tensor, taught_C: Tensor, weight: float = 1.0
) -> Tensor:
    """iCaRL's loss (Rebuffi et al., CVPR 2017, Alg. 3), a mean over clips of sums over columns.

        - sum_(c taught) [y = c] log g_c + [y != c] log(1 - g_c)
        - sum_(c not taught) q_c log g_c + (1 - q_c) log(1 - g_c),   g = sigmoid(logits)

    Args:
        columns_B: Int64, y.
        old_BK: Logits of the old model, of the first K columns; q is their sigmoid.
        taught_C: Bool, the columns of the task's classes. The others are among the first K.
        weight: Of the second sum; 1 in the paper.
    """
    targets_BC = torch.zeros_like(logits_BC).scatter(1, columns_B[:, None], 1.0)
    old_BC = torch.zeros_like(logits_BC)
    old_BC[:, : old_BK.shape[1]] = old_BK.sigmoid()
    targets_BC = torch.where(taught_C, targets_BC, old_BC)
    losses_BC = binary_cross_entropy_with_logits(logits_BC, targets_BC, reduction="none")
    from_labels_B = (losses_BC * taught_C).sum(dim=1)
    return (from_labels_B + weight * (losses_BC * ~taught_C).sum(dim=1)).mean()


def less_forget(x_BW: Tensor, old_BW: Tensor) -> Tensor:
    """1 - cos(x, old x), mean over clips: LUCIR's L_dis^G, PODNet's POD-flat."""
    return 1 - (normalize(x_BW, dim=1) * normalize(old_BW, dim=1)).sum(dim=1).mean()


def softened(logits_BK: Tensor, old_BK: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(old / T) || softmax(new / T)), mean over clips (Hinton et al., 2015)."""
    old_BK, logits_BK = (x.div(temperature).log_softmax(dim=1) for x in (old_BK, logits_BK))
    return temperature**2 * kl_div(logits_BK, old_BK, reduction="batchmean", log_target=True)


def relations(x_nW: Tensor, old_nW: Tensor) -> Tensor:
    """|C(x) - C(old)|^2 / n^2, C(x) the matrix of cosines of n vectors; mean over what leads."""
    new, old = (y @ y.mT for y in (normalize(x, dim=-1) for x in (x_nW, old_nW)))
    return (new - old).square().mean()


def margin_ranking(
    cosines_BC: Tensor, columns_B: Tensor, fresh_C: Tensor, top: int = 2, margin: float = 0.5
) -> Tensor:
    """LUCIR's L_mr (Hou et al., CVPR 2019): an old clip's class above the fresh ones by a margin.

        mean over clips of old classes of  sum_(k in top fresh) max(margin - cos_y + cos_k, 0)

    0 where the batch has no such clip. The published code has the mean over k in the sum's place.

    Args:
        fresh_C: Bool, the columns that this task brings.
    """
    old_B = ~fresh_C[columns_B]
    own_B1 = cosines_BC[old_B].gather(1, columns_B[old_B, None])
    fresh_BF = cosines_BC[old_B][:, fresh_C]
    hardest_BK = fresh_BF.topk(min(top, fresh_BF.shape[1]), dim=1).values
    losses_BK = (margin - own_B1 + hardest_BK).clamp(min=0)
    return losses_BK.sum() / max(len(losses_BK), 1)


def nca(cosines_BC: Tensor, columns_B: Tensor, scale: Tensor, margin: float = 0.6) -> Tensor:
    """PODNet's loss of its classifier (Douillard et al., ECCV 2020), mean over clips.

    [ -log exp(eta (y_own - margin)) / sum_(others) exp(eta y_other) ]_+
    """
    others_BC = (scale * cosines_BC).scatter(1, columns_B[:, None], -math.inf)
    own_B = scale * (cosines_BC.gather(1, columns_B[:, None])[:, 0] - margin)
    return (others_BC.logsumexp(dim=1) - own_B).clamp(min=0).mean()


def pooled(outputs: Sequence[Tensor], old: Sequence[Tensor]) -> Tensor:
    """PODNet's POD-spatial, frame by frame, mean over frames and stages.

        || p(h) - p(old h) ||_2,   p(h) = unit [ sum_v h^2 ; sum_u h^2 ]   of h_(c u v)

    The squares, the unit length and the root are the published code's; the paper has neither.
    Ours, on tokens [B, T, L, c]: the largest square of the last tokens is the grid; class and
    register tokens before it are held as they are, squared, in the same vector.

    Args:
        outputs: Of some stages: maps [B, T, c, H, V] or tokens [B, T, L, c].
    """
    losses = [(pool(h) - pool(g)).norm(dim=1).mean() for h, g in zip(outputs, old, strict=True)]
    return torch.stack(losses).mean()


def pool(h: Tensor) -> Tensor:
    """p of the frames, [B * T, ...]."""
    squares = h.flatten(0, 1) ** 2
    first = squares[:, :0, :0]
    if squares.ndim == 3:
        side = math.isqrt(squares.shape[1])
        prefix = squares.shape[1] - side**2
        first, grid = squares[:, :prefix], squares[:, prefix:]
        squares = grid.reshape(len(grid), side, side, -1).permute(0, 3, 1, 2)
    sums = [squares.sum(dim=3), squares.sum(dim=2), first]
    return normalize(torch.cat([part.flatten(1) for part in sums], dim=1), dim=1)

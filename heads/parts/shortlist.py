"""Shortlist: only a few of many experts run on a clip, and the residuals of the others are assumed.

TD-MoE runs all K experts on every clip, and its sum V = Vbar^s + sum_k r_k V^st_k includes all of
them: an expert was trained on the clips of its own task alone, yet has r_k = 0.6 to 0.9 for any
other clip. So leaving one out changes the result. Ours, where StPR has no such stage:

1. Every learned class has a mean clip, the mean of its clips' frame vectors, frame by frame. At the
   end of a task every expert runs on it once, and its temporal residual V^tem_k is kept.
2. The frames of a clip, concatenated, are a descriptor that needs no expert. It finds the nearest
   mean clip, by cosine. An expert that does not run is assumed to have the temporal residual that
   it had there: V^st_k = Vbar^s + V^tem_k of the mean clip.
3. The S experts whose assumed residuals are nearest to their anchors run. Their mean error is added
   to the assumed residuals of the others, shrunk by how much the S errors differ (the James-Stein
   estimate of a mean).

Under the published sum the two best classes are often nearer to each other than 92 of 100 assumed
terms are accurate. Where they are near, StPR therefore runs all experts (its option `doubt`). With
100 experts and S = 8, on features where the router prefers a clip's own expert for 89 % of the
clips, 98.6 % of the predictions equal those of the full routing without that option, and all of
them with it, at 20 experts a clip; see benchmarks/bench_routing.py, for harder features too.

Shapes: N, B clips, T frames, D width, C classes learned, K experts, S experts that run.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from varve.heads.parts.anchor_pool import AnchorPool

# From an expert's number and clips [n, T, D] to its unit vectors V^st, [n, D].
Encode = Callable[[int, Tensor], Tensor]


class Shortlist:
    """Temporal residuals of every expert on the mean clip of every class.

    With adapters, mean clips stay as the network of their own task computed them, as anchors do.

    Attributes:
        residuals_CKD: V^tem of expert k on the mean clip of class c, float32.
    """

    def __init__(self) -> None:
        self.residuals_CKD = torch.zeros(0, 0, 0)
        self._clips: list[Tensor] = []  # mean clips [C, T, D] of the classes of each task
        self._descriptors: AnchorPool | None = None  # the same, flat; class c has number c

    def __len__(self) -> int:
        """Return the number of experts."""
        return len(self._clips)

    def add(
        self, spatial_NTD: Tensor, labels_N: Tensor, classes: Sequence[int], encode: Encode
    ) -> None:
        """Add a task's classes and its expert, whose number is the next one.

        Args:
            encode: Runs an expert; it knows the new expert too.

        Raises:
            ValueError: The clips have another shape than those before, or are not finite. The
                shortlist is unchanged.
        """
        means = [spatial_NTD[(labels_N == c).to(spatial_NTD.device)].mean(dim=0) for c in classes]
        clips_CTD = torch.stack(means)
        if self._clips and self._clips[0].shape[1:] != clips_CTD.shape[1:]:
            raise ValueError(
                f"clips of {list(clips_CTD.shape[1:])}, where mean clips are "
                f"{list(self._clips[0].shape[1:])}: use the same feature and number of frames"
            )
        if not clips_CTD.isfinite().all():
            raise ValueError(
                "mean clips are not finite: leave out the clips that the store has not marked as "
                "done"
            )
        new = len(self)
        rows_CKD = torch.stack([_residuals(encode, k, clips_CTD) for k in range(new + 1)], dim=1)
        column_CD = torch.zeros(0, clips_CTD.shape[2])
        if self._clips:
            column_CD = _residuals(encode, new, torch.cat(self._clips).to(clips_CTD))
        self._append(clips_CTD.cpu(), rows_CKD.cpu(), column_CD.cpu())

    def encoded(
        self,
        spatial_BTD: Tensor,
        size: int,
        encode: Encode,
        similar: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return V^st of every expert, of which few run.

        Args:
            size: Number S of experts that run.
            similar: The router: from V^st of all experts, [B, K, D], to the cosine to each one's
                nearest anchor, [B, K].

        Returns:
            V^st, [B, K, D], and the experts that ran, int64 [B, S].

        Raises:
            ValueError: The clips are not of the mean clips' shape, or not finite; or there is no
                expert to run.
        """
        if self._descriptors is None or size < 1:
            raise ValueError(f"{size} of {len(self)} experts are to run: let one run at least")
        index_B = self._descriptors.nearest(spatial_BTD.flatten(1), 1).classes[:, 0].cpu()
        assumed_BKD = self.residuals_CKD[index_B].to(spatial_BTD)
        assumed_BKD = assumed_BKD + spatial_BTD.mean(dim=1, keepdim=True)
        # Stable, so that of equal experts the earlier one runs.
        order_BK = similar(assumed_BKD).argsort(dim=1, descending=True, stable=True)
        experts_BS = order_BK[:, :size]
        ran_BSD = run(encode, spatial_BTD, experts_BS)
        index_BSD = experts_BS[..., None].expand_as(ran_BSD)
        assumed_BKD += common_error(ran_BSD - assumed_BKD.gather(1, index_BSD))
        return assumed_BKD.scatter_(1, index_BSD, ran_BSD), experts_BS

    def state_dict(self) -> dict[str, Tensor]:
        """Return mean clips of each task, and the rows and column it added to `residuals_CKD`."""
        state, first = {}, 0
        for t, clips_CTD in enumerate(self._clips):
            end = first + len(clips_CTD)
            state[f"clips.{t}"] = clips_CTD.clone()
            state[f"rows.{t}"] = self.residuals_CKD[first:end, : t + 1].clone()
            state[f"column.{t}"] = self.residuals_CKD[:first, t].clone()
            first = end
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the content by that of the shortlist whose `state_dict` this is."""
        vars(self).update(vars(Shortlist()))
        while f"clips.{len(self)}" in state:
            parts = [state[f"{name}.{len(self)}"].clone() for name in ("clips", "rows", "column")]
            self._append(*parts)

    def _append(self, clips_CTD: Tensor, rows_CKD: Tensor, column_CD: Tensor) -> None:
        """Add a task: residuals of all experts on its classes, and of its expert on old ones."""
        if self._descriptors is None:
            self._descriptors = AnchorPool(clips_CTD[0].numel())
        first = len(self.residuals_CKD)
        numbers = range(first, first + len(clips_CTD))
        self._descriptors.add(len(self), numbers, clips_CTD.flatten(1))
        if first:
            old_CKD = torch.cat([self.residuals_CKD, column_CD[:, None]], dim=1)
            rows_CKD = torch.cat([old_CKD, rows_CKD])
        self.residuals_CKD = rows_CKD
        self._clips = [*self._clips, clips_CTD]


def run(encode: Encode, spatial_BTD: Tensor, experts_BS: Tensor) -> Tensor:
    """Return V^st of each clip by its own experts, [B, S, D]. An expert sees its clips alone."""
    encoded_BSD = spatial_BTD.new_empty((*experts_BS.shape, spatial_BTD.shape[2]))
    for k in torch.unique(experts_BS).tolist():  # type: ignore[no-untyped-call]
        rows, columns = (experts_BS == k).nonzero(as_tuple=True)
        encoded_BSD[rows, columns] = encode(k, spatial_BTD[rows])
    return encoded_BSD


def common_error(errors_BSD: Tensor) -> Tensor:
    """Return what S errors have in common, [B, 1, D]: their mean, shrunk by how far they scatter.

    mean * max(0, 1 - scatter / |mean|^2), where scatter is the estimated squared error of the mean
    itself (James-Stein, positive part). 0 for a single error.
    """
    size = errors_BSD.shape[1]
    mean_B1D = errors_BSD.mean(dim=1, keepdim=True)
    if size < 2:
        return torch.zeros_like(mean_B1D)
    scatter_B = (errors_BSD - mean_B1D).square().sum(dim=(1, 2)) / (size * (size - 1))
    square_B = mean_B1D.square().sum(dim=(1, 2))
    kept_B = torch.where(square_B > scatter_B, 1 - scatter_B / square_B, 0)
    return kept_B[:, None, None] * mean_B1D


def weights(similarities_BK: Tensor, softmax: float | None = None, keep: int = 0) -> Tensor:
    """Return r_k, the weights of the experts in the sum, [B, K].

    Args:
        similarities_BK: Cosine to each expert's nearest anchor: r_k itself, as published.
        softmax: Temperature of a softmax over the experts that are kept. None for no softmax.
        keep: Number of experts in the sum, those of the greatest similarities (of equal ones the
            first); the weights of the others are 0. 0 for all, as published.

    Raises:
        ValueError: `keep` is negative, or `softmax` is not above 0.
    """
    if keep < 0 or (softmax is not None and not softmax > 0):
        raise ValueError(f"{keep=}, {softmax=}: give a number of experts and a temperature above 0")
    kept_BK = torch.ones_like(similarities_BK, dtype=torch.bool)
    if keep:
        order_BK = similarities_BK.argsort(dim=1, descending=True, stable=True)
        kept_BK = kept_BK.scatter(1, order_BK[:, keep:], False)
    if softmax is None:
        return similarities_BK * kept_BK
    return torch.softmax((similarities_BK / softmax).masked_fill(~kept_BK, -torch.inf), dim=1)


def _residuals(encode: Encode, k: int, clips_CTD: Tensor) -> Tensor:
    return encode(k, clips_CTD) - clips_CTD.mean(dim=1)

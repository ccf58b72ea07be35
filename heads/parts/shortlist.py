"""The shortlist: few of many experts run on a clip, and what the others would say is assumed.

TD-MoE runs all K experts on every clip, and its sum V = Vbar^s + sum_k r_k V^st_k has them all: an
expert has seen nothing but its own task's clips, yet gives r_k = 0.6 to 0.9 to any other. So none
can be left out unnoticed. Ours, where StPR has no such stage:

1. Every learned class has a mean clip, the mean of its clips' frame vectors, frame by frame, and
   every expert is run on it once, at the end of a task. Its temporal residual V^tem_k is kept.
2. A clip's frames, one after the other, are a descriptor that needs no expert. By it the nearest
   mean clip is found (FAISS, `neighbours.py`), and an expert that does not run is assumed to have
   the temporal residual that it had there: V^st_k = Vbar^s + V^tem_k of the mean clip.
3. The S experts whose assumed residuals are nearest to their anchors run. By how much they differ
   from what was assumed, on average, is added to what is assumed of the others, as far as they
   agree about it (James and Stein's estimate of a mean).

Under the published sum the two best classes are often nearer to each other than 92 of 100 assumed
terms are right. So where they are near, StPR lets all experts run after all (its option `doubt`).
With 100 experts and S = 8, on features where the router prefers a clip's own expert for 89 % of the
clips, 98.6 % of the predictions are then those of the full routing without that, and all of them
with it, at 20 experts a clip; see benchmarks/bench_routing.py, for harder features too.

Shapes: N, B clips, T frames, D width, C classes learned, K experts, S experts that run.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from varve.heads.parts.neighbours import Neighbours, queries

# From an expert's number and clips [n, T, D] to its unit vectors V^st, [n, D].
Encode = Callable[[int, Tensor], Tensor]


class Shortlist:
    """What each expert said of the mean clip of each class.

    With adapters, mean clips stay what the network made of them in their own task, as anchors do.

    Attributes:
        residuals_CKD: V^tem of expert k on the mean clip of class c, float32.
    """

    def __init__(self) -> None:
        self.residuals_CKD = torch.zeros(0, 0, 0)
        self._clips: list[Tensor] = []  # of each task, its classes' mean clips
        self._near: Neighbours | None = None

    def __len__(self) -> int:
        """How many experts there are."""
        return len(self._clips)

    def add(
        self, spatial_NTD: Tensor, labels_N: Tensor, classes: Sequence[int], encode: Encode
    ) -> None:
        """Take up a task's classes and its expert, whose number is the next one.

        Args:
            encode: Knows the new expert too.

        Raises:
            ValueError: The clips have another shape than those before, or are not finite. Nothing
                is taken up.
        """
        means = [spatial_NTD[(labels_N == c).to(spatial_NTD.device)].mean(dim=0) for c in classes]
        clips_CTD = torch.stack(means)
        if self._clips and self._clips[0].shape[1:] != clips_CTD.shape[1:]:
            raise ValueError(
                f"clips of {list(clips_CTD.shape[1:])}, where mean clips are "
                f"{list(self._clips[0].shape[1:])}: use the same feature and number of frames"
            )
        described_CW = descriptor(clips_CTD)
        described, _ = queries(described_CW, described_CW.shape[1], "mean clips")
        new = len(self)
        told = [torch.stack([_residuals(encode, k, clips_CTD) for k in range(new + 1)], dim=1)]
        if self._clips:
            old_CTD = torch.cat(self._clips).to(clips_CTD)
            column_C1D = _residuals(encode, new, old_CTD)[:, None].cpu()
            told = [torch.cat([self.residuals_CKD, column_C1D], dim=1), *told]
        self.residuals_CKD = torch.cat([rows.cpu() for rows in told])
        self._clips = [*self._clips, clips_CTD.cpu()]
        if self._near is None:
            self._near = Neighbours(described.shape[1])
        self._near.add(described)

    def encoded(
        self,
        spatial_BTD: Tensor,
        size: int,
        encode: Encode,
        similar: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """V^st of every expert, of which few run.

        Args:
            size: S, how many.
            similar: The router: from V^st of all experts, [B, K, D], to the cosine to each one's
                nearest anchor, [B, K].

        Returns:
            V^st, [B, K, D], and the experts that ran, int64 [B, S].

        Raises:
            ValueError: The clips are not of the mean clips' shape, or not finite; there is none.
        """
        if self._near is None or size < 1:
            raise ValueError(f"{size} of {len(self)} experts are to run: let one run at least")
        asked_BW, norms_B = queries(
            descriptor(spatial_BTD), self._near.vectors_ND.shape[1], "clips"
        )
        _, places_B1 = self._near.search(asked_BW, norms_B, 1)
        told_BKD = self.residuals_CKD[torch.from_numpy(places_B1[:, 0])].to(spatial_BTD)
        assumed_BKD = told_BKD + spatial_BTD.mean(dim=1, keepdim=True)
        # Stable, so that of equal ones the earlier runs.
        order_BK = similar(assumed_BKD).argsort(dim=1, descending=True, stable=True)
        experts_BS = order_BK[:, :size]
        ran_BSD = run(encode, spatial_BTD, experts_BS)
        where_BSD = experts_BS[..., None].expand_as(ran_BSD)
        assumed_BKD += shared(ran_BSD - assumed_BKD.gather(1, where_BSD))
        return assumed_BKD.scatter_(1, where_BSD, ran_BSD), experts_BS

    def state_dict(self) -> dict[str, Tensor]:
        """Of each task its mean clips, and what was added to `residuals_CKD`: rows and a column."""
        state, first = {}, 0
        for t, clips_CTD in enumerate(self._clips):
            end = first + len(clips_CTD)
            state[f"clips.{t}"] = clips_CTD.clone()
            state[f"rows.{t}"] = self.residuals_CKD[first:end, : t + 1].clone()
            state[f"column.{t}"] = self.residuals_CKD[:first, t].clone()
            first = end
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of the shortlist whose `state_dict` this was."""
        vars(self).update(vars(Shortlist()))
        while f"clips.{len(self)}" in state:
            t = len(self)
            column_C1D = state[f"column.{t}"][:, None]
            rows_CKD = state[f"rows.{t}"].clone()
            if t:
                rows_CKD = torch.cat([torch.cat([self.residuals_CKD, column_C1D], dim=1), rows_CKD])
            self.residuals_CKD = rows_CKD
            self._clips.append(state[f"clips.{t}"].clone())
            described_CW = descriptor(self._clips[-1])
            if self._near is None:
                self._near = Neighbours(described_CW.shape[1])
            self._near.add(described_CW.numpy())


def descriptor(spatial_BTD: Tensor) -> Tensor:
    """The frames one after the other, [B, T * D]: what is seen, and in which order."""
    return normalize(spatial_BTD.flatten(1), dim=1)


def run(encode: Encode, spatial_BTD: Tensor, experts_BS: Tensor) -> Tensor:
    """What its own experts make of each clip, [B, S, D]. An expert runs where it is asked alone."""
    encoded_BSD = spatial_BTD.new_empty((*experts_BS.shape, spatial_BTD.shape[2]))
    for k in torch.unique(experts_BS).tolist():  # type: ignore[no-untyped-call]
        rows, columns = (experts_BS == k).nonzero(as_tuple=True)
        encoded_BSD[rows, columns] = encode(k, spatial_BTD[rows])
    return encoded_BSD


def shared(errors_BSD: Tensor) -> Tensor:
    """What S errors have in common, [B, 1, D]: their mean, shrunk by how far they scatter.

    mean * max(0, 1 - scatter / |mean|^2), the scatter being the estimated squared error of the mean
    itself (James and Stein, positive part). 0 for a single one.
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
    """r_k, as they enter the sum over experts.

    Args:
        similarities_BK: The cosine to each expert's nearest anchor: r_k itself, as published.
        softmax: Temperature, over the experts that are kept. None for no softmax.
        keep: How many experts enter, those of the greatest similarities (of equal ones the first);
            the weights of others are 0. 0 for all, as published.

    Raises:
        ValueError: `keep` or `softmax` is none.
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

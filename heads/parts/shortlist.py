"""The shortlist: which experts are worth running for a clip, told before any of them runs.

TD-MoE runs all K experts on a clip to learn which few of them matter. In two stages instead: a
descriptor that needs no expert, the clip's own frame vectors one after the other, is compared with
its mean over each learned class, and only the S experts of the nearest classes run.

Ours: StPR has no such stage, and its sum over all experts, V = Vbar^s + sum_k r_k V^st_k, is not
made for it. An expert has seen nothing but its own task's clips and still gives r_k = 0.6 to 0.9 to
all others, so that with a hundred of them the sum is mostly what the 99 foreign ones say: leaving
any out gives another sum, and mostly another class. What agrees with the full routing is a sum in
which only those weigh that would be on the shortlist anyway: `weights` with `keep`, or with a
softmax of low temperature. benchmarks/bench_routing.py has the figures.

Shapes: N, B clips, T frames, D width, K experts in all, S experts on the shortlist.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from heads.parts.anchor_pool import AnchorPool

FORMS = ("order", "motion")


def descriptor(spatial_BTD: Tensor, form: str = "order") -> Tensor:
    """One unit vector a clip, by its frames alone, [B, T * D].

    Args:
        form: `order` has the frames one after the other: what is seen and how it moves. `motion`
            takes the clip's mean out of each first, and leaves how it moves.
    """
    if form not in FORMS:
        raise ValueError(f"no {form=}; choose from {', '.join(FORMS)}")
    if form == "motion":
        spatial_BTD = spatial_BTD - spatial_BTD.mean(dim=1, keepdim=True)
    return normalize(spatial_BTD.flatten(1), dim=1)


class Shortlist:
    """The mean descriptors of every expert's classes, in an anchor pool of their own.

    Args:
        form: Of `descriptor`.
    """

    def __init__(self, form: str = "order") -> None:
        if form not in FORMS:
            raise ValueError(f"no {form=}; choose from {', '.join(FORMS)}")
        self.form = form
        self._pool: AnchorPool | None = None

    def __len__(self) -> int:
        """How many experts are known."""
        return len(self._pool) if self._pool else 0

    def add(self, spatial_NTD: Tensor, labels_N: Tensor, classes: Sequence[int]) -> None:
        """Learn what the next expert's clips look like.

        Raises:
            ValueError: The clips have another shape than those before, or are not finite.
        """
        described_NW = descriptor(spatial_NTD, self.form).double()
        means = [described_NW[(labels_N == c).to(described_NW.device)].mean(dim=0) for c in classes]
        pool = self._pool or AnchorPool(described_NW.shape[1])
        pool.add(len(pool), classes, torch.stack(means).float())
        self._pool = pool

    def ask(self, spatial_BTD: Tensor, size: int) -> Tensor:
        """The experts whose classes' means are nearest, int64 [B, S], the nearest first.

        Args:
            size: S; all experts where there are fewer.

        Raises:
            ValueError: No expert is known, `size` is none, or the clips do not fit the means.
        """
        if self._pool is None or size < 1:
            raise ValueError(f"a shortlist of {size} of {len(self)} experts: ask for one at least")
        size = min(size, len(self))
        # Among so many classes are those of `size` experts, however they are shared out.
        most = sorted(map(len, self._pool.classes), reverse=True)[: size - 1]
        experts_BM = self._pool.nearest(descriptor(spatial_BTD, self.form), 1 + sum(most)).experts
        ranks_BM = torch.arange(experts_BM.shape[1], device=experts_BM.device).expand_as(experts_BM)
        first_BK = ranks_BM.new_full((len(ranks_BM), len(self)), ranks_BM.shape[1])
        first_BK = first_BK.scatter_reduce(1, experts_BM, ranks_BM, "amin")
        return first_BK.argsort(dim=1, stable=True)[:, :size]

    def state_dict(self) -> dict[str, Tensor]:
        """As `AnchorPool.state_dict`."""
        return {} if self._pool is None else self._pool.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of a shortlist of the same form, whose `state_dict` this was."""
        self._pool = None
        if "expert.0.anchors" in state:
            self._pool = AnchorPool(state["expert.0.anchors"].shape[1])
            self._pool.load_state_dict(state)


def run(encode: Callable[[int, Tensor], Tensor], spatial_BTD: Tensor, asked_BS: Tensor) -> Tensor:
    """What each clip's own experts make of it, [B, S, D]. An expert runs on the clips that ask it.

    Args:
        encode: From an expert's number and some clips to [clips, D].
        asked_BS: The experts' numbers.
    """
    encoded_BSD = spatial_BTD.new_empty((*asked_BS.shape, spatial_BTD.shape[2]))
    for k in torch.unique(asked_BS).tolist():
        rows, columns = (asked_BS == k).nonzero(as_tuple=True)
        encoded_BSD[rows, columns] = encode(k, spatial_BTD[rows])
    return encoded_BSD


def weights(similarities_BS: Tensor, softmax: float | None = None, keep: int = 0) -> Tensor:
    """r_k, as they enter the sum over experts.

    Args:
        similarities_BS: The cosine to each expert's nearest anchor: r_k itself, as published.
        softmax: Temperature, over the experts that are kept. None for no softmax.
        keep: How many experts enter, those of the greatest similarities (of equal ones the first);
            the weights of others are 0. 0 for all, as published.
    """
    if keep < 0 or (softmax is not None and not softmax > 0):
        raise ValueError(f"{keep=}, {softmax=}: give a number of experts and a temperature above 0")
    if keep:
        order_BS = similarities_BS.argsort(dim=1, descending=True, stable=True)
        kept_BS = torch.zeros_like(similarities_BS, dtype=torch.bool)
        kept_BS.scatter_(1, order_BS[:, :keep], True)
    else:
        kept_BS = torch.ones_like(similarities_BS, dtype=torch.bool)
    if softmax is None:
        return similarities_BS * kept_BS
    logits_BS = (similarities_BS / softmax).masked_fill(~kept_BS, -torch.inf)
    return torch.softmax(logits_BS, dim=1)

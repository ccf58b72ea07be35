"""The anchor pool: whose anchors is a clip near? StPR's TD-MoE router, on FAISS.

Each task's expert k has an anchor a class, the mean temporal residual of the class's clips, and
expert k's residual of a clip is compared with the anchors of its own classes alone:
r_k = max over c of cos(V^tem_k, anchor_c).

For FAISS that is an inverted file whose lists are the experts: the residuals of all clips and all
experts are one search in which each is told its list. That search is exact, on the CPU. Over the
anchors of all experts together `nearest` searches as `neighbours.py` says, exactly or not.

Ours, where StPR is silent: the tie rule. A similarity is the cosine, as float32; of equal ones the
class that was added first comes first, and of equal experts the earlier. A vector of zeros is at 0
from everything.

Shapes: B queries, K experts in the pool, S experts asked or returned, C anchors of one expert,
D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from varve.heads import Routing
from varve.heads.parts.neighbours import Neighbours, cosines, ordered, queries, slack, threads, unit

ROOM = 64  # experts before the lists are first moved


class Nearest(NamedTuple):
    """The nearest anchors of all experts, by descending similarity.

    Attributes:
        experts: int64 [B, S], whose they are.
        classes: int64 [B, S].
        similarities: float32 [B, S], cosines.
    """

    experts: Tensor
    classes: Tensor
    similarities: Tensor


class AnchorPool:
    """The anchors of all experts, each with the key of the column that it was made from.

    Args:
        width: D.
        lineage: The pool is of one run whose network moved between its tasks: a query may come from
            the newest column, and is compared with older anchors too, as published. Without it all
            anchors asked must be of the query's own column.
        approximate, above, probes, gpu_above: Of `nearest`; see `Neighbours`.

    Attributes:
        classes: Of each expert, in the order of its anchors.
        keys: Of each expert.
    """

    def __init__(
        self,
        width: int,
        lineage: bool = False,
        approximate: str = "",
        above: int = 100_000,
        probes: int = 16,
        gpu_above: int | None = 10_000,
    ) -> None:
        self.width, self.lineage = width, lineage
        self.classes: list[list[int]] = []
        self.keys: list[str] = []
        self._search = (approximate, above, probes, gpu_above)
        self._all = Neighbours(width, *self._search)
        self._starts = np.zeros(1, np.int64)  # where each expert's anchors begin among all
        self._labels = np.zeros(0, np.int64)  # of all anchors
        self._lists = self._made(ROOM)

    def __len__(self) -> int:
        """How many experts there are."""
        return len(self.classes)

    def anchors(self, expert: int) -> Tensor:
        """Of one expert, as they were added: float32 [C, D]."""
        first, end = self._starts[expert : expert + 2].tolist()
        return torch.from_numpy(self._all.vectors_ND[first:end].copy())

    def add(self, expert: int, classes: Sequence[int], anchors_CD: Tensor, key: str = "") -> None:
        """Add the anchors of the next expert; the others stay where they are.

        Args:
            expert: Its number, the number of those there are.
            classes: C of them, each once.
            anchors_CD: Of any length; only their direction counts.
            key: Of the column that they were made from.

        Raises:
            ValueError: Another expert is next, classes and anchors do not fit each other or the
                pool, or a number is not finite. The pool stays as it was.
        """
        if expert != len(self):
            raise ValueError(
                f"anchors of expert {expert} for a pool of {len(self)}: experts are added once, in "
                f"the order of their tasks, and {len(self)} is next"
            )
        if not len(classes) or len(set(classes)) < len(classes):
            raise ValueError(
                f"classes {list(classes)} of expert {expert}: give each class once, and at least "
                "one"
            )
        if anchors_CD.ndim != 2 or len(anchors_CD) != len(classes):
            raise ValueError(
                f"anchors are {list(anchors_CD.shape)} for {len(classes)} classes of expert "
                f"{expert}: give one of width {self.width} to each"
            )
        queries(anchors_CD, self.width, f"anchors of expert {expert}")
        rows_CD = anchors_CD.detach().to("cpu", torch.float32).contiguous().numpy()
        if expert == self._lists.nlist:
            self._lists = self._made(2 * expert, self._lists)
        codes_CD, ids_C = unit(rows_CD), np.arange(len(rows_CD))
        self._lists.invlists.add_entries(
            expert, len(ids_C), faiss.swig_ptr(ids_C), faiss.swig_ptr(codes_CD.view(np.uint8))
        )
        self._all.add(rows_CD)
        self._starts = np.append(self._starts, len(self._all))
        self._labels = np.append(self._labels, np.array(classes, np.int64))
        self.classes.append(list(map(int, classes)))
        self.keys.append(key)

    def route(
        self,
        residuals_BSD: Tensor,
        top_k: int | None = None,
        key: str = "",
        experts: Tensor | None = None,
    ) -> Routing:
        """Weigh experts by how near their residuals are to their own anchors: r_k.

        Args:
            residuals_BSD: Of any length; residual s of a clip is of expert s, or of
                `experts[b, s]`.
            top_k: How many experts to return; None, or more than were asked, for all.
            key: Of the column that the residuals were made from.
            experts: int64 [S] or [B, S], where not all were run; see `shortlist.py`.

        Returns:
            With the similarities as weights; `shortlist.weights` knows others, in the same order.

        Raises:
            ValueError: As `compare`, or `top_k` is none.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"{top_k=}: ask for one expert at least")
        asked_BS = self._numbers(residuals_BSD, experts, key)
        rows_RD, norms_R = queries(residuals_BSD, self.width, "residuals")
        near_BS, places_BS = self._compared(rows_RD, norms_R, asked_BS)

        def exact(b: np.ndarray, s: np.ndarray) -> np.ndarray:
            anchors = self._starts[asked_BS[b, s]] + places_BS[b, s]
            return cosines(rows_RD, b * asked_BS.shape[1] + s, self._all.vectors_ND, anchors)

        order_BS = ordered(near_BS, asked_BS, exact, slack(self.width))
        asked_BS, near_BS, places_BS = (
            np.take_along_axis(x, order_BS, axis=1) for x in (asked_BS, near_BS, places_BS)
        )
        similarities_BS = torch.from_numpy(near_BS)
        classes_BS = torch.from_numpy(self._labels[self._starts[asked_BS] + places_BS])
        parts = (torch.from_numpy(asked_BS), similarities_BS, classes_BS, similarities_BS)
        return Routing(*(x[:, :top_k].to(residuals_BSD.device) for x in parts))

    def compare(
        self, residuals_BSD: Tensor, key: str = "", experts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`route`, in the order in which the experts were asked.

        Returns:
            The cosine to each expert's nearest anchor, float32 [B, S], and that anchor's class,
            int64 [B, S].

        Raises:
            ValueError: The pool has no expert, its anchors are of another column, or the residuals
                do not fit it or are not finite.
        """
        asked_BS = self._numbers(residuals_BSD, experts, key)
        rows_RD, norms_R = queries(residuals_BSD, self.width, "residuals")
        near_BS, places_BS = self._compared(rows_RD, norms_R, asked_BS)
        classes_BS = self._labels[self._starts[asked_BS] + places_BS]
        device = residuals_BSD.device
        return torch.from_numpy(near_BS).to(device), torch.from_numpy(classes_BS).to(device)

    def nearest(self, queries_BD: Tensor, top_k: int, key: str = "") -> Nearest:
        """The nearest anchors, whoever's they are; all where there are fewer.

        Raises:
            ValueError: As `compare`, or `top_k` is none.
        """
        if top_k < 1 or queries_BD.ndim != 2:
            raise ValueError(
                f"{top_k=} for queries of {list(queries_BD.shape)}: give [clips, {self.width}], "
                "and ask for one anchor at least"
            )
        self._filled()
        self._allow(key, range(len(self)))
        rows_BD, norms_B = queries(queries_BD, self.width, "queries")
        similarities_BS, places_BS = self._all.search(rows_BD, norms_B, top_k)
        experts_BS = np.searchsorted(self._starts, places_BS, side="right") - 1
        parts = (experts_BS, self._labels[places_BS], similarities_BS)
        return Nearest(*(torch.from_numpy(x).to(queries_BD.device) for x in parts))

    def state_dict(self) -> dict[str, Tensor]:
        """Of each expert its anchors as given, its classes, and its key as UTF-8; and IVF's cells.

        The lists and the graph are made anew from these.
        """
        state = {}
        for k, (classes, key) in enumerate(zip(self.classes, self.keys, strict=True)):
            state[f"expert.{k}.anchors"] = self.anchors(k)
            state[f"expert.{k}.classes"] = torch.tensor(classes)
            state[f"expert.{k}.key"] = torch.tensor(list(key.encode()), dtype=torch.uint8)
        if self._all.centroids is not None:
            state["centroids"] = torch.from_numpy(self._all.centroids.copy())
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of the pool whose `state_dict` this was."""
        new = AnchorPool(self.width, self.lineage, *self._search)
        while f"expert.{len(new)}.anchors" in state:
            name = f"expert.{len(new)}."
            key = bytes(state[name + "key"].tolist()).decode()
            new.add(len(new), state[name + "classes"].tolist(), state[name + "anchors"], key)
        if "centroids" in state:
            new._all.centroids = state["centroids"].numpy().copy()
        vars(self).update(vars(new))

    def _made(self, room: int, old: Any = None) -> Any:
        """A FAISS index with a list for each of so many experts, and what the old lists have."""
        coarse = faiss.IndexFlatIP(self.width)  # never asked: each residual is told its list
        lists: Any = faiss.IndexIVFFlat(coarse, self.width, room, faiss.METRIC_INNER_PRODUCT)
        lists.is_trained = True
        for k in range(0 if old is None else old.nlist):
            size = old.invlists.list_size(k)
            ids, codes = old.invlists.get_ids(k), old.invlists.get_codes(k)
            lists.invlists.add_entries(k, size, ids, codes)
        return lists

    def _numbers(self, residuals_BSD: Tensor, experts: Tensor | None, key: str) -> np.ndarray:
        """Of the experts asked, int64 [B, S]."""
        self._filled()
        asked = torch.arange(len(self)) if experts is None else experts.cpu()
        shape = residuals_BSD.shape[:2]
        fits = residuals_BSD.ndim == 3 and asked.shape in (shape, shape[1:])
        if not fits:
            raise ValueError(
                f"residuals are {list(residuals_BSD.shape)} for {list(asked.shape)} experts: give "
                f"[clips, experts, {self.width}], in the order of the tasks, or say which they are"
            )
        asked_BS = np.array(asked.expand(shape).numpy(), np.int64)
        numbers = np.unique(asked_BS).tolist()
        strange = set(numbers) - set(range(len(self)))
        if strange:
            raise ValueError(f"no expert {min(strange)} in a pool of {len(self)}: count from 0")
        self._allow(key, numbers)
        return asked_BS

    def _filled(self) -> None:
        if not len(self):
            raise ValueError("the pool has no anchors yet, so there is nothing to ask: learn first")

    def _allow(self, key: str, experts: Sequence[int]) -> None:
        """Refuse a query from a column that these experts' anchors are not of."""
        made = {self.keys[-1]} if self.lineage else {self.keys[k] for k in experts}
        if made - {key}:
            others = [k for k in experts if self.keys[k] != key]
            found = sorted({self.keys[k] for k in others} | set(self.keys[-1:]) - {key})
            raise ValueError(
                f"a query from column {key!r}; anchors of experts {others[:9]} were made from "
                f"{', '.join(map(repr, found[:9]))}: ask with the feature that they were made of, "
                "with the newest one (and lineage=True) where a run's own network moved in between"
            )

    def _compared(
        self, rows_RD: np.ndarray, norms_R: np.ndarray, asked_BS: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The similarity to each residual's nearest anchor and its place in its expert, [B, S]."""
        lists_R1 = asked_BS.reshape(-1, 1)
        ignored_R1 = np.zeros(lists_R1.shape, np.float32)
        compared = np.diff(self._starts)[asked_BS].sum()
        with threads(int(compared) * self.width):
            found_R2, places_R2 = self._lists.search_preassigned(rows_RD, 2, lists_R1, ignored_R1)
        some_R = norms_R > 0
        near_R = np.divide(found_R2[:, 0], norms_R, out=np.zeros_like(norms_R), where=some_R)
        places_R = np.where(some_R, places_R2[:, 0], 0)
        # Of an expert with one class the second is FAISS's least number.
        gaps_R = found_R2[:, 0] - found_R2[:, 1]
        close_R = some_R & (gaps_R <= slack(self.width) * norms_R)
        for k in np.unique(lists_R1[close_R]).tolist():
            close = np.flatnonzero(close_R & (lists_R1[:, 0] == k))
            own_C = np.arange(*self._starts[k : k + 2])
            pairs = np.repeat(close, len(own_C)), np.tile(own_C, len(close))
            exact_RC = cosines(rows_RD, pairs[0], self._all.vectors_ND, pairs[1])
            exact_RC = exact_RC.reshape(len(close), len(own_C))
            # Of equal ones argmax gives the first.
            places_R[close], near_R[close] = exact_RC.argmax(axis=1), exact_RC.max(axis=1)
        return near_R.reshape(asked_BS.shape), places_R.reshape(asked_BS.shape)

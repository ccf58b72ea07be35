"""Anchor pool: the anchors of all experts, compared with queries by exact cosine, on FAISS.

This is the router of StPR's TD-MoE. Expert k of task k has one anchor for each class of the task:
the mean temporal residual of the class's clips. The residual of a clip by expert k is compared with
the anchors of expert k alone:

    r_k = max over c of cos(V^tem_k, anchor_c)

Search is exact at every size. A pool has one anchor for each class of a task. Over all experts, a
query takes 1 ms among 1,000 anchors of width 128 and 25 ms among 100,000, on one core. An inverted
file (IVF) is six times as fast at 100,000 anchors, but misses one in twenty of the ten nearest.

One rule decides ties. A similarity is the cosine computed in float64 and rounded to float32. Of
equal similarities the anchor that was added first wins: the earlier expert, and within an expert
the class that comes first in its list. FAISS sums in float32, in an order that depends on the size
of the batch. So it only proposes candidates, with more of them wherever float32 cannot tell which
ones belong. The cosine of a vector of zeros is 0.

Shapes: B queries, K experts in the pool, S experts or anchors returned, C anchors of one expert,
N anchors in all, D width, R rows, F candidates.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from varve.heads import Routing

CHUNK = 1 << 22  # float64 numbers compared at a time
GPU_RESULTS = 2048  # the most results per query that FAISS returns from a GPU


class Nearest(NamedTuple):
    """Nearest anchors over all experts, by descending similarity.

    Attributes:
        experts: Experts of the anchors, int64 [B, S].
        classes: Classes of the anchors, int64 [B, S].
        similarities: Cosines, float32 [B, S].
    """

    experts: Tensor
    classes: Tensor
    similarities: Tensor


class AnchorPool:
    """Anchors of all experts, each with the key of the feature column that it was made from.

    Args:
        width: Width D of every anchor.
        lineage: Whether the pool belongs to one run whose network was trained between tasks. A
            query from the newest column is then compared with older anchors too, as published.
            Otherwise all anchors that a query is compared with must be of its own column.
        gpu_above: Number of anchors from which `nearest` uses the first GPU, if FAISS finds one;
            None for never. The CPU answers from a few thousand anchors before they reach a GPU.

    Attributes:
        classes: Classes of each expert, in the order of its anchors.
        keys: Column key of each expert.
    """

    def __init__(self, width: int, lineage: bool = False, gpu_above: int | None = 10_000) -> None:
        if width < 1:
            raise ValueError(f"{width=}: give at least 1")
        self.width, self.lineage, self.gpu_above = width, lineage, gpu_above
        self.classes: list[list[int]] = []
        self.keys: list[str] = []
        self._anchors_ND = np.empty((0, width), np.float32)  # as they were added
        self._wide_ND = np.empty((0, width))  # the same in float64
        self._norms_N = np.empty(0)
        self._index: Any = faiss.IndexFlatIP(width)  # of the unit vectors
        self._on_gpu: Any = None  # a copy of the index
        self._starts = np.zeros(1, np.int64)  # first anchor of each expert, and N
        self._labels = np.zeros(0, np.int64)  # class of each anchor

    def __len__(self) -> int:
        """Return the number of experts."""
        return len(self.classes)

    def anchors(self, expert: int) -> Tensor:
        """Return a copy of the anchors of one expert, float32 [C, D]."""
        first, end = self._starts[expert : expert + 2].tolist()
        return torch.from_numpy(self._anchors_ND[first:end].copy())

    def add(self, expert: int, classes: Sequence[int], anchors_CD: Tensor, key: str = "") -> None:
        """Add the anchors of the next expert. Those of other experts keep their indices.

        Args:
            expert: Number of the expert: the number of experts in the pool so far.
            classes: C classes, each one once.
            anchors_CD: Anchors of any length; only their direction counts.
            key: Key of the feature column that they were made from.

        Raises:
            ValueError: Another expert is next, classes and anchors do not fit each other or the
                pool, or a number is not finite. The pool is unchanged.
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
        rows_CD = _rows(anchors_CD, self.width, f"anchors of expert {expert}")
        self._anchors_ND = np.concatenate([self._anchors_ND, rows_CD])
        wide_CD, norms_C = _wide(rows_CD)
        self._wide_ND = np.concatenate([self._wide_ND, wide_CD])
        self._norms_N = np.append(self._norms_N, norms_C)
        self._index.add(_unit(wide_CD, norms_C))
        self._on_gpu = None
        self._starts = np.append(self._starts, len(self._anchors_ND))
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
        """Weigh experts by r_k, the cosine of their residuals to their own nearest anchors.

        Args:
            residuals_BSD: Residuals of any length; residual s of a clip is by expert s, or by
                `experts[b, s]`.
            top_k: Number of experts to return; None for all.
            key: Key of the feature column that the residuals were made from.
            experts: Experts that ran, int64 [S] or [B, S], where not all did; see `shortlist.py`.

        Raises:
            ValueError: As for `compare`, or `top_k` is below 1.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"{top_k=}: ask for one expert at least")
        experts_BS = self._experts(residuals_BSD, experts, key)
        similarities_BS, anchors_BS = self._own(residuals_BSD, experts_BS)
        order_BS = np.lexsort((experts_BS, -similarities_BS), axis=1)[:, :top_k]
        experts, similarities, classes = (
            torch.from_numpy(np.take_along_axis(x, order_BS, axis=1)).to(residuals_BSD.device)
            for x in (experts_BS, similarities_BS, self._labels[anchors_BS])
        )
        return Routing(experts, similarities, classes, similarities)

    def compare(
        self, residuals_BSD: Tensor, key: str = "", experts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compare residuals as `route` does, and keep the order in which experts are given.

        Returns:
            The cosine to each expert's nearest anchor, float32 [B, S], and that anchor's class,
            int64 [B, S].

        Raises:
            ValueError: The pool has no expert, its anchors are of another column, or the residuals
                do not fit it or are not finite.
        """
        experts_BS = self._experts(residuals_BSD, experts, key)
        similarities_BS, anchors_BS = self._own(residuals_BSD, experts_BS)
        device = residuals_BSD.device
        classes_BS = torch.from_numpy(self._labels[anchors_BS])
        return torch.from_numpy(similarities_BS).to(device), classes_BS.to(device)

    def nearest(self, queries_BD: Tensor, top_k: int, key: str = "") -> Nearest:
        """Find the nearest anchors of all experts together; all anchors if there are fewer.

        Raises:
            ValueError: As for `compare`, or `top_k` is below 1.
        """
        if top_k < 1 or queries_BD.ndim != 2:
            raise ValueError(
                f"{top_k=} for queries of {list(queries_BD.shape)}: give [clips, {self.width}], "
                "and ask for one anchor at least"
            )
        self._check_not_empty()
        self._check_key(key, range(len(self)))
        rows_BD = _rows(queries_BD, self.width, "queries")
        similarities_BS, anchors_BS = self._best(rows_BD, top_k)
        experts_BS = np.searchsorted(self._starts, anchors_BS, side="right") - 1
        parts = (experts_BS, self._labels[anchors_BS], similarities_BS)
        return Nearest(*(torch.from_numpy(x).to(queries_BD.device) for x in parts))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the anchors, classes and key (as UTF-8) of each expert, as tensors of its own."""
        state = {}
        for k, (classes, key) in enumerate(zip(self.classes, self.keys, strict=True)):
            state[f"expert.{k}.anchors"] = self.anchors(k)
            state[f"expert.{k}.classes"] = torch.tensor(classes)
            state[f"expert.{k}.key"] = torch.tensor(list(key.encode()), dtype=torch.uint8)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the content by that of the pool whose `state_dict` this is."""
        new = AnchorPool(self.width, self.lineage, self.gpu_above)
        while f"expert.{len(new)}.anchors" in state:
            name = f"expert.{len(new)}."
            key = bytes(state[name + "key"].tolist()).decode()
            new.add(len(new), state[name + "classes"].tolist(), state[name + "anchors"], key)
        vars(self).update(vars(new))

    def _experts(self, residuals_BSD: Tensor, experts: Tensor | None, key: str) -> np.ndarray:
        """Return the checked numbers of the experts of residuals, int64 [B, S]."""
        self._check_not_empty()
        numbers = torch.arange(len(self)) if experts is None else experts.cpu()
        shape = residuals_BSD.shape[:2]
        if residuals_BSD.ndim != 3 or numbers.shape not in (shape, shape[1:]):
            raise ValueError(
                f"residuals are {list(residuals_BSD.shape)} for {list(numbers.shape)} experts: "
                f"give [clips, experts, {self.width}], in the order of the tasks, or say which "
                "they are"
            )
        experts_BS = np.array(numbers.expand(shape).numpy(), np.int64)
        known = np.unique(experts_BS).tolist()
        unknown = set(known) - set(range(len(self)))
        if unknown:
            raise ValueError(f"no expert {min(unknown)} in a pool of {len(self)}: count from 0")
        self._check_key(key, known)
        return experts_BS

    def _check_not_empty(self) -> None:
        if not len(self):
            raise ValueError("the pool has no anchors yet, so there is nothing to ask: learn first")

    def _check_key(self, key: str, experts: Sequence[int]) -> None:
        """Refuse a query from a column that the anchors of these experts were not made from."""
        expected = {self.keys[-1]} if self.lineage else {self.keys[k] for k in experts}
        if expected - {key}:
            others = [k for k in experts if self.keys[k] != key]
            keys = sorted({self.keys[k] for k in others} | set(self.keys[-1:]) - {key})
            raise ValueError(
                f"a query from column {key!r}; anchors of experts {others[:9]} were made from "
                f"{', '.join(map(repr, keys[:9]))}: ask with the feature that they were made of, "
                "with the newest one (and lineage=True) where a run's own network moved in between"
            )

    def _own(self, residuals_BSD: Tensor, experts_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the similarity and index of the nearest own anchor of each expert, [B, S]."""
        # The few anchors of one expert are compared in float64 at once: no candidates are needed.
        rows_RD, experts_R = _rows(residuals_BSD, self.width, "residuals"), experts_BS.ravel()
        order_R = np.argsort(experts_R, kind="stable")  # rows of one expert beside each other
        experts, firsts = np.unique(experts_R[order_R], return_index=True)
        bounds = [*firsts.tolist(), len(order_R)]
        wide_RD, norms_R = _wide(rows_RD[order_R])
        best_R, near_R = np.empty(len(order_R), np.int64), np.empty(len(order_R), np.float32)
        for k, a, b in zip(experts.tolist(), bounds, bounds[1:], strict=False):
            first, end = self._starts[k : k + 2].tolist()
            products_RC = np.einsum("rd,cd->rc", wide_RD[a:b], self._wide_ND[first:end])
            cosines_RC = _divide(products_RC, norms_R[a:b, None] * self._norms_N[first:end])
            best_R[a:b] = first + cosines_RC.argmax(axis=1)  # the first of equal similarities
            near_R[a:b] = cosines_RC.max(axis=1)
        back_R = np.argsort(order_R)
        shape = experts_BS.shape
        return near_R[back_R].reshape(shape), best_R[back_R].reshape(shape)

    def _best(
        self, rows_RD: np.ndarray, count: int, candidates: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return similarities and indices [R, S] of the nearest of all anchors."""
        total = len(self._anchors_ND)
        count = min(count, total)
        candidates = min(max(candidates, count + 1), total)
        near_RF, index_RF = self._search(_unit(*_wide(rows_RD)), candidates)
        similarities_RF = self._cosines(rows_RD, index_RF)
        order_RS = np.lexsort((index_RF, -similarities_RF), axis=1)[:, :count]
        best_RS, index_RS = (
            np.take_along_axis(x, order_RS, axis=1) for x in (similarities_RF, index_RF)
        )
        # In float32 the last candidate may be as near as the last result: so may others.
        unsure_R = near_RF[:, count - 1] - near_RF[:, -1] <= _rounding(self.width)
        if candidates < total and unsure_R.any():
            more = self._best(rows_RD[unsure_R], count, 4 * candidates)
            best_RS[unsure_R], index_RS[unsure_R] = more
        return best_RS, index_RS

    def _search(self, unit_RD: np.ndarray, candidates: int) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 inner products and indices of all anchors [R, F], as FAISS finds them."""
        index = self._index
        enough = self.gpu_above is not None and index.ntotal >= self.gpu_above
        if enough and candidates <= GPU_RESULTS and faiss.get_num_gpus():
            if self._on_gpu is None:
                resources = faiss.StandardGpuResources()
                self._on_gpu = resources, faiss.index_cpu_to_gpu(resources, 0, index)
            index = self._on_gpu[1]
        near_RF, index_RF = index.search(unit_RD, candidates)
        return near_RF, index_RF

    def _cosines(self, rows_RD: np.ndarray, index_RF: np.ndarray) -> np.ndarray:
        """Return the cosines of rows and anchors by float64, float32 [R, F]; 0 with zeros."""
        out_RF = np.empty(index_RF.shape, np.float32)
        step = max(1, CHUNK // (index_RF.shape[1] * self.width))
        for start in range(0, len(rows_RD), step):
            index = index_RF[start : start + step]
            wide_RD, norms_R = _wide(rows_RD[start : start + step])
            # Not a matrix product: BLAS sums in another order by where a row stands in the batch.
            products_RF = np.einsum("rd,rfd->rf", wide_RD, self._wide_ND[index])
            norms_RF = norms_R[:, None] * self._norms_N[index]
            out_RF[start : start + step] = _divide(products_RF, norms_RF)
        return out_RF


def _rows(x: Tensor, width: int, name: str) -> np.ndarray:
    """Return vectors as finite float32 rows in CPU memory, [R, D].

    Raises:
        ValueError: The vectors, called `name`, have another width, or a number is not finite.
    """
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(
            f"{name} are {list(x.shape)}, where the pool has vectors of {width}: use the feature "
            "and the number of frames that the pool was made of"
        )
    rows_RD: np.ndarray = x.detach().to("cpu", torch.float32).reshape(-1, width).numpy()
    if not np.isfinite(rows_RD).all():
        raise ValueError(
            f"{name} are not finite: leave out the clips that the store has not marked as done"
        )
    return rows_RD


def _wide(x_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows in float64, and their norms [R]."""
    wide_RD = x_RD.astype(np.float64)
    return wide_RD, np.sqrt(np.einsum("rd,rd->r", wide_RD, wide_RD))


def _divide(products: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Return cosines, float32; 0 where a vector is zero."""
    cosines = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    result: np.ndarray = cosines.astype(np.float32)
    return result


def _unit(wide_RD: np.ndarray, norms_R: np.ndarray) -> np.ndarray:
    """Return unit vectors, float32 [R, D]; zeros stay zeros."""
    unit_RD: np.ndarray = wide_RD / np.where(norms_R > 0, norms_R, 1)[:, None]
    return unit_RD.astype(np.float32)


def _rounding(width: int) -> float:
    """Return the gap above which float32 inner products of unit vectors are in the right order.

    This is a worst case: D + 8 roundings of 2^-24 for each of two products, and for their norms.
    """
    return float(3 * (width + 8) * 2.0**-24)

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

Shapes: B queries, K experts, S anchors returned, C anchors of one expert,
N anchors in all, D width, R rows, F candidates.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

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

    def compare(self, residuals_BKD: Tensor, key: str = "") -> tuple[Tensor, Tensor]:
        """Compute r_k: compare the residual of each expert with the expert's own anchors.

        Args:
            residuals_BKD: Residuals of any length, of all experts in the order of their tasks.
            key: Key of the feature column that the residuals were made from.

        Returns:
            The cosine to each expert's nearest anchor, float32 [B, K], and that anchor's class,
            int64 [B, K].

        Raises:
            ValueError: The pool has no expert, its anchors are of another column, or the residuals
                do not fit it or are not finite.
        """
        self._check_key(key)
        if residuals_BKD.ndim != 3 or residuals_BKD.shape[1] != len(self):
            raise ValueError(
                f"residuals are {list(residuals_BKD.shape)} for {len(self)} experts: give [clips, "
                f"experts, {self.width}], in the order of the tasks"
            )
        similarities_BK, anchors_BK = self._own(residuals_BKD)
        classes_BK = torch.from_numpy(self._labels[anchors_BK])
        device = residuals_BKD.device
        return torch.from_numpy(similarities_BK).to(device), classes_BK.to(device)

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
        self._check_key(key)
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

    def _check_key(self, key: str) -> None:
        """Refuse a query of an empty pool, or from a column that anchors were not made from."""
        if not len(self):
            raise ValueError("the pool has no anchors yet, so there is nothing to ask: learn first")
        if {key} != set(self.keys[-1:] if self.lineage else self.keys):
            others = [k for k in range(len(self)) if self.keys[k] != key]
            keys = sorted({self.keys[k] for k in others} | set(self.keys[-1:]) - {key})
            raise ValueError(
                f"a query from column {key!r}; anchors of experts {others[:9]} were made from "
                f"{', '.join(map(repr, keys[:9]))}: ask with the feature that they were made of, "
                "with the newest one (and lineage=True) where a run's own network moved in between"
            )

    def _own(self, residuals_BKD: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return the similarity and index of the nearest own anchor of each expert, [B, K]."""
        # The few anchors of one expert are compared in float64 at once: no candidates are needed.
        shape = residuals_BKD.shape[:2]
        wide_RD, norms_R = _wide(_rows(residuals_BKD, self.width, "residuals"))
        wide_BKD, norms_BK = wide_RD.reshape(*shape, self.width), norms_R.reshape(shape)
        best_BK, near_BK = np.empty(shape, np.int64), np.empty(shape, np.float32)
        for k in range(len(self)):
            first, end = self._starts[k : k + 2].tolist()
            products_BC = np.einsum("bd,cd->bc", wide_BKD[:, k], self._wide_ND[first:end])
            cosines_BC = _divide(products_BC, norms_BK[:, k, None] * self._norms_N[first:end])
            best_BK[:, k] = first + cosines_BC.argmax(axis=1)  # the first of equal similarities
            near_BK[:, k] = cosines_BC.max(axis=1)
        return near_BK, best_BK

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

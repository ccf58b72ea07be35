"""Neighbours: the nearest of many vectors by cosine, through FAISS, ties included.

FAISS adds up in float32, in an order that depends on the size of the batch, and promises nothing
about equal ones. Here a similarity is the cosine, and equal ones (as float32, as they are returned)
come in the order in which their vectors were added: candidates that float32 cannot tell apart for
certain are computed again in float64, and further ones are looked at while they might belong.

Shapes: N vectors, B queries, D width, F candidates, S results.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

APPROXIMATE = ("", "ivf", "hnsw")
LINKS = 32  # of a vector in the HNSW graph
GPU_RESULTS = 2048  # FAISS has no more than these a query from a GPU
CHUNK = 1 << 22  # numbers at a time in float64
# Multiply-adds that one thread has done before others are awake: 4 ms, where torch's still spin.
ALONE = 10**8


class Neighbours:
    """Vectors that are added and never moved, and the search for the nearest ones.

    Exact (`IndexFlatIP`) unless `approximate` says otherwise, and then up to `above` vectors.

    `ivf` looks at the `probes` of sqrt(above) cells that are nearest to the query. The cells are
    trained once, on the first `above` vectors in their order, when there are more than that: so
    vectors added in any steps give the cells, and the results, of those added at once. What comes
    later is put into these cells; vectors unlike the first ones want a new object.

    `hnsw` walks a graph. Vectors enter it one by one, since a graph made of many at once depends on
    how many and on the timing of threads: slow (0.3 ms a vector of 512), but the same graph always.

    Args:
        width: D.
        approximate: "", "ivf" or "hnsw".
        above: Number of vectors.
        probes: Cells that `ivf` looks into; times 4, the candidates that `hnsw` keeps.
        gpu_above: From how many vectors on the first GPU is asked, where FAISS finds one; None for
            never. A few thousand vectors are answered before they could be sent there. `hnsw` is
            always on the CPU.

    Raises:
        ValueError: An option is none.
    """

    def __init__(
        self,
        width: int,
        approximate: str = "",
        above: int = 100_000,
        probes: int = 16,
        gpu_above: int | None = 10_000,
    ) -> None:
        if approximate not in APPROXIMATE:
            known = ", ".join(map(repr, APPROXIMATE))
            raise ValueError(f"no {approximate=}; choose from {known}")
        if min(width, above, probes) < 1:
            raise ValueError(f"{width=}, {above=}, {probes=}: give at least 1 of each")
        self.approximate, self.above, self.probes = approximate, above, probes
        self.gpu_above = gpu_above
        self.centroids: np.ndarray | None = None
        self._kept = np.empty((0, width), np.float32)
        self._count = 0
        self._indexed = 0  # how many the index has: it is made when first asked, then grows
        self._index: Any = faiss.IndexFlatIP(width)
        self._exact = True
        self._gpu: object | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def vectors_ND(self) -> np.ndarray:
        """As they were added; not to be written to."""
        return self._kept[: self._count]

    def add(self, vectors_ND: np.ndarray) -> None:
        """Add finite float32 vectors; their places are the next ones."""
        count = self._count + len(vectors_ND)
        if count > len(self._kept):
            # Twice the room, so that an added task costs its own size and not the pool's.
            kept = np.empty((max(count, 2 * self._count), self._kept.shape[1]), np.float32)
            kept[: self._count] = self.vectors_ND
            self._kept = kept
        self._kept[self._count : count] = vectors_ND
        self._count = count

    def search(
        self, queries_BD: np.ndarray, norms_B: np.ndarray, top_k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the nearest.

        Args:
            queries_BD, norms_B: As `queries` gives them. A query of zeros is at 0 from all.
            top_k: How many; S is no more than N.

        Returns:
            similarities float32 [B, S], descending, and places int64 [B, S].
        """
        self._catch_up()
        size, width = self.vectors_ND.shape
        count = min(top_k, size)
        places_BS = np.tile(np.arange(count), (len(queries_BD), 1))
        similarities_BS = np.zeros(places_BS.shape, np.float32)
        found = min(count + 1, size)
        rows = np.flatnonzero(norms_B)
        while len(rows):
            asked = queries_BD[rows]
            with threads(len(asked) * size * width):
                near_RF, places_RF = self._candidates(asked, found)
            near_RF /= norms_B[rows, None]
            sure_R = near_RF[:, count - 1] - near_RF[:, -1] > slack(width)
            if found == size or not self._exact:
                sure_R[:] = True
            asked, near_RF, places_RF = asked[sure_R], near_RF[sure_R], places_RF[sure_R]

            def exact(r: np.ndarray, f: np.ndarray, q=asked, p=places_RF) -> np.ndarray:  # type: ignore[no-untyped-def]
                return cosines(q, r, self.vectors_ND, p[r, f])

            order_RF = ordered(near_RF, places_RF, exact, slack(width))[:, :count]
            similarities_BS[rows[sure_R]] = np.take_along_axis(near_RF, order_RF, axis=1)
            places_BS[rows[sure_R]] = np.take_along_axis(places_RF, order_RF, axis=1)
            rows, found = rows[~sure_R], min(4 * found, size)
        return similarities_BS, places_BS

    def _candidates(self, asked_RD: np.ndarray, found: int) -> tuple[np.ndarray, np.ndarray]:
        index: Any = self._index
        if self._gpu is not None and found > GPU_RESULTS:
            index = faiss.index_gpu_to_cpu(index)
        near_RF, places_RF = index.search(asked_RD, found)
        short_R = (places_RF < 0).any(axis=1)
        if short_R.any():
            # The cells or the walk had fewer than were asked for: these look at everything.
            if self.approximate == "hnsw":
                near, places = index.storage.search(asked_RD[short_R], found)
            else:
                index = faiss.index_gpu_to_cpu(index) if self._gpu is not None else index
                everywhere = faiss.SearchParametersIVF(nprobe=index.nlist)  # type: ignore[call-arg]
                near, places = index.search(asked_RD[short_R], found, params=everywhere)
            near_RF[short_R], places_RF[short_R] = near, places
        return near_RF, places_RF

    def _catch_up(self) -> None:
        if self._exact and self.approximate and self._count > self.above:
            self._index, self._indexed = self._started(), 0
            self._exact, self._gpu = False, None
        step = 1 if self.approximate == "hnsw" and not self._exact else 1 << 15
        for first in range(self._indexed, self._count, step):
            self._index.add(unit(self.vectors_ND[first : first + step]))
        self._indexed = self._count
        enough = self.gpu_above is not None and self._count >= self.gpu_above
        walks = self.approximate == "hnsw" and not self._exact
        if enough and not walks and self._gpu is None and faiss.get_num_gpus():
            self._gpu = faiss.StandardGpuResources()
            self._index = faiss.index_cpu_to_gpu(self._gpu, 0, self._index)

    def _started(self) -> Any:
        """An approximate FAISS index that has no vector yet."""
        width = self._kept.shape[1]
        if self.approximate == "hnsw":
            graph = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efSearch = 4 * self.probes
            return graph
        coarse = faiss.IndexFlatIP(width)
        cells = len(self.centroids) if self.centroids is not None else int(self.above**0.5)
        index = faiss.IndexIVFFlat(coarse, width, cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(self.probes, cells)
        # 64 vectors a cell place it; its own seed draws them, and no global generator.
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 64
        if self.centroids is None:
            index.train(unit(self.vectors_ND[: self.above]))
            self.centroids = coarse.reconstruct_n(0, cells)
        else:
            coarse.add(self.centroids)
            index.is_trained = True
        return index


def queries(x: Tensor, width: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors to ask with, as rows in the memory of the CPU, and their norms.

    Args:
        x: [..., D].
        what: Their name in an error.

    Raises:
        ValueError: Another width, or a number that is not finite.
    """
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(
            f"{what} are {list(x.shape)}, where the pool has vectors of {width}: use the feature "
            "and the number of frames that the pool was made of"
        )
    x_RD = x.detach().to("cpu", torch.float32).reshape(-1, width).contiguous()
    norms_R = torch.linalg.vector_norm(x_RD, dim=1)
    odd_R = ~((norms_R > 1e-12) & (norms_R < 1e18))
    if odd_R.any():
        # Not numbers, zeros, or so long or short that their squares leave float32. The cosine does
        # not ask for the length.
        odd_OD = x_RD[odd_R]
        peak_O1 = odd_OD.abs().amax(dim=1, keepdim=True)
        if not peak_O1.isfinite().all():
            raise ValueError(
                f"{what} are not finite: leave out the clips that the store has not marked as done"
            )
        x_RD, norms_R = x_RD.clone(), norms_R.clone()
        x_RD[odd_R] = odd_OD / torch.where(peak_O1 > 0, peak_O1, 1)
        norms_R[odd_R] = torch.linalg.vector_norm(x_RD[odd_R], dim=1)
    return x_RD.numpy(), norms_R.numpy()


def unit(x_ND: np.ndarray) -> np.ndarray:
    """On the sphere, float32; zeros stay zeros."""
    wide_ND = x_ND.astype(np.float64)
    norms_N1 = np.linalg.norm(wide_ND, axis=1, keepdims=True)
    return (wide_ND / np.where(norms_N1 > 0, norms_N1, 1)).astype(np.float32)


@contextlib.contextmanager
def threads(multiply_adds: int) -> Iterator[None]:
    """FAISS's, for so much work: one where others would not pay."""
    before = faiss.omp_get_max_threads()
    if multiply_adds < ALONE:
        faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def slack(width: int) -> float:
    """Cosines of FAISS that differ by more are in the right order.

    D + 8 roundings of 2^-24 in whatever order for each of two products, and the norms' between two
    queries; a worst case, a thousand times what happens.
    """
    return float(3 * (width + 8) * 2.0**-24)


def cosines(
    left: np.ndarray, left_places: np.ndarray, right: np.ndarray, right_places: np.ndarray
) -> np.ndarray:
    """Of pairs of rows, by float64; float32 [R]. 0 with zeros. Equal rows give equal bits."""
    out = np.zeros(len(left_places), np.float32)
    step = max(1, CHUNK // left.shape[1])
    for first in range(0, len(out), step):
        part = slice(first, first + step)
        a, b = left[left_places[part]], right[right_places[part]]
        # Not a matrix product: BLAS adds up differently by where a row stands.
        ab, aa, bb = (
            np.einsum("rd,rd->r", x, y, dtype=np.float64) for x, y in ((a, b), (a, a), (b, b))
        )
        norms = np.sqrt(aa) * np.sqrt(bb)
        out[part] = np.divide(ab, norms, out=np.zeros_like(ab), where=norms > 0)
    return out


def ordered(
    similarities_BF: np.ndarray,
    ids_BF: np.ndarray,
    exact: Callable[[np.ndarray, np.ndarray], np.ndarray],
    slack: float,
) -> np.ndarray:
    """The columns of each row by descending similarity, equal ones by ascending id.

    Similarities within `slack` of a neighbour are replaced, where they are, by what
    `exact(rows, columns)` says.
    """
    first_BF = np.argsort(-similarities_BF, axis=1, kind="stable")
    sorted_BF = np.take_along_axis(similarities_BF, first_BF, axis=1)
    close = sorted_BF[:, :-1] - sorted_BF[:, 1:] <= slack
    doubt_BF = np.zeros(sorted_BF.shape, bool)
    doubt_BF[:, :-1] = close
    doubt_BF[:, 1:] |= close
    rows, at = np.nonzero(doubt_BF)
    columns = first_BF[rows, at]
    similarities_BF[rows, columns] = exact(rows, columns)
    return np.lexsort((ids_BF, -similarities_BF), axis=1)

"""MemoryStore: text chunks with embeddings, stable ids, metadata, exact search, circular eviction, safe saves."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memkern.ops.cosine_topk import cosine_topk, inverse_norms
from memkern.store import _arguments, persistence
from memkern.store._arguments import Filter, aligned, one_of, token_list
from memkern.store.locks import ReadWriteLock
from memkern.store.records import Chunk, Hit, UsedIds
from memkern.store.ring import Ring

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS = ("cosine", "dot", "learned")
EVICTIONS = ("ring", "error")
MAX_TOP_K = 2048


class MemoryStore:
    """Chunks of text with their embeddings, searched exactly by default.

    Safe for many reading threads beside one that writes. Ids are stable and never reused. At ``max_chunks`` the oldest
    chunk makes room (``eviction="ring"``) or adding fails (``"error"``).

    Args:
        d_model: width of the embeddings.
        max_chunks: how many chunks the store holds.
        dtype: float32, bfloat16 or float16: how embeddings are kept.
        retrieval_method: ``"cosine"``; ``"dot"``, the inner product as it stands; or ``"learned"``, the cosine of
            ``query @ score_matrix`` with the chunk, the identity until :attr:`score_matrix` is set.
        index: ``"exact"``, or an approximate index of FAISS: ``"faiss-flat"``, ``"faiss-hnsw"``, ``"faiss-ivf"`` or any
            FAISS factory string.
        eviction: ``"ring"`` or ``"error"``.
        device: where the embeddings live.

    Raises:
        ValueError: an argument out of its range, named.
    """

    def __init__(
        self,
        d_model: int,
        max_chunks: int = 10000,
        *,
        dtype: torch.dtype = torch.float32,
        retrieval_method: str = "cosine",
        index: str = "exact",
        eviction: str = "ring",
        device: str | torch.device = "cpu",
    ) -> None:
        d_model = _arguments.whole("d_model", d_model, 1)
        max_chunks = _arguments.whole("max_chunks", max_chunks, 1)
        one_of("dtype", dtype, DTYPES)
        one_of("retrieval_method", retrieval_method, METHODS)
        one_of("eviction", eviction, EVICTIONS)
        self.d_model, self.max_chunks, self.dtype = d_model, max_chunks, dtype
        if not isinstance(index, str):
            raise TypeError(f"index: expected a str, got {type(index).__name__} {index!r}")
        self.retrieval_method, self.index, self.eviction = retrieval_method, index, eviction
        self.device = torch.device(device)
        self._lock = ReadWriteLock()
        self._ring = Ring(d_model, max_chunks, dtype, self.device)
        self._used = UsedIds()
        self._added = self._evicted = self._deleted = 0
        with torch.inference_mode(False):
            identity = torch.eye(d_model, dtype=torch.float32, device="cpu")
        self._score_matrix = identity if retrieval_method == "learned" else None
        self._version = 0
        self._rewrites = 0  # changes other than appending, after which an approximate index starts anew
        self._approximate: Any = None
        if index != "exact":
            from memkern.store.faiss_index import FaissIndex

            self._approximate = FaissIndex(index, d_model, retrieval_method)

    # Adding, changing, removing

    def add(
        self,
        chunk: str,
        embedding: Tensor | Sequence[float],
        meta: Mapping[str, Any] | None = None,
        *,
        token_ids: Sequence[int] | Tensor | None = None,
        id: int | None = None,
    ) -> int:
        """Store one chunk with its (d_model,) embedding; see :meth:`add_batch`. Returns its id."""
        row = _arguments.row("embedding", embedding, self.d_model)
        ids = None if id is None else [id]
        return self.add_batch([chunk], row, [meta], token_ids=[token_ids], ids=ids)[0]

    def add_batch(
        self,
        chunks: Sequence[str],
        embeddings: Tensor | Sequence[Sequence[float]],
        metas: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        token_ids: Sequence[Sequence[int] | Tensor | None] | None = None,
        ids: Sequence[int] | None = None,
    ) -> list[int]:
        """Store n chunks, all or none; a batch larger than ``max_chunks`` keeps its last ones.

        Args:
            chunks: n texts.
            embeddings: (n, d_model) float; zeros are stored and score 0, NaN is refused.
            metas: n dicts or None; ``position``, ``timestamp`` and ``source`` are filled in where they are missing, in
                a copy.
            token_ids: n sequences of ints or None.
            ids: n ids >= 0 that were never used; by default the next free ones.

        Returns:
            The n ids, in order, also of chunks that the batch itself evicted.

        Raises:
            ValueError: wrong shapes or lengths, NaN, an id that was used before or occurs twice, or a full store with
                ``eviction="error"``. The store is then as it was.
        """
        if isinstance(chunks, str):
            raise TypeError(f"chunks: expected texts, got str {chunks!r}; add() takes one")
        chunks = [_arguments.text("chunks", chunk) for chunk in chunks]
        rows = self._embeddings("embeddings", embeddings, len(chunks))
        given_metas = [_arguments.mapping("metas", meta) for meta in aligned("metas", metas, len(chunks))]
        tokens = [token_list(t) for t in aligned("token_ids", token_ids, len(chunks))]
        with self._lock.write():
            given = self._new_ids(ids, len(chunks))
            if self.eviction == "error" and self._ring.size + len(chunks) > self.max_chunks:
                raise ValueError(
                    f"the store is full: {len(chunks)} more than its {self._ring.size} chunks do not fit "
                    f"max_chunks={self.max_chunks}"
                )
            first, now = self._added, time.time()
            for id in given:
                self._used.add(id)
            self._added += len(chunks)
            skipped = max(0, len(chunks) - self.max_chunks)
            self._evicted += skipped
            for _ in range(max(0, self._ring.size + len(chunks) - skipped - self.max_chunks)):
                self._ring.remove(self._ring.oldest())
                self._evicted += 1
                self._rewrites += 1
            self._ring.make_room(len(chunks) - skipped)
            slots = self._ring.append(rows[skipped:], self._norms(rows[skipped:]))
            for offset, slot in enumerate(slots, start=skipped):
                meta = {"position": first + offset, "timestamp": now, "source": ""} | given_metas[offset]
                self._ring.describe(slot, given[offset], chunks[offset], tokens[offset], meta)
            self._version += 1
            return given

    def update(
        self,
        id: int,
        *,
        chunk: str | None = None,
        embedding: Tensor | Sequence[float] | None = None,
        token_ids: Sequence[int] | Tensor | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Change a chunk in place; it keeps its id and its age. What is not given stays, ``meta`` is replaced whole.

        Raises:
            KeyError: no such id. ValueError, TypeError: a bad argument, named. The store is then as it was.
        """
        row = None
        if embedding is not None:
            row = self._embeddings("embedding", _arguments.row("embedding", embedding, self.d_model), 1)
        if chunk is not None:
            _arguments.text("chunk", chunk)
        metadata = _arguments.mapping("meta", meta)
        tokens = token_list(token_ids)
        with self._lock.write():
            slot = self._slot(id)
            if row is not None:
                self._ring.embeddings[slot] = row[0]
                self._ring.inverse_norms[slot] = self._norms(row)[0]
            if chunk is not None:
                self._ring.texts[slot] = chunk
            if tokens is not None:
                self._ring.token_ids[slot] = tokens
            if meta is not None:
                self._ring.metadata[slot] = metadata
            self._rewrites += row is not None
            self._version += 1

    def delete(self, ids: int | Iterable[int]) -> None:
        """Delete one chunk or several: all, or none and a KeyError when an id is unknown."""
        wanted = _arguments.several_ids(ids)
        with self._lock.write():
            slots = list(dict.fromkeys(self._slot(id) for id in wanted))
            for slot in slots:
                self._ring.remove(slot)
            self._deleted += len(slots)
            self._rewrites += 1
            self._version += 1

    def clear(self) -> None:
        """Remove every chunk; their ids stay used."""
        with self._lock.write():
            self._deleted += self._ring.size
            self._ring = Ring(self.d_model, self.max_chunks, self.dtype, self.device)
            self._rewrites += 1
            self._version += 1

    def merge(self, other: MemoryStore) -> list[int]:
        """Add a copy of every chunk of ``other``, oldest first, under new ids, which are returned in that order."""
        if not isinstance(other, MemoryStore):
            raise TypeError(f"other: expected a MemoryStore, got {type(other).__name__} {other!r}")
        if other.d_model != self.d_model:
            raise ValueError(f"other: expected d_model {self.d_model}, got {other.d_model}")
        taken = list(other)
        if not taken:
            return []
        return self.add_batch(
            [chunk.text for chunk in taken],
            torch.stack([chunk.embedding for chunk in taken]).to(self.device),
            [chunk.metadata for chunk in taken],
            token_ids=[chunk.token_ids for chunk in taken],
        )

    # Searching

    def search(
        self,
        query: Tensor | Sequence[float],
        top_k: int = 5,
        *,
        filter: Filter | None = None,
        threshold: float | None = None,
    ) -> list[Hit]:
        """The ``top_k`` best chunks for one (d_model,) query, fewer where there are fewer; ties go to the older chunk.

        Args:
            query: (d_model,) float.
            top_k: at least 1.
            filter: keeps chunks whose metadata has these values (a list, tuple or set: any of them), or for which a
                function of the metadata returns True.
            threshold: the lowest score to return.
        """
        row = _arguments.row("query", query, self.d_model)
        return self.search_batched(row, top_k, filter=filter, threshold=threshold)[0]

    def search_batched(
        self,
        queries: Tensor | Sequence[Sequence[float]],
        top_k: int = 5,
        *,
        filter: Filter | None = None,
        threshold: float | None = None,
    ) -> list[list[Hit]]:
        """:meth:`search` for (n, d_model) queries: a list per row."""
        rows = self._embeddings("queries", queries, None)
        top_k = _arguments.whole("top_k", top_k, 1)
        least = -math.inf if threshold is None else _arguments.number("threshold", threshold)
        keep = None if filter is None else _arguments.matcher(filter)
        with self._lock.read(), torch.no_grad():
            count = min(top_k, self._ring.size)
            if count == 0 or rows.shape[0] == 0:
                return [[] for _ in range(rows.shape[0])]
            allowed, rows = self._allowed(keep), self._as_scored(rows)
            if self._approximate is not None:
                chosen = None if keep is None else allowed  # what was deleted is not in the index
                scores, slots = self._approximate.search(self._ring, self._rewrites, rows, count, chosen)
                # An approximate index may look where too few rows are allowed, or leave out the older of equal ones;
                # those queries are searched exactly.
                wanted = count if allowed is None else min(count, int(allowed.sum()))
                short = (slots >= 0).sum(1) < wanted
                if bool(short.any()):
                    exact = self._exact(rows[short.to(rows.device)], count, allowed)
                    scores[short], slots[short] = (found.cpu() for found in exact)
            else:
                scores, slots = self._exact(rows, count, allowed)
            return [
                [
                    self._hit(slot, score)
                    for slot, score in zip(row_slots, row_scores, strict=True)
                    if slot >= 0 and score >= least
                ]
                for row_slots, row_scores in zip(slots.tolist(), scores.tolist(), strict=True)
            ]

    def range_search(self, query: Tensor | Sequence[float], threshold: float) -> list[Hit]:
        """Every chunk that scores at least ``threshold``, best first, ties to the older; exact with any index."""
        rows = self._embeddings("query", _arguments.row("query", query, self.d_model), 1)
        least = _arguments.number("threshold", threshold)
        with self._lock.read(), torch.no_grad():
            if self._ring.size == 0:
                return []
            found = self._exact(self._as_scored(rows), self._ring.size, self._allowed(None), least)
            scores, slots = (part[0].tolist() for part in found)
            return [self._hit(slot, score) for slot, score in zip(slots, scores, strict=True) if slot >= 0]

    def _as_scored(self, rows: Tensor) -> Tensor:
        """Queries as the rows are compared with: under ``"learned"``, times the matrix."""
        if self._score_matrix is None:
            return rows
        return (rows.float() @ self._score_matrix.to(rows.device)).to(rows.dtype)

    def _exact(
        self, rows: Tensor, top_k: int, allowed: Tensor | None, threshold: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and slots; the older run first, so that a stable merge keeps ties to the older chunk."""
        runs = self._ring.runs()
        if top_k > MAX_TOP_K:
            # More than one search of the operator returns: in blocks of which it returns every row.
            runs = [
                slice(start, min(start + MAX_TOP_K, run.stop))
                for run in runs
                for start in range(run.start, run.stop, MAX_TOP_K)
            ]
        limit = min(top_k, MAX_TOP_K)
        parts = [self._search_slots(rows, run, limit, allowed, threshold) for run in runs]
        if len(parts) == 1:
            return parts[0]
        scores, slots = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        best, order = torch.sort(scores, dim=1, descending=True, stable=True)
        return best[:, :top_k], slots.gather(1, order[:, :top_k])

    def _search_slots(
        self, rows: Tensor, run: slice, top_k: int, allowed: Tensor | None, threshold: float | None
    ) -> tuple[Tensor, Tensor]:
        result = cosine_topk(
            rows,
            self._ring.embeddings[run],
            top_k,
            valid=None if allowed is None else allowed[run],
            inverse_norms=None if self.retrieval_method == "dot" else self._ring.inverse_norms[run],
            normalized=self.retrieval_method == "dot",
            min_score=threshold,
        )
        return result.scores, torch.where(result.indices < 0, -1, result.indices + run.start)

    def _allowed(self, keep: Callable[[dict[str, Any]], bool] | None) -> Tensor | None:
        """(capacity,) bool of the slots that may be found; None when all of the window may."""
        if keep is None:
            return self._ring.live if self._ring.holes else None
        chosen = [slot for slot in self._ring.rows() if keep(dict(self._ring.metadata[slot] or {}))]
        mask = torch.zeros(self._ring.capacity, dtype=torch.bool, device=self.device)
        mask[torch.tensor(chosen, dtype=torch.int64, device=self.device)] = True
        return mask

    # Reading

    def get(self, id: int) -> Chunk:
        """The chunk with this id; KeyError when it is unknown, deleted or evicted."""
        with self._lock.read():
            return self._chunk(self._slot(id))

    def __len__(self) -> int:
        return self._ring.size

    def __contains__(self, id: object) -> bool:
        try:
            self._slot(id)
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks, oldest first, as they are when the iteration starts."""
        with self._lock.read():
            return iter([self._chunk(slot) for slot in self._ring.rows()])

    @property
    def size(self) -> int:
        return self._ring.size

    @property
    def ids(self) -> list[int]:
        """Ids, oldest first; :attr:`chunks` and its siblings have the same order."""
        with self._lock.read():
            return [self._ring.ids[slot] for slot in self._ring.rows()]

    @property
    def chunks(self) -> list[str]:
        with self._lock.read():
            return [self._ring.texts[slot] for slot in self._ring.rows()]

    @property
    def token_ids(self) -> list[list[int] | None]:
        with self._lock.read():
            return [self._ring.token_ids[slot] for slot in self._ring.rows()]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        with self._lock.read():
            return [dict(self._ring.metadata[slot] or {}) for slot in self._ring.rows()]

    @property
    def embeddings(self) -> Tensor:
        """(size, d_model) copy, oldest first."""
        with self._lock.read():
            return self._ring.embeddings[torch.tensor(list(self._ring.rows()), dtype=torch.int64, device=self.device)]

    @property
    def version(self) -> int:
        """Grows with every change; a cache of search results is good as long as it stands still."""
        return self._version

    @property
    def score_matrix(self) -> Tensor | None:
        """(d_model, d_model) of ``retrieval_method="learned"``: queries are multiplied by it; None otherwise."""
        return self._score_matrix

    @score_matrix.setter
    def score_matrix(self, matrix: Tensor) -> None:
        if self.retrieval_method != "learned":
            raise ValueError(f"score_matrix: only retrieval_method='learned' has one, not {self.retrieval_method!r}")
        if matrix.shape != (self.d_model, self.d_model):
            raise ValueError(f"score_matrix: expected ({self.d_model}, {self.d_model}), got {list(matrix.shape)}")
        with self._lock.write():
            self._score_matrix = matrix.detach().float().cpu().clone()
            self._version += 1

    def stats(self) -> dict[str, Any]:
        """Counts, settings and bytes of the embeddings."""
        with self._lock.read():
            return {
                "size": self._ring.size,
                "max_chunks": self.max_chunks,
                "d_model": self.d_model,
                "dtype": str(self.dtype).removeprefix("torch."),
                "retrieval_method": self.retrieval_method,
                "index": self.index,
                "eviction": self.eviction,
                "added": self._added,
                "evicted": self._evicted,
                "deleted": self._deleted,
                "embedding_bytes": self._ring.size * self.d_model * self.dtype.itemsize,
            }

    # Saving and exchanging

    def save(self, folder: str | Path) -> None:
        """Write the store into ``folder``, atomically: a crash at any moment leaves the previous save readable."""
        with self._lock.read():
            order = list(self._ring.rows())
            persistence.save(
                Path(folder),
                settings=self._settings(),
                tensors={
                    "embeddings": self._ring.embeddings[torch.tensor(order, dtype=torch.int64, device=self.device)],
                    "inverse_norms": self._ring.inverse_norms[
                        torch.tensor(order, dtype=torch.int64, device=self.device)
                    ],
                    "used_ids": torch.tensor(self._used.intervals, dtype=torch.int64, device="cpu").reshape(-1, 2),
                }
                | ({} if self._score_matrix is None else {"score_matrix": self._score_matrix}),
                records=(
                    {
                        "id": self._ring.ids[slot],
                        "text": self._ring.texts[slot],
                        "token_ids": self._ring.token_ids[slot],
                        "metadata": self._ring.metadata[slot],
                    }
                    for slot in order
                ),
            )

    @classmethod
    def load(cls, folder: str | Path, mmap: bool = False, *, device: str | torch.device = "cpu") -> MemoryStore:
        """Read a saved store; with ``mmap`` the embeddings stay on disk until they are touched.

        Raises:
            FileNotFoundError: no store there. ValueError: a damaged or newer file, named.
        """
        # Tensors of inference mode, in which a caller may be, could not be written to outside of it.
        with torch.inference_mode(False):
            return cls._load(Path(folder), mmap, device)

    @classmethod
    def _load(cls, folder: Path, mmap: bool, device: str | torch.device) -> MemoryStore:
        settings, tensors, records = persistence.load(folder, mmap=mmap)
        try:
            counters = settings.pop("counters")
            added, evicted, deleted = counters["added"], counters["evicted"], counters["deleted"]
            store = cls(**settings | {"dtype": getattr(torch, settings["dtype"])}, device=device)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / persistence.MANIFEST}: damaged: {error!r}") from error
        store._ring.adopt(tensors["embeddings"].to(store.device), tensors["inverse_norms"].to(store.device))
        for slot, record in enumerate(records):
            store._ring.describe(slot, record["id"], record["text"], record["token_ids"], record["metadata"])
        store._used = UsedIds([(start, end) for start, end in tensors["used_ids"].tolist()])
        store._added, store._evicted, store._deleted = added, evicted, deleted
        if "score_matrix" in tensors:
            store._score_matrix = tensors["score_matrix"].clone()
        return store

    def _settings(self) -> dict[str, Any]:
        return {
            "d_model": self.d_model,
            "max_chunks": self.max_chunks,
            "dtype": str(self.dtype).removeprefix("torch."),
            "retrieval_method": self.retrieval_method,
            "index": self.index,
            "eviction": self.eviction,
            "counters": {"added": self._added, "evicted": self._evicted, "deleted": self._deleted},
        }

    def to_numpy(self) -> tuple[Any, Any]:
        """(ids (n,) int64, embeddings (n, d_model) float32) as NumPy arrays, oldest first."""
        with self._lock.read():
            return torch.tensor(
                self.ids, dtype=torch.int64, device="cpu"
            ).numpy(), self.embeddings.float().cpu().numpy()

    @classmethod
    def from_numpy(
        cls,
        embeddings: Any,
        chunks: Sequence[str] | None = None,
        metas: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        ids: Sequence[int] | None = None,
        **settings: Any,
    ) -> MemoryStore:
        """A store of (n, d_model) NumPy rows; texts are empty without ``chunks``; ``settings``: the constructor's."""
        rows = _arguments.numbers("embeddings", embeddings)
        if rows.dim() != 2:
            raise ValueError(f"embeddings: expected shape (n, d_model), got {list(rows.shape)}")
        settings.setdefault("max_chunks", max(10000, rows.shape[0]))
        store = cls(rows.shape[1], **settings)
        store.add_batch(chunks or [""] * rows.shape[0], rows, metas, ids=ids)
        return store

    def to_faiss(self) -> Any:
        """A FAISS flat inner-product index with this store's ids; cosine stores export unit rows."""
        from memkern.store.faiss_index import export

        ids, rows = self.to_numpy()
        return export(ids, rows, unit=self.retrieval_method != "dot")

    @classmethod
    def from_faiss(
        cls, index: Any, chunks: Sequence[str] | None = None, metas: Sequence[Any] | None = None, **settings: Any
    ) -> MemoryStore:
        """A store of the vectors (and ids, where it has an id map) that a FAISS index can reconstruct."""
        from memkern.store.faiss_index import contents

        ids, rows = contents(index)
        return cls.from_numpy(rows, chunks, metas, ids=ids, **settings)

    # Details

    def _slot(self, id: Any) -> int:
        try:
            return self._ring.slot_of[operator.index(id)]
        except (KeyError, TypeError):
            raise KeyError(f"no chunk has id {id!r}: it is unknown, deleted or evicted") from None

    def _chunk(self, slot: int) -> Chunk:
        ring = self._ring
        tokens = ring.token_ids[slot]
        return Chunk(
            ring.ids[slot],
            ring.texts[slot],
            None if tokens is None else list(tokens),
            ring.embeddings[slot].clone(),
            dict(ring.metadata[slot] or {}),
        )

    def _hit(self, slot: int, score: float) -> Hit:
        ring = self._ring
        tokens = ring.token_ids[slot]
        return Hit(
            ring.ids[slot],
            ring.texts[slot],
            None if tokens is None else list(tokens),
            score,
            dict(ring.metadata[slot] or {}),
        )

    def _norms(self, rows: Tensor) -> Tensor:
        return inverse_norms(rows)

    def _embeddings(self, name: str, value: Any, count: int | None) -> Tensor:
        """(n, d_model) rows in the store's dtype on its device, NaN and infinity refused."""
        return _arguments.rows(name, value, count, self.d_model, self.dtype, self.device)

    def _new_ids(self, ids: Sequence[int] | None, count: int) -> list[int]:
        if ids is None:
            return list(range(self._used.next, self._used.next + count))
        given = [_arguments.new_id(id) for id in aligned("ids", ids, count)]
        seen: set[int] = set()
        for id in given:
            if id in seen or id in self._used:
                raise ValueError(f"ids: {id} was used before; ids are never reused")
            seen.add(id)
        return given

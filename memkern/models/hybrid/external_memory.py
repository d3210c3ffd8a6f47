"""The external memory: chunks of attention states by layer, searched exactly per head, documents kept apart."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from memkern.ops import cosine_topk

if TYPE_CHECKING:
    from memkern.models.hybrid.configuration_hybrid import HybridTransformerConfig
    from memkern.models.hybrid.faiss_search import FaissHeads

NO_DOCUMENT = -1
FORMAT_VERSION = 1
BANK_FILE, TENSOR_FILE = "external_memory.json", "external_memory.safetensors"


class ExternalMemoryBank:
    """A ring of chunks; each holds, for every retrieving layer, the attention states of its tokens as keys and values.

    A chunk's index vector is the mean of its keys, head by head. A search scores all of them by cosine, exactly, or
    asks FAISS (``config.external_index``), which runs on the host. A position with a document id finds only chunks of
    that document; without ids the whole bank is one document.

    Args:
        config: sizes.
        model: what turns texts into states, for :meth:`add`; the model sets itself.
        tokenizer: what turns texts into tokens, for :meth:`add`.
        embedding_layer_path: of earlier files; without effect: texts are stored as the model's own states.
    """

    def __init__(
        self,
        config: HybridTransformerConfig,
        model: Any = None,
        tokenizer: Any = None,
        embedding_layer_path: str | None = None,
    ) -> None:
        inner = config.text_config.get_text_config()
        self.heads = inner.num_attention_heads
        if inner.hidden_size % self.heads:
            self.heads = 1
        self.head_dim = inner.hidden_size // self.heads
        self.layers = config.get_retrieval_layers()
        self.chunk_size = config.chunk_size
        self.max_chunks = config.external_memory_size // config.chunk_size
        self.chunks_per_query = max(1, config.retrieval_k // config.chunk_size)
        self.drops_remainder = config.seq_adapt_method == "truncate"
        self.backend = config.memory_backend
        self.index = config.external_index
        self._faiss: dict[int, FaissHeads] = {}
        if self.index != "exact":
            from memkern.models.hybrid.faiss_search import FaissHeads

            self._faiss = {layer: FaissHeads(self.index, self.head_dim) for layer in self.layers}
        self.tokenizer = tokenizer
        self._model = [model]  # in a list, so that it is no submodule of anything
        self._threshold = config.retrieval_threshold
        self.epoch = 0  # grows when a slot changes hands: ids that were kept elsewhere are then void
        self._empty()

    def _empty(self) -> None:
        self._states: Tensor | None = None  # (layers, H, slots, chunk, hd)
        self._index: Tensor | None = None  # (layers, H, slots, hd)
        self._sizes: list[int] = []  # tokens that each slot's chunk offers, 0 once hidden: what the host knows
        self._lengths = torch.zeros(0, dtype=torch.int64)  # tokens of each slot's chunk
        self._documents = torch.zeros(0, dtype=torch.int64)
        self._live = torch.zeros(0, dtype=torch.bool)
        self._next, self._used = 0, 0
        self._holes = False
        self._entries: dict[Any, dict[str, Any]] = {}
        self._owners: dict[int, Any] = {}

    # Threshold

    def set_threshold(self, threshold: float) -> None:
        """Gates at or below it are closed at inference; clamped to [0, 1]."""
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold != threshold:
            raise ValueError(f"threshold: expected a number, got {threshold!r}")
        self._threshold = min(1.0, max(0.0, float(threshold)))

    def get_threshold(self) -> float:
        return self._threshold

    # Writing

    def write(self, states: Tensor, document: int | None = None) -> list[int]:
        """Store one text's attention states as chunks; returns their slots. Texts longer than the bank keep their end.

        Args:
            states: (layers, T, D), one plane for each retrieving layer, no padding.
            document: an id for the text, None for none.
        """
        if states.dim() != 3 or states.shape[0] != len(self.layers):
            raise ValueError(f"states: expected ({len(self.layers)}, T, D), got {list(states.shape)}")
        if self.drops_remainder:
            states = states[:, : states.shape[1] // self.chunk_size * self.chunk_size]
        length = states.shape[1]
        count = -(-length // self.chunk_size)
        padded = torch.nn.functional.pad(states.detach(), (0, 0, 0, count * self.chunk_size - length))
        chunks = padded.view(len(self.layers), count, self.chunk_size, self.heads, self.head_dim)
        chunks = chunks.permute(0, 3, 1, 2, 4)[:, :, max(0, count - self.max_chunks) :]
        lengths = [min(self.chunk_size, length - i * self.chunk_size) for i in range(count)][-self.max_chunks :]
        slots = self._take(chunks.shape[2], states)
        if not slots:
            return []
        where = torch.tensor(slots, device=states.device)
        sizes = torch.tensor(lengths, device=states.device)
        assert self._states is not None
        assert self._index is not None
        self._states[:, :, where] = chunks.to(self._states.dtype)
        mean = chunks.float().sum(3) / sizes[None, None, :, None]
        self._index[:, :, where] = mean.to(self._index.dtype)
        self._lengths[where], self._live[where] = sizes, True
        self._documents[where] = NO_DOCUMENT if document is None else document
        self._sizes += [0] * (self._used - len(self._sizes))
        for slot, size in zip(slots, lengths, strict=True):
            self._sizes[slot] = size
        return slots

    def _take(self, count: int, like: Tensor) -> list[int]:
        """Slots for ``count`` chunks, the oldest once the ring is full."""
        slots = [(self._next + i) % self.max_chunks for i in range(count)]
        if not slots:
            return []
        self._next = (slots[-1] + 1) % self.max_chunks
        highest = max(slots) + 1
        if self._states is None or highest > self._lengths.numel():
            self._grow(min(self.max_chunks, max(64, 2 * highest)), like)
        if any(slot < self._used for slot in slots):
            self.epoch += 1
            for slot in slots:
                self._disown(slot)
        self._used = max(self._used, highest)
        return slots

    def _grow(self, slots: int, like: Tensor) -> None:
        old_states, old_index, used = self._states, self._index, self._used
        shape = (len(self.layers), self.heads, slots)
        self._states = like.new_zeros(*shape, self.chunk_size, self.head_dim)
        self._index = like.new_zeros(*shape, self.head_dim)
        if old_states is not None and old_index is not None:
            self._states[:, :, :used] = old_states[:, :, :used]
            self._index[:, :, :used] = old_index[:, :, :used]
        for name in ("_lengths", "_documents", "_live"):
            old = getattr(self, name)
            fresh = torch.zeros(slots, dtype=old.dtype, device=like.device)
            fresh[:used] = old[:used]
            setattr(self, name, fresh)

    def _disown(self, slot: int) -> None:
        owner = self._owners.pop(slot, None)
        if owner in self._entries:
            self._entries[owner]["slots"].remove(slot)

    # Searching

    def search(self, layer: int, queries: Tensor, documents: Tensor | None) -> Tensor:
        """The best chunks' slots for each head of each query: (Q, D) -> (H, Q, n) int64, -1 where there are fewer.

        Args:
            layer: index of a layer that retrieves.
            queries: (Q, D) attention outputs.
            documents: (Q,) int64 ids, or None for the whole bank.
        """
        self.to(queries.device)
        assert self._index is not None
        rows = queries.detach().view(-1, self.heads, self.head_dim).transpose(0, 1)
        database = self._index[self.layers.index(layer), :, : self._used]
        live = self._live[: self._used]
        owned = self._documents[: self._used]
        # Named in a profile on every backend, the reference too, which has no operator of its own.
        with torch.profiler.record_function("memkern::cosine_topk"):
            if layer in self._faiss:
                return self._faiss[layer].search(
                    database,
                    self.epoch,
                    rows,
                    self.chunks_per_query,
                    live if self._holes else None,
                    None if documents is None else (documents, owned),
                )
            found = cosine_topk(
                rows.to(database.dtype),
                database,
                self.chunks_per_query,
                valid=live.expand(self.heads, -1) if self._holes else None,
                query_group=None if documents is None else documents.expand(self.heads, -1),
                row_group=None if documents is None else owned.expand(self.heads, -1),
                backend=self.backend,
            )
        return found.indices

    def to(self, device: torch.device) -> None:
        """Move the bank, if it is elsewhere."""
        for name in ("_states", "_index", "_lengths", "_documents", "_live"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != device:
                setattr(self, name, tensor.to(device))

    def keys(self, layer: int) -> Tensor:
        """(1, H, slots * chunk, hd): keys, and values, of a layer, for the slots that :meth:`tokens` names."""
        assert self._states is not None
        plane = self._states[self.layers.index(layer), :, : self._used]
        return plane.reshape(1, self.heads, self._used * self.chunk_size, self.head_dim)

    def tokens(self, slots: Tensor) -> Tensor:
        """(..., n) slots to (..., n * chunk) places in :meth:`keys`, -1 for an absent chunk or token."""
        offsets = torch.arange(self.chunk_size, device=slots.device)
        lengths = self._lengths[: self._used][slots.clamp(min=0)]
        there = (slots[..., None] >= 0) & (offsets < lengths[..., None])
        return torch.where(there, slots[..., None] * self.chunk_size + offsets, -1).flatten(-2)

    # Entries

    def add(self, entries: Sequence[str | Mapping[str, Any]] | str) -> list[Any]:
        """Embed and store texts, each a string or ``{"inp_txt", "id"?, "type"?, "document_id"?}``; returns their ids.

        Raises:
            ValueError: no tokenizer, or an id that is there already.
        """
        listed: list[Any] = [entries] if isinstance(entries, str | Mapping) else list(entries)
        checked: dict[Any, dict[str, Any]] = {}
        for entry in listed:
            values: dict[str, Any] = {"inp_txt": entry} if isinstance(entry, str) else dict(entry)
            if not isinstance(values.get("inp_txt"), str):
                raise ValueError(f"entries: expected a text or a mapping with the text 'inp_txt', got {entry!r}")
            id = values.get("id")
            id = str(uuid.uuid4()) if id is None else id
            if id in self._entries or id in checked:
                raise ValueError(f"id: {id!r} is there already; update it")
            checked[id] = values
        for id, values in checked.items():
            slots = self._write_text(values["inp_txt"], values.get("document_id"))
            self._entries[id] = {**values, "id": id, "slots": slots, "deleted": False}
            self._owners |= dict.fromkeys(slots, id)
        return list(checked)

    def _write_text(self, text: str, document: int | None) -> list[int]:
        model = self._model[0]
        if model is None or self.tokenizer is None:
            raise ValueError("tokenizer: texts need a model with a tokenizer; write_external_memory takes token ids")
        ids = torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.int64)
        if ids.numel() == 0:
            return []
        documents = None if document is None else torch.tensor([document], device=model.device)
        slots: list[list[int]] = model.write_external_memory(ids.to(model.device), document_ids=documents)
        return slots[0]

    def get(self, id: Any) -> dict[str, Any]:
        """The entry with this id; KeyError when it is unknown or deleted."""
        entry = self._entries.get(id)
        if entry is None or entry["deleted"]:
            raise KeyError(f"no entry has id {id!r}: it is unknown or deleted")
        return {name: value for name, value in entry.items() if name != "slots"}

    def update(self, id: Any, text: str) -> None:
        """Replace the text of an entry; its chunks are written anew."""
        entry = self._entries.get(id)
        if entry is None:
            raise KeyError(f"no entry has id {id!r}")
        slots = self._write_text(text, entry.get("document_id"))
        self._hide(entry["slots"])
        self._entries[id] = {**entry, "inp_txt": text, "slots": slots, "deleted": False}
        self._owners |= dict.fromkeys(slots, id)

    def delete(self, id: Any, soft: bool = True) -> None:
        """Take an entry out of every search; ``soft`` keeps its record, marked as deleted."""
        entry = self._entries.get(id)
        if entry is None:
            raise KeyError(f"no entry has id {id!r}")
        self._hide(entry["slots"])
        if soft:
            entry["deleted"], entry["slots"] = True, []
        else:
            del self._entries[id]

    def _hide(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._live[slot] = False
            self._sizes[slot] = 0
            self._owners.pop(slot, None)
        if slots:
            self._holes = True
            self.epoch += 1

    def clear(self) -> None:
        """Forget every chunk and entry."""
        self._empty()
        self.epoch += 1

    reset = clear

    def is_ready(self) -> bool:
        """Whether anything can be found."""
        return self._used > 0

    def __len__(self) -> int:
        """Chunks that a search may find."""
        return sum(size > 0 for size in self._sizes)

    def get_size(self) -> int:
        """Tokens that a search may find."""
        return sum(self._sizes)

    def get_stats(self) -> dict[str, Any]:
        return {
            "chunks": len(self),
            "tokens": self.get_size(),
            "max_chunks": self.max_chunks,
            "entries": sum(not entry["deleted"] for entry in self._entries.values()),
            "threshold": self._threshold,
            "layers": list(self.layers),
        }

    # Saving

    def save(self, folder: str | Path) -> None:
        """Write the bank into ``folder`` as JSON and safetensors."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {
            "lengths": self._lengths[: self._used].contiguous(),
            "documents": self._documents[: self._used].contiguous(),
            "live": self._live[: self._used].contiguous(),
        }
        if self._states is not None and self._index is not None:
            tensors["states"] = self._states[:, :, : self._used].contiguous()
            tensors["index"] = self._index[:, :, : self._used].contiguous()
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, str(path / TENSOR_FILE))
        (path / BANK_FILE).write_text(
            json.dumps(
                {
                    "version": FORMAT_VERSION,
                    "heads": self.heads,
                    "head_dim": self.head_dim,
                    "layers": self.layers,
                    "chunk_size": self.chunk_size,
                    "next": self._next,
                    "used": self._used,
                    "threshold": self._threshold,
                    "entries": list(self._entries.values()),
                },
                indent=1,
            )
            + "\n"
        )

    def load(self, folder: str | Path, device: torch.device | str | None = None) -> None:
        """Read what :meth:`save` wrote into this bank.

        Raises:
            FileNotFoundError: no bank there. ValueError: a damaged or newer file, or one of other sizes. The bank is
                then as it was.
        """
        path = Path(folder)
        try:
            saved = json.loads((path / BANK_FILE).read_text())
        except ValueError as error:
            raise ValueError(f"{path / BANK_FILE}: damaged: {error}") from error
        if saved["version"] > FORMAT_VERSION:
            raise ValueError(f"{path / BANK_FILE}: version {saved['version']} is newer than {FORMAT_VERSION}")
        for name in ("heads", "head_dim", "layers", "chunk_size"):
            if saved[name] != getattr(self, name):
                raise ValueError(f"{path / BANK_FILE}: {name} is {saved[name]}, expected {getattr(self, name)}")
        if saved["used"] > self.max_chunks:
            raise ValueError(f"{path / BANK_FILE}: {saved['used']} chunks, the bank holds {self.max_chunks}")
        try:
            tensors = load_file(str(path / TENSOR_FILE), device=str(device or "cpu"))
        except SafetensorError as error:
            raise ValueError(f"{path / TENSOR_FILE}: damaged: {error}") from error
        self._empty()
        self._states, self._index = tensors.get("states"), tensors.get("index")
        self._lengths, self._documents, self._live = tensors["lengths"], tensors["documents"], tensors["live"]
        self._next, self._used = saved["next"] % self.max_chunks, saved["used"]
        self._sizes = (self._lengths * self._live).tolist()
        self._holes = not bool(self._live.all())
        self._threshold = saved["threshold"]
        self._entries = {entry["id"]: entry for entry in saved["entries"]}
        self._owners = {slot: entry["id"] for entry in saved["entries"] for slot in entry["slots"]}
        self.epoch += 1

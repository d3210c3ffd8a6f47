"""The loss of a batch of documents: one softmax over a whole document, or one over each segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memkern.ops.retrieval import span_loss

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "cls_index")


def stack_steps(steps: Sequence[Mapping[str, Any]], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The time steps of :class:`memkern.data.TimeStepMajorDataLoader` as whole documents.

    Returns:
        the tensors (B, N, L) and (B, N), ``document_mask`` (B, N), and ``answerable`` (B, N, L), True on passage
        tokens and on ``cls_index``.
    """
    names = [name for name, value in steps[0].items() if isinstance(value, Tensor)]
    batch = {name: torch.stack([step[name] for step in steps], 1) for name in names}
    offsets = torch.tensor([step["offset_mapping"] for step in steps], dtype=torch.int64).transpose(0, 1)
    answerable = offsets[..., 1] > offsets[..., 0]
    answerable.scatter_(2, batch["cls_index"][..., None], True)
    batch["answerable"] = answerable & batch["document_mask"][..., None]
    return {name: value.to(device) for name, value in batch.items()}


def document_span_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    batch: Mapping[str, Tensor],
    *,
    whole_documents: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Marginal span loss over documents.

    With ``whole_documents`` one softmax runs over the answerable tokens of all of a document's segments; positive is
    the answer in every window that holds it whole, and for a document without an answer in sight the CLS token of
    every segment, whose joint mass is the one null score. Otherwise each segment is a document of its own.

    Args:
        start_logits, end_logits: (B, N, L).
        batch: of :func:`stack_steps`, with ``start_positions``, ``end_positions``, ``cls_index`` (B, N).
        backend: see :mod:`memkern.backends`.

    Returns:
        () mean over documents (segments).
    """
    shape = start_logits.shape
    rows, segments, length = shape
    cls = batch["cls_index"]
    held = (batch["start_positions"] != cls) & batch["document_mask"]
    if whole_documents:
        answered = held.any(1, keepdim=True).expand_as(held)
        member = torch.arange(rows, device=cls.device)[:, None].expand(rows, segments)
    else:
        answered = held
        member = torch.arange(rows * segments, device=cls.device).view(rows, segments)
    # In a document with an answer the windows without it have no positive; without one all have their CLS token.
    counts = held | ~answered
    places = torch.arange(length, device=cls.device)
    positives = [
        (places == torch.where(held, batch[name], cls)[..., None]) & counts[..., None]
        for name in ("start_positions", "end_positions")
    ]
    flat = (rows * segments, length)
    return span_loss(
        start_logits.reshape(flat),
        end_logits.reshape(flat),
        positives[0].reshape(flat),
        positives[1].reshape(flat),
        batch["answerable"].reshape(flat),
        torch.where(batch["document_mask"], member, -1).reshape(-1),
        backend=backend,
    )


class DocumentLoss(nn.Module):
    """A model and its loss over whole documents as one module: what accelerate wraps for several processes.

    ``forward`` takes the batch of :func:`stack_steps` and gives the () loss, span loss plus weighted auxiliary losses;
    :attr:`parts` then has both without graph.
    """

    def __init__(self, model: nn.Module, backend: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.backend = backend
        self.parts: dict[str, Tensor] = {}

    def forward(self, batch: Mapping[str, Tensor], whole_documents: bool = True) -> Tensor:
        inputs = {name: batch[name] for name in MODEL_INPUTS}
        output = self.model(**inputs, document_mask=batch["document_mask"])
        span = document_span_loss(
            output.start_logits, output.end_logits, batch, whole_documents=whole_documents, backend=self.backend
        )
        self.parts = {"span_loss": span.detach()}
        for name in ("load_balance_loss", "entropy_loss"):
            if output[name] is not None:
                self.parts[name] = output[name].detach()
        auxiliary: Any = self.model.auxiliary_loss(output)  # type: ignore[operator]
        return span + auxiliary

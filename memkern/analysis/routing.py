"""How a GMM model uses its experts: activations, entropy, balance, likeness, clusters; a report and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memkern.analysis.figures import as_array, new_figure, save_figure

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "document_mask", "cls_index")


def ward_linkage(points: np.ndarray[Any, Any]) -> list[list[float]]:
    """Hierarchical clustering of (n, d) points by Ward's criterion (1963), in SciPy's form.

    Returns:
        n - 1 rows [cluster, cluster, distance, size]; the cluster made by row i has number n + i.
    """
    count = len(points)
    size = dict.fromkeys(range(count), 1)
    distance = {(i, j): float(np.linalg.norm(points[i] - points[j])) for i in range(count) for j in range(i + 1, count)}
    rows: list[list[float]] = []
    for new in range(count, 2 * count - 1):
        (a, b), least = min(distance.items(), key=lambda item: (item[1], item[0]))
        rows.append([float(a), float(b), least, float(size[a] + size[b])])
        for c in size.keys() - {a, b}:
            to_a, to_b = distance[min(a, c), max(a, c)], distance[min(b, c), max(b, c)]
            total = size[a] + size[b] + size[c]
            squared = (size[a] + size[c]) * to_a**2 + (size[b] + size[c]) * to_b**2 - size[c] * least**2
            distance[c, new] = max(squared / total, 0.0) ** 0.5
        distance = {pair: value for pair, value in distance.items() if a not in pair and b not in pair}
        size[new] = size.pop(a) + size.pop(b)
    return rows


class GMMAnalyzer:
    """Runs documents through a GMM model and keeps how each segment was routed.

    Args:
        model: a ``GMMXLNetForQA``, or anything that answers ``return_routing_info=True`` and ``get_memory_state()``.
        device: where to run; None leaves the model where it is.
    """

    def __init__(self, model: Any, device: str | torch.device | None = None) -> None:
        self.model = model if device is None else model.to(device)
        self.routing: list[Tensor] = []  # (rows, k) for each segment step

    @torch.no_grad()
    def track_routing(self, loader: Iterable[list[Mapping[str, Any]]], max_segments: int | None = None) -> Tensor:
        """Route every document of a time-step-major loader, at most ``max_segments`` steps of each batch.

        Returns:
            (rows, k): the routing probabilities of every segment so far, padding rows left out.
        """
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        try:
            for document in loader:
                state = None
                for step in document[:max_segments]:
                    inputs = {name: step[name].to(device) for name in _INPUTS if name in step}
                    output = self.model(**inputs, memory_state=state, return_routing_info=True)
                    state = output["new_memory_state"]
                    probs = output["routing_info"]["routing_probs"].float().cpu()
                    mask = step.get("document_mask")
                    self.routing.append(probs if mask is None else probs[mask.cpu()])
        finally:
            self.model.train(was_training)
        return self.probs

    @property
    def probs(self) -> Tensor:
        """(rows, k) of everything tracked.

        Raises:
            ValueError: nothing was tracked.
        """
        if not self.routing:
            raise ValueError("routing: nothing was tracked; call track_routing first")
        return torch.cat(self.routing)

    def expert_activations(self) -> Tensor:
        """(k,): the mean probability of each expert."""
        return self.probs.mean(0)

    def routing_entropy(self) -> float:
        """Mean entropy of the rows, natural logarithm."""
        probs = self.probs
        return float(-torch.special.xlogy(probs, probs).sum(1).mean())

    def utilisation_entropy(self) -> float:
        """Entropy of the mean activations: ln k when all experts are used alike."""
        mean = self.expert_activations()
        return float(-torch.special.xlogy(mean, mean).sum())

    def utilisation_balance(self) -> float:
        """1 / (1 + std / mean) over the experts' activations: 1 when they are equal."""
        activations = self.expert_activations().double()
        return float(1 / (1 + activations.std() / (activations.mean() + 1e-10)))

    def expert_similarity(self, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """(k, k) cosines between the experts' mean slots, of the model's memory or of ``state``'s first row."""
        vectors = torch.nn.functional.normalize(self._expert_vectors(state), dim=1)
        return vectors @ vectors.t()

    def expert_diversity(self, state: Mapping[str, Tensor] | None = None) -> float:
        """1 - the mean cosine between different experts, in [0, 1]."""
        similarity = self.expert_similarity(state)
        count = len(similarity)
        off = (similarity.sum() - similarity.diagonal().sum()) / (count * (count - 1))
        return float((1 - off).clamp(0, 1))

    def expert_clusters(self, state: Mapping[str, Tensor] | None = None) -> list[list[float]]:
        """Ward's linkage of the experts' mean slots; see :func:`ward_linkage`."""
        return ward_linkage(self._expert_vectors(state).numpy())

    def report(self, path: str | Path | None = None) -> dict[str, Any]:
        """Everything as plain numbers, written to ``path`` as JSON where one is given."""
        content = {
            "rows": len(self.probs),
            "expert_activations": self.expert_activations().tolist(),
            "routing_entropy": self.routing_entropy(),
            "utilisation_entropy": self.utilisation_entropy(),
            "utilisation_balance": self.utilisation_balance(),
            "expert_similarity": self.expert_similarity().tolist(),
            "expert_diversity": self.expert_diversity(),
            "expert_clusters": self.expert_clusters(),
        }
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
        return content

    def plot(self, path: str | Path) -> Path:
        """Activations and similarity of the experts as one plot file."""
        figure = new_figure((10, 4))
        left, right = figure.subplots(1, 2)
        activations = as_array("activations", self.expert_activations(), 1)
        left.bar(range(len(activations)), activations)
        left.set(xlabel="expert", ylabel="mean probability", ylim=(0, 1), title="activations")
        similarity = as_array("similarity", self.expert_similarity(), 2)
        figure.colorbar(right.imshow(similarity, vmin=-1, vmax=1, cmap="coolwarm"), ax=right)
        right.set(xlabel="expert", ylabel="expert", title="cosine of mean slots")
        return save_figure(figure, path)

    def _expert_vectors(self, state: Mapping[str, Tensor] | None) -> Tensor:
        """(k, D) float64: each expert's slots averaged."""
        memory = self.model.get_memory_state() if state is None else state
        names = [f"expert_{index}" for index in range(sum(name.startswith("expert_") for name in memory))]
        if not names:
            raise ValueError(f"state: expected expert_0, expert_1, ..., got {sorted(memory)}")
        experts = [memory[name].detach().double().cpu() for name in names]
        return torch.stack([(expert[0] if expert.dim() == 3 else expert).mean(0) for expert in experts])

"""Route real text: windows of the Python documentation to experts, with and without the load-balance loss.

Every CPython carries its language reference as ``pydoc_data.topics``. A small transformer encodes windows of it, a
router sends each window to one of K experts (top-1, as in Switch Transformers), and the expert's output helps to
predict the words of the window that follows. The two runs differ in the weight of the load-balance loss alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from memkern.ops import route_experts

VOCABULARY, WIDTH, EXPERTS, WINDOW = 2000, 64, 8, 32


@dataclass(frozen=True)
class RoutingRun:
    """What one training run ended with, on windows it was not trained on."""

    load_balance_weight: float
    shares: list[float]
    entropy: float
    loss: float
    steps: int
    seconds: float


class RoutedModel(nn.Module):
    """Encoder, router and K small experts over one window; predicts the words of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(WINDOW, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) / math.sqrt(WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) / math.sqrt(2 * WIDTH))
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S) token ids -> (B, V) logits of the next window's words, (B,) chosen expert, () load-balance loss."""
        hiddens = self.encoder(self.embedding(tokens) + self.positions)
        routing = route_experts(hiddens, self.router.weight, self.router.bias)
        share, expert = routing.probs.max(-1)
        pooled = hiddens.mean(1)
        inner = torch.relu(torch.einsum("bd,bde->be", pooled, self.up[expert]))
        pooled = pooled + share[:, None] * torch.einsum("be,bed->bd", inner, self.down[expert])
        return pooled @ self.embedding.weight.t(), expert, routing.load_balance_loss


def documentation_windows() -> tuple[Tensor, int]:
    """The Python documentation as (windows, WINDOW) byte-pair tokens in reading order, and its number of topics."""
    from pydoc_data.topics import topics

    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError("the routing demo needs tokenizers: pip install 'memkern[models]'") from error
    texts = [topics[name] for name in sorted(topics)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>"]))
    windows = [
        torch.tensor(ids[start : start + WINDOW])
        for ids in (encoding.ids for encoding in tokenizer.encode_batch(texts))
        for start in range(0, len(ids) - WINDOW + 1, WINDOW)
    ]
    return torch.stack(windows), len(texts)


def train(
    windows: Tensor,
    load_balance_weight: float,
    seconds: float,
    *,
    seed: int = 0,
    batch: int = 64,
    progress: Callable[[float, float], None] = lambda fraction, loss: None,
) -> RoutingRun:
    """Train a fresh model for this many seconds and measure which experts the held-out windows go to.

    Args:
        windows: (n, WINDOW) int64; every tenth pair of neighbours is held out.
        load_balance_weight: factor of the load-balance loss.
        seconds: wall time to train for.
        progress: called with the fraction of the time spent and the current loss.
    """
    torch.manual_seed(seed)
    model = RoutedModel()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    pairs = torch.arange(len(windows) - 1)
    held_out, kept = pairs[pairs % 10 == 0], pairs[pairs % 10 != 0]
    generator = torch.Generator().manual_seed(seed)
    start, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        chosen = kept[torch.randint(len(kept), (batch,), generator=generator)]
        logits, _, balance = model(windows[chosen])
        task = next_window_loss(logits, windows[chosen + 1])
        loss = task + load_balance_weight * balance
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
        progress(elapsed / seconds, task.item())
    model.eval()
    with torch.no_grad():
        logits, expert, _ = model(windows[held_out])
        shares = torch.bincount(expert, minlength=EXPERTS).double() / len(held_out)
        loss = next_window_loss(logits, windows[held_out + 1])
    entropy = -(shares * torch.log(shares.clamp(min=1e-12))).sum().item() / math.log(EXPERTS)
    return RoutingRun(load_balance_weight, shares.tolist(), entropy, loss.item(), steps, elapsed)


def next_window_loss(logits: Tensor, following: Tensor) -> Tensor:
    """Mean cross-entropy of the next window's tokens, each predicted from the same (B, V) logits."""
    return -torch.log_softmax(logits, -1).gather(1, following).mean()


def plot(runs: list[RoutingRun], path: Path) -> None:
    """Draw the share of windows that each expert got, a group of bars per run."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'memkern[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        places = [j + (i - (len(runs) - 1) / 2) * width for j in range(EXPERTS)]
        label = f"load-balance weight {run.load_balance_weight:g} (entropy {run.entropy:.2f} of 1)"
        axes.bar(places, run.shares, width, label=label)
    axes.axhline(1 / EXPERTS, color="black", linewidth=0.8, linestyle="--", label="even use")
    axes.set(xlabel="expert", ylabel="share of held-out windows", xticks=range(EXPERTS))
    axes.set_title("Expert utilisation on the Python documentation")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""How long a sequence a backbone can take at all."""

from __future__ import annotations

from typing import Any

from torch import nn


def position_limit(backbone: Any, length: int) -> int | None:
    """The most positions that a backbone has, if ``length`` passes them; None where it fits.

    Only a table of learned positions (GPT-2, OPT) is such a limit: rotary positions go on past the configured length.
    """
    limit: int | None = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or length <= limit:
        return None
    for name, module in backbone.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last):
            return limit
    return None

"""Tokenizers: memory tokens in one that is there, and an XLNet tokenizer trained locally where none is at hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

XLNET_SPECIALS = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")


def configure_memory_tokens(tokenizer: Any, mem_token_count: int) -> dict[str, list[int]]:
    """Add ``[MEM_READ_i]`` and ``[MEM_WRITE_i]`` to a tokenizer; its other special tokens stay.

    Args:
        tokenizer: of transformers; changed in place. Resize the model's embeddings to ``len(tokenizer)`` afterwards.
        mem_token_count: m, how many of each.

    Returns:
        {"mem_read_ids": m ids, "mem_write_ids": m ids}; the same ids when it is called again.

    Raises:
        ValueError: a negative count.
    """
    if isinstance(mem_token_count, bool) or not isinstance(mem_token_count, int) or mem_token_count < 0:
        raise ValueError(f"mem_token_count: expected an integer of at least 0, got {mem_token_count!r}")
    reads = [f"[MEM_READ_{i}]" for i in range(mem_token_count)]
    writes = [f"[MEM_WRITE_{i}]" for i in range(mem_token_count)]
    known = tokenizer.get_vocab()
    if any(token not in known for token in reads + writes):
        # The default replaces the list that is there: XLNet's <eop> and <eod> would stop being special.
        tokenizer.add_special_tokens({"additional_special_tokens": reads + writes}, replace_extra_special_tokens=False)
    return {
        "mem_read_ids": [int(tokenizer.convert_tokens_to_ids(token)) for token in reads],
        "mem_write_ids": [int(tokenizer.convert_tokens_to_ids(token)) for token in writes],
    }


def train_xlnet_tokenizer(texts: Iterable[str], vocab_size: int = 4000) -> Any:
    """An ``XLNetTokenizer`` (unigram pieces) trained on ``texts``, special tokens where the published ones stand.

    Args:
        texts: passages and questions; seconds for some hundred passages.
        vocab_size: pieces, special tokens included; fewer come out of little text.

    Returns:
        The tokenizer, the same for the same texts; ``save_pretrained`` and ``AutoTokenizer`` work on it.

    Raises:
        ImportError: transformers is not installed (extra ``memkern[models]``). ValueError: no text.
    """
    try:
        from tokenizers.trainers import UnigramTrainer
        from transformers import XLNetTokenizer
    except ImportError as error:
        raise ImportError("training a tokenizer needs transformers: install the extra memkern[models]") from error
    found = [text for text in texts if text.strip()]
    if not found:
        raise ValueError("texts: expected at least one text that is not blank, got none")
    fresh: Any = XLNetTokenizer()
    trainer: Any = UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(XLNET_SPECIALS), unk_token="<unk>", show_progress=False
    )
    fresh._tokenizer.train_from_iterator(found, trainer=trainer)
    scores = dict(json.loads(fresh._tokenizer.to_str())["model"]["vocab"])
    # The trainer's own order changes from run to run: the last digits of the scores with it, and the steps by which it
    # sets rare characters, the tail of the list, below one another.
    lowest = min(scores.values()) + 0.1
    learned = [(piece, round(max(score, lowest), 3)) for piece, score in scores.items() if piece not in XLNET_SPECIALS]
    learned.sort(key=lambda pair: (-pair[1], pair[0]))
    trained: Any = XLNetTokenizer(vocab=[*((name, 0.0) for name in XLNET_SPECIALS), *learned], unk_id=0)
    return trained
